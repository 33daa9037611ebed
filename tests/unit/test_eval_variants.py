"""Dense beside pruned: means and ranges by hand, what is left out, and intervals that hold what they should."""

import numpy as np
import pytest
from eval_sample import boxes, detections, forward_camera, kitti_truth, truth

from dm3d_deploy.errors import InternalError, UsageError
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.evaluation.paired import ClassHits, draw_frames, paired_changes
from dm3d_deploy.evaluation.variants import EVERY_MEAN, VULNERABLE_MEAN, variant_rows

NAMES = ("car", "pedestrian", "bicycle")
SIZE = (1.0, 1.0, 1.0, 0.0)
RANGE_M = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
PLACES = ((10.0, 0.0), (0.0, 35.0), (-20.0, 5.0))
TYPES = ("car", "pedestrian", "car")


def rows_at(places):
    return [(x, y, 0.0, *SIZE) for x, y in places]


def labelled(places=PLACES, types=TYPES, points=20):
    return FrameLabels(
        truth=kitti_truth(rows_at(places), types),
        num_points=np.full(len(places), points, dtype=np.int64),
        camera=forward_camera(),
        all_around=True,
    )


def seen(places=PLACES, types=TYPES, names=NAMES):
    scores = np.linspace(0.9, 0.5, len(places))
    return detections(rows_at(places), [names.index(name) for name in types], scores, names)


def test_rows_by_hand() -> None:
    frames = [labelled()] * 6
    found = {"dense": [seen()] * 6, "pruned": [seen(PLACES[:1], TYPES[:1])] * 6}
    rows = variant_rows(found, frames, RANGE_M, compared=("pruned",))
    told = {(row.name, row.subset): row for row in rows}
    assert [row.name for row in rows if row.subset == "all"] == [
        VULNERABLE_MEAN, EVERY_MEAN, "pedestrian", "bicycle", "car",
    ]  # fmt: skip
    half = 100 * 40 / 90  # recall ends at one half: 40 of the 90 recalls above 0.1 count, each in full
    assert told["car", "all"].ap_percent == pytest.approx({"dense": 100, "pruned": half})
    assert told["car", "0-30 m"].objects == 12
    assert told["pedestrian", "0-30 m"].ap_percent == {"dense": None, "pruned": None}
    assert told["pedestrian", "30-50 m"].ap_percent == pytest.approx({"dense": 100, "pruned": 0})
    assert told["bicycle", "all"].objects == 0
    assert told["bicycle", "all"].changes == {}
    assert told[VULNERABLE_MEAN, "all"].classes == ("pedestrian",)
    every = told[EVERY_MEAN, "all"]
    assert every.classes == ("pedestrian", "car")
    assert every.ap_percent == pytest.approx({"dense": 100, "pruned": half / 2})
    assert every.changes["pruned"].points == pytest.approx(half / 2 - 100)
    assert every.changes["pruned"].interval_points == pytest.approx((half / 2 - 100,) * 2)  # all frames are alike


def test_equal_detectors_do_not_differ_and_few_frames_have_no_interval() -> None:
    found = {"dense": [seen()] * 4, "pruned": [seen()] * 4}
    rows = variant_rows(found, [labelled()] * 4, RANGE_M, compared=("pruned",))
    assert {row.changes["pruned"].points for row in rows if row.changes} == {0.0}
    assert {row.changes["pruned"].interval_points for row in rows if row.changes} == {None}
    rows = variant_rows({name: own * 2 for name, own in found.items()}, [labelled()] * 8, RANGE_M, compared=("pruned",))
    assert {row.changes["pruned"].interval_points for row in rows if row.changes} == {(0.0, 0.0)}


def test_objects_outside_the_models_range_and_with_few_points_are_not_asked_for() -> None:
    ahead = (0.0, -51.2, -5.0, 51.2, 51.2, 3.0)  # the car behind is out of range
    rows = variant_rows({"dense": [seen(PLACES[:2], TYPES[:2])]}, [labelled()], ahead, compared=())
    cars = next(row for row in rows if (row.name, row.subset) == ("car", "all"))
    assert (cars.objects, cars.ap_percent["dense"]) == (1, pytest.approx(100))
    with pytest.raises(UsageError, match="the 1 frames hold no object of pedestrian, bicycle, car within the model's"):
        variant_rows({"dense": [seen()]}, [labelled(points=4)], RANGE_M, compared=())


def test_words_of_other_data_sets_and_foreign_classes() -> None:
    names = ("Car", "Pedestrian", "Tram")
    rows = variant_rows(
        {"dense": [seen(types=("Car", "Pedestrian", "Tram"), names=names)]}, [labelled()], RANGE_M, compared=()
    )
    assert {row.name for row in rows} == {VULNERABLE_MEAN, EVERY_MEAN, "car", "pedestrian"}
    with pytest.raises(UsageError, match="the model finds Tram, none of which the metric 'nuscenes' knows"):
        variant_rows({"dense": [seen((PLACES[0],), ("Tram",), ("Tram",))]}, [labelled()], RANGE_M, compared=())


def test_the_interval_of_a_sure_loss_lies_below_zero_and_holds_the_change() -> None:
    dice = np.random.default_rng(3)
    truths, dense, pruned = [], [], []
    for _ in range(40):
        places = [(float(x), float(y)) for x, y in dice.uniform(-30, 30, (6, 2))]
        kept = [place for place in places if dice.random() < 0.6]
        truths.append(truth(rows_at(places), [0] * 6))
        dense.append(detections(rows_at(places), [0] * 6, np.sort(dice.uniform(0, 1, 6))[::-1], NAMES))
        scores = np.sort(dice.uniform(0, 1, len(kept)))[::-1]
        pruned.append(detections(rows_at(kept), [0] * len(kept), scores, NAMES))
    change = paired_changes(dense, pruned, truths, {"car": ("car",)}, times=draw_frames(40))["car"]
    low, high = change.interval_points
    assert low < change.points < high < -20
    assert high - low < 25


def test_draws_are_sets_of_as_many_frames_and_the_same_each_time() -> None:
    times = draw_frames(9, draws=200)
    assert times.shape == (200, 9)
    assert set(times.sum(axis=1)) == {9}
    assert np.array_equal(times, draw_frames(9, draws=200))
    assert len({tuple(row) for row in times}) > 150


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InternalError, match="1, 2, 1 and 1 frames cannot be paired"):
        paired_changes([seen()], [seen()] * 2, [truth(rows_at(PLACES), [0, 1, 0])], {}, times=draw_frames(1))
    with pytest.raises(InternalError, match=r"hits of shape \(3, 2\) do not fit 2 detections"):
        ClassHits(frame=np.zeros(2, int), hits=np.zeros((3, 2), bool), objects=np.zeros(1, int))


def test_boxes_of_the_sample_are_where_they_should_be() -> None:
    assert boxes(rows_at(PLACES)).centre[:, :2].tolist() == [list(map(pytest.approx, place)) for place in PLACES]
