"""Which process this is among those that torchrun started, on which device, and with whom it shares what.

World size = data_parallel × tensor_parallel. Ranks that share one model, tensor_parallel of them, are neighbours, since
they talk in every layer and should sit in one machine; ranks that hold the same slice of it on other data stand
tensor_parallel apart:

    data_parallel 2, tensor_parallel 4        tensor groups    0 1 2 3 | 4 5 6 7
                                              data groups      0 4 | 1 5 | 2 6 | 3 7
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minisobert.config import ModelConfig, nearest, words

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mesh:
    """An explicit object that is handed to whoever needs it; there is no global one. World size one costs nothing."""

    rank: int = 0
    data_parallel: int = 1
    tensor_parallel: int = 1
    device: torch.device = CPU
    data_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None

    @property
    def world(self) -> int:
        return self.data_parallel * self.tensor_parallel

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_parallel

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_parallel

    @property
    def is_first(self) -> bool:
        """Of all processes, the one that prints and writes."""
        return self.rank == 0

    def sum_over_data(self, x: Tensor) -> Tensor:
        """x summed, in place, over the ranks that have other data; every one gets the same bits."""
        if self.data_parallel > 1:
            dist.all_reduce(x, group=self.data_group)
        return x

    def sum_over_slices(self, x: Tensor) -> Tensor:
        """x summed, in place, over the ranks that share one model."""
        if self.tensor_parallel > 1:
            dist.all_reduce(x, group=self.tensor_group)
        return x

    def sum_over_all(self, x: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def wait_for_all(self) -> None:
        if self.world > 1:
            dist.barrier()


def world_size() -> int:
    """Of what torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_layout(model: ModelConfig, world: int, tensor_parallel: int, micro_batch: int) -> None:
    """Raises ValueError, with the sizes that fit everything, where the model, the processes or the tokens of a
    micro-batch cannot be split so."""
    divided = {
        "processes": world, "attention heads": model.heads, "hidden": model.hidden, "ffn": model.ffn,
        "vocabulary": model.vocabulary, "tokens of a micro-batch": micro_batch,
    }  # fmt: skip
    if any(n % tensor_parallel for n in divided.values()):
        fitting = [n for n in range(1, world + 1) if not any(size % n for size in divided.values())]
        unfit = words([f"{n:,} {name}" for name, n in divided.items() if n % tensor_parallel], "and")
        choices = words(nearest(fitting, tensor_parallel))
        raise ValueError(f"{unfit} cannot be split over --tensor-parallel {tensor_parallel}; choose {choices}")


@contextmanager
def start(tensor_parallel: int = 1) -> Iterator[Mesh]:
    """The mesh of torchrun's variables, or of one process where there are none. NCCL on GPUs, gloo on CPUs."""
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world = world_size()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else CPU
    if cuda:
        torch.cuda.set_device(device)
    data_parallel = world // tensor_parallel
    mesh = Mesh(rank, data_parallel, tensor_parallel, device)
    if world == 1:
        yield mesh
        return
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield Mesh(rank, data_parallel, tensor_parallel, device, *_groups(mesh))
    finally:
        dist.destroy_process_group()


def _groups(mesh: Mesh) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The data group and the tensor group of this rank. All ranks make all groups, in one order."""
    ranks = torch.arange(mesh.world).view(mesh.data_parallel, mesh.tensor_parallel)
    data = [dist.new_group(column) for column in ranks.T.tolist()]
    tensor = [dist.new_group(row) for row in ranks.tolist()]
    return data[mesh.tensor_rank], tensor[mesh.data_rank]
