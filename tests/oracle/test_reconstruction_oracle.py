"""The refit against dense least squares, and its walk through a detector against rows gathered by hand."""

import itertools

import numpy as np
import pytest
import torch
from run_sample import TINY
from safetensors.numpy import load_file, save

from calib.reconstruct import reconstructed_weights
from calib.refit_shares import refit_shares
from dm3d_deploy.artifacts import write_bytes
from dm3d_deploy.config import load_config
from dm3d_deploy.errors import InternalError
from dm3d_deploy.models.checkpoints import load_checkpoint, save_weights
from dm3d_deploy.models.detector import build_detector, prunable_layers
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.pruning.reconstruction import Moments, _factor, refit, shares_left
from dm3d_deploy.pruning.sensitivity import FLOOR

DAMPING = 0.05


def by_lstsq(x, y, weight, keep, damping, counts):
    """Column by column: an intercept, the kept inputs, and rows that pull the weights back to where they were."""
    centred = x - np.average(x, axis=0, weights=counts)
    ridge = damping * np.mean(np.average(centred**2, axis=0, weights=counts)) * counts.sum()
    root = np.sqrt(counts)
    found, offset = np.zeros(weight.shape), np.zeros(weight.shape[1])
    for column in range(weight.shape[1]):
        kept = np.flatnonzero(keep[:, column])
        rows = np.hstack([x[:, kept], np.ones((len(x), 1))]) * root[:, None]
        pull = np.hstack([np.sqrt(ridge) * np.eye(len(kept)), np.zeros((len(kept), 1))])
        wanted = np.concatenate([y[:, column] * root, np.sqrt(ridge) * weight[kept, column]])
        solution = np.linalg.lstsq(np.vstack([rows, pull]), wanted, rcond=None)[0]
        found[kept, column], offset[column] = solution[:-1], solution[-1]
    return found, offset


@pytest.mark.parametrize("shared", [False, True], ids=["masks of their own", "masks in common"])
def test_refit_is_dense_least_squares(shared):
    rng = np.random.default_rng(0)
    x = rng.normal(2, 1, (300, 12)) @ rng.normal(0, 1, (12, 12))
    weight = rng.normal(size=(12, 7))
    y = x @ weight + rng.normal(0, 0.3, (300, 7)) + 5
    keep = rng.random((12, 1 if shared else 7)) < 0.5
    keep = np.broadcast_to(keep, weight.shape).copy()
    keep[:, 3] = False
    moments = Moments.empty(12, 7)
    counts = rng.exponential(size=300)
    for chunk in np.array_split(np.arange(300), 4):
        moments.add(Moments.of(x[chunk], y[chunk], counts[chunk]))
    found = refit(moments, weight, keep, damping=DAMPING)
    wanted, offset = by_lstsq(x, y, weight, keep, DAMPING, counts)
    np.testing.assert_allclose(found.weight, wanted, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.offset, offset, rtol=1e-7, atol=1e-7)
    assert not found.weight[~keep].any()
    assert found.offset[3] == pytest.approx(np.average(y[:, 3], weights=counts))


def test_inputs_that_never_vary_keep_their_weights():
    moments = Moments.empty(3, 1)
    moments.add(Moments.of(np.zeros((4, 3)), np.ones((4, 1)), np.ones(4)))
    weight = np.array([[1.0], [2.0], [3.0]])
    found = refit(moments, weight, weight < 3, damping=DAMPING)
    assert found.weight.ravel().tolist() == [1.0, 2.0, 0.0]
    assert found.offset.tolist() == [1.0]


@pytest.mark.parametrize(("rows", "damping", "what"), [(0, 0.1, "rows of mass 0"), (2, 0.0, "damping 0")])
def test_refit_refuses_what_has_no_solution(rows, damping, what):
    moments = Moments.empty(2, 1)
    moments.add(Moments.of(np.ones((rows, 2)), np.ones((rows, 1)), np.ones(rows)))
    with pytest.raises(InternalError, match=what):
        refit(moments, np.ones((2, 1)), np.ones((2, 1), dtype=bool), damping=damping)


