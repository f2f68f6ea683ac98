"""Which process this is among those that torchrun started, on which device, and with whom it shares what.

World size = data_parallel × tensor_parallel. Ranks that share one model, tensor_parallel of them, are neighbours, since
they talk in every layer and should sit in one machine; ranks that hold the same slice of it on other data stand
tensor_parallel apart:

    data_parallel 2, tensor_parallel 4        tensor groups    0 1 2 3 | 4 5 6 7
                                              data groups      0 4 | 1 5 | 2 6 | 3 7

What the hosts have to tell each other once a step (counts, signals) goes over gloo, on GPUs too. There it comes before
the first wait for the device, so that a process that hangs is noticed by a host that can still say so.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from minisobert.cli import nearest, words
from minisobert.config import ModelConfig

CPU = torch.device("cpu")
ROLL_CALL = 4.0  # seconds in which who is alive has to answer


@dataclass(frozen=True)
class Mesh:
    """An explicit object that is handed to whoever needs it; there is no global one. World size one costs nothing."""

    rank: int = 0
    data_parallel: int = 1
    tensor_parallel: int = 1
    device: torch.device = CPU
    data_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None
    hosts: dist.ProcessGroup | None = None  # all processes, gloo
    watch: _Watch | None = None

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

    def sum_on_hosts(self, numbers: list[int]) -> list[int]:
        """Each number summed over all processes."""
        if self.world == 1:
            return numbers
        self.watch.meetings += 1
        x = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(x, group=self.hosts)
        return x.tolist()

    def wait_for_all(self) -> None:
        self.sum_on_hosts([0])


def from_torchrun(name: str, otherwise: int) -> int:
    """One of the numbers that torchrun puts into the environment of the processes it starts."""
    return int(os.environ.get(name, otherwise))


# (started by, how many, which of them). Not SLURM_NTASKS: a batch script has it too, which runs once
_TASKS = (
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
)


def check_launch() -> None:
    """Raises ValueError where this is one of several processes that were not started by torchrun: each would believe
    that it is alone. All but the first just leave, with its exit status."""
    if "WORLD_SIZE" in os.environ or os.isatty(0):
        return  # a terminal in a job of several tasks has their variables, and is one process
    for starter, size, rank in _TASKS:
        tasks, which = (int(os.environ.get(name) or otherwise) for name, otherwise in ((size, 1), (rank, 0)))
        if tasks > 1:
            if which:
                raise SystemExit(2)
            nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or 1) if starter == "srun" else 1
            several = f" --nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500" if nodes > 1 else ""
            step = f"srun --ntasks={nodes} --ntasks-per-node=1 " if starter == "srun" else ""
            raise ValueError(
                f"{starter} started {tasks} processes, of which each would train alone; let torchrun start them: "
                f"{step}torchrun{several} --nproc_per_node={tasks // nodes} train.py …"
            )


def _divided(model: ModelConfig, world: int, row_tokens: int) -> dict[str, int]:
    """All that tensor parallelism splits; tokens with sequence parallelism, which any layout may add."""
    return {
        "processes": world, "attention heads": model.heads, "hidden": model.hidden, "ffn": model.ffn,
        "vocabulary": model.vocabulary, "tokens of a row": row_tokens,
    }  # fmt: skip


def tensor_parallel_sizes(model: ModelConfig, world: int, row_tokens: int) -> list[int]:
    """That `world` processes and the model's sizes can be divided by."""
    return [n for n in range(1, world + 1) if not any(size % n for size in _divided(model, world, row_tokens).values())]


def check_layout(model: ModelConfig, world: int, tensor_parallel: int, row_tokens: int) -> None:
    """Raises ValueError, with the sizes that fit everything, where model or processes cannot be split so."""
    choices = tensor_parallel_sizes(model, world, row_tokens)
    if tensor_parallel not in choices:
        unfit = [f"{n:,} {name}" for name, n in _divided(model, world, row_tokens).items() if n % tensor_parallel]
        raise ValueError(
            f"{words(unfit, 'and')} cannot be split over --tensor-parallel {tensor_parallel}; "
            f"choose {words(nearest(choices, tensor_parallel))}"
        )


