"""AnchorHeadSingle: class scores, box residuals and directions of every anchor, with OpenPCDet's parameter names."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from dm3d_deploy.config import AnchorHeadConfig
from dm3d_deploy.geometry.anchors import BOX_CHANNELS, anchor_maps


class AnchorHeadSingle(nn.Module):
    """One 1x1 convolution each for classes, boxes and directions."""

    def __init__(self, config: AnchorHeadConfig, classes: int, in_channels: int) -> None:
        super().__init__()
        self.config = config
        self.conv_cls = nn.Conv2d(in_channels, config.per_cell * classes, 1)
        self.conv_box = nn.Conv2d(in_channels, config.per_cell * BOX_CHANNELS, 1)
        if config.direction is not None:
            self.conv_dir_cls = nn.Conv2d(in_channels, config.per_cell * config.direction.bins, 1)

    def forward(self, features: Float[Tensor, "batch features h w"]) -> dict[str, Float[Tensor, "batch channels h w"]]:
        """Raw outputs by anchor of a cell: "0.cls" of the first anchor, then "0.box", "0.dir", "1.cls", ..."""
        whole = {"cls": self.conv_cls(features), "box": self.conv_box(features)}
        if self.config.direction is not None:
            whole["dir"] = self.conv_dir_cls(features)
        return anchor_maps(whole, self.config.per_cell)
