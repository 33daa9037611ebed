"""BaseBEVBackbone: the dense backbone on the bird's-eye view, with OpenPCDet's parameter names."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dm3d_deploy.config import Backbone2dConfig

NORM_EPS = 1e-3
NORM_MOMENTUM = 0.01


def _norm_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, eps=NORM_EPS, momentum=NORM_MOMENTUM), nn.ReLU(inplace=True)]


class BaseBEVBackbone(nn.Module):
    """Blocks of 3x3 convolutions; the output of each is brought back to one resolution and concatenated.

    Without a block, as in VoxelNeXt, the map goes through as it is.
    """

    def __init__(self, config: Backbone2dConfig, in_channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.deblocks = nn.ModuleList()
        channels = in_channels
        for layers, stride, filters in zip(config.layer_nums, config.strides, config.filters, strict=True):
            self.blocks.append(_block(channels, filters, layers, stride))
            channels = filters
        ups = zip(config.filters, config.upsample_strides, config.upsample_filters, strict=True)
        for filters, up, out in ups:
            self.deblocks.append(nn.Sequential(_resizing(filters, out, up), *_norm_relu(out)))

    def forward(self, bev: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """All blocks' features, concatenated."""
        outputs = []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            bev = block(bev)
            outputs.append(deblock(bev))
        return torch.cat(outputs, dim=1) if outputs else bev


def _resizing(in_channels: int, channels: int, up: float) -> nn.Module:
    """A transposed convolution, or where the map shrinks (`up` = 1/n) a convolution of stride n."""
    if up >= 1:
        return nn.ConvTranspose2d(in_channels, channels, int(up), stride=int(up), bias=False)
    down = round(1 / up)
    return nn.Conv2d(in_channels, channels, down, stride=down, bias=False)


def _block(in_channels: int, channels: int, layers: int, stride: int) -> nn.Sequential:
    """One strided convolution behind an explicit padding, then `layers` plain ones."""
    modules: list[nn.Module] = [
        nn.ZeroPad2d(1),
        nn.Conv2d(in_channels, channels, 3, stride=stride, bias=False),
        *_norm_relu(channels),
    ]
    for _ in range(layers):
        modules += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), *_norm_relu(channels)]
    return nn.Sequential(*modules)
