"""The mesh: the rank and device of this process, and the groups of ranks with which it communicates.

World size = data_parallel × tensor_parallel. The tensor_parallel ranks that share one model are neighbours, since they
communicate in every layer and should be on one machine. Ranks that hold the same slice for other data are
tensor_parallel apart:

    data_parallel 2, tensor_parallel 4        tensor groups    0 1 2 3 | 4 5 6 7
                                              data groups      0 4 | 1 5 | 2 6 | 3 7

Once per step the processes exchange a few integers (counts, signals) over gloo, also when training on GPUs. This
happens before the host first waits for its GPU, so that a hung process is noticed by hosts that can still report it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, its default arguments would keep the default group forever
from torch import Tensor

from minisobert.cli import nearest, words
from minisobert.config import ModelConfig
from minisobert.parallel.roll_call import ParentWatch, Process, RollCall, lost_contact, patience, store_of_this_attempt

CPU = torch.device("cpu")
TURN = 0.2  # seconds, well below any --timeout


class KnownToAll(Exception):
    """Raised on all ranks, which then leave the mesh together, as at the end of a run."""


@dataclass(frozen=True)
class Mesh:
    """An explicit object, passed where it is needed; there is no global mesh. World size one costs nothing."""

    rank: int = 0
    data_parallel: int = 1
    tensor_parallel: int = 1
    device: torch.device = CPU
    data_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None
    hosts: dist.ProcessGroup | None = None  # all processes, gloo
    roll_call: RollCall | None = None

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
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def sum_over_data(self, x: Tensor) -> Tensor:
        """Sums x in place over the data group, the ranks with other data. All get the same bits."""
        if self.data_parallel > 1:
            dist.all_reduce(x, group=self.data_group)
        return x

    def sum_over_slices(self, x: Tensor) -> Tensor:
        """Sums x in place over the tensor group, the ranks that share one model."""
        if self.tensor_parallel > 1:
            dist.all_reduce(x, group=self.tensor_group)
        return x

    def sum_over_all(self, x: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def sum_on_hosts(self, numbers: list[int]) -> list[int]:
        """Each number summed over all processes."""
        if self.world == 1:
            return numbers
        self.roll_call.meetings += 1
        x = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(x, group=self.hosts)
        return x.tolist()

    def wait_for_all(self, work: Future | None = None) -> None:
        """Waits until all processes are here and the background work of each, if it has any, is done.

        A disk may take longer than --timeout. So a process that waits for its own work comes to a meeting every TURN
        seconds, and is not taken for a lost one. A process that is lost is still missed in time.
        """
        working = True
        while working:
            if work:
                wait([work], TURN)
            (working,) = self.sum_on_hosts([int(work is not None and not work.done())])


def from_torchrun(name: str, otherwise: int) -> int:
    """One of the numbers that torchrun puts into the environment of its processes."""
    return int(os.environ.get(name, otherwise))


# (started by, number of processes, which of them). Not SLURM_NTASKS, which a batch script has too, though it runs once
_TASKS = (
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
)


def check_launch() -> None:
    """Raises ValueError if this is one of several processes that torchrun did not start: each would train as if it were
    alone. All but the first just exit, with the same status."""
    if "WORLD_SIZE" in os.environ or os.isatty(0):
        return  # a terminal in a job of several tasks has their variables, but is one process
    for starter, size, rank in _TASKS:
        tasks, which = (int(os.environ.get(name) or otherwise) for name, otherwise in ((size, 1), (rank, 0)))
        if tasks > 1:
            if which:
                raise SystemExit(2)
            nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or 1) if starter == "srun" else 1
            several = f" --nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500" if nodes > 1 else ""
            step = f"srun --ntasks={nodes} --ntasks-per-node=1 " if starter == "srun" else ""
            raise ValueError(
                f"{starter} started {tasks} processes, and each would train by itself; let torchrun start them: "
                f"{step}torchrun{several} --nproc_per_node={tasks // nodes} train.py …"
            )


def check_precision(precision: str) -> None:
    """Raises ValueError if the device does not support it."""
    if precision == "bf16-products":
        if torch.cuda.is_available():
            raise ValueError("--precision bf16-products is for CPUs; choose bf16, which is fastest on GPUs")
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise ValueError("--precision bf16-products: this CPU has no bf16 instructions; choose fp32")


def _divided(model: ModelConfig, world: int, row_tokens: int) -> dict[str, int]:
    """The sizes that tensor_parallel must divide, with tokens for sequence parallelism, which any layout may add."""
    return {
        "processes": world, "attention heads": model.heads, "hidden": model.hidden, "ffn": model.ffn,
        "vocabulary": model.vocabulary, "tokens of a row": row_tokens,
    }  # fmt: skip


def tensor_parallel_sizes(model: ModelConfig, world: int, row_tokens: int) -> list[int]:
    """The numbers that divide `world` and the model's sizes."""
    return [n for n in range(1, world + 1) if not any(size % n for size in _divided(model, world, row_tokens).values())]


