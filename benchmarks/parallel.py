"""One step on 1, 2 and 4 processes of this machine, over gloo: `python -m benchmarks.parallel`. About two minutes.

It measures tokens per second, the bytes that a rank sends, and how much of the communication is hidden behind
computation. For the latter, each layout steps in two ways, in turn: as in training, and waiting for each collective
where it could start. (Data parallelism has `Gradients` for that; in tensor parallelism, collectives are made to return
only when they are done.) Then the collectives of a step run once more by themselves, on as many bytes:

    share that is hidden = (step that waits - step) / communication alone

Before that, both ways must give the same gradients to the last bit, and the collectives that were called must be those
of `planning/forecast.py`, which also gives the bytes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import machine, parser, show
from minisobert.cli import table
from minisobert.config import ModelConfig
from minisobert.model import MaskedLM
from minisobert.ops import Documents
from minisobert.parallel import data, tensor
from minisobert.parallel import mesh as meshes
from minisobert.parallel.collectives import all_gather_into, reduce_scatter_into
from minisobert.parallel.mesh import Mesh
from minisobert.planning import forecast
from minisobert.planning.forecast import Layout
from minisobert.training.optimizer import Optimizer

MODEL = ModelConfig(layers=6, hidden=384, heads=12, ffn=1_536, vocabulary=8_192, positions=512)
ROW = 512  # tokens in a micro-batch instead of 2,048: a CPU is so slow that communication would not be seen
DOCUMENT = 128  # tokens
BUCKET = 1 << 20  # elements, so that a step has several buckets, as a larger model has with the default


def layouts(world: int) -> list[Layout]:
    one = Layout(precision="fp32", row_tokens=ROW)
    if world == 1:
        return [one]
    return [
        *(replace(one, data_parallel=world, shard_optimizer=option) for option in (False, True)),
        *(replace(one, tensor_parallel=world, sequence_parallel=option) for option in (False, True)),
    ]


class Call(NamedTuple):
    group: str  # "data" or "tensor"
    operation: str  # as in forecast.Collective
    elements: int  # of the whole tensor


class Measured(NamedTuple):
    steps: list[float]  # seconds of each step
    waiting: list[float]  # of each step that waits
    alone: list[float]  # of its communication by itself
    sent: int  # bytes that a rank sends


class Recorded(TorchDispatchMode):
    """Records the collectives of the data and the tensor group that are called inside it. (Those of the world group sum
    single figures.)"""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.calls: list[Call] = []
        self.groups = {mesh.data_group.group_name: "data", mesh.tensor_group.group_name: "tensor"}
        self.names = {"allreduce_": "all-reduce", "_reduce_scatter_base_": "reduce-scatter"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
            if group.group_name in self.groups:
                operation = self.names.get(function._schema.name.removeprefix("c10d::"), "all-gather")
                tensors = [x for x in args if isinstance(x, Tensor)] or args[0]
                self.calls.append(Call(self.groups[group.group_name], operation, max(x.numel() for x in tensors)))
        return function(*args, **(kwargs or {}))


class Step:
    """Forward, backward, sums over the ranks and AdamW, on one micro-batch of synthetic tokens per data rank."""

    def __init__(self, layout: Layout, mesh: Mesh):
        generator = torch.Generator().manual_seed(mesh.data_rank)
        self.layout, self.mesh = layout, mesh
        self.tokens = torch.randint(8, MODEL.vocabulary, (ROW,), generator=generator)
        self.positions = torch.arange(ROW) % DOCUMENT
        self.documents = Documents.from_bounds(list(range(0, ROW + 1, DOCUMENT)))
        self.masked = torch.randperm(ROW, generator=generator)[: layout.masked].sort()[0]
        self.model = tensor.shard(MaskedLM(MODEL).initialise(0), mesh, layout.sequence_parallel)
        self.optimizer = Optimizer(
            self.model, torch.float32, (0.9, 0.999), 0.01, mesh,
            sharded=layout.shard_optimizer, sequence_parallel=layout.sequence_parallel,
        )  # fmt: skip

    def backward(self) -> None:
        logits = self.model(self.tokens, self.positions, self.documents, self.masked)
        loss = tensor.cross_entropy(logits, self.tokens[self.masked], self.mesh).sum()
        self.optimizer.gradients.before_last_backward()
        loss.backward()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step(1e-4, self.layout.masked * self.layout.data_parallel, 1.0)

    def gradients(self) -> Tensor:
        """The summed gradients with which this rank steps."""
        self.backward()
        self.optimizer.gradients.sum()
        sums = torch.cat([part.master.grad for part in self.optimizer.parts])
        self.optimizer.flat.gradients.zero_()
        return sums

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which nothing overlaps."""
        overlapped = self.optimizer.gradients
        self.optimizer.gradients = data.Gradients(self.optimizer.flat, self.mesh, self.layout.shard_optimizer)
        with (
            mock.patch.object(dist, "all_reduce", _until_done(dist.all_reduce)),
            mock.patch.object(tensor, "reduce_scatter_into", _until_done(tensor.reduce_scatter_into)),
        ):
            yield
        self.optimizer.gradients = overlapped


def _until_done(collective: Callable) -> Callable:
    def call(*arguments, async_op=False, **keywords):
        work = collective(*arguments, async_op=True, **keywords)
        work.wait()
        return work

    return call


