"""VoxelNeXt: a sparse backbone down to a 2D sparse map, and a head that speaks at its cells only.

A 2D sparse layer is a 3D one over a grid of one cell along z, with its weights [Cout, ky, kx, Cin].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dm3d_deploy.config import Backbone3dConfig, Branch, CenterHeadConfig
from dm3d_deploy.geometry.center_boxes import EMPTY_LOGIT
from dm3d_deploy.models.backbone3d import ConvNormReLU, SparseBackbone, SparseBasicBlock, down_stage, sites_only
from dm3d_deploy.models.sparse import (
    KernelMap,
    SparseConv3d,
    SparseConvolution,
    SparseTensor,
    SubMConv3d,
    Triple,
    cell_keys,
    cells_of,
)

MERGED = ("conv4", "conv5", "conv6")
FLAT = ("conv_out", "shared_conv")


class SubMConv2d(SubMConv3d):
    """Sub-manifold convolution over a flat grid."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, indice_key: str) -> None:
        super().__init__(in_channels, out_channels, (1, size, size), indice_key=indice_key, bias=True)
        self.weight = nn.Parameter(self.weight.detach()[:, 0].clone())


class PointConv2d(SubMConv2d):
    """A kernel of one cell: a product with `weight` read as [Cin, Cout], although its shape is [Cout, 1, 1, Cin].

    spconv 2 does so (https://github.com/traveller59/spconv/issues/450), in training as well, and so do checkpoints.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, indice_key="cells")

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Multiply."""
        matrix = self.weight.view(self.in_channels, self.out_channels)
        product = x.features @ matrix
        return x.with_features(product if self.bias is None else product + self.bias)


class SparseConv2d(SparseConv3d):
    """Convolution of stride 1 over a flat grid: cells become active around those that are."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, indice_key: str) -> None:
        kernel, padding = (1, size, size), (0, size // 2, size // 2)
        super().__init__(
            in_channels, out_channels, kernel, stride=(1, 1, 1), padding=padding, indice_key=indice_key
        )  # fmt: skip
        self.weight = nn.Parameter(self.weight.detach()[:, 0].clone())


class VoxelNeXtBackbone(SparseBackbone):
    """VoxelResBackBone8xVoxelNeXt: six stages; the last three, brought to the cells of conv4, are added up over z."""

    def __init__(self, config: Backbone3dConfig, in_channels: int, shape_zyx: Triple) -> None:
        nn.Module.__init__(self)  # the plain backbone's layers have other paddings and another end
        first, c1, c2, c3, c4, last = config.channels
        self.shape_zyx = shape_zyx
        self.conv_input = ConvNormReLU(SubMConv3d(in_channels, first, (3, 3, 3), indice_key="stage1"))
        self.conv1 = nn.Sequential(*(SparseBasicBlock(c1, indice_key="stage1") for _ in range(config.blocks)))
        widths = (c1, c2, c3, c4, c4, c4)
        for stage, (before, channels) in enumerate(pairwise(widths), start=2):
            made = down_stage(SparseBasicBlock, before, channels, config.blocks, f"stage{stage}", padding=(1, 1, 1))
            self.add_module(f"conv{stage}", made)
        self.conv_out = ConvNormReLU(SparseConv2d(c4, last, 3, indice_key="out"))
        self.shared_conv = ConvNormReLU(SubMConv2d(last, last, 3, indice_key="shared"), nn.BatchNorm1d(last))

    @property
    def out_shape_zyx(self) -> Triple:
        """The flat grid of conv4's cells."""
        height, width = self.shape_zyx[1:]
        for _ in range(3):
            height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
        return 1, height, width

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Features of `shared_conv` and a last column of ones, so that a dense map tells which cells are active."""
        x = self.conv1(self.conv_input(x))
        stages = []
        for stage in range(2, 7):
            x = self.get_submodule(f"conv{stage}")(x)
            stages.append(x)
        out: SparseTensor = self.shared_conv(self.conv_out(merged(stages[-len(MERGED) :])))
        return out.with_features(torch.cat([out.features, out.features.new_ones(len(out.features), 1)], dim=1))

    def kernel_maps(self, x: SparseTensor) -> Iterator[tuple[str, SparseConvolution, SparseTensor, KernelMap]]:
        """All convolutions in forward order: name, convolution, the cells that it reads, and its map."""
        ends = []
        for stage in ("conv_input", *(f"conv{number}" for number in range(1, 7))):
            for name, conv in self.convolutions():
                if name.startswith(f"{stage}."):
                    kernel_map = conv.kernel_map(x)
                    yield name, conv, x, kernel_map
                    x = sites_only(x.at(kernel_map, x.features))
            ends.append(x)
        x = merged(ends[-len(MERGED) :])
        for name, conv in self.convolutions():
            if name.startswith(FLAT):
                kernel_map = conv.kernel_map(x)
                yield name, conv, x, kernel_map
                x = sites_only(x.at(kernel_map, x.features))


def merged(stages: Sequence[SparseTensor]) -> SparseTensor:
    """The sum over z of stages whose cells are 1, 2, 4, ... cells of the first wide; raster order."""
    shape = (1, *stages[0].shape_zyx[1:])
    cells = []
    for power, stage in enumerate(stages):
        batch, _, y, x = stage.coords.unbind(1)
        cells.append(torch.stack((batch, torch.zeros_like(y), y << power, x << power), dim=1))
    keys, rows = torch.unique(cell_keys(torch.cat(cells), shape), return_inverse=True)
    features = torch.cat([stage.features for stage in stages])
    total = features.new_zeros(len(keys), features.shape[1]).index_add(0, rows, features)
    first = stages[0]
    return SparseTensor(total, cells_of(keys, shape), shape, first.batch_size, first.maps)


class SparseSeparateHead(nn.Module):
    """The branches of one task, pointwise; each is a child named as the branch."""

    def __init__(self, channels: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.names = tuple(branch.name for branch in branches)
        for branch in branches:
            hidden = [
                ConvNormReLU(PointConv2d(channels, channels), nn.BatchNorm1d(channels)) for _ in range(branch.convs - 1)
            ]
            final = PointConv2d(channels, branch.channels)
            self.add_module(branch.name, nn.Sequential(*hidden, final))


class SparseCenterHead(nn.Module):
    """VoxelNeXtHead with kernels of one cell. Cells that are not active say EMPTY_LOGIT in heat maps and else 0."""

    def __init__(self, config: CenterHeadConfig) -> None:
        super().__init__()
        self.heads_list = nn.ModuleList(
            SparseSeparateHead(config.shared_channels, branches) for branches in config.branches
        )

    def forward(self, bev: Float[Tensor, "batch features h w"]) -> dict[str, Float[Tensor, "batch channels h w"]]:
        """Raw outputs by "TASK.BRANCH"; the last channel of `bev` is 1 at active cells."""
        batch_size, _, height, width = bev.shape
        rows = bev.permute(0, 2, 3, 1).flatten(0, 2)
        active = (rows[:, -1] > 0).nonzero().squeeze(1)
        shape = (1, height, width)
        x = SparseTensor(rows[active, :-1], cells_of(active, shape), shape, batch_size)
        found = {}
        for task, head in enumerate(cast("Iterable[SparseSeparateHead]", self.heads_list)):
            for name in head.names:
                values = head.get_submodule(name)(x).features
                fill = EMPTY_LOGIT if name == "hm" else 0.0
                flat = values.new_full((len(rows), values.shape[1]), fill).index_copy(0, active, values)
                found[f"{task}.{name}"] = flat.view(batch_size, height, width, -1).permute(0, 3, 1, 2).contiguous()
        return found
