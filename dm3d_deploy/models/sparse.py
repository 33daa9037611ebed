"""Sparse 3D convolution over a kernel map: plain torch, any device, deterministic, spconv's weights and results.

For every tap of the kernel the map lists which input row meets which output row; a convolution is then one small
matrix product per tap. Index relation, as in spconv: input = output * stride - padding + offset, and the tap is
k = (kz * KY + ky) * KX + kx.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dm3d_deploy.errors import InternalError

Triple = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class KernelMap:
    """Which rows meet at each tap. Within one tap a row occurs at most once on either side.

    `in_rows[k]` and `out_rows[k]` are Int64 of equal length; `out_coords` is Int64[M, 4] (batch, z, y, x). Taps are
    visited in `order`: the centre of a sub-manifold kernel, which pairs every row with itself, comes first.
    """

    in_rows: tuple[Int64[Tensor, " pairs"], ...]
    out_rows: tuple[Int64[Tensor, " pairs"], ...]
    out_coords: Int64[Tensor, "sites 4"]
    out_shape_zyx: Triple
    submanifold: bool

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return len(self.in_rows)

    @property
    def centre(self) -> int | None:
        """The tap that is the identity, if there is one."""
        return self.taps // 2 if self.submanifold else None

    @property
    def order(self) -> tuple[int, ...]:
        """The taps in the order of summation: with the centre first, sums equal spconv's bit for bit."""
        return tuple(sorted(range(self.taps), key=lambda tap: (tap != self.centre, tap)))

    @property
    def pair_counts(self) -> Int64[np.ndarray, " taps"]:
        """Pairs of each tap: one pair is Cin * Cout multiplications."""
        return np.array([len(rows) for rows in self.in_rows], dtype=np.int64)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SparseTensor:
    """Features on the active cells of a grid; `coords` are (batch, z, y, x), unique, in any order.

    `maps` is shared by all tensors of one forward pass, so that layers with one `indice_key` build their map once.
    """

    features: Float[Tensor, "sites channels"]
    coords: Int64[Tensor, "sites 4"]
    shape_zyx: Triple
    batch_size: int
    maps: dict[str, KernelMap] = dataclasses.field(default_factory=dict)

    def with_features(self, features: Float[Tensor, "sites channels"]) -> SparseTensor:
        """The same cells with other features."""
        return dataclasses.replace(self, features=features)

    def at(self, kernel_map: KernelMap, features: Float[Tensor, "sites channels"]) -> SparseTensor:
        """Features on the output cells of a kernel map."""
        return dataclasses.replace(
            self, features=features, coords=kernel_map.out_coords, shape_zyx=kernel_map.out_shape_zyx
        )


def cell_keys(coords: Int64[Tensor, "sites 4"], shape_zyx: Triple) -> Int64[Tensor, " sites"]:
    """The raster index of every cell in [batch, z, y, x]."""
    depth, height, width = shape_zyx
    batch, z, y, x = coords.unbind(1)
    return ((batch * depth + z) * height + y) * width + x


