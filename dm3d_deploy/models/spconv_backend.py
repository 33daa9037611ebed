"""The 3D backbone through spconv, for calibration and fine-tuning on CUDA, with the detector's own parameters."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dm3d_deploy.errors import InternalError, UsageError, require
from dm3d_deploy.models.backbone3d import SparseBasicBlock, bev_from_sparse
from dm3d_deploy.models.detector import Detector
from dm3d_deploy.models.sparse import SparseConv3d, SparseConvolution, SparseTensor


def backbone_to_bev(
    detector: Detector,
    features: Float[Tensor, "voxels columns"],
    coords: Int64[Tensor, "voxels 4"],
    batch_size: int = 1,
) -> Float[Tensor, "batch bev_channels height width"]:
    """What `detector.backbone_to_bev` computes, by spconv; gradients reach the detector's parameters.

    Not tested with spconv itself: the tests run it on a stand-in with spconv's interface. MissingDependency without
    spconv; UsageError off CUDA, where spconv's convolutions race and its backward does not run.
    """
    spconv = require("spconv.pytorch", extra="cuda")
    if features.device.type != "cuda":
        raise UsageError(
            f"spconv was asked for on {features.device.type}: it is used on CUDA only.",
            fix="move the detector and the voxels to a CUDA device, or use detector.backbone_to_bev",
        )
    return run_backbone(spconv, detector, features, coords, batch_size)


def run_backbone(spconv: Any, detector: Detector, features: Tensor, coords: Tensor, batch_size: int) -> Tensor:
    """The backbone over the given spconv module. Rows come out in its order; the dense map does not depend on it."""
    backbone = detector.backbone_3d
    indices = coords.to(torch.int32).contiguous()
    x = spconv.SparseConvTensor(features, indices, list(backbone.shape_zyx), batch_size)
    stages = (backbone.conv1, backbone.conv2, backbone.conv3, backbone.conv4)
    for block in (backbone.conv_input, *(block for stage in stages for block in stage), backbone.conv_out):
        x = _residual(spconv, block, x) if isinstance(block, SparseBasicBlock) else _plain(spconv, block, x)
    z, y, width = x.spatial_shape
    return bev_from_sparse(SparseTensor(x.features, x.indices.long(), (z, y, width), batch_size))


def _plain(spconv: Any, block: nn.Module, x: Any) -> Any:
    conv, norm, relu = block.children()
    x = _native(spconv, conv)(x)
    return x.replace_feature(relu(norm(x.features)))


def _residual(spconv: Any, block: SparseBasicBlock, x: Any) -> Any:
    hidden = _native(spconv, block.conv1)(x)
    hidden = hidden.replace_feature(block.relu(block.bn1(hidden.features)))
    hidden = _native(spconv, block.conv2)(hidden)
    return hidden.replace_feature(block.relu(block.bn2(hidden.features) + x.features))


def _native(spconv: Any, conv: nn.Module) -> Any:
    """A module of spconv that holds our parameters."""
    if not isinstance(conv, SparseConvolution):
        raise InternalError(f"{type(conv).__name__} is no sparse convolution")
    shared: dict[str, Any] = {"bias": conv.bias is not None, "indice_key": conv.indice_key}
    kernel = list(conv.kernel)
    if isinstance(conv, SparseConv3d):
        shared |= {"stride": list(conv.stride), "padding": list(conv.padding)}
        native = spconv.SparseConv3d(conv.in_channels, conv.out_channels, kernel, **shared)
    else:
        shared["padding"] = [size // 2 for size in conv.kernel]
        native = spconv.SubMConv3d(conv.in_channels, conv.out_channels, kernel, **shared)
    native.weight, native.bias = conv.weight, conv.bias
    return native.train(conv.training)