def test_rows_that_do_not_belong_together_are_refused():
    with pytest.raises(InternalError, match="3 rows of inputs, 2 of outputs and 3 weights"):
        Moments.of(np.ones((3, 1)), np.ones((2, 1)), np.ones(3))


def scene(seed, detector):
    """Features and coordinates of a few clustered voxels."""
    rng = np.random.default_rng(seed)
    depth, height, width = (size // 2 for size in detector.config.voxels.grid_zyx)
    cells = np.unique(rng.integers(0, (depth, height // 2, width // 2), (400, 3)), axis=0)
    coords = np.hstack([np.zeros((len(cells), 1)), cells]).astype(np.int64)
    features = rng.normal(size=(len(cells), len(detector.config.voxels.columns))).astype(np.float32)
    return torch.from_numpy(features), torch.from_numpy(coords)


def by_refits(x, weight, steps, points, damping, counts):
    """Of the change at every point what refits leave, each solved anew; y is what the dense layer computes."""
    y, mean = x @ weight, lambda squares: np.average(squares, axis=0, weights=counts).sum()
    ridge = damping * np.mean(np.average((x - np.average(x, axis=0, weights=counts)) ** 2, axis=0, weights=counts))
    found = np.ones(points)
    for point in range(points):
        keep = steps > point
        masked = mean((x @ (weight * ~keep)) ** 2)
        refitted, offset = by_lstsq(x, y, weight * keep, keep, damping, counts)
        left = mean((y - x @ refitted - offset) ** 2) + ridge * ((weight - refitted) ** 2).sum()
        found[point] = min(1.0, left / masked) if masked > 0 else 1.0
    return found


def test_shares_left_are_those_of_refits_one_by_one():
    rng = np.random.default_rng(3)
    x = rng.normal(1, 1, (200, 9)) @ rng.normal(0, 1, (9, 9))
    weight, steps = rng.normal(size=(9, 5)), rng.integers(1, 8, (9, 5))
    steps[:, 4] = 7  # a column that loses nothing before the end
    steps[:, 3] = steps[:, 1]  # two that go alike
    counts = rng.exponential(size=200)
    moments = Moments.of(x, x @ weight, counts)
    found = shares_left(moments, weight, steps, 8, damping=DAMPING)
    np.testing.assert_allclose(found, by_refits(x, weight, steps, 8, DAMPING, counts), rtol=1e-4)
    assert found[0] == 1.0
    assert found[3:7].max() < 0.9


@pytest.mark.parametrize("spread", [0.0, 1e-6], ids=["never vary", "vary less than sums can tell"])
def test_inputs_that_hardly_vary_have_shares(spread):
    rng = np.random.default_rng(5)
    x = (3 + spread * rng.normal(size=(300, 40))).astype(np.float32)
    weight, steps = rng.normal(size=(40, 2)), rng.integers(1, 4, (40, 2))
    found = shares_left(Moments.of(x, x @ weight, np.ones(300)), weight, steps, 4, damping=DAMPING)
    assert found[0] == 1.0
    assert found[1:].max() < 0.05  # an offset makes good what does not vary


def test_a_factor_that_single_precision_does_not_have_is_found_in_double():
    rng = np.random.default_rng(5)
    gram = np.cov(rng.normal(size=(1, 300)) + 1e-5 * rng.normal(size=(8, 300))) + 1e-9 * np.eye(8)
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(gram.astype(np.float32))
    found = _factor(gram.astype(np.float32), lambda: gram)
    np.testing.assert_allclose(found @ found.T, gram, rtol=1e-12)


@pytest.mark.parametrize(("rows", "damping", "what"), [(0, 0.1, "mass 0"), (2, 0.0, "damping 0")])
def test_shares_of_nothing_are_refused(rows, damping, what):
    moments = Moments.of(np.ones((rows, 2)), np.ones((rows, 1)), np.ones(rows))
    with pytest.raises(InternalError, match=what):
        shares_left(moments, np.ones((2, 1)), np.ones((2, 1), dtype=int), 3, damping=damping)


@pytest.fixture
def given(tmp_path):
    """A dense and a masked tiny detector, two frames, and the settings of the walk."""
    dense = build_detector(load_config(str(TINY)))
    seed_weights(dense, 0)
    save_weights(dense, tmp_path / "dense.safetensors")
    masked = build_detector(dense.config)
    load_checkpoint(masked, tmp_path / "dense.safetensors")
    rng = np.random.default_rng(2)
    layers = [layer for layer in prunable_layers(masked) if layer.part != "head"]
    masks = {layer.name: rng.random(tuple(layer.weight.shape)) < 0.6 for layer in layers}
    arrays = {}
    for layer in layers:
        layer.weight.data *= torch.from_numpy(masks[layer.name])
    for frame in (0, 1):
        features, coords = scene(frame, dense)
        arrays |= {f"{frame}.features": features.numpy(), f"{frame}.coords": coords.numpy().astype(np.int16)}
    cells = {layer.name: cell_count(dense, layer.name) for layer in layers if layer.kind != "deconv2d"}
    felt = {name: rng.exponential(size=count).astype(np.float16) for name, count in list(cells.items())[::2]}
    write_bytes(tmp_path / "sensitivity.safetensors", save(felt))
    write_bytes(tmp_path / "masks.safetensors", save(masks))
    write_bytes(tmp_path / "frames.safetensors", save(arrays))
    settings = {
        "dense_weights": str(tmp_path / "dense.safetensors"), "masks": str(tmp_path / "masks.safetensors"),
        "frames_file": str(tmp_path / "frames.safetensors"), "frames": [0, 1], "rows_per_input": 10**6,
        "damping": DAMPING, "seed": 0, "sensitivity": str(tmp_path / "sensitivity.safetensors"),
    }  # fmt: skip
    return dense, masked, masks, settings


def inputs_and_outputs(detector, name, frame):
    """What goes into a layer and what comes out of it."""
    seen = {}
    layer = detector.get_submodule(name)

    def look(_, given, result):
        seen["pair"] = (given[0], result)

    handle = layer.register_forward_hook(look)
    with torch.no_grad():
        detector(*scene(frame, detector))
    handle.remove()
    return seen["pair"]


def cell_count(detector, name):
    """Output cells of a layer in both frames."""
    results = [inputs_and_outputs(detector, name, frame)[1] for frame in (0, 1)]
    return sum(len(found.features) if hasattr(found, "features") else found[0, 0].numel() for found in results)


def sparse_rows(layer, x, result):
    kernel_map = layer.kernel_map(x)
    rows = np.zeros((len(result.features), kernel_map.taps, x.features.shape[1]))
    for tap in range(kernel_map.taps):
        for at, source in zip(kernel_map.out_rows[tap].tolist(), kernel_map.in_rows[tap].tolist(), strict=True):
            rows[at, tap] = x.features[source]
    return rows.reshape(len(rows), -1)


def conv_rows(layer, x, result):
    pad, step, kernel = layer.padding[0], layer.stride[0], layer.kernel_size[0]
    image = np.pad(x[0].numpy(), ((0, 0), (pad, pad), (pad, pad)))
    height, width = result.shape[2:]
    return np.stack(
        [
            image[:, y * step : y * step + kernel, z * step : z * step + kernel].ravel()
            for y, z in itertools.product(range(height), range(width))
        ]
    )


def offsets(detector, layer):
    """What the layer's output is moved by before it is normalised."""
    return -detector.get_submodule(layer.norm_name).running_mean.numpy(force=True).astype(float)


def test_the_walk_solves_each_layer_from_what_it_now_sees(given):
    dense, masked, masks, settings = given
    means = {layer.name: offsets(masked, layer) for layer in prunable_layers(masked) if layer.name in masks}
    seen = []
    walked = {"walked": lambda layers, of: seen.append((layers, of))}
    changed = reconstructed_weights(masked, *scene(0, dense), 0, settings | walked)
    assert len(changed) == 2 * len(masks)
    assert seen == [(layer + 1, len(masks)) for layer in range(len(masks))]
    felt = load_file(settings["sensitivity"])
    again = build_detector(dense.config)
    load_checkpoint(again, settings["dense_weights"])
    state = again.state_dict() | {name: torch.from_numpy(array) for name, array in changed.items()}
    again.load_state_dict(state)
    for layer in [layer for layer in prunable_layers(again) if layer.name in masks]:
        pairs = [(inputs_and_outputs(again, layer.name, f), inputs_and_outputs(dense, layer.name, f)) for f in (0, 1)]
        keep, original = masks[layer.name], dense.get_submodule(layer.name).weight.numpy(force=True)
        if layer.kind == "deconv2d":
            continue  # its rows are single cells: the test below
        gather = sparse_rows if layer.kind == "sparse" else conv_rows
        x = np.concatenate([gather(layer.module, seen[0], seen[1]) for seen, _ in pairs]).astype(float)
        wanted = [dense_pair[1] for _, dense_pair in pairs]
        y = np.concatenate(
            [w.features.numpy() if layer.kind == "sparse" else w[0].flatten(1).t().numpy() for w in wanted]
        ).astype(float)
        counts = felt[layer.name].astype(float) + FLOOR if layer.name in felt else np.ones(len(x))
        flat = (original * keep).reshape(len(original), -1).T
        found, offset = by_lstsq(x, y, flat, keep.reshape(len(keep), -1).T, DAMPING, counts)
        now = layer.weight.numpy(force=True).reshape(len(original), -1).T
        scale = np.abs(found).max()
        np.testing.assert_allclose(now, found, atol=5e-3 * scale)
        bias = layer.module.bias
        moved = offsets(again, layer) - means[layer.name] + (0 if bias is None else bias.numpy(force=True))
        np.testing.assert_allclose(moved, offset, atol=5e-3 * max(1.0, np.abs(offset).max()))


def test_the_walk_brings_the_output_closer(given):
    dense, masked, _, settings = given
    with torch.no_grad():
        wanted = dense(*scene(5, dense))
        before = masked(*scene(5, dense))
        reconstructed_weights(masked, *scene(0, dense), 0, settings)
        after = masked(*scene(5, dense))

    def far(maps):
        return sum(float(((maps[name] - wanted[name]) ** 2).sum()) for name in wanted)

    assert far(after) < 0.7 * far(before)


def test_fewer_rows_give_other_weights_and_equal_seeds_equal_ones(given):
    dense, masked, _, settings = given
    start = {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    found = []
    for rows in (3, 3, 10**6):
        masked.load_state_dict(start)
        found.append(reconstructed_weights(masked, *scene(0, dense), 0, {**settings, "rows_per_input": rows}))
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not np.array_equal(found[0][name], found[2][name]) for name in found[0])


def test_shares_are_taken_at_the_rows_of_the_detector_before_pruning(given, tmp_path):
    dense, _, masks, settings = given
    points, rng = 4, np.random.default_rng(4)
    steps = {f"some {name}": rng.integers(0, points + 1, mask.shape).astype(np.int16) for name, mask in masks.items()}
    write_bytes(tmp_path / "steps.safetensors", save(steps))
    curves = {name: {f"some {name}": points} for name in masks}
    more = {"steps": str(tmp_path / "steps.safetensors"), "curves": curves, "columns": 10**6}
    seen = []
    walked = {"walked": lambda layers, of: seen.append((layers, of))}
    found = refit_shares(dense, *scene(0, dense), 0, settings | more | walked)
    assert found.keys() == steps.keys()
    assert seen == [(layer + 1, len(masks)) for layer in range(len(masks))]
    felt = load_file(settings["sensitivity"])
    for layer in [layer for layer in prunable_layers(dense) if layer.name in masks and layer.kind != "deconv2d"]:
        pairs = [inputs_and_outputs(dense, layer.name, frame) for frame in (0, 1)]
        gather = sparse_rows if layer.kind == "sparse" else conv_rows
        x = np.concatenate([gather(layer.module, *pair) for pair in pairs]).astype(float)
        weight = layer.weight.numpy(force=True).astype(float)
        flat, own = (array.reshape(len(weight), -1).T for array in (weight, steps[f"some {layer.name}"]))
        counts = felt[layer.name].astype(float) + FLOOR if layer.name in felt else np.ones(len(x))
        wanted = by_refits(x, flat, own, points, DAMPING, counts)
        np.testing.assert_allclose(found[f"some {layer.name}"], wanted, rtol=2e-3)