def submanifold_map(coords: Int64[Tensor, "sites 4"], shape_zyx: Triple, kernel: Triple) -> KernelMap:
    """The map of a sub-manifold convolution: the outputs are the inputs, the kernel is odd and centred.

    Only half of the taps are searched for: tap k and tap K-1-k hold the same pairs with the sides exchanged.
    """
    if any(size % 2 == 0 for size in kernel):
        raise InternalError(f"a sub-manifold kernel must be odd, not {kernel}")
    keys, order = torch.sort(cell_keys(coords, shape_zyx))
    if bool((keys[1:] == keys[:-1]).any()):
        raise InternalError("two rows of a sparse tensor lie in the same cell")
    axes = coords[order].unbind(1)[1:]
    taps = math.prod(kernel)
    rows: list[Tensor] = [order] * taps
    partners: list[Tensor] = [order] * taps
    offsets = itertools.product(*(range(-(size // 2), size // 2 + 1) for size in kernel))
    for tap, (dz, dy, dx) in zip(range(taps // 2), offsets, strict=False):
        inside = _inside(axes, (dz, dy, dx), shape_zyx)
        wanted = keys + (dz * shape_zyx[1] + dy) * shape_zyx[2] + dx
        found = torch.searchsorted(keys, wanted).clamp_(max=max(len(keys) - 1, 0))
        hits = (inside & (keys[found] == wanted)).nonzero().squeeze(1)
        rows[tap] = partners[taps - 1 - tap] = order[found[hits]]
        partners[tap] = rows[taps - 1 - tap] = order[hits]
    return KernelMap(tuple(rows), tuple(partners), coords, shape_zyx, submanifold=True)


def _inside(axes: tuple[Tensor, ...], offset: Triple, shape_zyx: Triple) -> Bool[Tensor, " sites"]:
    """Whether the neighbour at `offset` lies in the grid."""
    inside = torch.ones_like(axes[0], dtype=torch.bool)
    for axis, step, size in zip(axes, offset, shape_zyx, strict=True):
        if step < 0:
            inside &= axis >= -step
        elif step > 0:
            inside &= axis < size - step
    return inside


def strided_map(
    coords: Int64[Tensor, "sites 4"], shape_zyx: Triple, kernel: Triple, stride: Triple, padding: Triple
) -> KernelMap:
    """The map of a strided convolution: an output is active when any input lies under its kernel; raster order."""
    out_shape = output_shape(shape_zyx, kernel, stride, padding)
    batch, *axes = coords.unbind(1)
    reached = [
        [_reached(axis, offset, stride[i], padding[i], out_shape[i]) for offset in range(kernel[i])]
        for i, axis in enumerate(axes)
    ]
    in_rows, out_keys = [], []
    for (z, z_ok), (y, y_ok), (x, x_ok) in itertools.product(*reached):
        rows = (z_ok & y_ok & x_ok).nonzero().squeeze(1)
        in_rows.append(rows)
        out_keys.append(cell_keys(torch.stack((batch[rows], z[rows], y[rows], x[rows]), dim=1), out_shape))
    keys, out_rows = torch.unique(torch.cat(out_keys), return_inverse=True)
    split = out_rows.split([len(rows) for rows in in_rows])
    return KernelMap(tuple(in_rows), tuple(split), cells_of(keys, out_shape), out_shape, submanifold=False)


def output_shape(shape_zyx: Triple, kernel: Triple, stride: Triple, padding: Triple) -> Triple:
    """The grid after a strided convolution."""
    z, y, x = (
        (size + 2 * pad - width) // step + 1
        for size, width, step, pad in zip(shape_zyx, kernel, stride, padding, strict=True)
    )
    if min(z, y, x) < 1:
        raise InternalError(f"a kernel {kernel} with padding {padding} does not fit into the grid {shape_zyx}")
    return z, y, x


def _reached(
    axis: Int64[Tensor, " sites"], offset: int, stride: int, padding: int, size: int
) -> tuple[Int64[Tensor, " sites"], Bool[Tensor, " sites"]]:
    """Along one axis: the output that meets each input at `offset`, and whether there is one."""
    shifted = axis + (padding - offset)
    output = torch.div(shifted, stride, rounding_mode="floor")
    return output, (output * stride == shifted) & (output >= 0) & (output < size)


def cells_of(keys: Int64[Tensor, " sites"], shape_zyx: Triple) -> Int64[Tensor, "sites 4"]:
    """The inverse of `cell_keys`."""
    depth, height, width = shape_zyx
    rest = torch.div(keys, width, rounding_mode="floor")
    plane = torch.div(rest, height, rounding_mode="floor")
    batch = torch.div(plane, depth, rounding_mode="floor")
    return torch.stack((batch, plane - batch * depth, rest - plane * height, keys - rest * width), dim=1)


class _Convolve(torch.autograd.Function):
    """Sum over taps of gathered rows times the tap's matrix; saves its inputs and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Float[Tensor, "sites cin"],
        weight: Float[Tensor, "cout kz ky kx cin"],
        bias: Float[Tensor, " cout"] | None,
        kernel_map: KernelMap,
    ) -> Float[Tensor, "outputs cout"]:
        ctx.save_for_backward(features, weight)
        ctx.kernel_map = kernel_map
        matrices = weight.flatten(1, -2)
        kept = matrices.any(dim=2).any(dim=0).tolist()
        output = features.new_zeros(len(kernel_map.out_coords), len(weight))
        for tap in kernel_map.order:
            matrix = matrices[:, tap].t()
            if tap == kernel_map.centre:
                torch.mm(features, matrix, out=output)
            elif kept[tap]:
                gathered = features.index_select(0, kernel_map.in_rows[tap])
                output.index_add_(0, kernel_map.out_rows[tap], gathered @ matrix)
        if bias is not None:
            output += bias
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "outputs cout"]) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        kernel_map: KernelMap = ctx.kernel_map
        wants_features, wants_weight, wants_bias, _ = ctx.needs_input_grad
        matrices = weight.flatten(1, -2)
        grad_features = torch.zeros_like(features) if wants_features else None
        grad_weight = torch.empty_like(matrices) if wants_weight else None
        for tap in kernel_map.order:
            centre = tap == kernel_map.centre
            in_rows = kernel_map.in_rows[tap]
            rows_grad = grad if centre else grad.index_select(0, kernel_map.out_rows[tap])
            if grad_features is not None:
                if centre:
                    torch.mm(rows_grad, matrices[:, tap], out=grad_features)
                else:
                    grad_features.index_add_(0, in_rows, rows_grad @ matrices[:, tap])
            if grad_weight is not None:
                grad_weight[:, tap] = rows_grad.t() @ (features if centre else features.index_select(0, in_rows))
        grad_bias = grad.sum(0) if wants_bias else None
        return grad_features, None if grad_weight is None else grad_weight.view_as(weight), grad_bias, None


class SparseConvolution(nn.Module):
    """What both kinds share: `weight` [Cout, kz, ky, kx, Cin] as spconv 2.x stores it, and an optional `bias`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Triple,
        *,
        indice_key: str,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel = kernel
        self.indice_key = indice_key
        self.weight = nn.Parameter(torch.zeros(out_channels, *kernel, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def build_map(self, coords: Int64[Tensor, "sites 4"], shape_zyx: Triple) -> KernelMap:
        """The kernel map for these cells."""
        raise NotImplementedError

    def kernel_map(self, x: SparseTensor) -> KernelMap:
        """The map for `x`, built once per `indice_key` and forward pass."""
        if self.indice_key not in x.maps:
            x.maps[self.indice_key] = self.build_map(x.coords, x.shape_zyx)
        return x.maps[self.indice_key]

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve."""
        kernel_map = self.kernel_map(x)
        return x.at(kernel_map, _Convolve.apply(x.features, self.weight, self.bias, kernel_map))

    def extra_repr(self) -> str:
        """The numbers that print shows."""
        return f"{self.in_channels}, {self.out_channels}, kernel={self.kernel}, indice_key={self.indice_key!r}"


class SubMConv3d(SparseConvolution):
    """Sub-manifold convolution: stride 1, and the active cells stay as they are."""

    def build_map(self, coords: Int64[Tensor, "sites 4"], shape_zyx: Triple) -> KernelMap:
        """See `submanifold_map`."""
        return submanifold_map(coords, shape_zyx, self.kernel)


class SparseConv3d(SparseConvolution):
    """Strided sparse convolution: cells become active under the kernel."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Triple,
        *,
        stride: Triple,
        padding: Triple,
        indice_key: str,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, indice_key=indice_key, bias=bias)
        self.stride = stride
        self.padding = padding

    def build_map(self, coords: Int64[Tensor, "sites 4"], shape_zyx: Triple) -> KernelMap:
        """See `strided_map`."""
        return strided_map(coords, shape_zyx, self.kernel, self.stride, self.padding)
