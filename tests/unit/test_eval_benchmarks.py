"""The three benchmarks over simulated and hand-labelled frames: words, masks, notes, tables and curves."""

import numpy as np
import pytest
from eval_sample import CAR, TALL_PX, WALKER, boxes, detections, forward_camera, kitti_truth

from calib.simulated_dataset import labelled_frame
from calib.simulator import CLASS_NAMES, simulate_frame
from dm3d_deploy.errors import UsageError
from dm3d_deploy.evaluation.benchmarks import METRICS, benchmark_scores, scored_classes
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.evaluation.rows import ApRow, vulnerable_first
from dm3d_deploy.pointcloud import Detections
from dm3d_deploy.reporting.ap_tables import ap_text, curves_png

NAMES = ("car", "pedestrian", "bicycle")
OBJECTS = [(10.0, 0.0, 0.0, *CAR, 0.0), (20.0, 3.0, 0.0, *WALKER, 0.0)]


def labels(rows, types, *, counts=None, all_around=True, areas=()):
    return FrameLabels(
        truth=kitti_truth(rows, types, areas=areas),
        num_points=np.array(counts if counts is not None else [50] * len(rows), dtype=np.int64),
        camera=forward_camera(),
        all_around=all_around,
    )


def ap(scores, name, subset="all"):
    values = [r.ap_percent for r in scores.rows if (r.class_name, r.subset) == (name, subset)]
    return values[0]


@pytest.fixture(scope="module")
def simulated():
    return [simulate_frame(seed, sensor="hdl64") for seed in range(910_000, 910_004)]


@pytest.mark.parametrize("metric", METRICS)
def test_labels_of_simulated_frames_as_detections_give_100(simulated, metric: str) -> None:
    found = [
        Detections(
            boxes=frame.boxes,
            scores=np.linspace(0.9, 0.5, len(frame.boxes)).astype(np.float32),
            labels=frame.labels,
            class_names=CLASS_NAMES,
        )
        for frame in simulated
    ]
    scores = benchmark_scores(metric, found, [labelled_frame(frame).labels for frame in simulated])
    known = [row for row in scores.rows if row.objects and row.class_name in ("Car", "car", "Vehicle")]
    assert len(known) >= 3
    if metric != "nuscenes":  # where objects too few points fell on are found too, which counts against precision
        assert [row.ap_percent for row in known if row.subset in ("easy", "moderate")] == pytest.approx(
            [100.0] * sum(row.subset in ("easy", "moderate") for row in known)
        )
    seen = [np.flatnonzero(frame.num_points >= 5) for frame in simulated]
    visible = [
        Detections(
            boxes=boxes(np.c_[f.boxes.centre, f.boxes.size, f.boxes.yaw, f.boxes.velocity][rows]),
            scores=np.full(len(rows), 0.5, np.float32),
            labels=f.labels[rows],
            class_names=CLASS_NAMES,
        )
        for f, rows in zip(simulated, seen, strict=True)
    ]
    scores = benchmark_scores(metric, visible, [labelled_frame(frame).labels for frame in simulated])
    assert [row.ap_percent for row in scores.rows if row.objects] == pytest.approx(
        [100.0] * sum(row.objects > 0 for row in scores.rows)
    )
    assert next(iter(scores.summary.values())) == pytest.approx(100.0)


@pytest.mark.parametrize(("metric", "name"), [("nuscenes", "car"), ("once", "Car")])
def test_simulated_objects_count_from_five_points_on(metric: str, name: str) -> None:
    found = detections(OBJECTS[:1], [0], [0.9], NAMES)
    for points, objects in ((5, 2), (4, 1)):
        frame = labels([OBJECTS[0], (30.0, 0, 0, *CAR, 0)], ["car", "car"], counts=[50, points])
        scores = benchmark_scores(metric, [found], [frame])
        assert [r.objects for r in scores.rows if (r.class_name, r.subset) == (name, "all")] == [objects]
    assert "simulated objects count from 5 points on" in scores.notes


@pytest.mark.parametrize(("metric", "name"), [("nuscenes", "car"), ("once", "Vehicle"), ("kitti", "Car")])
def test_what_people_did_not_label_is_no_mistake(metric: str, name: str) -> None:
    behind, beside, nothing = (-10.0, 0, 0, *CAR, 0), (30.0, 8.0, 0, *CAR, 0), (25.0, -6.0, 0, *CAR, 0)
    subset = "easy" if metric == "kitti" else "all"
    # The detection beside lies between 387 and 467 px, in the area.
    areas = [(300, 0, 500, 400)]
    frame = labels(OBJECTS[:1], ["Car"], all_around=False, areas=areas)
    found = detections([behind, beside, OBJECTS[0]], [0, 0, 0], [0.9, 0.8, 0.7], NAMES)
    scores = benchmark_scores(metric, [found], [frame])
    assert ap(scores, name, subset) == pytest.approx(100.0)
    assert any("in the camera's view only" in note for note in scores.notes)
    wrong = detections([nothing, OBJECTS[0]], [0, 0], [0.9, 0.7], NAMES)
    assert ap(benchmark_scores(metric, [wrong], [frame]), name, subset) < 60
    around = labels([OBJECTS[0], behind], ["Car", "Car"], all_around=False, areas=areas)
    if metric != "kitti":  # whose labels say themselves what the image shows
        assert ap(benchmark_scores(metric, [found], [around]), name) == pytest.approx(100.0)
        # Simulated frames are labelled on every side.
        assert ap(benchmark_scores(metric, [found], [labels(OBJECTS[:1], ["Car"])]), name) < 60


