"""Gradients, normalised outputs and batch-norm statistics against slow definitions of the same things."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from calib.frame_outputs import NORMS, batch_statistics, head_maps
from calib.gradients import arrays_of, normalised_outputs, signs, sketch_gradients
from calib.pool import FrameJob, FramePool
from dm3d_deploy.artifacts import write_bytes
from dm3d_deploy.config import load_config
from dm3d_deploy.errors import CheckpointError, InternalError, UsageError
from dm3d_deploy.models.checkpoints import save_weights
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.pruning.normalisation import output_distortion, output_scale, top_cells
from dm3d_deploy.pruning.recovery import judge, mean_statistics

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "centerpoint-tiny.yaml"
LAYERS = ("backbone_3d.conv1.0.conv1", "backbone_2d.deblocks.1.0", "dense_head.shared_conv.0")


def scene(seed):
    rng = np.random.default_rng(seed)
    cells = rng.choice(40 * 128 * 128, 400, replace=False)
    z, y, x = np.unravel_index(np.sort(cells), (40, 128, 128))
    coords = np.column_stack([np.zeros_like(z), z, y, x])
    features = np.column_stack([rng.normal(0, 5, (400, 3)), rng.uniform(0, 255, 400), rng.uniform(0, 0.4, 400)])
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(coords.astype(np.int64))


@pytest.fixture(scope="module")
def detector():
    torch.set_num_threads(1)
    built = build_detector(load_config(TINY))
    seed_weights(built, 3)
    return built


@pytest.fixture(scope="module")
def scale(detector):
    return output_scale([head_maps(detector, *scene(seed), 0, {}) for seed in (1, 2)], 40)


def test_squared_differences_of_y_are_the_distortion(detector, scale):
    other = copy.deepcopy(detector)
    with torch.no_grad():
        other.get_parameter(f"{LAYERS[0]}.weight").mul_(0.5)
    dense, changed = (head_maps(model, *scene(1), 0, {}) for model in (detector, other))
    cells = top_cells(dense, scale.box_cells)
    pieces = [
        normalised_outputs(
            {k: torch.from_numpy(v) for k, v in maps.items()}, cells, scale, lambda_box=2, lambda_score=3
        )
        for maps in (dense, changed)
    ]
    squares = sum(float(((a - b).double() ** 2).sum()) for a, b in zip(*pieces, strict=True))
    wanted = output_distortion(dense, changed, scale, cells, lambda_box=2, lambda_score=3)
    assert wanted > 1e-6
    assert squares == pytest.approx(wanted, rel=1e-4)


def test_a_gradient_row_is_the_slope_of_the_sketched_output(detector, scale):
    exact = copy.deepcopy(detector).double()
    features, coords = scene(1)
    features = features.double()
    settings = {
        "layers": LAYERS, "scale": scale.as_json(), "sketches": 2, "seed": 5, "lambda_box": 1.0, "lambda_score": 1.0,
    }  # fmt: skip
    rows = sketch_gradients(exact, features, coords, 7, settings)
    cells = top_cells(arrays_of(exact(features, coords)), scale.box_cells)

    def sketched(sketch):
        rng = np.random.Generator(np.random.PCG64([5, 7, sketch]))
        pieces = normalised_outputs(exact(features, coords), cells, scale, lambda_box=1.0, lambda_score=1.0)
        return sum(float((signs(piece.shape, rng) * piece).sum().detach()) for piece in pieces)

    for name in LAYERS:
        weight = exact.get_parameter(f"{name}.weight")
        direction = torch.from_numpy(np.random.default_rng(1).normal(size=tuple(weight.shape)))
        for sketch in range(2):
            values = []
            for step in (1e-9, -2e-9):  # short, so that no ReLU changes sides
                with torch.no_grad():
                    weight.add_(direction, alpha=step)
                values.append(sketched(sketch))
            with torch.no_grad():
                weight.add_(direction, alpha=1e-9)
            slope = (values[0] - values[1]) / 2e-9
            assert float((rows[name][sketch] * direction.numpy()).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_statistics_are_those_of_one_training_pass(detector):
    found = mean_statistics([batch_statistics(detector, *scene(seed), 0, {}) for seed in (1, 2, 3)])
    trained = copy.deepcopy(detector)
    norms = {name: module for name, module in trained.named_modules() if isinstance(module, NORMS)}
    for norm in norms.values():
        norm.train()
        norm.momentum = None  # cumulative average
        norm.reset_running_stats()
    with torch.no_grad():
        for seed in (1, 2, 3):
            trained(*scene(seed))
    assert len(found) == 2 * len(norms)
    for name, norm in norms.items():
        np.testing.assert_allclose(found[f"{name}.mean"], norm.running_mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[f"{name}.var"], norm.running_var, rtol=1e-4, atol=1e-5)


def test_taking_statistics_leaves_the_detector_in_eval_mode(detector):
    momenta = [m.momentum for m in detector.modules() if isinstance(m, NORMS)]
    twin = copy.deepcopy(detector)
    batch_statistics(twin, *scene(1), 0, {})
    assert not any(m.training for m in twin.modules() if isinstance(m, NORMS))
    assert [m.momentum for m in twin.modules() if isinstance(m, NORMS)] == momenta


def test_recovery_is_judged_by_the_mean_and_refuses_nan():
    assert judge("x", [2.0, 4.0], [1.0, 4.9]).accepted
    assert not judge("x", [1.0], [1.0]).accepted
    assert not judge("x", [1.0], [float("nan")]).accepted
    assert "did not fall: 1 before, 2 after" in judge("x", [1.0], [2.0]).reason
    with pytest.raises(InternalError, match="same selection frames"):
        judge("x", [], [])
    with pytest.raises(InternalError, match="at least one frame"):
        mean_statistics([])


@pytest.fixture
def job(tmp_path, detector):
    arrays = {}
    for frame in range(3):
        features, coords = scene(frame)
        arrays |= {f"{frame}.features": features.numpy(), f"{frame}.coords": coords.numpy().astype(np.int16)}
    write_bytes(tmp_path / "frames.safetensors", save(arrays))
    save_weights(detector, tmp_path / "weights.safetensors")
    return FrameJob(
        kind="outputs", config_text=load_config(TINY).text, weights=str(tmp_path / "weights.safetensors"),
        frames_file=str(tmp_path / "frames.safetensors"), frames=(2, 0, 1), out_dir=str(tmp_path / "out"), settings={},
    )  # fmt: skip


def test_layers_of_a_walk_are_told_beside_frames():
    frames, layers = [], []
    pool = FramePool(1)
    pool._children = [None]
    for line in ("dm3d-part 1 35\n", "dm3d-part 2 35\n", "dm3d-done 0\n", "dm3d-idle\n"):
        pool._lines.put((0, line))
    pool._wait(total=1, advanced=lambda *told: frames.append(told), walked=lambda *told: layers.append(told))
    assert (frames, layers) == ([(0, 1), (1, 1)], [(1, 35), (2, 35)])


def test_the_pool_computes_what_one_process_computes_and_names_what_went_wrong(job, detector, tmp_path):
    steps = []
    with FramePool(2) as pool:
        files = pool.run(job, advanced=lambda done, total: steps.append((done, total)))
        for frame, file in zip(job.frames, files, strict=True):
            wanted = head_maps(detector, *scene(frame), frame, {})
            found = load_file(file)
            assert found.keys() == wanted.keys()
            for name in wanted:
                np.testing.assert_array_equal(found[name], wanted[name])
        assert steps[0] == (0, 3)
        assert steps[-1] == (3, 3)
        with pytest.raises(UsageError, match="cannot do 'nothing'"):
            pool.run(FrameJob(**{**_fields(job), "kind": "nothing"}), advanced=lambda done, total: None)
        with pytest.raises(CheckpointError):  # the pool starts again after a failure
            pool.run(FrameJob(**{**_fields(job), "weights": str(tmp_path)}), advanced=lambda done, total: None)


def _fields(job):
    return {name: getattr(job, name) for name in FrameJob.__dataclass_fields__}


def test_a_child_that_dies_is_an_internal_error(job):
    def kill(done, total):
        for child in pool._children:
            child.kill()

    with FramePool(1) as pool, pytest.raises(InternalError, match="ended with code -9"):
        pool.run(job, advanced=kill)
