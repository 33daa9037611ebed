"""CenterHead: heat maps and box regressions of CenterPoint, with OpenPCDet's parameter names."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from dm3d_deploy.config import Branch, CenterHeadConfig


def _conv_norm_relu(in_channels: int, channels: int, bias: bool) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]


class SeparateHead(nn.Module):
    """The branches of one task; each is a child named as the branch."""

    def __init__(self, channels: int, branches: tuple[Branch, ...], *, bias: bool) -> None:
        super().__init__()
        self.names = tuple(branch.name for branch in branches)
        for branch in branches:
            hidden = [nn.Sequential(*_conv_norm_relu(channels, channels, bias)) for _ in range(branch.convs - 1)]
            final = nn.Conv2d(channels, branch.channels, 3, padding=1, bias=True)
            self.add_module(branch.name, nn.Sequential(*hidden, final))

    def forward(self, x: Float[Tensor, "batch shared h w"]) -> dict[str, Float[Tensor, "batch channels h w"]]:
        """Raw outputs by branch name."""
        return {name: self.get_submodule(name)(x) for name in self.names}


class CenterHead(nn.Module):
    """A shared convolution, then one SeparateHead per task."""

    def __init__(self, config: CenterHeadConfig, in_channels: int) -> None:
        super().__init__()
        shared = config.shared_channels
        self.shared_conv = nn.Sequential(*_conv_norm_relu(in_channels, shared, config.bias_before_norm))
        self.heads_list = nn.ModuleList(
            SeparateHead(shared, branches, bias=config.bias_before_norm) for branches in config.branches
        )

    def forward(self, features: Float[Tensor, "batch features h w"]) -> dict[str, Float[Tensor, "batch channels h w"]]:
        """Raw outputs; the key is task number, dot, branch name: "0.center"."""
        shared = self.shared_conv(features)
        return {
            f"{task}.{name}": value for task, head in enumerate(self.heads_list) for name, value in head(shared).items()
        }
