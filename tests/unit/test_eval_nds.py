"""NDS and its errors by hand."""

import numpy as np
import pytest
from eval_sample import CAR, detections, truth

from dm3d_deploy.evaluation.nds import nds_score, nuscenes_rows

NAMES = ("car", "pedestrian", "barrier", "traffic_cone")
OBJECT = (10.0, 0.0, 0.0, *CAR, 0.0, 3.0, 0.0)


def score_of(found, labels=None, scores=None, objects=(OBJECT,), object_labels=(0,)):
    count = len(found)
    given = detections(found, labels or [0] * count, scores or [0.9] * count, NAMES)
    return nds_score([given], [truth(objects, object_labels)])


def test_labels_as_detections_give_all_that_can_be_had_without_attributes() -> None:
    score = score_of([OBJECT])
    assert score.ap.mean_ap == pytest.approx(1.0)
    assert dict(score.errors) == {"ATE": 0.0, "ASE": 0.0, "AOE": 0.0, "AVE": 0.0}
    assert score.nds == pytest.approx(0.9)  # (5 + 4) / 10: the attribute error counts as 1


def test_every_error_by_hand() -> None:
    # 0.8 m off, half as long, 0.5 rad, 2 m/s: no hit at 0.5 m.
    score = score_of([(10.0, 0.8, 0.3, 2.0, 2.0, 1.5, 0.5, 3.0, -2.0)])
    assert score.ap.mean_ap == pytest.approx(0.75)
    assert dict(score.errors) == pytest.approx({"ATE": 0.8, "ASE": 0.5, "AOE": 0.5, "AVE": 2.0}, abs=1e-6)
    assert score.nds == pytest.approx((5 * 0.75 + 0.2 + 0.5 + 0.5 + 0) / 10, abs=1e-6)


@pytest.mark.parametrize(("label", "error"), [(0, np.pi - 0.2), (2, 0.2)])
def test_a_barrier_has_two_fronts(label: int, error: float) -> None:
    turned = (*OBJECT[:6], np.pi - 0.2, 0.0, 0.0)
    score = score_of([turned], labels=[label], object_labels=(label,))
    assert score.errors_by_class[NAMES[label]]["AOE"] == pytest.approx(error, abs=1e-6)
    # A class that does not move has no part in the mean of AVE; with no class left it is 1.
    assert score.errors["AVE"] == pytest.approx({0: 3.0, 2: 1.0}[label])


def test_a_cone_has_neither_front_nor_speed() -> None:
    turned = (10.0, 0.0, 0.0, 0.4, 0.4, 1.0, 1.0, 0.0, 0.0)
    score = score_of([turned, OBJECT], [3, 0], [0.9, 0.8], (turned, OBJECT), (3, 0))
    assert dict(score.errors) == {"ATE": 0.0, "ASE": 0.0, "AOE": 0.0, "AVE": 0.0}


def test_a_class_without_a_hit_has_errors_of_one() -> None:
    far = (30.0, 0.0, 0.0, *CAR, 0.0)
    score = score_of([far])
    assert dict(score.errors) == dict.fromkeys(("ATE", "ASE", "AOE", "AVE"), 1.0)
    assert score.nds == 0.0


def test_labels_without_velocity_count_as_an_error_of_one() -> None:
    still = (*OBJECT[:7], np.nan, np.nan)
    assert score_of([OBJECT], objects=(still,)).errors["AVE"] == 1.0
    # The better-scored of two has none: the running mean is 0 up to recall 1/2, then rises to 0.5 at recall 1.
    other = (20.0, 0.0, 0.0, *CAR, 0.0, 1.0, 0.0)
    score = score_of([OBJECT, (*other[:7], 1.5, 0.0)], scores=[0.9, 0.8], objects=(still, other), object_labels=(0, 0))
    assert score.errors["AVE"] == pytest.approx(sum(range(51)) / 100 / 90, abs=1e-6)


def test_ranges_and_class_ranges() -> None:
    near, far, beyond = (10.0, 0, 0, *CAR, 0), (40.0, 0, 0, *CAR, 0), (55.0, 0, 0, *CAR, 0)
    given = detections([near, beyond], [0, 0], [0.9, 0.8], NAMES)
    labels = [truth([near, far, beyond, near], [0, 0, 0, 1])]

    def row(limits):
        return {r.class_name: r for r in nuscenes_rows([given], labels, "x", limits)}

    everywhere = row((0.0, np.inf))
    assert everywhere["car"].objects == 2  # 55 m is beyond the class's range
    assert everywhere["car"].ap_percent == pytest.approx(100 * 40 / 90)  # recalls 0.11 to 0.5 of 0.11 to 1
    assert everywhere["pedestrian"].ap_percent == 0.0
    assert everywhere["barrier"].ap_percent is None
    assert row((0.0, 30.0))["car"].ap_percent == pytest.approx(100.0)
    assert row((30.0, 50.0))["car"].ap_percent == 0.0
    assert row((50.0, np.inf))["car"].objects == 0
    assert len(everywhere["car"].precision) == len(everywhere["car"].recall) == 101
