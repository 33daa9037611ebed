"""KITTI's AP by hand: few objects, ignored neighbours, difficulties, DontCare, what the camera does not see."""

import numpy as np
import pytest
from eval_sample import CAR, TALL_PX, WALKER, boxes, detections, forward_camera, kitti_found, kitti_truth

from dm3d_deploy.errors import InternalError
from dm3d_deploy.evaluation.camera import boxes_from_camera, camera_from_boxes, image_boxes, projected_boxes
from dm3d_deploy.evaluation.curves import FlaggedFrame, precision_curve, score_thresholds
from dm3d_deploy.evaluation.kitti import found_in_view, kitti_rows
from dm3d_deploy.geometry.boxes import iou_3d_matrix, iou_bev_matrix, wrap_angle

ONE = [(10.0, 0.0, 0.0, *CAR, 0.0)]


def ap(rows, name, subset="easy", measure="3d R40"):
    (row,) = [r for r in rows if (r.class_name, r.subset, r.measure) == (name, subset, measure)]
    return row.ap_percent


def spread(count, spacing=6.0):
    return [(8.0 + spacing * (i % 8), -20.0 + spacing * (i // 8), 0.0, *CAR, 0.3 * i) for i in range(count)]


@pytest.mark.parametrize("count", [1, 3, 41, 60, 200])
def test_labels_as_detections_give_100(count: int) -> None:
    rows = spread(count)
    result = kitti_rows([kitti_truth(rows, ["Car"] * count)], [kitti_found(rows, ["Car"] * count, [1.0] * count)])
    cars = [row for row in result if row.class_name == "Car" and row.subset in ("easy", "moderate", "hard")]
    assert [row.ap_percent for row in cars] == [pytest.approx(100.0)] * 12
    assert [row.objects for row in cars] == [count] * 12
    assert all(row.ap_percent is None and row.objects == 0 for row in result if row.class_name != "Car")


def test_a_false_positive_above_all_hits_halves_precision_of_the_first_object() -> None:
    # Scores 0.9 (nothing there), 0.8 (hit): at the only threshold precision is 1/2 at every recall.
    found = kitti_found([*ONE, (40.0, 0.0, 0.0, *CAR, 0.0)], ["Car", "Car"], [0.8, 0.9])
    assert ap(kitti_rows([kitti_truth(ONE, ["Car"])], [found]), "Car") == pytest.approx(50.0)


def test_precision_falls_at_the_recall_of_the_second_object() -> None:
    # Two objects: hit at 0.9, nothing at 0.8, hit at 0.7. Precision 1 up to recall 0.75 (30 steps of 40, half way
    # between 1/2 and 1), then 2/3.
    rows = [*ONE, (30.0, 0.0, 0.0, *CAR, 0.0)]
    found = kitti_found([*rows, (50.0, 0.0, 0.0, *CAR, 0.0)], ["Car"] * 3, [0.9, 0.7, 0.8])
    result = kitti_rows([kitti_truth(rows, ["Car", "Car"])], [found])
    assert ap(result, "Car") == pytest.approx(100 * (30 + 10 * 2 / 3) / 40)
    assert ap(result, "Car", measure="3d R11") == pytest.approx(100 * (8 + 3 * 2 / 3) / 11)  # 0, .1, ... .7 and .8 on
    assert ap(result, "Car", "0-30 m") == 100.0
    assert ap(result, "Car", "30-50 m") == 100.0


@pytest.mark.parametrize(
    ("shift", "in_3d", "in_bev"),
    [
        ((0.7, 0, 0), 100.0, 100.0),  # IoU 3.3 / 4.7 = 0.702
        ((0.71, 0, 0), 0.0, 0.0),  # 3.29 / 4.71 = 0.6985
        ((0, 0, 0.26), 100.0, 100.0),  # height 1.24 of 1.76 = 0.7045
        ((0, 0, 0.27), 0.0, 100.0),  # 1.23 / 1.77 = 0.695
    ],
)
def test_a_car_hits_above_an_overlap_of_0_7(shift, in_3d: float, in_bev: float) -> None:
    moved = [(10 + shift[0], shift[1], shift[2], *CAR, 0.0)]
    result = kitti_rows([kitti_truth(ONE, ["Car"])], [kitti_found(moved, ["Car"], [0.5])])
    assert (ap(result, "Car"), ap(result, "Car", measure="bev R40")) == (in_3d, in_bev)


def test_a_walker_needs_half() -> None:
    person = [(10.0, 0.0, 0.0, *WALKER, 0.0)]
    for shift, expected in ((0.26, 100.0), (0.27, 0.0)):  # 0.54 / 1.06 = 0.509, 0.53 / 1.07 = 0.495
        found = kitti_found([(10.0 + shift, 0.0, 0.0, *WALKER, 0.0)], ["pedestrian"], [0.5])
        assert ap(kitti_rows([kitti_truth(person, ["Pedestrian"])], [found]), "Pedestrian") == expected


@pytest.mark.parametrize(("neighbour", "name"), [("Van", "Car"), ("Person_sitting", "Pedestrian")])
def test_neighbours_are_neither_hit_nor_missed(neighbour: str, name: str) -> None:
    rows = [*ONE, (30.0, 0.0, 0.0, *CAR, 0.0)]
    found = kitti_found(rows, [name, name], [0.5, 0.9])
    assert ap(kitti_rows([kitti_truth(rows, [name, neighbour])], [found]), name) == 100.0
    assert ap(kitti_rows([kitti_truth(rows, [name, "Truck"])], [found]), name) == 50.0
    alone = kitti_found(rows[:1], [name], [0.5])
    assert ap(kitti_rows([kitti_truth(rows, [name, neighbour])], [alone]), name) == 100.0


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, ("easy", "moderate", "hard")),
        ({"occlusion": [1]}, ("moderate", "hard")),
        ({"occlusion": [2]}, ("hard",)),
        ({"occlusion": [3]}, ()),
        ({"truncation": [0.15]}, ("easy", "moderate", "hard")),
        ({"truncation": [0.2]}, ("moderate", "hard")),
        ({"truncation": [0.4]}, ("hard",)),
        ({"truncation": [0.51]}, ()),
        ({"px": [(0, 0, 50, 41)]}, ("easy", "moderate", "hard")),
        ({"px": [(0, 0, 50, 40)]}, ("moderate", "hard")),
        ({"px": [(0, 0, 50, 25)]}, ()),
    ],
)
def test_difficulties(changes, counts) -> None:
    rows = kitti_rows([kitti_truth(ONE, ["Car"], **changes)], [kitti_found(ONE, ["Car"], [0.5])])
    counted = tuple(r.subset for r in rows if r.class_name == "Car" and r.measure == "3d R40" and r.objects)
    assert counted == (*counts, *(("0-30 m",) if "hard" in counts else ()))


