"""The stage that makes good what pruning broke: each step is taken only if frames that it did not see say so."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dm3d_deploy.artifacts import write_json, write_tensors
from dm3d_deploy.pruning.masks import masked_state
from dm3d_deploy.pruning.recovery import STEPS_OF, Acceptance, judge, mean_statistics
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.frame_work import Maps, Pieces, distortions, frame_job, frames_of, outputs_of, refit_frames

State = dict[str, np.ndarray]

ROWS_PER_INPUT = 8
DAMPING = 0.01
TITLES = {
    "bn": "batch-norm re-estimation",
    "reconstruct": "layer-wise reconstruction",
    "distill": "label-free distillation",
    "finetune": "fine-tuning with labels",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """Weights to judge; `labelled` are the losses before and after on labelled crops that they did not learn from."""

    state: State
    labelled: tuple[list[float], list[float]] | None = None


def recover(run: RunContext) -> None:
    """Recover the masked weights step by step, and write what each step did to the selection frames."""
    state = masked_weights(run)
    steps, selection = STEPS_OF[run.recipe.recover], frames_of(run, "selection")
    rows: list[Acceptance] = []
    seconds: dict[str, float] = {}
    found = _nothing(run.recipe.recover)
    if steps and selection:
        trials = _Trials(run, selection, steps)
        before = trials.current
        for step in steps:
            started = time.perf_counter()
            tried = _MAKERS[step](run, state, trials)
            verdict = trials.judged(TITLES[step], tried)
            state = tried.state if verdict.accepted else state
            rows.append(verdict)
            seconds[verdict.method] = round(time.perf_counter() - started, 3)
        trials.close()
        found = _as_json(rows, before, trials.last)
    write_tensors(run.path("pruned_weights"), state)
    write_json(run.path("recovery"), found)
    write_json(run.path("recovery_seconds"), seconds)


def masked_weights(run: RunContext) -> State:
    """The weights that pruning started from, zero where the masks are."""
    return masked_state(load_file(run.start), load_file(run.path("masks")))


def _as_json(rows: list[Acceptance], before: list[float], after: list[float]) -> dict[str, Any]:
    """Distortions of the selection frames: of the mask, and of the last step that was taken, else of the last."""
    taken = [row for row in rows if row.accepted]
    return {
        "method": ", then ".join(row.method for row in taken or rows),
        "accepted": bool(taken),
        "before": math.fsum(before) / len(before),
        "after": math.fsum(after) / len(after),
        "reason": "; ".join(row.reason for row in taken or rows),
        "steps": [asdict(row) for row in rows],
    }


def _nothing(asked: str) -> dict[str, Any]:
    reason = "none was asked for" if asked == "none" else "no frame could be spared to judge it; give more frames"
    return {"method": "none", "accepted": False, "reason": reason, "steps": []}


class _Trials:
    """Candidates' weights on disk, where the frame workers read them, and their distortion on the selection frames."""

    def __init__(self, run: RunContext, selection: tuple[int, ...], steps: tuple[str, ...]) -> None:
        self.run, self.selection = run, selection
        self.calibration = frames_of(run, "calibration")
        learning = run.recipe.recover_steps
        work = {"bn": len(self.calibration), "reconstruct": 1, "distill": learning, "finetune": learning}
        self.pieces = Pieces(run, (2 + len(steps)) * len(selection) + sum(work[step] for step in steps))
        self.path = run.root / "work" / ".trial.safetensors"
        self.dense = self._outputs(run.path("dense_weights"))
        self.current = self.last = self.distortions(masked_weights(run))
        self._any_taken = False

    def write(self, state: State) -> None:
        write_tensors(self.path, state)

    def job(self, kind: str, frames: tuple[int, ...], state: State, settings: Mapping[str, Any]) -> list[State]:
        """What the frame workers compute with these weights."""
        self.write(state)
        job = frame_job(self.run, kind, frames, weights=self.path, folder=f".{kind}", settings=settings)
        files = self.run.pool.run(job, advanced=lambda done, _: self.pieces.done(done), walked=self.pieces.walked)
        self.pieces.next_job(len(frames))
        found = [load_file(file) for file in files]
        shutil.rmtree(job.out_dir)
        return found

    def distortions(self, state: State) -> list[float]:
        """Of the selection frames."""
        self.write(state)
        return distortions(self.run, self.dense, self._outputs(self.path))

    def judged(self, method: str, tried: Tried) -> Acceptance:
        """Hold a candidate against what was accepted before it: by labels where it learned from some."""
        after = self.distortions(tried.state)
        if tried.labelled is None:
            verdict = judge(method, self.current, after)
        else:
            verdict = judge(method, *tried.labelled, measure="labelled loss", where="batches of other scenes")
        if verdict.accepted or not self._any_taken:
            self.last = after
        if verdict.accepted:
            self.current, self._any_taken = after, True
        return verdict

    def close(self) -> None:
        self.path.unlink()

    def _outputs(self, weights: Any) -> list[Maps]:
        found = outputs_of(self.run, weights, self.selection, self.pieces.done)
        self.pieces.next_job(len(self.selection))
        return found


def _batch_norm(run: RunContext, state: State, trials: _Trials) -> Tried:
    statistics = mean_statistics(trials.job("statistics", trials.calibration, state, {}))
    renamed = {f"{k.rsplit('.', 1)[0]}.running_{k.rsplit('.', 1)[1]}": v for k, v in statistics.items()}
    return Tried(state={**state, **renamed})


def reconstruction_settings(run: RunContext, masks: Path) -> dict[str, Any]:
    """Of a job that fits the weights which the masks in a file keep anew to the refit's frames."""
    files = {"dense_weights": str(run.path("dense_weights").resolve()), "masks": str(masks.resolve())}
    return {**files, **refit_settings(run, ROWS_PER_INPUT)}


def refit_settings(run: RunContext, rows_per_input: int) -> dict[str, Any]:
    """Of any walk through the refit's frames: where they lie, which rows of its layers count, and how it is damped."""
    return {
        "frames_file": str(run.path("frames").resolve()),
        "frames": list(refit_frames(run)),
        "sensitivity": str(run.path("sensitivity").resolve()),
        "rows_per_input": rows_per_input,
        "damping": DAMPING,
        "seed": run.recipe.seed,
    }


def _reconstruction(run: RunContext, state: State, trials: _Trials) -> Tried:
    settings = reconstruction_settings(run, run.path("masks"))
    return Tried(state={**state, **trials.job("reconstruction", trials.calibration[:1], state, settings)[0]})


def _distillation(run: RunContext, state: State, trials: _Trials) -> Tried:
    from dm3d_deploy.steps.recover_by_training import distilled

    trials.write(state)
    found = distilled(run, trials.path, trials.pieces.done)
    trials.pieces.next_job(run.recipe.recover_steps)
    return Tried(state=found)


def _fine_tuning(run: RunContext, state: State, trials: _Trials) -> Tried:
    from dm3d_deploy.steps.recover_by_training import fine_tuned

    trials.write(state)
    found, *losses = fine_tuned(run, trials.path, trials.pieces.done)
    trials.pieces.next_job(run.recipe.recover_steps)
    return Tried(state=found, labelled=(losses[0], losses[1]))


_MAKERS: dict[str, Callable[[RunContext, State, _Trials], Tried]] = {
    "bn": _batch_norm,
    "reconstruct": _reconstruction,
    "distill": _distillation,
    "finetune": _fine_tuning,
}
