"""Which cells count: energies against gradients taken by hand, draws against the sums they stand for."""

import numpy as np
import pytest
import torch
from run_sample import TINY

from calib.cell_energies import CellEnergies
from dm3d_deploy.config import load_config
from dm3d_deploy.models.detector import build_detector, prunable_layers
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.pruning.sensitivity import FLOOR, drawn, relative


def scene(detector):
    rng = np.random.default_rng(0)
    depth, height, width = (size // 2 for size in detector.config.voxels.grid_zyx)
    cells = np.unique(rng.integers(0, (depth, height // 2, width // 2), (200, 3)), axis=0)
    coords = np.hstack([np.zeros((len(cells), 1)), cells]).astype(np.int64)
    features = rng.normal(size=(len(cells), len(detector.config.voxels.columns))).astype(np.float32)
    return torch.from_numpy(features), torch.from_numpy(coords)


def value_of(maps):
    return torch.stack([(maps[name].double().cos() * (1 + i)).sum() for i, name in enumerate(sorted(maps))]).sum()


def output_of(detector, given, layer, push):
    """A sum of all outputs, each with a factor of its own, where `push` is added to what `layer` computes."""

    def pushed(_, __, result):
        if hasattr(result, "features"):
            return result.with_features(result.features + push)
        return result + push

    handle = layer.module.register_forward_hook(pushed)
    maps = detector(*given)
    handle.remove()
    return value_of(maps)


def test_energies_are_squared_derivatives_by_each_cell():
    detector = build_detector(load_config(str(TINY)))
    seed_weights(detector, 0)
    given = scene(detector)
    layers = [layer for layer in prunable_layers(detector) if layer.part != "head"]
    names = [layer.name for layer in layers]
    with CellEnergies(detector, names) as energies:
        maps = detector(*given)
    value = value_of(maps)
    twice = torch.autograd.grad(value, [detector.get_parameter(f"{names[0]}.weight")], retain_graph=True)
    torch.autograd.grad(value, [detector.get_parameter(f"{names[0]}.weight")])
    assert twice[0].any()
    found = energies.arrays()
    assert set(found) == {f"cells.{name}" for name in names}
    for layer in layers:
        shape = {}

        def look(_, __, result, shape=shape):
            shape["of"] = (result.features if hasattr(result, "features") else result).shape

        handle = layer.module.register_forward_hook(look)
        detector(*given)
        handle.remove()
        push = torch.zeros(shape["of"], requires_grad=True)
        gradient = torch.autograd.grad(output_of(detector, given, layer, push), [push])[0].numpy().astype(float)
        wanted = 2 * (gradient**2).sum(axis=1)  # two backward passes
        if layer.kind == "deconv2d":
            up = layer.module.stride[0]
            rows, columns = wanted.shape[1] // up, wanted.shape[2] // up
            blocks = [(y * up, x * up) for y in range(rows) for x in range(columns)]
            wanted = np.array([wanted[0, y : y + up, x : x + up].sum() for y, x in blocks])
        np.testing.assert_allclose(found[f"cells.{layer.name}"], wanted.ravel(), rtol=2e-3, atol=1e-6 * wanted.max())


def test_energies_of_frames_are_told_by_their_common_mean():
    found = relative({"a": [np.array([1.0, 3.0]), np.array([8.0])], "dead": [np.zeros(2), np.zeros(1)]})
    assert list(found) == ["a"]
    assert found["a"].dtype == np.float16
    np.testing.assert_allclose(found["a"], [0.25, 0.75, 2.0])
    spike = np.zeros(10**6)
    spike[7] = 1
    assert np.isfinite(relative({"a": [spike]})["a"]).all()


def test_a_draw_stands_for_the_sum_weighted_by_sensitivity():
    rng = np.random.default_rng(1)
    felt = rng.exponential(size=4000) ** 2
    values = rng.normal(size=4000) + felt
    wanted = np.average(values, weights=felt + FLOOR)
    means = []
    for seed in range(200):
        found = drawn(4000, 400, felt, np.random.default_rng(seed))
        assert len(found.cells) == len(set(found.cells.tolist())) == 400
        assert (np.diff(found.cells) > 0).all()
        assert found.weights.mean() == pytest.approx(1, rel=1e-5)
        means.append(np.average(values[found.cells], weights=found.weights))
    assert np.mean(means) == pytest.approx(wanted, rel=0.1)  # without replacement the largest are drawn once only
    assert abs(values.mean() - wanted) > 0.5 * wanted


def test_few_cells_are_all_taken_and_count_what_they_are_felt():
    found = drawn(3, 5, np.array([0.0, 1.0, 2.0]), np.random.default_rng(0))
    assert found.cells.tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.weights, np.array([FLOOR, 1 + FLOOR, 2 + FLOOR]) / (1 + FLOOR), rtol=1e-6)
    assert drawn(3, 2, None, np.random.default_rng(0)).weights.tolist() == [1.0, 1.0]


def test_a_range_of_a_draw_is_counted_from_its_start():
    part = drawn(10, 10, np.arange(10.0), np.random.default_rng(0)).within(4, 7)
    assert part.cells.tolist() == [0, 1, 2]
    np.testing.assert_allclose(part.weights * (4.5 + FLOOR), np.array([4, 5, 6]) + FLOOR, rtol=1e-6)
