"""The whole detector from voxels or points to raw head maps, and the list of what can be pruned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from dm3d_deploy.config import VOXELNEXT, AnchorHeadConfig, CenterHeadConfig, DetectorConfig
from dm3d_deploy.errors import InternalError, UsageError
from dm3d_deploy.models.anchor_head import AnchorHeadSingle
from dm3d_deploy.models.backbone2d import BaseBEVBackbone
from dm3d_deploy.models.backbone3d import SparseBackbone, bev_from_sparse, sites_only
from dm3d_deploy.models.center_head import CenterHead
from dm3d_deploy.models.outputs import Outputs, Scene
from dm3d_deploy.models.pillars import PillarVFE
from dm3d_deploy.models.sparse import SparseConvolution, SparseTensor
from dm3d_deploy.models.voxelnext import SparseCenterHead, VoxelNeXtBackbone
from dm3d_deploy.pointcloud import Voxels


class Detector(nn.Module):
    """A detector after voxelisation; parameter names are those of OpenPCDet's checkpoints.

    It has a `backbone_3d` over voxels or a `vfe` over the points of pillars, as its config says.
    """

    global_step: Tensor
    backbone_3d: SparseBackbone
    vfe: PillarVFE

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        depth, height, width = config.voxels.grid_zyx
        columns = len(config.voxels.columns)
        self.config = config
        # OpenPCDet keeps its step counter in every checkpoint.
        self.register_buffer("global_step", torch.zeros(1, dtype=torch.int64))
        if config.pillars is not None:
            self.vfe = PillarVFE(config.pillars, columns, config.voxels.max_points_per_voxel)
        elif config.backbone_3d is not None:
            backbone = VoxelNeXtBackbone if config.backbone_3d.name == VOXELNEXT else SparseBackbone
            self.backbone_3d = backbone(config.backbone_3d, columns, (depth + 1, height, width))
        else:
            raise InternalError(f"{config.name} has neither a 3D backbone nor pillars")
        self.backbone_2d = BaseBEVBackbone(config.backbone_2d, config.bev_channels)
        features = sum(config.backbone_2d.upsample_filters)
        if isinstance(config.head, CenterHeadConfig):
            sparse = config.head.sparse
            self.dense_head: nn.Module = SparseCenterHead(config.head) if sparse else CenterHead(config.head, features)
        else:
            self.dense_head = AnchorHeadSingle(config.head, len(config.class_names), features)

    @property
    def over_pillars(self) -> bool:
        """Whether a frame comes as the points of pillars, one row a point, and not as voxels."""
        return self.config.pillars is not None

    @property
    def grid_zyx(self) -> tuple[int, int, int]:
        """The cells that coordinates may name."""
        return self.config.voxels.grid_zyx if self.over_pillars else self.backbone_3d.shape_zyx

    @property
    def bev_shape(self) -> tuple[int, int]:
        """Rows and columns of the bird's-eye view."""
        _, height, width = self.config.voxels.grid_zyx if self.over_pillars else self.backbone_3d.out_shape_zyx
        return height, width

    def backbone_to_bev(
        self, features: Float[Tensor, "rows columns"], coords: Int64[Tensor, "rows 4"], batch_size: int = 1
    ) -> Float[Tensor, "batch bev_channels height width"]:
        """The bird's-eye view that the 3D backbone, or the point network of the pillars, makes of a frame."""
        x = self._sparse(features, coords, batch_size)
        return bev_from_sparse(self.vfe(x) if self.over_pillars else self.backbone_3d(x))

    def bev_to_heads(
        self, bev: Float[Tensor, "batch bev_channels height width"]
    ) -> dict[str, Float[Tensor, "batch channels h w"]]:
        """Raw convolution outputs of the head by task, "0.center" to "5.hm", or by anchor of a cell, "0.cls"."""
        heads: dict[str, Tensor] = self.dense_head(self.backbone_2d(bev))
        return heads

    def outputs(
        self,
        features: Float[Tensor, "rows columns"],
        coords: Int64[Tensor, "rows 4"],
        batch_size: int = 1,
        scenes: Sequence[Scene] = (),
    ) -> Outputs:
        """All that is said of a batch; `scenes`, one a frame, are what a second stage reads beside the voxels."""
        bev = self.backbone_to_bev(features, coords, batch_size)
        return Outputs(bev=bev, maps=self.bev_to_heads(bev))

    def forward(
        self,
        features: Float[Tensor, "rows columns"],
        coords: Int64[Tensor, "rows 4"],
        batch_size: int = 1,
        scenes: Sequence[Scene] = (),
    ) -> dict[str, Float[Tensor, "batch channels h w"]]:
        """Raw head maps from mean voxel features, or from the points of pillars."""
        return self.outputs(features, coords, batch_size, scenes).maps

    def _sparse(self, features: Tensor, coords: Tensor, batch_size: int) -> SparseTensor:
        shape = self.grid_zyx
        if coords.dtype != torch.int64 or coords.shape != (len(features), 4):
            raise InternalError(f"voxel coordinates are {coords.dtype} {tuple(coords.shape)}, not int64 [N, 4]")
        limits = torch.tensor((batch_size, *shape), device=coords.device)
        if bool(((coords < 0) | (coords >= limits)).any()):
            raise InternalError(f"a voxel lies outside the grid {shape} or the batch of {batch_size}")
        return SparseTensor(features, coords, shape, batch_size)