def measure(layout: Layout, mesh: Mesh, turns: int) -> Measured:
    step = Step(layout, mesh)
    if mesh.world == 1:
        step()
        return Measured([_seconds(step, mesh) for _ in range(turns)], [], [], 0)

    gradients = step.gradients()
    with step.waiting():
        differs = not torch.equal(gradients, step.gradients())
    if mesh.sum_on_hosts([int(differs)])[0]:
        raise SystemExit(f"{layout}: the gradients are not those of a step that waits")
    with Recorded(mesh) as recorded:
        step()
    measured = Measured([], [], [], _sent(recorded.calls, step))
    buffer = torch.zeros(max(call.elements for call in recorded.calls))
    for _ in range(turns):
        measured.steps.append(_seconds(step, mesh))
        with step.waiting():
            measured.waiting.append(_seconds(step, mesh))
        measured.alone.append(_seconds(lambda: [_again(call, buffer, mesh) for call in recorded.calls], mesh))
    return measured


def _sent(calls: list[Call], step: Step) -> int:
    """The bytes that a rank sends, by the forecast. Raises SystemExit unless these calls are those of the forecast."""
    rows = forecast.collectives(MODEL, step.layout, [step.layout.masked])
    rows = [row for row in rows if row.group in ("tensor", "data") and row.name != "loss"]  # which is not logged here
    expected = Counter()
    for row in rows:
        expected[Call(row.group, row.operation, row.bytes // 4)] += row.calls
    if expected != Counter(calls):
        raise SystemExit(f"{step.layout}: {Counter(calls) - expected} were called, not {expected - Counter(calls)}")
    return sum(forecast.wire_bytes(rows, step.layout, group) for group in ("tensor", "data"))


def _again(call: Call, buffer: Tensor, mesh: Mesh) -> None:
    group = mesh.data_group if call.group == "data" else mesh.tensor_group
    whole = buffer[: call.elements]
    if call.operation == "all-reduce":
        dist.all_reduce(whole, group=group)
    elif call.operation == "reduce-scatter":
        reduce_scatter_into(whole.chunk(group.size())[group.rank()], whole, group=group)
    else:
        all_gather_into(whole, whole.chunk(group.size())[group.rank()], group=group)


def _seconds(run: Callable, mesh: Mesh) -> float:
    """Seconds until the last rank has finished."""
    mesh.wait_for_all()
    began = time.perf_counter()
    run()
    mesh.wait_for_all()
    return time.perf_counter() - began


def _work(rank: int, world: int, ports: list[str], turns: int, out: Path) -> None:
    torch.set_num_threads(1)
    data.BUCKET = BUCKET
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    results = []
    for layout, os.environ["MASTER_PORT"] in zip(layouts(world), ports, strict=True):
        with meshes.start(layout.tensor_parallel) as mesh:
            results.append(_row(layout, measure(layout, mesh, turns)))
    if rank == 0:
        out.write_text(json.dumps(results))


def _row(layout: Layout, m: Measured) -> list:
    options = [name for name in ("shard_optimizer", "sequence_parallel") if getattr(layout, name)]
    name = " ".join([f"{layout.data_parallel} × {layout.tensor_parallel}", *options]).replace("_", "-")
    tokens = layout.data_parallel * ROW
    cells = [layout.gpus, name, f"{tokens / median(m.steps):,.0f}"]
    if layout.gpus == 1:
        cells += ["–"] * 4
    else:
        alone = median(m.alone)
        low, hidden, high = quantiles([(w - s) / alone for w, s in zip(m.waiting, m.steps)], method="inclusive")
        cells += [f"{tokens / median(m.waiting):,.0f}", f"{m.sent / 1e6:.1f}", f"{1e3 * alone:.0f}"]
        cells += [f"{hidden:.0%} ({low:.0%} to {high:.0%})"]
    return cells


def main() -> None:
    command = parser("parallel", "--turns 3", "The processes talk over gloo; it takes about two minutes.")
    command.add_argument("--turns", type=int, default=6, metavar="N", help="number of timed steps of each kind")
    options = command.parse_args()
    turns, rows = options.turns, []
    if turns < 2:
        command.error(f"--turns is {turns}; it must be at least 2")
    for world in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "lines"
            # the stores through which processes find each other, held here as by torchrun
            stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in layouts(world)]
            ports = [str(store.port) for store in stores]
            torch.multiprocessing.spawn(_work, (world, ports, turns, out), nprocs=world)
            rows += json.loads(out.read_text())
            print(f"{world} of 4 processes measured", file=sys.stderr)
    columns = ["processes", "data × tensor parallel", "tokens/s", "tokens/s, waiting", "MB a rank sends a step"]
    columns += ["communication alone, ms", "of it hides (quartiles)"]
    show(
        [
            "# One step on several processes",
            "",
            f"`python -m benchmarks.parallel`: {forecast.parameters(MODEL) / 1e6:.1f} M parameters ({MODEL.layers} "
            f"layers, {MODEL.hidden} wide), fp32, no dropout, {ROW} tokens for each data-parallel rank,",
            f"buckets of {BUCKET / 1e6:.1f} M elements, gloo over the loopback device, one thread a process; medians "
            f"of {turns} steps.",
            f"{machine('torch')}." + " Four processes share the cores." * ((os.cpu_count() or 1) < 4),
            "",
            *table(columns, rows),
            "",
            "- Waiting: each collective is waited for where it could start. Gradients are the same to the last bit.",
            "- Hides: (step that waits - step) / communication alone, in each turn. It may be more than all of it: a "
            "step that waits does so for the slowest process, too. And gloo's threads need cores: with none to spare, "
            "what can hide is the waiting and not the work. Nothing here is about GPUs.",
            "- Bytes: those of rings, for the collectives of `planning/forecast.py`, which were called. gloo's "
            "reduce-scatter sends twice that, as much as an all-reduce.",
        ],
        "parallel",
        options.write,
    )


if __name__ == "__main__":
    main()
