"""Anchor heads, over voxels and over pillars, learn in the same loop as CenterPoint."""

import numpy as np
import pytest
import torch
from zoo_sample import variant

from calib.crops import Window, batch_of, crop_of
from calib.training_frames import LabelledFrame
from dm3d_deploy.errors import InternalError
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.pointcloud import Boxes3D
from dm3d_deploy.training.loop import TrainSettings, column_scale, labelled_losses, train_detector
from dm3d_deploy.training.start import start_weights
from dm3d_deploy.training.targets import collate

CAR_M = (3.9, 1.6, 1.56)


def frame_of(config):
    """Two cars as blocks of points, and points of the ground."""
    random = np.random.default_rng(0)
    centre = np.array([[6.4, 0.0, -1.0], [6.0, 4.0, -1.0]], dtype=np.float32)
    cars = [place + random.uniform(-0.5, 0.5, (300, 3)) * CAR_M for place in centre]
    ground = random.uniform((0, -6, -1.8), (12, 6, -1.75), (400, 3))
    xyz = np.concatenate([*cars, ground])
    points = np.concatenate([xyz, random.uniform(0, 1, (len(xyz), len(config.voxels.columns) - 3))], axis=1)
    boxes = Boxes3D(
        centre=centre,
        size=np.array([CAR_M, CAR_M], dtype=np.float32),
        yaw=np.zeros(2, np.float32),
        velocity=np.zeros((2, 2), np.float32),
    )
    return LabelledFrame(
        points=points.astype(np.float32), boxes=boxes, labels=np.zeros(2, dtype=np.int64), full_scale=1.0
    )


def batches_of(config):
    frame, window = frame_of(config), Window.of(config, 12.8)

    def batches(step):
        random = np.random.default_rng(step % 4)
        crops = [crop_of(frame, config, window, random, prefer_large=False) for _ in range(2)]
        return batch_of([crop for crop in crops if crop is not None], config, window)

    return batches


@pytest.mark.parametrize("name", ["second", "pointpillars"])
def test_a_small_anchor_detector_learns(name, tmp_path):
    torch.set_num_threads(1)
    config = variant(name)
    detector = build_detector(config)
    start_weights(detector, {}, seed=1)
    assert float(torch.sigmoid(detector.dense_head.conv_cls.bias).detach().mean()) == pytest.approx(0.01)
    batches = batches_of(config)
    batch = batches(0)
    depth = config.voxels.grid_zyx[0] + (name == "second")
    assert batch.shape_zyx == (depth, *(cells for cells in config.voxels.grid_zyx[1:]))
    assert (batch.targets.classes > 0).any()
    assert len(column_scale(detector)) == batch.features.shape[1]
    rows = []
    settings = TrainSettings(steps=40, log_every=5, half_2d=False)
    train_detector(detector, batches, settings, out=tmp_path, report=rows.append)
    totals = [row.losses["heat"] + row.losses["box"] for row in rows]
    assert totals[-1] < 0.6 * totals[0]
    with pytest.raises(InternalError, match="a AnchorHeadConfig cannot learn from tuple"):
        labelled_losses(detector, half_2d=False)(
            type(batch)(
                features=batch.features, coords=batch.coords, shape_zyx=batch.shape_zyx, size=batch.size,
                targets=collate([()]),
            )
        )  # fmt: skip


def test_objects_outside_a_window_ask_for_nothing():
    config = variant("second")
    batch = batches_of(config)(1)
    assert batch.targets.classes.shape[1] == np.prod(batch.shape_zyx[1:]) // 64 * config.head.per_cell
    assert torch.equal(batch.targets.to(torch.device("cpu")).classes, batch.targets.classes)
