"""Targets and losses of CenterHead: hand-computed values, and targets that decode to the boxes they came from."""

import math

import numpy as np
import pytest
import torch
from models_sample import small_config

from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.decode import detections_from_maps
from dm3d_deploy.pointcloud import Boxes3D
from dm3d_deploy.training.losses import center_losses, focal_loss, values_at
from dm3d_deploy.training.targets import center_targets, collate, gaussian_radius

CONFIG = small_config()
LOW = CONFIG.voxels.point_range_m[:2]
SHAPE = (8, 6)


def some_boxes():
    return Boxes3D(
        centre=np.array([[1.0, 0.3, -1.0], [3.9, -2.7, 0.5], [2.0, 2.5, 0.0], [9.0, 0.0, 0.0]], dtype=np.float32),
        size=np.array([[0.9, 0.5, 0.4], [2.0, 1.0, 1.0], [1.0, 1.0, 2.0], [1.0, 1.0, 1.0]], dtype=np.float32),
        yaw=np.array([0.3, -2.0, 3.1, 0.0], dtype=np.float32),
        velocity=np.zeros((4, 2), dtype=np.float32),
    )


LABELS = np.array([0, 2, 1, 0], dtype=np.int64)
BRANCHES = [[branch.name for branch in task if branch.name != "hm"] for task in CONFIG.head.branches]


def perfect_maps(targets, logit=12.0):
    maps = {}
    for task, target in enumerate(targets):
        heat = target.heat
        maps[f"{task}.hm"] = torch.where(heat == 1, logit, -logit)
        at = 0
        for branch in CONFIG.head.branches[task]:
            if branch.name == "hm":
                continue
            flat = torch.zeros(branch.channels, heat.shape[0] * heat[0, 0].numel())
            flat[:, target.cells] = target.values[:, at : at + branch.channels].T
            at += branch.channels
            shape = (branch.channels, heat.shape[0], *heat.shape[2:])
            maps[f"{task}.{branch.name}"] = flat.view(shape).transpose(0, 1).contiguous()
    return maps


def test_radius_by_hand() -> None:
    """A square of side s: the three roots are s(1 + sqrt(1 - .9/1.1)), s(2 + sqrt(.4)), s(sqrt(.52) - .2) (o = .1)."""
    least = min(1 + math.sqrt(1 - 0.9 / 1.1), 2 + math.sqrt(0.4), 0.5 * (-0.4 + math.sqrt(0.16 + 4 * 0.4 * 0.9)))
    assert gaussian_radius(5.0, 5.0, 0.1) == pytest.approx(5 * least)
    assert gaussian_radius(2.0, 6.0) == gaussian_radius(6.0, 2.0)


def test_heat_is_one_at_the_centre_and_a_gaussian_around() -> None:
    heat = center_targets(some_boxes(), LABELS, CONFIG, low_m=LOW, shape=SHAPE)[0].heat
    assert heat.shape == (1, 1, *SHAPE)
    # x 1.0 m / 0.8 m: column 1; y (0.3 + 3.2) m / 0.8 m: row 4. Radius 2 cells, sigma 5/6.
    assert heat[0, 0, 4, 1] == 1
    assert heat[0, 0, 4, 2].item() == pytest.approx(math.exp(-1 / (2 * (5 / 6) ** 2)))
    assert heat[0, 0, 4, 4] == 0
    assert int((heat == 1).sum()) == 1


def test_overlapping_objects_take_the_larger_heat() -> None:
    boxes = some_boxes()
    both = center_targets(boxes, np.array([1, 1, 1, 0]), CONFIG, low_m=LOW, shape=SHAPE)[1].heat
    single = [
        center_targets(boxes, np.where(np.arange(4) == i, 1, 0), CONFIG, low_m=LOW, shape=SHAPE)[1].heat
        for i in range(3)
    ]
    assert torch.equal(both, torch.stack(single).amax(dim=0))


def test_targets_decode_to_the_boxes() -> None:
    boxes = some_boxes()
    targets = center_targets(boxes, LABELS, CONFIG, low_m=LOW, shape=SHAPE)
    found = detections_from_maps({k: v.numpy() for k, v in perfect_maps(targets).items()}, CONFIG)
    assert sorted(found.labels.tolist()) == [0, 1, 2]  # the fourth lies outside the map
    for row, label in enumerate(found.labels):
        source = int(np.flatnonzero(label == LABELS)[0])
        np.testing.assert_allclose(found.boxes.centre[row], boxes.centre[source], atol=1e-5)
        np.testing.assert_allclose(found.boxes.size[row], boxes.size[source], rtol=1e-5)
        assert abs(math.remainder(float(found.boxes.yaw[row] - boxes.yaw[source]), math.tau)) < 1e-5


def test_perfect_maps_cost_nothing_and_one_wrong_metre_a_known_price() -> None:
    targets = center_targets(some_boxes(), LABELS, CONFIG, low_m=LOW, shape=SHAPE)
    maps = perfect_maps(targets)
    losses = center_losses(maps, targets, BRANCHES)
    assert losses.box.item() == pytest.approx(0, abs=1e-6)
    maps["1.center_z"] = maps["1.center_z"] + 1.0
    # one metre on each of the task's objects: their mean times the weight of boxes
    assert center_losses(maps, targets, BRANCHES).box.item() == pytest.approx(0.25, abs=1e-6)


def test_focal_loss_by_hand() -> None:
    """Three cells at score 0.5: a centre, heat 0.5, heat 0; the sum over the one centre."""
    heat = torch.tensor([1.0, 0.5, 0.0])
    expected = math.log(2) * 0.25 * (1 + 0.5**4 + 1)
    assert focal_loss(torch.zeros(3), heat).item() == pytest.approx(expected, rel=1e-6)
    # without a centre nothing is divided
    assert focal_loss(torch.zeros(2), heat[1:]).item() == pytest.approx(math.log(2) * 0.25 * (0.5**4 + 1), rel=1e-6)


def test_focal_loss_survives_sure_mistakes() -> None:
    logits = torch.tensor([-200.0, 200.0], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == pytest.approx(400.0)
    assert torch.isfinite(logits.grad).all()


def test_a_batch_numbers_its_cells_frame_by_frame() -> None:
    first = center_targets(some_boxes(), LABELS, CONFIG, low_m=LOW, shape=SHAPE)
    second = center_targets(some_boxes(), LABELS[::-1].copy(), CONFIG, low_m=LOW, shape=SHAPE)
    both = collate([first, second])
    maps = perfect_maps(both)
    assert center_losses(maps, both, BRANCHES).box.item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(values_at(maps["1.center"], both[1].cells), both[1].values[:, :2])
    with pytest.raises(InternalError, match="no frames"):
        collate([])


def test_a_frame_without_objects_has_targets_and_a_finite_loss() -> None:
    empty = Boxes3D(
        centre=np.zeros((0, 3), np.float32),
        size=np.zeros((0, 3), np.float32),
        yaw=np.zeros(0, np.float32),
        velocity=np.zeros((0, 2), np.float32),
    )
    targets = center_targets(empty, np.zeros(0, np.int64), CONFIG, low_m=LOW, shape=SHAPE)
    losses = center_losses(perfect_maps(targets), targets, BRANCHES)
    assert losses.box.item() == 0
    assert math.isfinite(losses.total.item())
