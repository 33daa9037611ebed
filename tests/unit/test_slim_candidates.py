"""Channels with and without blocks: each allocation is considered once, by the name of what it did."""

from __future__ import annotations

import numpy as np
import pytest

from dm3d_deploy.pruning.channels import GroupCurve
from dm3d_deploy.pruning.contracts import Budget, Layer
from dm3d_deploy.pruning.groups import channel_groups
from dm3d_deploy.steps.slim import Whole, candidates_within

BLOCK = "backbone_3d.conv1.0"


def sparse(name, inputs):
    return Layer(name=name, part="3d", kind="sparse", shape=(8, 3, 3, 3, inputs), positions=np.full(27, 10.0))


LAYERS = (sparse("backbone_3d.conv_input.0", 4), sparse(f"{BLOCK}.conv1", 8), sparse(f"{BLOCK}.conv2", 8))
INNER = GroupCurve(
    group=f"{BLOCK}.conv1", order=np.arange(8), widths=np.array([8, 4, 2]), distortion=np.array([0.0, 0.2, 1.0])
)


@pytest.mark.parametrize(("loss", "names"), [(0.01, ["channels and blocks", "channels"]), (99.0, ["channels"])])
def test_a_block_that_stays_makes_no_second_candidate(loss, names):
    whole = Whole(
        every=LAYERS, layers=LAYERS, groups=channel_groups(LAYERS), curves={INNER.group: INNER}, blocks={BLOCK: loss}
    )
    budget = Budget(value=0.6, denominator=sum(layer.macs for layer in LAYERS), unit="executed")
    found = candidates_within(whole, budget, curves=(), offered=set(), scores={})
    assert [candidate.name for candidate in found] == names
    assert [bool(candidate.allocation.dropped) for candidate in found] == [name.endswith("blocks") for name in names]