def test_a_low_detection_is_no_false_positive() -> None:
    far = (60.0, 0.0, 0.0, *CAR, 0.0)
    for height, expected in ((24.0, 100.0), (25.0, 50.0)):
        px = [TALL_PX, (0, 0, 30, height)]
        found = kitti_found([*ONE, far], ["Car", "Car"], [0.5, 0.9], px=px)
        assert ap(kitti_rows([kitti_truth(ONE, ["Car"])], [found]), "Car", "moderate") == expected


def test_what_lies_in_a_dont_care_area_is_no_false_positive() -> None:
    found = kitti_found(
        [*ONE, (60.0, 0.0, 0.0, *CAR, 0.0)], ["Car", "Car"], [0.5, 0.9], px=[TALL_PX, (300, 100, 400, 150)]
    )
    for right, expected in ((371.0, 100.0), (370.0, 50.0)):  # 71 and 70 of 100 px; a car needs more than 0.7
        truth = kitti_truth(ONE, ["Car"], areas=[(300, 0, right, 400)])
        assert ap(kitti_rows([truth], [found]), "Car") == expected


def test_a_range_ignores_what_lies_outside_it() -> None:
    rows = [*ONE, (40.0, 0.0, 0.0, *CAR, 0.0), (0.0, 60.0, 0.0, *CAR, 0.0)]
    found = kitti_found([rows[0], rows[2], (45.0, 10.0, 0.0, *CAR, 0.0)], ["Car"] * 3, [0.5, 0.6, 0.9])
    result = kitti_rows([kitti_truth(rows, ["Car"] * 3)], [found])
    assert [ap(result, "Car", name) for name in ("0-30 m", "30-50 m", "50+ m")] == [100.0, 0.0, 100.0]


def test_frames_are_not_mixed() -> None:
    empty = kitti_found([], [], [])
    result = kitti_rows([kitti_truth(ONE, ["Car"]), kitti_truth([], [])], [empty, kitti_found(ONE, ["Car"], [0.9])])
    assert ap(result, "Car") == 0.0
    with pytest.raises(InternalError, match="0 frames of detections and 1"):
        kitti_rows([kitti_truth(ONE, ["Car"])], [])
    with pytest.raises(InternalError, match="0 frames of detections and 0"):
        kitti_rows([], [])
    with pytest.raises(InternalError, match="differ in number"):
        kitti_truth(ONE, ["Car", "Car"])
    one = np.zeros(1, np.int64)
    with pytest.raises(InternalError, match="flags do not fit"):
        FlaggedFrame(iou=np.zeros((1, 2)), scores=np.zeros(1), object_flag=one, found_flag=one, excused=one > 0)


