"""NDS against numbers that the nuScenes devkit 1.2.0 gave (accumulate, calc_ap, calc_tp, DetectionMetrics)."""

import numpy as np
import pytest

from dm3d_deploy.evaluation.nds import nds_score, nuscenes_rows
from dm3d_deploy.evaluation.nuscenes import CLASS_RANGE_M, Truth
from dm3d_deploy.pointcloud import Boxes3D, Detections

NAMES = tuple(CLASS_RANGE_M)
# seed: mAP, NDS, translation, scale, orientation and velocity error, AP of car and of pedestrian
DEVKIT = {
    0: (0.26092250594642163, 0.26503887462081066, 0.905950743003433, 0.35491128987780873, 0.7839778055103035,
        0.6093839451324559, 0.2740899275382849, 0.2537037037037037),
    1: (0.38835073030589023, 0.33515720887036893, 0.8129819643676275, 0.3305073945991902, 0.8038067482212984,
        0.6428854556376458, 0.323296681199459, 0.38489957883427667),
    2: (0.26584475556153436, 0.27636063420482015, 0.8710124883599779, 0.35378318277157395, 0.7342334320651549,
        0.6065883325627636, 0.2611671649283162, 0.043532111235814935),
}  # fmt: skip


def boxes(centre, size, yaw, velocity):
    parts = (np.asarray(part, dtype=np.float32) for part in (centre, size, yaw, velocity))
    return Boxes3D(**dict(zip(("centre", "size", "yaw", "velocity"), parts, strict=True)))


def scene(seed):
    """Twelve frames of all classes; four of five objects are found near their place, and other things too."""
    rng = np.random.default_rng(seed)
    found, truths = [], []
    for _ in range(12):
        count, extra = int(rng.integers(5, 40)), int(rng.integers(0, 20))
        centre = np.c_[rng.uniform(-60, 60, (count, 2)), rng.uniform(-1, 1, count)]
        size, yaw = rng.uniform(0.5, 5, (count, 3)), rng.uniform(-3, 3, count)
        velocity, label = rng.normal(0, 3, (count, 2)), rng.integers(0, 10, count)
        truths.append(Truth(boxes=boxes(centre, size, yaw, velocity), labels=label))
        seen = rng.random(count) < 0.8
        hits = int(seen.sum())
        turn = rng.normal(0, 0.5, hits) + np.pi * (rng.random(hits) < 0.2)
        guess = boxes(
            np.r_[
                centre[seen] + rng.normal(0, 0.7, (hits, 3)), np.c_[rng.uniform(-60, 60, (extra, 2)), np.zeros(extra)]
            ],
            np.r_[size[seen] * np.exp(rng.normal(0, 0.2, (hits, 3))), rng.uniform(0.5, 5, (extra, 3))],
            np.r_[yaw[seen] + turn, rng.uniform(-3, 3, extra)],
            np.r_[velocity[seen] + rng.normal(0, 0.5, (hits, 2)), np.zeros((extra, 2))],
        )
        scores = rng.uniform(0.01, 1, hits + extra).astype(np.float32)
        labels = np.r_[label[seen], rng.integers(0, 10, extra)]
        found.append(Detections(boxes=guess, scores=scores, labels=labels, class_names=NAMES))
    return found, truths


@pytest.mark.parametrize("seed", DEVKIT)
def test_scores_are_those_of_the_devkit(seed: int) -> None:
    found, truths = scene(seed)
    score = nds_score(found, truths)
    rows = {row.class_name: row for row in nuscenes_rows(found, truths, "all", (0.0, np.inf))}
    ours = (
        score.ap.mean_ap, score.nds, *(score.errors[name] for name in ("ATE", "ASE", "AOE", "AVE")),
        rows["car"].ap_percent / 100, rows["pedestrian"].ap_percent / 100,
    )  # fmt: skip
    assert ours == pytest.approx(DEVKIT[seed], abs=1e-12)
    assert np.mean([row.ap_percent for row in rows.values()]) == pytest.approx(100 * DEVKIT[seed][0])
