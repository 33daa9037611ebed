"""VoxelSetAbstraction, PointHeadSimple and the RoI heads of PV-RCNN and Voxel R-CNN, with OpenPCDet's parameter names.

Which rows each of them reads comes from `geometry.pooling`; here are the layers over them, one row a place or a
neighbour. OpenPCDet's convolutions of extent one are linear layers over rows, whose weights keep their shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dm3d_deploy.config import KeypointConfig, PoolSource, SecondStageConfig
from dm3d_deploy.geometry.anchors import BOX_CHANNELS
from dm3d_deploy.geometry.pooling import RAW

POINT_CHANNELS = 3  # x, y, z of a neighbour relative to its place

Tensors = Mapping[str, Tensor]


class RowLinear(nn.Linear):
    """A linear layer over rows whose weight has `spare` more dimensions of extent one, as a convolution's has."""

    def __init__(self, in_features: int, out_features: int, *, spare: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.weight = nn.Parameter(self.weight.detach().view(out_features, in_features, *(1,) * spare))

    def forward(self, rows: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """Apply to every row."""
        return functional.linear(rows, self.weight.flatten(1), self.bias)


def _with_zeros(rows: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows_and_one channels"]:
    """The rows and one of zeros behind them, which places without a neighbour read."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


class BallPool(nn.Module):
    """StackSAModuleMSG: for each grouping an MLP over neighbours and the maximum over them, side by side."""

    def __init__(self, source: PoolSource) -> None:
        super().__init__()
        self.source = source.name
        self.mlps = nn.ModuleList()
        for grouping in source.groupings:
            layers: list[nn.Module] = []
            channels = POINT_CHANNELS + source.channels
            for width in grouping.widths:
                layers += [RowLinear(channels, width, spare=2), nn.BatchNorm1d(width), nn.ReLU()]
                channels = width
            self.mlps.append(nn.Sequential(*layers))

    def forward(
        self, features: Float[Tensor, "rows channels"], geometry: Tensors, around: str
    ) -> Float[Tensor, "places channels"]:
        """Features of the places that `geometry` has `around` ("keypoints" or "rois") for this source."""
        padded = _with_zeros(features)
        pooled = []
        for index, mlp in enumerate(self.mlps):
            rows = geometry[f"{around}.{self.source}.{index}.rows"]
            offsets = geometry[f"{around}.{self.source}.{index}.offsets"]
            grouped = torch.cat([offsets, padded[rows]], dim=2)
            hidden: Tensor = mlp(grouped.flatten(0, 1))
            pooled.append(hidden.view(*rows.shape, -1).max(dim=1).values)
        return torch.cat(pooled, dim=1)


class VoxelPool(nn.Module):
    """NeighborVoxelSAModuleMSG: features and offsets each through a layer, their sum's maximum, and a layer behind."""

    def __init__(self, source: PoolSource) -> None:
        super().__init__()
        self.source = source.name
        within = [grouping.widths[0] for grouping in source.groupings]
        behind = [grouping.widths[1] for grouping in source.groupings]
        self.mlps_in = nn.ModuleList(
            nn.Sequential(RowLinear(source.channels, width, spare=1), nn.BatchNorm1d(width)) for width in within
        )
        self.mlps_pos = nn.ModuleList(
            nn.Sequential(RowLinear(POINT_CHANNELS, width, spare=2), nn.BatchNorm1d(width)) for width in within
        )
        self.mlps_out = nn.ModuleList(
            nn.Sequential(RowLinear(width, out, spare=1), nn.BatchNorm1d(out), nn.ReLU())
            for width, out in zip(within, behind, strict=True)
        )

    def forward(self, features: Float[Tensor, "rows channels"], geometry: Tensors) -> Float[Tensor, "places channels"]:
        """Features of the places in the RoIs."""
        names = [f"rois.{self.source}.{index}" for index in range(len(self.mlps_in))]
        inputs = [_with_zeros(mlp(features)) for mlp in self.mlps_in]
        places = [
            mlp(geometry[f"{name}.offsets"].flatten(0, 1)) for name, mlp in zip(names, self.mlps_pos, strict=True)
        ]
        pooled = []
        for name, grouped, place, mlp in zip(names, inputs, places, self.mlps_out, strict=True):
            rows = geometry[f"{name}.rows"]
            hidden = torch.relu(grouped[rows] + place.view(*rows.shape, -1))
            pooled.append(mlp(hidden.max(dim=1).values))
        return torch.cat(pooled, dim=1)


class VoxelSetAbstraction(nn.Module):
    """Features of the keypoints from the bird's-eye view, the points and the stages; then fused."""

    def __init__(self, config: KeypointConfig) -> None:
        super().__init__()
        self.stages = [source.name for source in config.sources if source.name != RAW]
        self.SA_layers = nn.ModuleList(BallPool(source) for source in config.sources if source.name != RAW)
        for source in config.sources:
            if source.name == RAW:
                self.SA_rawpoints = BallPool(source)
        self.vsa_point_feature_fusion = nn.Sequential(
            RowLinear(config.channels, config.fused, spare=0), nn.BatchNorm1d(config.fused), nn.ReLU()
        )

    def forward(
        self, sources: Tensors, geometry: Tensors
    ) -> tuple[Float[Tensor, "keypoints channels"], Float[Tensor, "keypoints fused"]]:
        """Before and after they are fused; `sources` are rows by name, those of "bev" its cells row by row."""
        layers = zip(self.stages, self.SA_layers, strict=True)
        stages = [layer(sources[name], geometry, "keypoints") for name, layer in layers]
        parts = []
        if "keypoints.bev.rows" in geometry:
            corners = sources["bev"][geometry["keypoints.bev.rows"]]
            parts.append((corners * geometry["keypoints.bev.weights"][..., None]).sum(dim=1))
        if hasattr(self, "SA_rawpoints"):
            parts.append(self.SA_rawpoints(sources[RAW], geometry, "keypoints"))
        whole = torch.cat([*parts, *stages], dim=1)
        return whole, self.vsa_point_feature_fusion(whole)


class PointHead(nn.Module):
    """PointHeadSimple: how much a keypoint belongs to an object."""

    def __init__(self, config: KeypointConfig) -> None:
        super().__init__()
        self.cls_layers = nn.Sequential(*_hidden(config.channels, config.score_widths, spare=0))
        self.cls_layers.append(RowLinear(config.score_widths[-1], 1, spare=0, bias=True))

    def forward(self, features: Float[Tensor, "keypoints channels"]) -> Float[Tensor, "keypoints 1"]:
        """Scores, 0 to 1."""
        return torch.sigmoid(self.cls_layers(features))


def _hidden(channels: int, widths: Iterable[int], *, spare: int, dropout_after: Iterable[int] = ()) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        layers += [RowLinear(channels, width, spare=spare), nn.BatchNorm1d(width), nn.ReLU()]
        if index in set(dropout_after):
            layers.append(nn.Dropout())  # it does nothing in eval mode, but counts in the names
        channels = width
    return layers


def _between(widths: tuple[int, ...], dropout: float) -> range:
    """The layers behind which OpenPCDet drops out: all but the last."""
    return range(len(widths) - 1 if dropout > 0 else 0)


class VoxelRCNNHead(nn.Module):
    """Pools cells of the sparse backbone; RoIs as rows, a place's channels together."""

    def __init__(self, config: SecondStageConfig) -> None:
        super().__init__()
        self.places = config.grid**3
        self.stages = [source.name for source in config.sources]
        self.roi_grid_pool_layers = nn.ModuleList(VoxelPool(source) for source in config.sources)
        channels = self.places * sum(source.out_channels for source in config.sources)
        shared, drop = config.shared, config.dropout
        self.shared_fc_layer = nn.Sequential(*_hidden(channels, shared, spare=0, dropout_after=_between(shared, drop)))
        cls, reg = config.cls_widths, config.reg_widths
        self.cls_fc_layers = nn.Sequential(*_hidden(shared[-1], cls, spare=0, dropout_after=_between(cls, drop)))
        self.cls_pred_layer = RowLinear(cls[-1], 1, spare=0, bias=True)
        self.reg_fc_layers = nn.Sequential(*_hidden(shared[-1], reg, spare=0, dropout_after=_between(reg, drop)))
        self.reg_pred_layer = RowLinear(reg[-1], BOX_CHANNELS, spare=0, bias=True)

    def forward(self, sources: Tensors, geometry: Tensors) -> tuple[Float[Tensor, "rois 1"], Float[Tensor, "rois 7"]]:
        """Scores before the sigmoid, and residuals."""
        layers = zip(self.stages, self.roi_grid_pool_layers, strict=True)
        pooled = torch.cat([layer(sources[name], geometry) for name, layer in layers], dim=1)
        shared = self.shared_fc_layer(pooled.view(-1, self.places * pooled.shape[1]))
        return self.cls_pred_layer(self.cls_fc_layers(shared)), self.reg_pred_layer(self.reg_fc_layers(shared))


class PVRCNNHead(nn.Module):
    """Pools keypoints; RoIs as rows, a channel's places together."""

    def __init__(self, config: SecondStageConfig) -> None:
        super().__init__()
        self.places = config.grid**3
        (source,) = config.sources
        self.roi_grid_pool_layer = BallPool(source)
        shared, drop = config.shared, config.dropout
        channels = self.places * source.out_channels
        self.shared_fc_layer = nn.Sequential(*_hidden(channels, shared, spare=1, dropout_after=_between(shared, drop)))
        self.cls_layers = nn.Sequential(*_hidden(shared[-1], config.cls_widths, spare=1, dropout_after=(0,)))
        self.cls_layers.append(RowLinear(config.cls_widths[-1], 1, spare=1, bias=True))
        self.reg_layers = nn.Sequential(*_hidden(shared[-1], config.reg_widths, spare=1, dropout_after=(0,)))
        self.reg_layers.append(RowLinear(config.reg_widths[-1], BOX_CHANNELS, spare=1, bias=True))

    def forward(self, sources: Tensors, geometry: Tensors) -> tuple[Float[Tensor, "rois 1"], Float[Tensor, "rois 7"]]:
        """Scores before the sigmoid, and residuals."""
        pooled: Tensor = self.roi_grid_pool_layer(sources["keypoints"], geometry, "rois")
        by_channel = pooled.view(-1, self.places, pooled.shape[1]).transpose(1, 2)
        shared = self.shared_fc_layer(by_channel.flatten(1))
        return self.cls_layers(shared), self.reg_layers(shared)
