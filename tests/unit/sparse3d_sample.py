"""Small backbones, frames and plans for the tests of the sparse engine."""

import numpy as np
import torch

from dm3d_deploy.config import load_config
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from engines.sparse3d.entry import Frame, frame_from_config
from engines.sparse3d.onnx_reader import read_backbone
from exporters.backbone3d import SparseLayer, backbone_model, export_backbone3d

CUBE, ONE = (3, 3, 3), (1, 1, 1)


def tiny_detector(fixtures):
    """41 x 128 x 128 cells, channels 4 to 16, with seeded weights and norms."""
    detector = build_detector(load_config(fixtures / "centerpoint-tiny.yaml"))
    seed_weights(detector, 0)
    return detector.eval()


def exported(detector, folder, max_voxels):
    """The detector's backbone as the planner reads it."""
    path = folder / "backbone3d.onnx"
    export_backbone3d(detector, path, max_voxels=max_voxels)
    return read_backbone(path)


def voxel_frame(detector, rows, *, points=False):
    """The frame of a detector."""
    return frame_from_config(detector.config.voxels, rows=rows, points=points)


def plain_frame(grid, rows):
    """A frame on any grid, the sensor in its middle."""
    depth, height, width = grid
    return Frame(
        rows=rows,
        points=False,
        point_range_m=(-width / 2, -height / 2, 0.0, width / 2, height / 2, float(depth)),
        voxel_size_m=(1.0, 1.0, 1.0),
        grid_zyx=grid,
    )


def layer(rng, name, cout, cin, *, kernel=CUBE, stride=ONE, padding=None, submanifold=None, key="", adds="", dead=0.0):
    """A layer of random weights; `dead` is the share of 16 x 16 tiles without any."""
    weight = (rng.normal(size=(cout, *kernel, cin)) / np.sqrt(cin * 9)).astype(np.float32)
    tiles = rng.random((-(-cout // 16), *kernel, -(-cin // 16))) >= dead
    weight *= np.repeat(np.repeat(tiles, 16, axis=0)[:cout], 16, axis=4)[..., :cin]
    submanifold = stride == ONE if submanifold is None else submanifold
    return SparseLayer(
        name=name,
        weight=weight,
        bias=rng.normal(size=cout).astype(np.float32) / 4,
        stride=stride,
        padding=tuple(size // 2 for size in kernel) if padding is None else padding,
        submanifold=submanifold,
        key=key,
        adds=adds,
    )


def backbone_of(layers, grid, max_voxels, folder):
    """What the planner reads of plain layers."""
    path = folder / "layers.onnx"
    path.write_bytes(backbone_model(layers, grid_zyx=grid, max_voxels=max_voxels).SerializeToString())
    return read_backbone(path)


def clustered_cells(rng, grid, count):
    """Unique cells (z, y, x) that have neighbours."""
    low = np.minimum(grid, np.ceil(np.cbrt(count * 4) * np.array([0.6, 1.3, 1.3])).astype(int))
    flat = rng.choice(int(np.prod(low)), count, replace=False)
    start = (np.array(grid) - low) // 2
    return np.stack(np.unravel_index(flat, low), axis=1) + start


def padded(features, cells, rows):
    """Inputs of a plan; what lies behind the count must never be read."""
    count = len(cells)
    filled = np.full((rows, features.shape[1]), np.nan, np.float32)
    coords = np.full((rows, 4), 2**30, np.int32)
    filled[:count], coords[:count, 0], coords[:count, 1:] = features, 0, cells
    return {"features": filled, "coords": coords, "count": np.array([count], np.int32)}


def keep_everything(backbone):
    """Names of every array that a comparison at every stage needs."""
    stages = [f"{stage.name}.{part}" for stage in backbone.stages for part in ("sites", "count")]
    return (*stages, *(item.name for item in backbone.layers))


def torch_reference(detector, features, cells):
    """By name of the exporter's layer that ends each module: sorted keys of its sites, and its features there."""
    from dm3d_deploy.models.backbone3d import ConvNormReLU, SparseBasicBlock
    from dm3d_deploy.models.sparse import SparseTensor, cell_keys

    found, hooks = {}, []

    def record(name):
        def hook(module, inputs, output):
            keys, order = torch.sort(cell_keys(output.coords, output.shape_zyx))
            found[name] = (keys.numpy(), output.features[order].numpy())

        return hook

    for name, module in detector.backbone_3d.named_modules():
        if isinstance(module, (ConvNormReLU, SparseBasicBlock)):
            end = "0" if isinstance(module, ConvNormReLU) else "conv2"
            hooks.append(module.register_forward_hook(record(f"{name}.{end}")))
    coords = np.concatenate([np.zeros((len(cells), 1), np.int64), cells], axis=1)
    with torch.no_grad():
        detector.backbone_3d(
            SparseTensor(
                torch.from_numpy(np.asarray(features, np.float32)),
                torch.from_numpy(coords),
                detector.backbone_3d.shape_zyx,
                1,
            )
        )
    for hook in hooks:
        hook.remove()
    return found


def bev_of(keys, features, grid):
    """The dense map [1, C * D, H, W] of sites."""
    depth, height, width = grid
    dense = np.zeros((features.shape[1], depth * height * width), features.dtype)
    dense[:, keys] = features.T
    return dense.reshape(1, -1, height, width)


def merging_layers(rng):
    """Three stages that are added up in the bird's-eye view and flat layers behind them, as VoxelNeXt has them."""
    down = {"stride": (2, 2, 2), "padding": (1, 1, 1)}
    flat = {"kernel": (1, 3, 3), "padding": (0, 1, 1)}
    return [
        layer(rng, "conv_input.0", 16, 4, key="a"),
        layer(rng, "conv4.0", 24, 16, key="b", **down),
        layer(rng, "conv5.0", 24, 24, key="c", **down),
        layer(rng, "conv6.0", 24, 24, key="d", **down),
        layer(rng, "conv_out.0", 40, 24, submanifold=False, key="out", **flat),
        layer(rng, "shared_conv.0", 64, 40, key="shared", dead=0.5, **flat),
    ]
