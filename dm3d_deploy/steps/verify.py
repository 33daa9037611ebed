"""The stage that asks whether what will be deployed computes what the detector computes, and what pruning cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from dm3d_deploy.artifacts import write_json, write_tensors
from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.detect import VARIANTS, DeployedDetector, load_run
from dm3d_deploy.evidence import Comparison, Tolerance, compare_arrays
from dm3d_deploy.geometry.candidates import Located
from dm3d_deploy.geometry.decode import decoded
from dm3d_deploy.geometry.matching import BoxTolerance, boxes_comparison
from dm3d_deploy.geometry.rois import first_stage, rois_from_array
from dm3d_deploy.pointcloud import Detections, Voxels
from dm3d_deploy.pruning.masks import masked_state
from dm3d_deploy.reporting.detection_files import detections_to_json
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.deploy import shown_cloud
from dm3d_deploy.steps.frame_work import Maps, Pieces, distortions, frames_of, outputs_of
from dm3d_deploy.steps.layers import narrowing_of

BACKBONE_TOLERANCE = Tolerance(max_relative=1e-3, min_cosine=0.9999)
HEAD_TOLERANCE = {
    "fp32": Tolerance(max_relative=1e-3, min_cosine=0.9999),
    "fp16": Tolerance(max_relative=5e-2, min_cosine=0.998),
}
BOX_TOLERANCE = {
    "fp32": BoxTolerance(centre_m=0.01, score=1e-3, size_share=1e-3, yaw_rad=0.01, velocity_mps=0.01),
    "fp16": BoxTolerance(centre_m=0.05, score=0.01, size_share=0.01, yaw_rad=0.05, velocity_mps=0.05),
}
WEIGHTS = {"pruned": "pruned_weights", "dense": "dense_weights"}


def verify(run: RunContext) -> None:
    """Compare ONNX with torch on the shown frame, and the pruned with the dense detector on the held-out frames."""
    held_out = frames_of(run, "held_out")
    _, label, shown = shown_cloud(run)
    frames = tuple(dict.fromkeys((*held_out, shown)))
    recovered = bool(json.loads(run.path("recovery").read_text(encoding="utf-8"))["accepted"])
    pieces = Pieces(run, len(frames) * 2 + len(held_out) * recovered + len(VARIANTS))
    outputs: dict[str, dict[int, Maps]] = {}
    for variant, kind in WEIGHTS.items():
        found = outputs_of(run, run.path(kind), frames, pieces.done, settings={"bev": True})
        outputs[variant] = dict(zip(frames, found, strict=True))
        pieces.next_job(len(frames))
    after = _distortions(run, outputs["dense"], outputs["pruned"], held_out)
    before = _before_recovery(run, outputs["dense"], held_out, pieces) if recovered else after
    parity: list[Comparison] = []
    for variant in VARIANTS:
        deployed = load_run(run.root, variant=variant)
        rois = _rois(run, shown, deployed.config)
        maps = exported_maps(run, outputs[variant][shown]) if variant == "pruned" else outputs[variant][shown]
        rows, detections = _compare(deployed, _voxels(run, shown), rois, maps, run.recipe.precision)
        parity += rows
        moving = deployed.config.estimates_velocity
        write_json(run.path(f"{variant}_detections"), detections_to_json(detections, frame=label, moving=moving))
        pieces.next_job(1)
        pieces.done(0)
    labels = [row["label"] for row in json.loads(run.path("frames_info").read_text(encoding="utf-8"))["frames"]]
    write_json(
        run.path("verification"),
        {
            "frame": label,
            "parity": [row.as_json() for row in parity],
            "held_out": [
                {"frame": labels[frame], "masked": a, "recovered": b if recovered else None}
                for frame, a, b in zip(held_out, before, after, strict=True)
            ],
        },
    )


def _distortions(
    run: RunContext, dense: Mapping[int, Maps], other: Mapping[int, Maps], frames: tuple[int, ...]
) -> list[float]:
    def heads(maps: Maps) -> Maps:
        return {name: array for name, array in maps.items() if name != "bev"}

    return distortions(run, [heads(dense[f]) for f in frames], [heads(other[f]) for f in frames])


def _before_recovery(
    run: RunContext, dense: Mapping[int, Maps], frames: tuple[int, ...], pieces: Pieces
) -> list[float]:
    """Distortions of the weights that pruning started from, masked."""
    state = masked_state(load_file(run.start), load_file(run.path("masks")))
    masked = run.root / "work" / ".masked.safetensors"
    write_tensors(masked, state)
    found = outputs_of(run, masked, frames, pieces.done)
    pieces.next_job(len(frames))
    masked.unlink()
    return _distortions(run, dense, dict(zip(frames, found, strict=True)), frames)


def exported_maps(run: RunContext, maps: Maps) -> Maps:
    """The masked detector's outputs without the channels of its bird's-eye map that the graphs have no more."""
    narrow = narrowing_of(run)
    reader = next((layer.name for layer in narrow.layers if layer.part == "2d"), None)  # in the order of the network
    if reader not in narrow.sides:
        return maps
    return {**maps, "bev": maps["bev"][:, narrow.sides[reader][0]]}


def _voxels(run: RunContext, frame: int) -> Voxels:
    with safe_open(run.path("frames"), framework="np") as file:
        features, coords, num_points = (
            file.get_tensor(f"{frame}.{name}") for name in ("features", "coords", "num_points")
        )
        points = file.get_tensor(f"{frame}.points") if f"{frame}.points" in file.keys() else None  # noqa: SIM118 - a file
    return Voxels(
        features=features, coords=coords.astype(np.int32), num_points=num_points, found=len(coords), cutoff_m=np.inf,
        points=points,
    )  # fmt: skip


def _rois(run: RunContext, frame: int, config: DetectorConfig) -> Located | None:
    """The dense detector's proposals, at which both sides are compared; None of a detector with one stage."""
    if config.second_stage is None:
        return None
    with safe_open(run.path("rois"), framework="np") as file:
        return rois_from_array(file.get_tensor(str(frame)), config)


