"""Several processes that train one model: gradients are averaged at each step, batch norm at each checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float32
from torch import Tensor, nn

from dm3d_deploy.errors import Dm3dError

# Longer than any pause of a stopped process; one that died closes its connection and is noticed at once.
PATIENCE = timedelta(hours=12)


class Team:
    """The place of a process among `size`. Alone, every exchange is the identity.

    They meet at the file `meeting`, or without one where torchrun's environment variables say; on GPUs they exchange
    by NCCL, else by Gloo.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, meeting: Path | None = None, *, device: torch.device | None = None
    ) -> None:
        self.rank, self.size = rank, size
        if size > 1:
            on_gpu = device is not None and device.type == "cuda"
            if on_gpu:
                torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                init_method="env://" if meeting is None else f"file://{meeting}",
                rank=rank,
                world_size=size,
                timeout=PATIENCE,
            )

    @property
    def leads(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def average(self, values: Float32[Tensor, " values"]) -> None:
        """Replace the values by their mean over all processes."""
        if self.size == 1:
            return
        try:
            dist.all_reduce(values)
        except RuntimeError as error:
            raise Dm3dError(
                f"a training process of {self.size} ended early: {str(error).splitlines()[0][:200]}.",
                fix="read its message above, then go on with --resume from the last checkpoint, if there is one",
            ) from None
        values /= self.size

    def average_gradients(self, parameters: Iterable[nn.Parameter], shared: Float32[Tensor, " numbers"]) -> Tensor:
        """Average all gradients in place, and return the means of the numbers of each process; one exchange."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([shared, *(g.flatten() for g in gradients)])
        self.average(flat)
        at = len(shared)
        if self.size > 1:
            for gradient in gradients:
                gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
                at += gradient.numel()
        return flat[: len(shared)]

    def average_buffers(self, model: nn.Module) -> None:
        """Average the running statistics: each process saw other frames."""
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        flat = torch.cat([b.flatten() for b in buffers])
        self.average(flat)
        at = 0
        for buffer in buffers:
            buffer.copy_(flat[at : at + buffer.numel()].view_as(buffer))
            at += buffer.numel()

    def leave(self) -> None:
        """End the exchange."""
        if self.size > 1:
            dist.destroy_process_group()