def test_labels_of_people_have_no_velocity_and_need_a_point() -> None:
    found = detections(OBJECTS, [0, 1], [0.9, 0.8], NAMES)
    scores = benchmark_scores("nuscenes", [found], [labels(OBJECTS, ["Car", "Person_sitting"], all_around=False)])
    assert scores.summary["AVE"] == 1.0
    assert scores.summary["mAP"] == pytest.approx(100.0)
    assert scores.summary["NDS"] == pytest.approx(80.0)
    assert any("no velocities, so AVE is 1" in note for note in scores.notes)
    hidden = labels(OBJECTS, ["Van", "Cyclist"], counts=[1, 0], all_around=False)
    scores = benchmark_scores("nuscenes", [found], [hidden])
    assert {r.class_name: r.objects for r in scores.rows if r.subset == "all"} == {
        "car": 1,
        "pedestrian": 0,
        "bicycle": 0,
    }


def test_classes_that_a_model_does_not_know() -> None:
    assert scored_classes("once", ("Car", "barrier")) == ("Car",)
    assert scored_classes("kitti", NAMES) == ("Pedestrian", "Cyclist", "Car")
    assert scored_classes("nuscenes", NAMES) == ("pedestrian", "bicycle", "car")
    scores = benchmark_scores("nuscenes", [detections(OBJECTS[:1], [0], [0.9], ("Car",))], [labels(OBJECTS, NAMES[:2])])
    assert {row.class_name for row in scores.rows} == {"car"}
    (note,) = [note for note in scores.notes if "does not know" in note]
    assert note.endswith(
        "pedestrian, bicycle, motorcycle, truck, construction_vehicle, bus, trailer, barrier, traffic_cone"
    )
    with pytest.raises(UsageError, match="the model finds boat, none of which the metric 'once' knows"):
        scored_classes("once", ("boat",))
    with pytest.raises(UsageError, match=r"no metric 'kiti'.*did you mean 'kitti'"):
        scored_classes("kiti", NAMES)


def test_frames_that_hold_nothing_to_find() -> None:
    found = detections(OBJECTS[:1], [0], [0.9], NAMES)
    for metric in METRICS:
        with pytest.raises(UsageError, match=r"the 1 frames hold no object of .* that counts in the metric"):
            benchmark_scores(metric, [found], [labels([OBJECTS[0]], ["truck"])])


def row(name, subset, value, objects=3, measure="3d"):
    curve = () if value is None else (0.0, 0.5, 1.0)
    precision = () if value is None else (1.0, 0.5, 0.0)
    return ApRow(class_name=name, subset=subset, measure=measure, objects=objects, ap_percent=value, recall=curve,
                 precision=precision)  # fmt: skip


def test_vulnerable_road_users_come_first() -> None:
    assert vulnerable_first(("Car", "Cyclist", "bus", "Pedestrian")) == ("Pedestrian", "Cyclist", "Car", "bus")
    text = ap_text([row("Car", "easy", 50.04), row("Car", "hard", None, 0), row("Pedestrian", "easy", 5.0, 12)])
    assert text.splitlines() == [
        "AP %, 3d        easy  hard",
        "Pedestrian  5.0 (12)     -",
        "Car         50.0 (3)     -",
    ]
    two = ap_text([row("Car", "easy", 50.0), row("Car", "easy", 60.0, measure="bev")])
    assert two.count("\n\n") == 1
    assert "AP %, bev" in two


@pytest.mark.parametrize("subsets", [1, 3, 4, 6])
def test_curves_are_drawn_the_same_every_time(subsets: int) -> None:
    rows = [row(name, f"part {i}", None if i == 2 else 50.0 + i) for i in range(subsets) for name in NAMES]
    first = curves_png(rows, title="cost in $ and _ of " + "a long name " * 12)
    assert first.startswith(b"\x89PNG")
    assert first == curves_png(rows, title="cost in $ and _ of " + "a long name " * 12)
    assert first != curves_png(rows[1:], title="cost in $ and _ of " + "a long name " * 12)
    assert TALL_PX[3] > 0