def build_detector(config: DetectorConfig) -> Detector:
    """A detector in eval mode, its sparse weights zero: load a checkpoint or seed it. UsageError if it cannot exist."""
    residual = config.backbone_3d is not None and config.backbone_3d.name == "VoxelResBackBone8x"
    first, stage1 = config.backbone_3d.channels[:2] if config.backbone_3d is not None and residual else (0, 0)
    if first != stage1:
        raise UsageError(
            f"conv_input of {config.name} has {first} channels and conv1 has {stage1}: a residual stage keeps its "
            "channels.",
            fix="make the first two numbers of CHANNELS equal",
        )
    if config.second_stage is not None:
        from dm3d_deploy.models.two_stage import TwoStageDetector

        return TwoStageDetector(config).eval()
    return Detector(config).eval()


def tensors_from_voxels(
    voxels: Voxels, device: torch.device | str = "cpu"
) -> tuple[Float32[Tensor, "rows columns"], Int64[Tensor, "rows 4"]]:
    """A frame's voxels as the detector's inputs."""
    features = torch.from_numpy(np.ascontiguousarray(voxels.features)).to(device)
    return features, torch.from_numpy(voxels.coords.astype(np.int64)).to(device)


@torch.no_grad()
def sparse_pair_counts(detector: Detector, coords: Int64[Tensor, "voxels 4"]) -> dict[str, Int64[np.ndarray, " taps"]]:
    """Multiplied rows per tap of every layer before the bird's-eye view, by name, without computing a feature.

    Pairs of a sparse convolution. A pillar's linear layer has one tap: points, or with PillarVFE the places of pillars,
    padded ones too, as OpenPCDet multiplies them.
    """
    if detector.over_pillars:
        rows = detector.vfe.multiplied_rows(len(coords), len(torch.unique(coords, dim=0)))
        return {layer.name: np.array([rows]) for layer in _layers(detector, "vfe", "3d")}
    batch_size = int(coords[:, 0].max()) + 1 if len(coords) else 1
    empty = torch.empty(len(coords), 0, device=coords.device)
    x = sites_only(detector._sparse(empty, coords, batch_size))
    counts, sites = {}, {}
    for name, _, _, kernel_map in detector.backbone_3d.kernel_maps(x):
        counts[f"backbone_3d.{name}"] = kernel_map.pair_counts
        sites[f"x_{name.split('.')[0]}"] = len(kernel_map.out_coords)
    for layer in _layers(detector, "dense_head", "head"):
        if layer.kind == "sparse":
            counts[layer.name] = np.array([sites["x_shared_conv"]])
    if detector.config.second_stage is not None:
        from dm3d_deploy.models.two_stage import second_stage_rows

        names = [layer.name for scope in _second_scopes(detector) for layer in _layers(detector, scope, "head")]
        multiplied = second_stage_rows(detector.config, sites, names)
        counts |= {name: np.array([number]) for name, number in multiplied.items()}
    return counts


