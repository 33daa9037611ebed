"""Batch norms folded into the convolutions before them: what is exported and executed."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dm3d_deploy.errors import InternalError
from dm3d_deploy.models.detector import Detector, Norm, prunable_layers


@torch.no_grad()
def folded(
    conv_weight: Float[Tensor, ...],
    conv_bias: Float[Tensor, " channels"] | None,
    norm: Norm,
    *,
    output_dim: int = 0,
) -> tuple[Float[Tensor, ...], Float[Tensor, " channels"]]:
    """Weight and bias of one convolution that equals convolution and norm in eval mode.

    `output_dim` is the dimension of `conv_weight` over output channels: 0, 1 for a transposed convolution, -1 for a
    pointwise sparse one. Products
    are formed in float64; zeros stay zeros. w' = w * g / sqrt(var + eps), b' = (b - mean) * g / sqrt(var + eps) + beta.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise InternalError("a batch norm without running statistics cannot be folded")
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    shape = [1] * conv_weight.ndim
    shape[output_dim] = -1
    weight = conv_weight.double() * scale.view(shape)
    start = torch.zeros_like(scale) if conv_bias is None else conv_bias.double()
    bias = (start - norm.running_mean.double()) * scale + norm.bias.double()
    return weight.to(conv_weight.dtype), bias.to(conv_weight.dtype)


def fold_batch_norms(detector: Detector) -> Detector:
    """A copy in eval mode in which every convolution before a batch norm has a bias, and the norm is nn.Identity."""
    copied = copy.deepcopy(detector).eval()
    for layer in prunable_layers(copied):
        if layer.norm is None or layer.norm_name is None:
            continue
        module = layer.module
        bias = module.bias if isinstance(module.bias, Tensor) else None
        read = layer.weight.reshape(layer.read_shape)
        weight, bias = folded(read, bias, layer.norm, output_dim=layer.output_dim)
        module.weight = nn.Parameter(weight.reshape(layer.weight.shape))
        module.bias = nn.Parameter(bias)
        parent, _, leaf = layer.norm_name.rpartition(".")
        setattr(copied.get_submodule(parent), leaf, nn.Identity())
    return copied
