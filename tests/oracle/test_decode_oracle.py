"""The whole way from raw maps to detections against OpenPCDet's own final boxes, on a real frame and seeded weights."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dm3d_deploy.config import load_config
from dm3d_deploy.geometry.decode import detections_from_maps
from dm3d_deploy.pointcloud import Detections


@pytest.fixture(scope="module")
def oracle(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "oracle/centerpoint_voxel01_nuscenes.npz"))


@pytest.fixture(scope="module")
def maps(shared: Path, oracle: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    torch = pytest.importorskip("torch")
    from dm3d_deploy.models.detector import build_detector

    spec = importlib.util.spec_from_file_location("seeded_weights", shared / "oracle/seeded_weights.py")
    assert spec is not None
    assert spec.loader is not None
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    detector = build_detector(load_config("centerpoint"))
    detector.load_state_dict(
        {
            name: torch.from_numpy(seeded.seeded_array(0, name, tuple(value.shape))).to(value.dtype)
            for name, value in detector.state_dict().items()
        }
    )
    features = torch.from_numpy(oracle["b.voxel_features"])
    coords = torch.from_numpy(oracle["input.voxel_coords"].astype(np.int64))
    with torch.no_grad():
        return {name: value.numpy() for name, value in detector(features, coords).items()}


def matched_share(found: Detections, oracle: dict[str, np.ndarray]) -> float:
    """Share of OpenPCDet's boxes that have one of ours within a thousandth (of a metre, or of a value above one)."""
    boxes = np.concatenate(
        [found.boxes.centre, found.boxes.size, found.boxes.yaw[:, None], found.boxes.velocity], axis=1
    )
    reference, scores, labels = oracle["final.pred_boxes"], oracle["final.pred_scores"], oracle["final.pred_labels"] - 1
    free = np.ones(len(found), dtype=bool)
    for box, score, label in zip(reference, scores, labels, strict=True):
        error = (np.abs(boxes - box) / np.maximum(1, np.abs(box))).max(axis=1)
        error[(found.labels != label) | ~free | (np.abs(found.scores - score) > 1e-4)] = np.inf
        best = int(error.argmin())
        free[best] = free[best] and error[best] > 1e-3
    return float((~free).sum()) / len(reference)


@pytest.mark.data
def test_final_boxes_are_those_of_openpcdet(oracle: dict[str, np.ndarray], maps: dict[str, np.ndarray]) -> None:
    """Its NMS was a CPU stand-in and random weights give boxes of kilometres: neither side promises more than this."""
    found = detections_from_maps(maps, load_config("centerpoint"))
    assert len(oracle["final.pred_scores"]) == 498
    assert abs(len(found) - 498) <= 2
    assert matched_share(found, oracle) >= 0.95


@pytest.mark.data
@pytest.mark.parametrize("branch", ["rot", "center", "vel", "dim"])
def test_swapped_channels_would_be_seen(
    oracle: dict[str, np.ndarray], maps: dict[str, np.ndarray], branch: str
) -> None:
    swapped = {name: value[:, ::-1] if name.endswith(f".{branch}") else value for name, value in maps.items()}
    assert matched_share(detections_from_maps(swapped, load_config("centerpoint")), oracle) < 0.5
