"""The visible list of stages. Their order is data; each is a function from files to files, imported when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calib.pool import FramePool
from dm3d_deploy.progress import Watch
from dm3d_deploy.recipe import Recipe

FILES = {
    "model_config": "model.yaml",
    "dense_weights": "weights/dense.safetensors",
    "start_weights": "weights/start.safetensors",
    "model_info": "work/model.json",
    "frames": "work/frames.safetensors",
    "frames_info": "work/frames.json",
    "rois": "work/rois.safetensors",
    "output_scale": "work/output_scale.json",
    "layers": "work/layers.json",
    "gradients": "work/gradients",
    "sensitivity": "work/sensitivity.safetensors",
    "curves": "work/curves.json",
    "scores": "work/scores.safetensors",
    "channels": "work/channels.json",
    "refit_shares": "work/refit_shares.json",
    "allocation": "work/allocation.json",
    "masks": "weights/masks.safetensors",
    "masks_info": "work/masks.json",
    "pruned_weights": "weights/pruned.safetensors",
    "small_weights": "weights/small.safetensors",
    "recovery": "work/recovery.json",
    "recovery_seconds": "work/recovery_seconds.json",
    "dense_bev_head": "onnx/dense/bev_head.onnx",
    "dense_backbone3d": "onnx/dense/backbone3d.onnx",
    "bev_head": "onnx/bev_head.onnx",
    "backbone3d": "onnx/backbone3d.onnx",
    "second_stage": "onnx/second_stage.onnx",
    "dense_second_stage": "onnx/dense/second_stage.onnx",
    "export_info": "work/export.json",
    "plan": "engines/backbone3d/backbone3d.plan",
    "points_plan": "engines/backbone3d/points.plan",
    "plan_info": "engines/backbone3d/resources.json",
    "bev_head_engine": "engines/bev_head.rtx.engine",
    "engines_info": "engines/engines.json",
    "engine_layers": "engines/bev_head.rtx.engine.layers.json",
    "engine_log": "engines/bev_head.rtx.log",
    "second_stage_engine": "engines/second_stage.rtx.engine",
    "second_stage_engine_layers": "engines/second_stage.rtx.engine.layers.json",
    "second_stage_engine_log": "engines/second_stage.rtx.log",
    "verification": "work/verification.json",
    "dense_detections": "detections/dense.json",
    "pruned_detections": "detections/pruned.json",
    "score": "work/score.json",
    "latency": "work/latency.json",
    "report": "report.json",
    "report_page": "report.html",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the line.

    `reads` and `writes` are kinds of FILES, `recipe` the recipe fields it depends on, `outside` the inputs that lie
    outside the run, `tools` the packages whose versions decide it beside those of every stage. A `transient` output
    may be deleted once the next stage is done; what is not `reproducible` (times, the machine) is recorded in
    measurements.json, not in the manifest.
    """

    name: str
    says: str
    run: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    recipe: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    transient: bool = False
    reproducible: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What a stage function gets: where the run lies, what was asked for, who watches, and who works over frames."""

    root: Path
    recipe: Recipe
    watch: Watch
    pool: FramePool

    def path(self, kind: str) -> Path:
        """Where a kind of file lies in this run."""
        return self.root / FILES[kind]

    @property
    def start(self) -> Path:
        """The weights that pruning starts from: an earlier round's, else the dense ones."""
        earlier = self.path("start_weights")
        return earlier if earlier.is_file() else self.path("dense_weights")