@contextmanager
def start(tensor_parallel: int = 1, timeout: float = 600.0) -> Iterator[Mesh]:
    """The mesh of torchrun's variables, or of one process where there are none. NCCL on GPUs, gloo on CPUs.

    timeout: seconds that a process waits for another. When one has died or does not come, the others end, with a line
    that names it.
    """
    rank, local, world = (from_torchrun(name, n) for name, n in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else CPU
    if cuda:
        torch.cuda.set_device(device)
    mesh = Mesh(rank, world // tensor_parallel, tensor_parallel, device)
    if world == 1:
        yield mesh
        return
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    store = _part_of_this_attempt(store, rank, world, timeout)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, device_id=device if cuda else None,
        # the device waits longer: the hosts, which can name who is missing, give up first
        timeout=timedelta(seconds=2 * timeout if cuda else timeout),
    )  # fmt: skip
    watch = _Watch(store, rank)
    watch.start()
    try:
        yield _with_groups(replace(mesh, watch=watch), timedelta(seconds=timeout))
    except RuntimeError as error:
        if not _lost_contact(error):
            raise
        _give_up(error, store, mesh, watch)
    watch.stop.set()
    dist.destroy_process_group()


def _part_of_this_attempt(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """torchrun's store may outlive a job that it starts again, with the old processes' addresses in it, and the agents
    of several machines may count attempts differently. So the first rank makes up a name and hands it to who is here.
    """
    attempt = nonce = secrets.token_hex(8)
    store.set(f"here/{rank}", nonce)
    if rank:
        attempt = store.get(f"attempt/{rank}/{nonce}").decode()  # waits
        store.set(f"seen/{rank}/{attempt}", "")
        return dist.PrefixStore(attempt, store)
    until, missing = time.monotonic() + timeout, list(range(1, world))
    while missing := [r for r in missing if not store.check([f"seen/{r}/{attempt}"])]:
        if time.monotonic() > until:
            raise RuntimeError(f"{_ranks(missing)} not come within --timeout {timeout:g} seconds")
        for r in missing:
            if store.check([f"here/{r}"]):  # or it was, in an earlier attempt, until the new one writes its own nonce
                store.set(f"attempt/{r}/{store.get(f'here/{r}').decode()}", attempt)
        time.sleep(0.02)
    return dist.PrefixStore(attempt, store)


def _with_groups(mesh: Mesh, timeout: timedelta) -> Mesh:
    """All ranks make all groups, in one order."""
    ranks = torch.arange(mesh.world).view(mesh.data_parallel, mesh.tensor_parallel)
    device_timeout = 2 * timeout if mesh.device.type == "cuda" else timeout
    data = [dist.new_group(column, timeout=device_timeout) for column in ranks.T.tolist()]
    tensor = [dist.new_group(row, timeout=device_timeout) for row in ranks.tolist()]
    hosts = dist.new_group(backend="gloo", timeout=timeout)
    return replace(mesh, data_group=data[mesh.tensor_rank], tensor_group=tensor[mesh.data_rank], hosts=hosts)


class _Watch(threading.Thread):
    """Answers a roll call for this process, whose main thread may be waiting for one that is gone, and then ends it.

    The roll call is held in torchrun's store by the first process that gives up. An answer is the number of meetings of
    the hosts that this process has come to: one that hangs, but lives, has come to fewer.
    """

    def __init__(self, store: dist.Store, rank: int):
        super().__init__(daemon=True, name="roll-call")
        self.store, self.rank, self.meetings, self.stop = store, rank, 0, threading.Event()

    def run(self) -> None:
        try:
            while not self.stop.wait(0.5):
                if self.store.check(["roll-call"]):
                    self.answer()
                    time.sleep(ROLL_CALL + 1)
                    os._exit(1)
        except (RuntimeError, OSError):  # the store is gone, as at the end of every job
            return

    def answer(self) -> None:
        self.store.set(f"alive/{self.rank}", str(self.meetings))


def _lost_contact(error: RuntimeError) -> bool:
    """Whether the error is a collective's: gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def _give_up(error: RuntimeError, store: dist.Store, mesh: Mesh, watch: _Watch) -> None:
    """Ends the job with a line that says who is to blame. The first process that gets here calls the roll."""
    who, first = "torchrun's store does not answer", True
    try:
        first = store.add("roll-call", 1) == 1
        watch.answer()
        time.sleep(ROLL_CALL)
        came = {r: int(store.get(f"alive/{r}")) for r in range(mesh.world) if store.check([f"alive/{r}"])}
        missing = [rank for rank in range(mesh.world) if rank not in came]
        late = [rank for rank, meetings in came.items() if meetings < max(came.values())]
        who = (
            f"{_ranks(missing)} not answer" if missing
            else f"{_ranks(late)} answer, but did not come" if late
            else "all processes answer, but lost each other"
        )  # fmt: skip
    except (RuntimeError, OSError):
        pass
    if first:
        reason = " ".join(str(error).split())[:200]
        print(
            f"{who}; rank {mesh.rank} on {socket.gethostname()} waited in vain ({reason}). The same command goes on "
            "from the last checkpoint",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    if mesh.is_first:
        time.sleep(2)  # it may keep the store, in which others still look
    os._exit(1)  # threads and other processes that hang must not hold this one


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]} does" if len(ranks) == 1 else f"ranks {words(ranks, 'and')} do"
