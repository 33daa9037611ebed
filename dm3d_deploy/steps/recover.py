"""The stage that makes good what pruning broke: each step is taken only if frames that it did not see say so."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save

from dm3d_deploy.artifacts import write_bytes, write_json
from dm3d_deploy.config import load_config
from dm3d_deploy.pruning.masks import masked_state
from dm3d_deploy.pruning.recovery import STEPS_OF, Acceptance, judge, mean_statistics
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.frame_work import Maps, Pieces, distortions, frame_job, frames_of, outputs_of

if TYPE_CHECKING:
    from dm3d_deploy.training.batch import Batch

State = dict[str, np.ndarray]

ROWS_PER_INPUT = 8
DAMPING = 0.01
TITLES = {
    "bn": "batch-norm re-estimation",
    "reconstruct": "layer-wise reconstruction",
    "distill": "label-free distillation",
}
CROPS = 2
DISTILL_RATE = 2e-4  # a tenth of the rate that trained the dense weights


def recover(run: RunContext) -> None:
    """Recover the masked weights step by step, and write what each step did to the selection frames."""
    state = masked_weights(run)
    steps, selection = STEPS_OF[run.recipe.recover], frames_of(run, "selection")
    rows: list[Acceptance] = []
    seconds: dict[str, float] = {}
    if steps and selection:
        trials = _Trials(run, selection, steps)
        for step in steps:
            started = time.perf_counter()
            candidate = _MAKERS[step](run, state, trials)
            verdict = trials.judged(TITLES[step], candidate)
            state = candidate if verdict.accepted else state
            rows.append(verdict)
            seconds[verdict.method] = round(time.perf_counter() - started, 3)
        trials.close()
    write_bytes(run.path("pruned_weights"), save(state))
    write_json(run.path("recovery"), _as_json(run.recipe.recover, rows, bool(selection)))
    write_json(run.path("recovery_seconds"), seconds)


def masked_weights(run: RunContext) -> State:
    """The weights that pruning started from, zero where the masks are."""
    return masked_state(load_file(run.start), load_file(run.path("masks")))


def _as_json(asked: str, rows: list[Acceptance], judged: bool) -> dict[str, Any]:
    if rows:
        taken = [row for row in rows if row.accepted]
        return {
            "method": ", then ".join(row.method for row in taken or rows),
            "accepted": bool(taken),
            "before": rows[0].before,
            "after": taken[-1].after if taken else rows[-1].after,
            "reason": "; ".join(row.reason for row in taken or rows),
            "steps": [asdict(row) for row in rows],
        }
    reason = "none was asked for" if asked == "none" else "no frame could be spared to judge it; give more frames"
    return {"method": "none", "accepted": False, "reason": reason, "steps": []}


class _Trials:
    """Candidates' weights on disk, where the frame workers read them, and their distortion on the selection frames."""

    def __init__(self, run: RunContext, selection: tuple[int, ...], steps: tuple[str, ...]) -> None:
        self.run, self.selection = run, selection
        self.calibration = frames_of(run, "calibration")
        work = {"bn": len(self.calibration), "reconstruct": 1, "distill": run.recipe.distill_steps}
        self.pieces = Pieces(run, (2 + len(steps)) * len(selection) + sum(work[step] for step in steps))
        self.path = run.root / "work" / ".trial.safetensors"
        self.dense = self._outputs(run.path("dense_weights"))
        self.current = self.distortions(masked_weights(run))

    def write(self, state: State) -> None:
        write_bytes(self.path, save(state))

    def job(self, kind: str, frames: tuple[int, ...], state: State, settings: Mapping[str, Any]) -> list[State]:
        """What the frame workers compute with these weights."""
        self.write(state)
        job = frame_job(self.run, kind, frames, weights=self.path, folder=f".{kind}", settings=settings)
        files = self.run.pool.run(job, advanced=lambda done, _: self.pieces.done(done))
        self.pieces.next_job(len(frames))
        found = [load_file(file) for file in files]
        shutil.rmtree(job.out_dir)
        return found

    def distortions(self, state: State) -> list[float]:
        """Of the selection frames."""
        self.write(state)
        return distortions(self.run, self.dense, self._outputs(self.path))

    def judged(self, method: str, candidate: State) -> Acceptance:
        """Hold a candidate against what was accepted before it."""
        after = self.distortions(candidate)
        verdict = judge(method, self.current, after)
        self.current = after if verdict.accepted else self.current
        return verdict

    def close(self) -> None:
        self.path.unlink()

    def _outputs(self, weights: Any) -> list[Maps]:
        found = outputs_of(self.run, weights, self.selection, self.pieces.done)
        self.pieces.next_job(len(self.selection))
        return found


def _batch_norm(run: RunContext, state: State, trials: _Trials) -> State:
    statistics = mean_statistics(trials.job("statistics", trials.calibration, state, {}))
    renamed = {f"{k.rsplit('.', 1)[0]}.running_{k.rsplit('.', 1)[1]}": v for k, v in statistics.items()}
    return {**state, **renamed}


def _reconstruction(run: RunContext, state: State, trials: _Trials) -> State:
    settings = {
        "dense_weights": str(run.path("dense_weights").resolve()),
        "masks": str(run.path("masks").resolve()),
        "frames_file": str(run.path("frames").resolve()),
        "frames": list(trials.calibration),
        "rows_per_input": ROWS_PER_INPUT,
        "damping": DAMPING,
        "seed": run.recipe.seed,
    }
    return {**state, **trials.job("reconstruction", trials.calibration[:1], state, settings)[0]}


def _distillation(run: RunContext, state: State, trials: _Trials) -> State:
    """On simulated crops; in one thread, so that a recipe gives the same bits on any number of cores."""
    import torch

    from calib.training_frames import SimulatedCrops
    from dm3d_deploy.models.checkpoints import load_checkpoint
    from dm3d_deploy.models.detector import build_detector
    from dm3d_deploy.training.distill import distil
    from dm3d_deploy.training.loop import TrainSettings
    from dm3d_deploy.training.schedule import OneCycle

    config, steps = load_config(run.path("model_config")), run.recipe.distill_steps
    student, teacher = build_detector(config), build_detector(config)
    trials.write(state)
    load_checkpoint(student, trials.path)
    load_checkpoint(teacher, run.path("dense_weights"))
    crops = SimulatedCrops(config, seed=run.recipe.seed, crops=CROPS)

    def batch_of(step: int) -> Batch:
        trials.pieces.done(min(step, steps))
        return crops(step)

    settings = TrainSettings(steps=steps, cycle=OneCycle(peak_rate=DISTILL_RATE), half_2d=False)
    folder, threads = run.root / "work" / ".distillation", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        distil(student, teacher, batch_of, settings, out=folder, masks=load_file(run.path("masks")))
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder, ignore_errors=True)
    trials.pieces.next_job(steps)
    trained = {name: value.numpy() for name, value in student.state_dict().items()}
    return masked_state(trained, load_file(run.path("masks")))


_MAKERS: dict[str, Callable[[RunContext, State, _Trials], State]] = {
    "bn": _batch_norm,
    "reconstruct": _reconstruction,
    "distill": _distillation,
}
