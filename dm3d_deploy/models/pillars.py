"""PillarVFE and DynPillarVFE: points to one feature vector a pillar, with OpenPCDet's parameter names.

Points come as rows, one a point, already decorated (see geometry.voxelize); a row's coordinates are its pillar's cell.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dm3d_deploy.config import PillarConfig
from dm3d_deploy.models.sparse import SparseTensor, cell_keys, cells_of

NORM_EPS = 1e-3
NORM_MOMENTUM = 0.01


class PFNLayer(nn.Module):
    """Linear, batch norm, ReLU, and the maximum over each pillar's points."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.norm = nn.BatchNorm1d(out_features, eps=NORM_EPS, momentum=NORM_MOMENTUM)

    def forward(
        self, rows: Float[Tensor, "points columns"], owner: Int64[Tensor, " points"], free: Int64[Tensor, " pillars"]
    ) -> tuple[Float[Tensor, "points channels"], Float[Tensor, "pillars channels"]]:
        """Features of points and pillars. `free` are the empty places of each pillar, which PillarVFE pads with zeros.

        A padded place passes linear and norm as a point of zeros does and takes part in the maximum; its features are
        the same in every pillar, so one row stands for all of them, but for the statistics of a norm that trains.
        """
        padded = free > 0
        inputs = rows
        if bool(padded.any()):
            places = int(free.sum()) if self.norm.training else 1
            inputs = torch.cat([rows, rows.new_zeros(places, rows.shape[1])])
        hidden = torch.relu(self.norm(self.linear(inputs)))
        points, spare = hidden[: len(rows)], hidden[len(rows) : len(rows) + 1]
        top = points.new_zeros(len(free), points.shape[1])
        top = top.scatter_reduce(0, owner[:, None].expand_as(points), points, "amax")
        if len(spare):
            top = torch.where(padded[:, None], torch.maximum(top, spare), top)
        return points, top


class PillarVFE(nn.Module):
    """The point network. In `pfn_layers` every layer but the last makes half its channels of the pillar's maximum."""

    def __init__(self, config: PillarConfig, columns: int, max_points: int) -> None:
        super().__init__()
        self.places = 0 if config.dynamic else max_points
        widths = (config.features(columns), *config.filters)
        last = len(config.filters) - 1
        self.pfn_layers = nn.ModuleList(
            PFNLayer(widths[i], widths[i + 1] // (1 if i == last else 2)) for i in range(len(config.filters))
        )

    @property
    def channels(self) -> int:
        """Channels of a pillar."""
        return cast(PFNLayer, self.pfn_layers[-1]).linear.out_features

    def multiplied_rows(self, points: int, pillars: int) -> int:
        """Rows that a linear layer multiplies in OpenPCDet: all points, or every place of every pillar."""
        return pillars * self.places if self.places else points

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Rows of points to rows of pillars in raster order."""
        cells, owner, counts = torch.unique(cell_keys(x.coords, x.shape_zyx), return_inverse=True, return_counts=True)
        free = (self.places - counts).clamp(min=0)
        rows = top = x.features
        for index, layer in enumerate(self.pfn_layers):
            rows, top = layer(rows, owner, free)
            if index + 1 < len(self.pfn_layers):
                rows = torch.cat([rows, top[owner]], dim=1)
        return dataclasses.replace(x, features=top, coords=cells_of(cells, x.shape_zyx))