STAGES: tuple[Stage, ...] = (
    Stage(
        name="load", says="read the detector", run="dm3d_deploy.steps.inputs:load",
        writes=("model_config", "dense_weights", "model_info"), optional=("start_weights",),
        recipe=("model", "checkpoint", "start", "voxel_keep", "voxel_stages", "seed"),
        outside=("model", "checkpoint", "start"),
    ),
    Stage(
        name="frames", says="gather point clouds", run="dm3d_deploy.steps.inputs:frames",
        reads=("model_config",), writes=("frames", "frames_info"),
        recipe=("frames", "calibration_frames", "selection_frames", "held_out_frames", "seed"), outside=("frames",),
    ),
    Stage(
        name="gradients", says="sketch the detector's sensitivity", run="dm3d_deploy.steps.prune:gradients",
        reads=("model_config", "dense_weights", "start_weights", "frames", "frames_info"),
        writes=("gradients", "sensitivity", "output_scale", "layers"), optional=("rois",),
        recipe=("scope", "sketches", "lambda_box", "lambda_score", "box_cells", "seed"), transient=True,
    ),
    Stage(
        name="curves", says="price every ratio of every layer", run="dm3d_deploy.steps.prune:curves",
        reads=("dense_weights", "start_weights", "gradients", "layers"), writes=("curves", "scores", "channels"),
        recipe=("method", "scope", "ratios", "damping", "kappa"),
    ),
    Stage(
        name="foresee", says="price what a refit will make good", run="dm3d_deploy.steps.foresee:foresee",
        reads=("model_config", "dense_weights", "start_weights", "frames", "frames_info", "rois", "sensitivity",
               "layers", "curves", "scores"),
        writes=("refit_shares",),
        recipe=("method", "recover", "max_distortion", "cost", "patterns", "device", "ratios", "seed"),
    ),
    Stage(
        name="allocate", says="spend the budget", run="dm3d_deploy.steps.allocate:allocate",
        reads=("model_config", "model_info", "dense_weights", "start_weights", "frames", "frames_info", "rois",
               "output_scale", "layers", "curves", "scores", "channels", "refit_shares"),
        writes=("allocation",), outside=("profile",),
        recipe=("method", "target", "target_ms", "max_distortion", "cost", "profile", "candidates", "scope",
                "patterns", "device", "lambda_box", "lambda_score", "box_cells"),
    ),
    Stage(
        name="mask", says="choose the weights", run="dm3d_deploy.steps.prune:mask",
        reads=("layers", "allocation", "scores", "channels"), writes=("masks", "masks_info"), recipe=("ratios",),
    ),
    Stage(
        name="recover", says="make good what pruning broke", run="dm3d_deploy.steps.recover:recover",
        reads=("model_config", "dense_weights", "start_weights", "masks", "frames", "frames_info", "rois",
               "output_scale", "sensitivity"),
        writes=("pruned_weights", "recovery"),
        recipe=("recover", "recover_steps", "recover_data", "lambda_box", "lambda_score", "box_cells", "seed"),
        outside=("recover_data",),
    ),
    Stage(
        name="export", says="write ONNX", run="dm3d_deploy.steps.deploy:export",
        reads=("model_config", "dense_weights", "pruned_weights", "layers", "allocation", "channels"),
        writes=("bev_head", "backbone3d", "dense_bev_head", "dense_backbone3d", "export_info"),
        optional=("small_weights", "second_stage", "dense_second_stage"), recipe=("precision",),
    ),
    Stage(
        name="plan", says="plan the 3D engine", run="dm3d_deploy.steps.plan3d:plan3d",
        reads=("model_config", "frames", "frames_info", "backbone3d"), writes=("plan_info",),
        optional=("plan", "points_plan"), recipe=("device", "precision", "capacity_margin", "capacities"),
        tools=("triton",),
    ),
    Stage(
        name="engine", says="build engines", run="dm3d_deploy.steps.deploy:engine",
        reads=("model_config", "bev_head", "second_stage", "plan_info", "plan", "points_plan"),
        writes=("engines_info",),
        optional=("bev_head_engine", "engine_layers", "engine_log", "second_stage_engine",
                  "second_stage_engine_layers", "second_stage_engine_log"),
        recipe=("device", "precision"), tools=("tensorrt-rtx",), reproducible=False,
    ),
    Stage(
        name="verify", says="compare with the detector in torch", run="dm3d_deploy.steps.verify:verify",
        reads=("model_config", "dense_weights", "start_weights", "pruned_weights", "masks", "frames", "frames_info",
               "rois", "output_scale",
               "bev_head", "backbone3d", "second_stage", "dense_bev_head", "dense_backbone3d", "dense_second_stage"),
        writes=("verification", "dense_detections", "pruned_detections"),
        recipe=("precision", "lambda_box", "lambda_score", "box_cells"),
    ),
    Stage(
        name="score", says="count what pruning costs in detections", run="dm3d_deploy.steps.score:score",
        reads=("model_config", "model_info", "dense_weights", "masks", "pruned_weights", "recovery"),
        writes=("score",), recipe=("score_frames",),
    ),
    Stage(
        name="bench", says="measure latency here", run="dm3d_deploy.steps.deploy:bench",
        reads=("model_config", "frames", "frames_info", "bev_head", "backbone3d", "second_stage", "dense_bev_head",
               "dense_backbone3d", "dense_second_stage"),
        writes=("latency",), recipe=("precision",), reproducible=False,
    ),
    Stage(
        name="report", says="write the report", run="dm3d_deploy.steps.report:report",
        reads=("model_config", "model_info", "frames", "frames_info", "layers", "allocation", "masks_info", "recovery",
               "export_info", "plan", "plan_info", "engines_info", "output_scale", "verification", "dense_detections",
               "pruned_detections", "score", "latency"),
        writes=("report", "report_page"),
        recipe=("target", "target_ms", "max_distortion", "cost", "scope", "patterns", "device", "precision"),
        reproducible=False,
    ),
)  # fmt: skip

STAGE_NAMES = tuple(stage.name for stage in STAGES)
