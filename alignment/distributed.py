"""The only file that knows about processes: what rank this is, and exact global sums.

Gradients are summed, not averaged: every loss is a sum divided by a count that is already global,
so the sum over ranks is the gradient of the whole batch, whatever share of it each rank holds.
Ranks may run different numbers of forward passes, or none; nothing synchronises inside the backward
pass.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor

T = TypeVar("T")


class Distributed:
    """This process among those of the run (one process where nothing was launched)."""

    def __init__(self, *, cpu: bool = False) -> None:
        # accelerate joins processes on a CPU only where it is told that there is nothing else.
        no_accelerator = not torch.accelerator.is_available()
        on_cpu = cpu or no_accelerator or parse_flag_from_env("ACCELERATE_USE_CPU")
        self._state = PartialState(cpu=on_cpu)

    @property
    def rank(self) -> int:
        return int(self._state.process_index)

    @property
    def world_size(self) -> int:
        return int(self._state.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        device: torch.device = self._state.device
        return device

    def peak_gigabytes(self) -> float:
        """This process's peak memory so far: allocated on a GPU, else resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's contiguous part of `items`; the parts differ by one at most."""
        n, world = len(items), self.world_size
        return list(items[n * self.rank // world : n * (self.rank + 1) // world])

    def deal(self, items: Sequence[T]) -> list[T]:
        """This rank's part, dealt out one by one: every stretch is spread over all ranks."""
        return list(items[self.rank :: self.world_size])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over ranks."""
        if self.world_size == 1:
            return [float(v) for v in values]
        # Accelerators such as MPS have no float64; counts and sums there stay below 2^24.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        tensor = torch.tensor(values, dtype=dtype, device=self.device)
        torch.distributed.all_reduce(tensor)
        out: list[float] = tensor.tolist()
        return out

    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise maxima over ranks."""
        if self.world_size == 1:
            return [float(v) for v in values]
        tensor = torch.tensor(values, dtype=torch.float32, device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        out: list[float] = tensor.tolist()
        return out

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Sum each gradient over ranks, in place. All ranks hold the same list in one order."""
        if self.world_size == 1:
            return
        handles = [torch.distributed.all_reduce(g, async_op=True) for g in gradients]
        for handle in handles:
            if handle is not None:
                handle.wait()

    def gather(self, items: Sequence[T]) -> list[T]:
        """All ranks' items in rank order, on every rank."""
        if self.world_size == 1:
            return list(items)
        gathered: list[T] = gather_object(list(items))
        return gathered

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        broadcast_object_list(box)
        out: T = box[0]
        return out

    def barrier(self) -> None:
        self._state.wait_for_everyone()
