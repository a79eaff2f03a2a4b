"""Data-parallel training under ``torchrun``; without it, a single process is rank 0 of 1."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fusedrnn.demo.options import DemoError

_last_work: Any = None


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together."""

    rank: int = 0
    local: int = 0  # the rank on this machine
    size: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """What torchrun says, if it started this process."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            local=int(os.environ.get("LOCAL_RANK", 0)),
            size=int(os.environ.get("WORLD_SIZE", 1)),
        )

    @contextmanager
    def group(self, device: torch.device) -> Iterator[None]:
        """The processes can talk to each other inside this context."""
        if self.size == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()

    def check_batch(self, batch: int) -> None:
        """Only equal shares make the average of the ranks' gradients the whole batch's."""
        if batch % self.size:
            raise DemoError(
                f"a batch of {batch} cannot be shared equally by {self.size} processes."
            )

    def share(self, starts: Tensor) -> Tensor:
        """This rank's columns of ``starts`` (N, B): (N, B / size)."""
        return starts.tensor_split(self.size, dim=1)[self.rank]

    def parallel(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients averaged over the ranks."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model)

    def mean(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Each value's mean over the ranks."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        # Kept until the next one: else gloo's thread is the last to let go of the tensor, needs the
        # interpreter for that, and aborts the process where it has begun to end.
        global _last_work
        _last_work = dist.all_reduce(total, async_op=True)
        _last_work.wait()
        return (total / self.size).tolist()
