"""VoxelResBackBone8x and VoxelBackBone8x: the sparse backbones, residual and plain, with OpenPCDet's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dm3d_deploy.config import Backbone3dConfig
from dm3d_deploy.models.sparse import (
    KernelMap,
    SparseConv3d,
    SparseConvolution,
    SparseTensor,
    SubMConv3d,
    Triple,
    cell_keys,
    output_shape,
)

NORM_EPS = 1e-3
NORM_MOMENTUM = 0.01
CUBE: Triple = (3, 3, 3)
DOWN: Triple = (2, 2, 2)


def _norm(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=NORM_EPS, momentum=NORM_MOMENTUM)


class ConvNormReLU(nn.Sequential):
    """Sparse convolution, batch norm and ReLU, named 0, 1, 2; the norm is the backbone's unless another is given."""

    def __init__(self, conv: SparseConvolution, norm: nn.BatchNorm1d | None = None) -> None:
        super().__init__(conv, _norm(conv.out_channels) if norm is None else norm, nn.ReLU(inplace=True))

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Apply to the features."""
        conv, norm, relu = self
        out: SparseTensor = conv(x)
        return out.with_features(relu(norm(out.features)))


class SparseBasicBlock(nn.Module):
    """Two sub-manifold convolutions and the identity. Its convolutions carry biases before the norm."""

    def __init__(self, channels: int, *, indice_key: str) -> None:
        super().__init__()
        self.conv1 = SubMConv3d(channels, channels, CUBE, indice_key=indice_key, bias=True)
        self.bn1 = _norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = SubMConv3d(channels, channels, CUBE, indice_key=indice_key, bias=True)
        self.bn2 = _norm(channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Apply to the features."""
        hidden: SparseTensor = self.conv1(x)
        hidden = hidden.with_features(self.relu(self.bn1(hidden.features)))
        hidden = self.conv2(hidden)
        out: Tensor = self.relu(self.bn2(hidden.features) + x.features)
        return hidden.with_features(out)


class SparseBackbone(nn.Module):
    """Eight-fold down-sampling in x and y, about twenty-fold in z; see OpenPCDet's spconv_backbone.py.

    `shape_zyx` is the sparse grid: one more cell along z than the voxel grid has. Residual or plain, by the config.
    """

    def __init__(self, config: Backbone3dConfig, in_channels: int, shape_zyx: Triple) -> None:
        super().__init__()
        first, c1, c2, c3, c4, last = config.channels
        self.shape_zyx = shape_zyx
        self.conv_input = ConvNormReLU(SubMConv3d(in_channels, first, CUBE, indice_key="stage1"))
        plain = config.name == "VoxelBackBone8x"
        block = _plain_block if plain else SparseBasicBlock
        if plain:
            self.conv1 = nn.Sequential(ConvNormReLU(SubMConv3d(first, c1, CUBE, indice_key="stage1")))
        else:
            self.conv1 = nn.Sequential(*_blocks(block, c1, config.blocks, "stage1"))
        self.conv2 = down_stage(block, c1, c2, config.blocks, "stage2", padding=(1, 1, 1))
        self.conv3 = down_stage(block, c2, c3, config.blocks, "stage3", padding=(1, 1, 1))
        self.conv4 = down_stage(block, c3, c4, config.blocks, "stage4", padding=(0, 1, 1))
        self.conv_out = ConvNormReLU(
            SparseConv3d(c4, last, (3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0), indice_key="out")
        )

    def convolutions(self) -> Iterator[tuple[str, SparseConvolution]]:
        """All sparse convolutions in forward order, with their names inside the backbone."""
        for name, module in self.named_modules():
            if isinstance(module, SparseConvolution):
                yield name, module

    def kernel_maps(self, x: SparseTensor) -> Iterator[tuple[str, SparseConvolution, SparseTensor, KernelMap]]:
        """All convolutions in forward order: name, convolution, the cells that it reads, and its map."""
        for name, conv in self.convolutions():
            kernel_map = conv.kernel_map(x)
            yield name, conv, x, kernel_map
            x = sites_only(x.at(kernel_map, x.features))

    @property
    def out_shape_zyx(self) -> Triple:
        """The grid after `conv_out`."""
        shape = self.shape_zyx
        for _, conv in self.convolutions():
            if isinstance(conv, SparseConv3d):
                shape = output_shape(shape, conv.kernel, conv.stride, conv.padding)
        return shape

    def stages(self, x: SparseTensor) -> dict[str, SparseTensor]:
        """Features of "x_conv1" to "x_conv4", as OpenPCDet calls them, and of `conv_out`, "out"."""
        found = {"x_conv1": self.conv1(self.conv_input(x))}
        for name, before in (("conv2", "x_conv1"), ("conv3", "x_conv2"), ("conv4", "x_conv3")):
            found[f"x_{name}"] = self.get_submodule(name)(found[before])
        found["out"] = self.conv_out(found["x_conv4"])
        return found

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Features of `conv_out`."""
        return self.stages(x)["out"]


def _plain_block(channels: int, *, indice_key: str) -> nn.Module:
    return ConvNormReLU(SubMConv3d(channels, channels, CUBE, indice_key=indice_key))


def _blocks(block: Callable[..., nn.Module], channels: int, count: int, indice_key: str) -> list[nn.Module]:
    return [block(channels, indice_key=indice_key) for _ in range(count)]


def down_stage(
    block: Callable[..., nn.Module], in_channels: int, channels: int, blocks: int, name: str, *, padding: Triple
) -> nn.Sequential:
    """A strided convolution and `blocks` blocks behind it, as OpenPCDet's conv2 to conv6 are."""
    down = SparseConv3d(in_channels, channels, CUBE, stride=DOWN, padding=padding, indice_key=f"{name}_down")
    return nn.Sequential(ConvNormReLU(down), *_blocks(block, channels, blocks, name))


def bev_from_sparse(x: SparseTensor) -> Float[Tensor, "batch channels_depth height width"]:
    """HeightCompression: a dense map whose channel c * depth + z is channel c at height z; empty cells are zero."""
    depth, height, width = x.shape_zyx
    channels = x.features.shape[1]
    rows = x.features.new_zeros(x.batch_size * depth * height * width, channels)
    rows = rows.index_copy(0, cell_keys(x.coords, x.shape_zyx), x.features)
    cells = rows.view(x.batch_size, depth, height, width, channels)
    return cells.permute(0, 4, 1, 2, 3).reshape(x.batch_size, channels * depth, height, width)


def sites_only(x: SparseTensor) -> SparseTensor:
    """The same cells without features: enough to build kernel maps."""
    return x.with_features(torch.empty(len(x.coords), 0, device=x.coords.device))
