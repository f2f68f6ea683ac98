"""Which process this is among those that torchrun started, on which device, and their one collective."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mesh:
    """An explicit object that is handed to whoever needs it; there is no global one. World size one costs nothing."""

    rank: int = 0
    data_parallel: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Of all processes, the one that prints and writes."""
        return self.rank == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """x summed over all processes, in place; every process gets the same bits."""
        if self.data_parallel > 1:
            dist.all_reduce(x)
        return x


@contextmanager
def start() -> Iterator[Mesh]:
    """The mesh of torchrun's variables, or of one process where there are none. NCCL on GPUs, gloo on CPUs."""
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else CPU
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield Mesh(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()