Norm = nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True, slots=True, eq=False)
class PrunableLayer:
    """A layer with weights: where it is, what it is, and the batch norm that follows it.

    `part` is "3d" (all before the bird's-eye view), "2d" or "head"; `kind` is "sparse", "linear", "conv2d" or
    "deconv2d"; `final` marks a branch's last layer.
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
    def pointwise(self) -> bool:
        """Whether this is a sparse kernel of one cell, whose weight spconv reads as [Cin, 1, 1, Cout]."""
        return self.kind == "sparse" and math.prod(self.weight.shape[1:-1]) == 1

    @property
    def read_shape(self) -> tuple[int, ...]:
        """The shape in which the weight multiplies: its own unless it is pointwise."""
        shape = tuple(self.weight.shape)
        return shape[::-1] if self.pointwise else shape

    @property
    def output_dim(self) -> int:
        """The dimension of `read_shape` that runs over output channels."""
        return -1 if self.pointwise else 1 if self.kind == "deconv2d" else 0

    @property
    def input_dim(self) -> int:
        """The dimension of `read_shape` that runs over input channels."""
        return 0 if self.pointwise else {"sparse": -1, "deconv2d": 0}.get(self.kind, 1)


KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (SparseConvolution, "sparse"),
    (nn.Linear, "linear"),
    (nn.Conv2d, "conv2d"),
    (nn.ConvTranspose2d, "deconv2d"),
)


def prunable_layers(detector: Detector) -> tuple[PrunableLayer, ...]:
    """Every layer with weights, in forward order: 3D backbone or pillars, 2D backbone, head, second stage."""
    blocks = range(len(detector.backbone_2d.blocks))
    flat = [f"backbone_2d.{kind}.{i}" for i in blocks for kind in ("blocks", "deblocks")]
    layers = list(_layers(detector, "vfe" if detector.over_pillars else "backbone_3d", "3d"))
    for scope in flat:
        layers += _layers(detector, scope, "2d")
    for scope in ("dense_head", *_second_scopes(detector)):
        layers += _layers(detector, scope, "head")
    return tuple(layers)


def _second_scopes(detector: Detector) -> tuple[str, ...]:
    """The modules of the second stage in forward order."""
    own = {name for name, _ in detector.named_children()}
    return tuple(name for name in ("pfe", "point_head", "roi_head") if name in own)


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
        final = part == "head" and _is_final(detector, name, norm)
        yield PrunableLayer(name, part, kind, module, norm, next_name if norm is not None else None, final)


def _is_final(detector: Detector, name: str, norm: nn.Module | None) -> bool:
    if not name.startswith("dense_head."):
        return norm is None  # of the second stage only what it says has no norm behind it
    head = detector.config.head
    if isinstance(head, AnchorHeadConfig):
        return True
    return name.split(".")[-2] in {branch.name for branches in head.branches for branch in branches}


def dense_positions(detector: Detector) -> dict[str, int]:
    """For every dense 2D layer: how many times each of its weights is multiplied for one frame.

    A convolution's weights meet every output cell; those of a deconvolution whose kernel is its stride, every input
    cell.
    """
    height, width = detector.bev_shape
    positions = {}
    size = (height, width)
    for i, stride in enumerate(detector.config.backbone_2d.strides):
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        for layer in _layers(detector, f"backbone_2d.blocks.{i}", "2d"):
            positions[layer.name] = height * width
        up = detector.config.backbone_2d.upsample_strides[i]
        size = (round(height * up), round(width * up))
        for layer in _layers(detector, f"backbone_2d.deblocks.{i}", "2d"):
            positions[layer.name] = math.prod(size) if layer.kind == "conv2d" else height * width
    for layer in _layers(detector, "dense_head", "head"):
        if layer.kind != "sparse":
            positions[layer.name] = math.prod(size)
    return positions
