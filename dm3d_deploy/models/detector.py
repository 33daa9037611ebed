"""The whole CenterPoint detector from mean voxel features to raw head maps, and the list of what can be pruned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.errors import InternalError, UsageError
from dm3d_deploy.models.backbone2d import BaseBEVBackbone
from dm3d_deploy.models.backbone3d import VoxelResBackBone8x, bev_from_sparse, sites_only
from dm3d_deploy.models.center_head import CenterHead
from dm3d_deploy.models.sparse import SparseConvolution, SparseTensor
from dm3d_deploy.pointcloud import Voxels


class Detector(nn.Module):
    """CenterPoint after voxelisation; parameter names are those of OpenPCDet's checkpoints."""

    global_step: Tensor

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        depth, height, width = config.voxels.grid_zyx
        self.config = config
        # OpenPCDet keeps its step counter in every checkpoint.
        self.register_buffer("global_step", torch.zeros(1, dtype=torch.int64))
        self.backbone_3d = VoxelResBackBone8x(
            config.backbone_3d, len(config.voxels.columns), (depth + 1, height, width)
        )
        self.backbone_2d = BaseBEVBackbone(config.backbone_2d, config.bev_channels)
        self.dense_head = CenterHead(config.head, sum(config.backbone_2d.upsample_filters))

    def backbone_to_bev(
        self, features: Float[Tensor, "voxels columns"], coords: Int64[Tensor, "voxels 4"], batch_size: int = 1
    ) -> Float[Tensor, "batch bev_channels height width"]:
        """The 3D backbone's output as a bird's-eye view."""
        return bev_from_sparse(self.backbone_3d(self._sparse(features, coords, batch_size)))

    def bev_to_heads(
        self, bev: Float[Tensor, "batch bev_channels height width"]
    ) -> dict[str, Float[Tensor, "batch channels h w"]]:
        """Raw convolution outputs of the head: keys "0.center", "0.center_z", ..., "5.hm"."""
        heads: dict[str, Tensor] = self.dense_head(self.backbone_2d(bev))
        return heads

    def forward(
        self, features: Float[Tensor, "voxels columns"], coords: Int64[Tensor, "voxels 4"], batch_size: int = 1
    ) -> dict[str, Float[Tensor, "batch channels h w"]]:
        """Raw head maps from mean voxel features."""
        return self.bev_to_heads(self.backbone_to_bev(features, coords, batch_size))

    def _sparse(self, features: Tensor, coords: Tensor, batch_size: int) -> SparseTensor:
        shape = self.backbone_3d.shape_zyx
        if coords.dtype != torch.int64 or coords.shape != (len(features), 4):
            raise InternalError(f"voxel coordinates are {coords.dtype} {tuple(coords.shape)}, not int64 [N, 4]")
        limits = torch.tensor((batch_size, *shape), device=coords.device)
        if bool(((coords < 0) | (coords >= limits)).any()):
            raise InternalError(f"a voxel lies outside the grid {shape} or the batch of {batch_size}")
        return SparseTensor(features, coords, shape, batch_size)


def build_detector(config: DetectorConfig) -> Detector:
    """A detector in eval mode, its sparse weights zero: load a checkpoint or seed it. UsageError if it cannot exist."""
    first, stage1 = config.backbone_3d.channels[:2]
    if first != stage1:
        raise UsageError(
            f"conv_input of {config.name} has {first} channels and conv1 has {stage1}: a residual stage keeps its "
            "channels.",
            fix="make the first two numbers of CHANNELS equal",
        )
    return Detector(config).eval()


def tensors_from_voxels(
    voxels: Voxels, device: torch.device | str = "cpu"
) -> tuple[Float32[Tensor, "voxels columns"], Int64[Tensor, "voxels 4"]]:
    """A frame's voxels as the detector's inputs."""
    features = torch.from_numpy(np.ascontiguousarray(voxels.features)).to(device)
    return features, torch.from_numpy(voxels.coords.astype(np.int64)).to(device)