def _compare(
    deployed: DeployedDetector, voxels: Voxels, rois: Located | None, torch_maps: Maps, precision: str
) -> tuple[list[Comparison], Detections]:
    """The BEV map, every kind of head output (tasks side by side) and the boxes of one frame, before and after NMS.

    Of two stages the proposals are compared as boxes are, and the second stage at the same RoIs on both sides.
    """
    names = (f"torch, {deployed.variant}", f"ONNX Runtime, {deployed.variant}")
    bev, maps, _ = deployed.outputs_at(voxels, rois)
    rows = [compare_arrays("BEV map", torch_maps["bev"], bev, names=names, tolerance=BACKBONE_TOLERANCE)]
    heads = {name: array for name, array in torch_maps.items() if name != "bev"}
    for branch in dict.fromkeys(name.split(".", 1)[1] for name in heads):
        tasks = [name for name in heads if name.split(".", 1)[1] == branch]
        reference, candidate = (np.concatenate([found[name] for name in tasks], axis=1) for found in (heads, maps))
        rows.append(compare_arrays(branch, reference, candidate, names=names, tolerance=HEAD_TOLERANCE[precision]))
    every = _without_threshold(deployed.config)
    tolerance = BOX_TOLERANCE[precision]
    if rois is not None:
        first = first_stage(deployed.config)
        sides = decoded(heads, first), decoded(maps, first)
        proposals = boxes_comparison([sides[0]], [sides[1]], names=names, tolerance=tolerance, config=first)
        rows += [replace(row, output=row.output.replace("boxes", "proposals")) for row in proposals]
    expected, found = decoded(heads, every, rois), decoded(maps, every, rois)
    rows += boxes_comparison([expected], [found], names=names, tolerance=tolerance, config=every)
    return rows, deployed.detect_voxels(voxels)


def _without_threshold(config: DetectorConfig) -> DetectorConfig:
    """The same detector with every score let through: a frame without confident boxes is evidence too.

    What NMS keeps above the real threshold is a part of what it keeps here: it takes boxes by falling score.
    """
    return replace(config, post=replace(config.post, score_threshold=0.0))