def check_layout(model: ModelConfig, world: int, tensor_parallel: int, row_tokens: int) -> None:
    """Raises ValueError, with the sizes that fit everything, if the model or the processes cannot be split this way."""
    choices = tensor_parallel_sizes(model, world, row_tokens)
    if tensor_parallel not in choices:
        unfit = [f"{n:,} {name}" for name, n in _divided(model, world, row_tokens).items() if n % tensor_parallel]
        raise ValueError(
            f"{words(unfit, 'and')} cannot be split over --tensor-parallel {tensor_parallel}; "
            f"choose {words(nearest(choices, tensor_parallel))}"
        )


@contextmanager
def start(tensor_parallel: int = 1, timeout: float = 600.0) -> Iterator[Mesh]:
    """The mesh that torchrun's variables describe, or one of a single process without them. NCCL on GPUs, gloo on CPUs.

    timeout: seconds within which all processes end if one dies or does not come, with a line that names it, or if
    torchrun dies.

    A block that ends without an exception leaves no thread behind. A thread that comes back into Python while the
    interpreter shuts down aborts the process (SIGABRT), and a finished run would seem to have failed.
    """
    with ParentWatch(timeout) if "TORCHELASTIC_RUN_ID" in os.environ else nullcontext():
        yield from _start(tensor_parallel, timeout)


def _start(tensor_parallel: int, timeout: float) -> Iterator[Mesh]:
    rank, local, world = (from_torchrun(name, n) for name, n in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if tensor_parallel > 1:
        # makes the device begin work in the order of the calls: an all-reduce before, not after, the product that is to
        # hide it. Read when the device is first used
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else CPU
    if cuda:
        torch.cuda.set_device(device)
    mesh = Mesh(rank, world // tensor_parallel, tensor_parallel, device)
    if world == 1:
        yield mesh
        return
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    store = store_of_this_attempt(store, rank, world, timeout)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, device_id=device if cuda else None,
        # the device waits longer, so that the hosts, which can name the missing rank, give up first
        timeout=timedelta(seconds=2 * timeout if cuda else patience(timeout)),
    )  # fmt: skip
    roll_call, failure = RollCall(store, rank, world, timeout), None
    roll_call.start()
    try:
        mesh = _with_groups(replace(mesh, roll_call=roll_call), timeout)
        roll_call.processes = _processes(mesh)
        yield mesh
    except (ValueError, KnownToAll) as error:
        failure = error
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        roll_call.give_up(error)
    finally:
        roll_call.stop.set()
        roll_call.join(timeout)  # it may be waiting for the store, which is slow on a busy machine
    # gloo's threads release their last tensors, for which they need Python, and end with the last reference to their
    # group. Parameters' hooks keep the mesh forever, so it drops its groups. Other exceptions do not get here: the
    # threads wait for work under way, and thus for other ranks, which may never come
    dist.destroy_process_group()
    vars(mesh).update(data_group=None, tensor_group=None, hosts=None)
    if failure:
        raise failure


def _with_groups(mesh: Mesh, timeout: float) -> Mesh:
    """All ranks create all groups, in one order. A group of all ranks is the default one: each takes device memory."""
    ranks = torch.arange(mesh.world).view(mesh.data_parallel, mesh.tensor_parallel)
    wait = timedelta(seconds=patience(timeout))
    device_wait = timedelta(seconds=2 * timeout) if mesh.device.type == "cuda" else wait
    data, tensor = (
        [
            dist.new_group(group, timeout=device_wait) if len(group) < mesh.world else dist.group.WORLD
            for group in groups
        ]
        for groups in (ranks.T.tolist(), ranks.tolist())
    )
    hosts = dist.new_group(backend="gloo", timeout=wait)
    return replace(mesh, data_group=data[mesh.tensor_rank], tensor_group=tensor[mesh.data_rank], hosts=hosts)


def _processes(mesh: Mesh) -> list[Process]:
    """The processes of all ranks."""
    found = [None] * mesh.world
    dist.all_gather_object(found, Process.own(), group=mesh.hosts)
    return found