@torch.no_grad()
def sparse_pair_counts(detector: Detector, coords: Int64[Tensor, "voxels 4"]) -> dict[str, Int64[np.ndarray, " taps"]]:
    """Pairs per tap of every sparse convolution, by name, without computing a feature."""
    batch_size = int(coords[:, 0].max()) + 1 if len(coords) else 1
    empty = torch.empty(len(coords), 0, device=coords.device)
    x = sites_only(detector._sparse(empty, coords, batch_size))
    counts = {}
    for name, conv in detector.backbone_3d.convolutions():
        kernel_map = conv.kernel_map(x)
        counts[f"backbone_3d.{name}"] = kernel_map.pair_counts
        x = sites_only(x.at(kernel_map, x.features))
    return counts


Norm = nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True, slots=True, eq=False)
class PrunableLayer:
    """A layer with weights: where it is, what it is, and the batch norm that follows it.

    `part` is "3d", "2d" or "head"; `kind` is "sparse", "conv2d" or "deconv2d"; `final` marks a branch's last layer.
    """

    name: str
    part: str
    kind: str
    module: nn.Module
    norm: Norm | None
    norm_name: str | None
    final: bool

    @property
    def weight(self) -> Tensor:
        """The layer's weights."""
        weight = self.module.weight
        if not isinstance(weight, Tensor):
            raise InternalError(f"{self.name} has no weights")
        return weight

    @property
    def output_dim(self) -> int:
        """The dimension of `weight` that runs over output channels."""
        return 1 if self.kind == "deconv2d" else 0


KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (SparseConvolution, "sparse"),
    (nn.Conv2d, "conv2d"),
    (nn.ConvTranspose2d, "deconv2d"),
)


def prunable_layers(detector: Detector) -> tuple[PrunableLayer, ...]:
    """Every layer with weights, in forward order: the 3D backbone, the 2D backbone, the head."""
    blocks = range(len(detector.backbone_2d.blocks))
    flat = [f"backbone_2d.{kind}.{i}" for i in blocks for kind in ("blocks", "deblocks")]
    layers = list(_layers(detector, "backbone_3d", "3d"))
    for scope in flat:
        layers += _layers(detector, scope, "2d")
    return (*layers, *_layers(detector, "dense_head", "head"))


def _layers(detector: Detector, scope: str, part: str) -> Iterator[PrunableLayer]:
    """The layers below one module: in all of them the norm of a convolution is registered right behind it."""
    leaves = [
        (f"{scope}.{name}", module)
        for name, module in detector.get_submodule(scope).named_modules()
        if not list(module.children())
    ]
    for (name, module), (next_name, following) in zip(leaves, [*leaves[1:], ("", nn.Identity())], strict=True):
        kind = next((kind for cls, kind in KINDS if isinstance(module, cls)), None)
        if kind is None:
            continue
        norm = following if isinstance(following, Norm) else None
        final = part == "head" and name.split(".")[-2] in _branch_names(detector)
        yield PrunableLayer(name, part, kind, module, norm, next_name if norm is not None else None, final)


def _branch_names(detector: Detector) -> set[str]:
    return {branch.name for branches in detector.config.head.branches for branch in branches}


def dense_positions(detector: Detector) -> dict[str, int]:
    """For every 2D layer: how many times each of its weights is multiplied for one frame.

    A convolution's weights meet every output cell; those of a deconvolution whose kernel is its stride, every input
    cell.
    """
    _, height, width = detector.backbone_3d.out_shape_zyx
    positions = {}
    size = (height, width)
    for i, stride in enumerate(detector.config.backbone_2d.strides):
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        for layer in _layers(detector, f"backbone_2d.blocks.{i}", "2d"):
            positions[layer.name] = height * width
        for layer in _layers(detector, f"backbone_2d.deblocks.{i}", "2d"):
            positions[layer.name] = height * width
        up = detector.config.backbone_2d.upsample_strides[i]
        size = (height * up, width * up)
    for layer in _layers(detector, "dense_head", "head"):
        positions[layer.name] = math.prod(size)
    return positions