@pytest.mark.parametrize(("iou", "expected"), [(0.5, 0.0), (0.5000001, 100.0)])
def test_an_overlap_must_exceed_the_least(iou: float, expected: float) -> None:
    zero = np.zeros(1, np.int64)
    frame = FlaggedFrame(
        iou=np.array([[iou]]), scores=np.ones(1), object_flag=zero, found_flag=zero, excused=np.zeros(1, dtype=bool)
    )
    curve = precision_curve([frame], min_iou=0.5, positions=40, repeat_below=41)
    assert curve.ap_percent() == expected
    assert curve.recall.tolist() == pytest.approx(np.arange(41) / 40)


def test_thresholds_by_hand() -> None:
    # 4 objects, 4 hits, 2 steps of recall (0, 1/2, 1): the scores at recall 1/4 and, nearest to 1/2 and to 1, after.
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert score_thresholds(scores, 4, 2, repeat=False).tolist() == [0.9, 0.8, 0.6]
    # One hit of one object serves every step when it may.
    assert score_thresholds(np.array([0.4]), 1, 4, repeat=True).tolist() == [0.4] * 5
    assert score_thresholds(np.array([0.4]), 1, 4, repeat=False).tolist() == [0.4]
    assert score_thresholds(np.array([0.4]), 2, 4, repeat=True).tolist() == [0.4] * 3


def test_only_what_the_camera_sees_is_evaluated() -> None:
    camera = forward_camera()
    places = [(20, 0, 0), (-20, 0, 0), (0, 20, 0), (20, 100, 0), (3, 3, 0)]
    found = detections(
        [(*p, *CAR, 0.1) for p in places], [0, 0, 0, 0, 1], [0.9, 0.8, 0.7, 0.6, 0.5], ("car", "bicycle", "bus")
    )
    seen = found_in_view(found, camera)
    assert seen.types == ("Car", "Cyclist")
    assert seen.scores.tolist() == pytest.approx([0.9, 0.5])
    np.testing.assert_array_equal(seen.boxes.centre[:, 0], [20, 3])


def test_image_boxes_by_hand() -> None:
    camera = forward_camera(f=100.0, width=201, height=101)
    cube = (2.0, 2.0, 2.0)
    box = boxes([(11, 0, 0, *cube, 0), (11, 4, 0, *cube, 0), (11, 10, 0, *cube, 0), (0, 0, 0, *cube, 0)])
    pixels = image_boxes(camera, box)
    centre = (100.5, 50.5)
    np.testing.assert_allclose(pixels[0], (centre[0] - 10, centre[1] - 10, centre[0] + 10, centre[1] + 10))
    # Left is smaller x; the nearer face gives the outer edge, the farther one the inner.
    np.testing.assert_allclose(pixels[1], (centre[0] - 50, centre[1] - 10, centre[0] - 25, centre[1] + 10), rtol=1e-6)
    assert pixels[2].tolist()[0] == 0.0  # cut at the border of the image
    assert projected_boxes(camera, box)[2, 0] == pytest.approx(centre[0] - 110)
    np.testing.assert_array_equal(pixels[3], (0, 0, 200, 100))  # around the camera: cut at 0.1 m before it
    behind = boxes([(-11, 0, 0, *cube, 0)])
    assert not image_boxes(camera, behind).any()
    assert not projected_boxes(camera, behind).any()


def test_boxes_go_to_the_camera_and_back() -> None:
    rng = np.random.default_rng(0)
    turned = forward_camera()
    angle = 0.7
    spin = np.eye(4)
    spin[:2, :2] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    spin[:3, 3] = (0.3, -0.2, 0.5)
    camera = type(turned)(projection=turned.projection, from_lidar=turned.from_lidar @ spin, width_px=1, height_px=1)
    assert camera.heading == pytest.approx(angle)
    box = boxes(np.c_[rng.uniform(-40, 40, (20, 3)), rng.uniform(0.5, 5, (20, 3)), rng.uniform(-3.1, 3.1, 20)])
    back = boxes_from_camera(camera, camera_from_boxes(camera, box))
    np.testing.assert_allclose(back.centre, box.centre, atol=1e-5)
    np.testing.assert_allclose(back.size, box.size, atol=1e-6)
    np.testing.assert_allclose(wrap_angle(back.yaw - box.yaw), 0, atol=1e-6)
    # A box that faces where the camera looks has rotation_y -pi/2, and its label is the middle of its bottom.
    (row,) = camera_from_boxes(forward_camera(), boxes([(10, 2, 1, 4, 2, 1.5, 0)]))
    np.testing.assert_allclose(row, (1.5, 2, 4, -2, -0.25, 10, -np.pi / 2), atol=1e-6)
    same = boxes([(10, 2, 1, 4, 2, 1.5, 0)])
    assert iou_3d_matrix(same, boxes_from_camera(forward_camera(), row[None]))[0, 0] == pytest.approx(1, abs=1e-5)
    assert iou_bev_matrix(same, same)[0, 0] == 1.0
