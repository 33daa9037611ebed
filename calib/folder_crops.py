"""Frames of a folder as training batches: each once an epoch, in an order of its own."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from calib.crops import MIN_CROP_POINTS, Crop, Window, batch_of, crop_of, window_of_step
from calib.object_paste import ObjectBank
from calib.training_folder import FolderFrame, TrainingFolder
from dm3d_deploy.errors import FrameError, UsageError
from dm3d_deploy.training.batch import Batch

FRAMES_IN_HAND = 32
TRIES = 40  # windows until a frame is taken for empty


class FolderCrops:
    """The batch of each step, from the step's number, the seed and the place among the processes alone.

    One crop of each of the next `crops` frames, each frame once an epoch over all processes. Labelled objects of other
    frames are pasted in.
    """

    def __init__(
        self,
        folder: TrainingFolder,
        names: Sequence[str],
        *,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        crops: int = 2,
    ) -> None:
        if crops < 1:
            raise UsageError(f"a batch of {crops} crops is empty.", fix="use one crop or more")
        self._folder, self._names, self._seed = folder, tuple(names), seed
        self._rank, self._processes, self._crops = rank, processes, crops
        self._bank = ObjectBank(folder, names) if folder.folder is not None else None
        self._frames: OrderedDict[str, FolderFrame] = OrderedDict()

    def steps_of(self, epochs: int) -> int:
        """Steps in which every frame is shown `epochs` times."""
        return math.ceil(epochs * len(self._names) / (self._crops * self._processes))

    def __call__(self, step: int) -> Batch:
        """The batch of that step."""
        window, large = window_of_step(self._folder.config, self._seed, step)
        first = (step * self._processes + self._rank) * self._crops
        crops = [self._crop(number, window, large=large) for number in range(first, first + self._crops)]
        return batch_of(crops, self._folder.config, window)

    def _crop(self, number: int, window: Window, *, large: bool) -> Crop:
        epoch, place = divmod(number, len(self._names))
        name = self._names[np.random.default_rng((self._seed, epoch)).permutation(len(self._names))[place]]
        random = np.random.default_rng((self._seed, 1, number))
        frame = self._frame(name)
        labelled = frame.labelled if self._bank is None else self._bank.paste(name, frame, random)
        for _ in range(TRIES):
            crop = crop_of(labelled, self._folder.config, window, random, prefer_large=large)
            if crop is not None:
                return crop
        raise FrameError(
            f"{self._folder.paths[name]} has {len(labelled.points)} points, and {TRIES} crops of it held fewer than "
            f"{MIN_CROP_POINTS} each.",
            fix="leave the frame out, or use a model whose range fits the sensor",
        )

    def _frame(self, name: str) -> FolderFrame:
        if name not in self._frames:
            self._frames[name] = self._folder.read(name)
        self._frames.move_to_end(name)
        while len(self._frames) > FRAMES_IN_HAND:
            self._frames.popitem(last=False)
        return self._frames[name]
