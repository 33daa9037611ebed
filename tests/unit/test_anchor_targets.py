"""Anchors, their targets and losses, against numbers worked out by hand from OpenPCDet's formulas."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dm3d_deploy.config import AnchorHeadConfig, ClassAnchors, DirectionConfig, load_config
from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.anchors import (
    anchor_maps,
    anchor_places,
    boxes_from_residuals,
    cell_anchors,
    directed,
    from_fold,
    residuals_from_boxes,
)
from dm3d_deploy.pointcloud import Boxes3D
from dm3d_deploy.training.anchor_losses import anchor_losses, focal_loss, residual_loss
from dm3d_deploy.training.anchor_targets import anchor_targets, collate_anchors, nearest_bev_iou

DIRECTION = DirectionConfig(bins=2, offset_rad=0.78539, limit_offset=0.0)


def head_of(*, align=False, direction=DIRECTION):
    """Two classes; at each cell two anchors of a 4 x 2 m car, then two of a 1 x 1 m walker."""
    shared = {"rotations_rad": (0.0, math.pi / 2), "align_center": align}
    car = ClassAnchors(
        class_name="Car", sizes_m=((4.0, 2.0, 1.5),), bottom_m=-2.0, matched=0.6, unmatched=0.45, **shared
    )
    walker = ClassAnchors(
        class_name="Pedestrian", sizes_m=((1.0, 1.0, 2.0),), bottom_m=-1.0, matched=0.5, unmatched=0.35, **shared
    )
    return AnchorHeadConfig(anchors=(car, walker), direction=direction, stride=2)


def config_of(head):
    """A map of 5 x 5 cells over 8 m: the anchors stand 2 m apart, from edge to edge."""
    whole = load_config("second")
    voxels = dataclasses.replace(whole.voxels, point_range_m=(0, -4, -3, 8, 4, 1), voxel_size_m=(0.8, 0.8, 0.1))
    return dataclasses.replace(whole, class_names=("Car", "Pedestrian"), head=head, voxels=voxels)


def boxes_of(*rows):
    values = np.array(rows, dtype=np.float32).reshape(-1, 7)
    return Boxes3D(
        centre=values[:, :3], size=values[:, 3:6], yaw=values[:, 6], velocity=np.zeros((len(values), 2), np.float32)
    )


def targets_of(boxes, labels, head=None, **window):
    head = head or head_of()
    return anchor_targets(boxes, np.array(labels, dtype=np.int64), config_of(head), head, **window)


def test_anchors_stand_from_edge_to_edge_or_in_the_middle_of_their_cells():
    head = head_of()
    x, y = anchor_places(config_of(head), head)
    np.testing.assert_allclose(x, np.tile([0, 2, 4, 6, 8], (4, 1)))
    np.testing.assert_allclose(y, np.tile([-4, -2, 0, 2, 4], (4, 1)))
    centred = head_of(align=True)
    x, _ = anchor_places(config_of(centred), centred)
    np.testing.assert_allclose(x[0], [0.8, 2.4, 4.0, 5.6, 7.2])
    np.testing.assert_allclose(cell_anchors(head)[0], [-1.25, 4, 2, 1.5, 0])
    np.testing.assert_allclose(cell_anchors(head)[3], [0, 1, 1, 2, math.pi / 2])


def test_residuals_are_those_of_residual_coder_and_come_back():
    anchors = np.array([[1.0, 2.0, -1.25, 4.0, 3.0, 1.5, 0.1]])
    boxes = np.array([[2.0, 1.0, -0.5, 8.0, 1.5, 3.0, 0.6]])
    residuals = residuals_from_boxes(boxes, anchors)
    np.testing.assert_allclose(residuals, [[0.2, -0.2, 0.5, math.log(2), -math.log(2), math.log(2), 0.5]])
    back = boxes_from_residuals(residuals, anchors)
    np.testing.assert_allclose(np.concatenate([back[:, :3], np.exp(back[:, 3:6]), back[:, 6:]], axis=1), boxes)


@pytest.mark.parametrize(("yaw", "direction", "wanted"), [(0.0, 0, math.pi), (0.0, 1, 2 * math.pi), (1.0, 0, 1.0)])
def test_a_direction_turns_the_yaw_by_half_turns(yaw, direction, wanted):
    # 0 lies before the first bin, which begins at 45 degrees: OpenPCDet answers pi in it and 2 pi in the second.
    np.testing.assert_allclose(directed(np.array([yaw]), np.array([direction]), DIRECTION), [wanted])


@pytest.mark.parametrize(("yaw", "wanted"), [(0.78539, 0.0), (0.77539, 0.01), (0.80539 + 7 * math.pi, 0.02)])
def test_a_yaw_next_to_the_fold_is_turned_by_rounding(yaw, wanted):
    np.testing.assert_allclose(from_fold(np.array([yaw]), DIRECTION), [wanted], atol=1e-12)
    fold = yaw - wanted if yaw > 0.78539 else yaw + wanted
    near = directed(np.array([fold - 1e-6, fold + 1e-6]), np.array([0, 0]), DIRECTION)
    assert abs(near[1] - near[0]) > 3


def test_overlap_is_that_of_boxes_turned_to_the_nearer_axis():
    a = np.array([[0, 0, 0, 4, 2, 1, 0.3]])
    b = np.array([[1, 0, 0, 4, 2, 1, 0.0], [0, 0, 0, 4, 2, 1, math.pi / 2 + 0.1], [9, 9, 0, 1, 1, 1, 0]])
    np.testing.assert_allclose(nearest_bev_iou(a, b), [[6 / 10, 4 / 12, 0]])


def test_matched_forced_ignored_and_background_anchors():
    # On an anchor of the car: IoU 1. Its neighbours 2 m ahead and behind: 2 * 2 / 12 = 1/3, background.
    # The turned anchor at the same place: 2 * 2 / 12, background.
    targets = targets_of(boxes_of([4, 0, -1, 4, 2, 1.5, 0.2]), [0])
    classes = targets.classes.view(5, 5, 4)
    assert classes[2, 2, 0] == 1
    assert classes.clamp(min=0).sum() == 1
    assert (classes == -1).sum() == 0
    np.testing.assert_allclose(targets.residuals.view(5, 5, 4, 7)[2, 2, 0], [0, 0, 0.25 / 1.5, 0, 0, 0, 0.2], atol=1e-6)
    # 0.6 m to the side: 4 * 1.4 / (16 - 5.6) = .538, below .6 and above .45; the best there is, so it is forced.
    shifted = targets_of(boxes_of([4, 0.6, -1, 4, 2, 1.5, 0.0]), [0]).classes.view(5, 5, 4)
    assert shifted[2, 2, 0] == 1


def test_an_anchor_no_object_claims_is_ignored_between_the_thresholds():
    # Cars at x = 4 (IoU 1 with that anchor) and a long one from x = 3.8 to 8.6 whose best anchor is x = 6 (4 / 4.8).
    # The anchor at x = 8 shares 2.6 of 4 m with it: 5.2 / (8 + 9.6 - 5.2) = .419 < .45 is background; made longer it
    # shares 3.2 m of 6: 6.4 / (8 + 12 - 6.4) = .47, ignored.
    near = targets_of(boxes_of([6.2, 0, -1, 4.8, 2, 1.5, 0]), [0]).classes.view(5, 5, 4)
    assert near[2, :, 0].tolist() == [0, 0, 0, 1, 0]
    far = targets_of(boxes_of([6.2, 0, -1, 6.0, 2, 1.5, 0]), [0]).classes.view(5, 5, 4)
    assert far[2, :, 0].tolist() == [0, 0, 0, 1, -1]


def test_no_object_makes_all_background_and_windows_are_parts_of_the_whole():
    assert (targets_of(boxes_of(), []).classes == 0).all()
    boxes = boxes_of([4, 0, -1, 4, 2, 1.5, 0.2], [6, 2, 0, 1, 1, 2, 2.0])
    whole = targets_of(boxes, [0, 1])
    part = targets_of(boxes, [0, 1], first=(1, 2), shape=(3, 3))
    cut = whole.classes.view(5, 5, 4)[1:4, 2:5].reshape(1, -1)
    assert torch.equal(part.classes, cut)
    assert torch.equal(part.residuals, whole.residuals.view(5, 5, 4, 7)[1:4, 2:5].reshape(1, -1, 7))
    assert collate_anchors([whole, whole]).directions.shape == (2, 100)
    with pytest.raises(InternalError, match=r"a window of 3 x 3 cells from \(3, 0\) leaves the map"):
        targets_of(boxes, [0, 1], first=(3, 0), shape=(3, 3))
    with pytest.raises(InternalError, match="a batch of no frames"):
        collate_anchors([])


@pytest.mark.parametrize(("yaw", "wanted"), [(0.0, 1), (0.8, 0), (3.0, 0), (-2.5, 0), (-2.3, 1), (math.pi, 0)])
def test_directions_are_half_turns_from_45_degrees(yaw, wanted):
    targets = targets_of(boxes_of([4, 0, -1, 4, 2, 1.5, yaw]), [0])
    owned = targets.classes[0] == 1
    assert set(targets.directions[0][owned].tolist()) == {wanted}


def test_losses_by_hand():
    # one anchor asked for class 1 of 2, one background, one ignored; sigmoid(0) = .5, -log .5 = log 2
    logits = torch.zeros(1, 3, 2)
    loss = focal_loss(logits, torch.tensor([[1, 0, -1]]))
    one = 0.25 * 0.25 * math.log(2)
    other = 0.75 * 0.25 * math.log(2)
    np.testing.assert_allclose(loss[0], [one + other, 2 * other, 0], rtol=1e-6)
    found = torch.tensor([[[0.05, 0.5, 0, 0, 0, 0, math.pi + 0.2]]])
    hand = 0.5 * 0.05**2 * 9 + (0.5 - 1 / 18) + (math.sin(0.2) - 1 / 18)
    np.testing.assert_allclose(residual_loss(found, torch.zeros(1, 1, 7))[0, 0], hand, rtol=1e-5)


def test_the_whole_loss_by_hand():
    head = head_of()
    targets = targets_of(boxes_of([4, 0, -1.25, 4, 2, 1.5, 0.0]), [0], head)
    whole = {"cls": torch.zeros(1, 8, 5, 5), "box": torch.full((1, 28, 5, 5), 0.5), "dir": torch.zeros(1, 8, 5, 5)}
    losses = anchor_losses(anchor_maps(whole, 4), targets, head)
    background = 0.75 * 0.25 * math.log(2)
    heat = 99 * 2 * background + background + 0.25 * 0.25 * math.log(2)
    box = 2 * (6 * (0.5 - 1 / 18) + math.sin(0.5) - 1 / 18) + 0.2 * math.log(2)
    np.testing.assert_allclose(losses.heat, heat, rtol=1e-5)
    np.testing.assert_allclose(losses.box, box, rtol=1e-5)
    blind = head_of(direction=None)
    del whole["dir"]
    losses = anchor_losses(
        anchor_maps(whole, 4), targets_of(boxes_of([4, 0, -1.25, 4, 2, 1.5, 0.0]), [0], blind), blind
    )
    np.testing.assert_allclose(losses.box, box - 0.2 * math.log(2), rtol=1e-5)
