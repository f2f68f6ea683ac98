"""Communication between ranks: collectives are compared with formulas on one process, and those of a step counted."""

from __future__ import annotations

import json
import os
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import ROW, SMALL, finish, launch, words
from torch.utils._python_dispatch import TorchDispatchMode

import train
from minisobert import ops
from minisobert.config import ModelConfig
from minisobert.corpus.loader import Rows
from minisobert.corpus.shards import open_shards
from minisobert.model import MaskedLM
from minisobert.ops import Documents
from minisobert.parallel import data, mesh, tensor
from minisobert.parallel.collectives import (
    gather_from_sequence_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
)
from minisobert.parallel.mesh import Mesh, check_layout
from minisobert.planning import forecast
from minisobert.planning.forecast import Layout
from minisobert.training import loop


def on_ranks(check, log: Path, ranks: int, *arguments) -> None:
    """Calls check(mesh, *arguments) on every rank. An assertion that fails on one of them fails here."""
    status = finish(launch([partial(_checked, check, *arguments)], log, ranks))
    assert status == [0] * ranks, log.read_text()


def _checked(check, tensor_parallel, *arguments) -> int:
    try:
        with mesh.start(tensor_parallel, timeout=60) as here:
            assert tensor_parallel == 1 or os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
            check(here, *arguments)
    except Exception:
        traceback.print_exc()
        os._exit(1)
    return 0


def part(rank: int, rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def each_pair(mesh: Mesh) -> None:
    ranks = range(mesh.tensor_parallel)
    parts, upstream = [part(rank) for rank in ranks], [part(10 + rank) for rank in ranks]
    # every rank has the same loss, since all ranks compute alike what follows the two
    common = part(99)

    x = parts[mesh.tensor_rank].clone().requires_grad_()
    y = reduce_from_tensor_parallel(x * 1, mesh)  # a copy, since it is overwritten
    y.backward(common)
    torch.testing.assert_close(y, sum(parts))
    torch.testing.assert_close(x.grad, common)

    x = parts[mesh.tensor_rank].clone().requires_grad_()
    y = reduce_scatter_to_sequence_parallel(x, mesh)
    own = [g[: 6 // mesh.tensor_parallel] for g in upstream]
    y.backward(own[mesh.tensor_rank])
    torch.testing.assert_close(y, sum(parts).chunk(mesh.tensor_parallel)[mesh.tensor_rank])
    torch.testing.assert_close(x.grad, torch.cat(own))

    x = parts[mesh.tensor_rank].clone().requires_grad_()
    y = gather_from_sequence_parallel(x, mesh)
    whole = torch.cat([common * (i + 1) for i in ranks])
    y.backward(whole)
    torch.testing.assert_close(y, torch.cat(parts))
    torch.testing.assert_close(x.grad, whole.chunk(mesh.tensor_parallel)[mesh.tensor_rank])


@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_and_their_gradients_are_those_of_the_formula(tmp_path, ranks):
    on_ranks(each_pair, tmp_path / "log", ranks, ranks)


CONFIG = ModelConfig(layers=2, hidden=32, heads=4, ffn=64, vocabulary=128, positions=64)


def batch():
    documents = Documents.from_bounds([0, 30, 31, 48])
    tokens = torch.arange(48) * 7 % 123 + 5
    positions = torch.cat([torch.arange(n) for n in documents.bounds.diff().tolist()])
    masked = torch.arange(0, 48, 5)
    return tokens, positions, documents, masked, tokens[masked]


def a_model(mesh: Mesh, sequence_parallel: bool) -> None:
    """Compares losses, guesses and gradients of a split model in fp64 with those of the whole model, or slices of
    them."""
    from minisobert.parallel import splits

    *inputs, targets = batch()
    whole = MaskedLM(CONFIG).initialise(0).double()
    with torch.no_grad():  # no zeros and no ones, so that every path carries signal
        for p in whole.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype) * 0.1)
    logits = whole(*inputs)
    expected = ops.cross_entropy(logits, targets)
    expected.sum().backward()

    split = MaskedLM(CONFIG).double()
    split.load_state_dict(whole.state_dict())
    split = tensor.shard(split, mesh, sequence_parallel)
    own = split(*inputs)
    assert own.shape == (len(targets), CONFIG.vocabulary // mesh.tensor_parallel)
    losses = tensor.cross_entropy(own, targets, mesh)
    # its three sums are fp32
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(tensor.guessed_right(own, targets, mesh), logits.argmax(1) == targets)
    losses.sum().backward()
    for name, parameter in split.named_parameters():
        gradient = parameter.grad
        if sequence_parallel and splits.summed_over_tokens(name):
            gradient = mesh.sum_over_slices(gradient)
        exact = splits.slice_of(name, whole.get_parameter(name).grad, mesh.tensor_rank, mesh.tensor_parallel)
        assert (gradient - exact).abs().max() <= 1e-6 * exact.abs().max().clamp(min=1e-2), name


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_model_is_the_whole_one(tmp_path, ranks, sequence_parallel):
    on_ranks(a_model, tmp_path / "log", ranks, ranks, sequence_parallel)


NAMES = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}


class Recorded(TorchDispatchMode):
    """Records every collective that goes through torch, whatever calls it: (operation, bytes of the whole tensor)."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = NAMES[function._schema.name.split("::")[1]]
            whole = args[0][0] if name == "all-reduce" else max(args[:2], key=lambda x: x.numel())
            self.calls[name, whole.nbytes] += 1
        return function(*args, **(kwargs or {}))


def count_a_step(argv: list[str], out: Path) -> int:
    """Records the second of two steps of train.py, and how many tokens each of its micro-batches masked."""
    data.BUCKET = 10_000  # several buckets
    step, recorded = loop.train_step, {}

    def recording(model, optimizer, batches, *rest):
        batches = list(batches)
        with Recorded() as mode:
            figures = step(model, optimizer, batches, *rest)
        recorded["calls"] = [[*key, n] for key, n in mode.calls.items()]
        recorded["masked"] = [len(each.targets) for each in batches]
        recorded["buckets"] = len(optimizer.flat.buckets)
        return figures

    loop.train_step = recording
    status = train.main(argv)
    loop.train_step = step
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(recorded))
    return status


COUNTED = [
    Layout(4, 1, 1), Layout(4, 1, 1, shard_optimizer=True), Layout(1, 4, 1), Layout(2, 2, 2),
    Layout(2, 2, 1, sequence_parallel=True, shard_optimizer=True, recompute=True),
]  # fmt: skip


def test_a_steps_collectives_and_their_bytes_are_those_of_the_plan(corpus, tmp_path, monkeypatch):
    jobs, folders = [], [tmp_path / str(i) for i in range(len(COUNTED))]
    for layout, folder in zip(COUNTED, folders):
        folder.mkdir()
        options = {name: getattr(layout, name) for name in ("sequence_parallel", "shard_optimizer", "recompute")}
        argv = words(
            corpus, folder / "run", steps=2, tensor_parallel=layout.tensor_parallel,
            micro_batch_rows=layout.micro_batch_rows, **options,
        )  # fmt: skip
        jobs.append(partial(count_a_step, argv, folder))
    assert finish(launch(jobs, tmp_path / "log", 4)) == [0] * 4, (tmp_path / "log").read_text()
    monkeypatch.setattr(data, "BUCKET", 10_000)
    model = ModelConfig(SMALL.layers, SMALL.hidden, SMALL.heads, SMALL.ffn, vocabulary=512)
    for layout, folder in zip(COUNTED, folders):
        layout = Layout(**{**vars(layout), "precision": "fp32", "row_tokens": ROW})
        for rank in range(4):
            recorded = json.loads((folder / f"{rank}.json").read_text())
            assert recorded["buckets"] > 2
            expected = Counter()
            for row in forecast.collectives(model, layout, recorded["masked"]):
                expected[row.operation, row.bytes] += row.calls
            assert {(operation, size): n for operation, size, n in recorded["calls"]} == expected


@pytest.mark.parametrize(
    ("model", "world", "tensor_parallel", "message"),
    [
        (CONFIG, 8, 8, "4 attention heads cannot be split over --tensor-parallel 8; choose 1, 2 or 4"),
        (CONFIG, 6, 4, "6 processes cannot be split over --tensor-parallel 4; choose 1 or 2"),
        (CONFIG, 12, 3, "4 attention heads, 32 hidden, .* and 2,048 tokens of a row cannot be .*; choose 1, 2 or 4"),
        (CONFIG, 1, 2, "1 processes cannot be split over --tensor-parallel 2; choose 1"),
        (CONFIG, 7, 2, "7 processes cannot be split over --tensor-parallel 2; choose 1"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_those_that_do(model, world, tensor_parallel, message):
    with pytest.raises(ValueError, match=message):
        check_layout(model, world, tensor_parallel, 2_048)


def test_ids_outside_the_vocabulary_are_refused_at_every_layout(corpus, tmp_path, capsys, monkeypatch):
    """It happens before any process waits for another, so one rank is enough here. (With tp > 1, Megatron-LM looks up
    zeros.)"""
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in corpus.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokens = bytearray((folder / "tokens.bin").read_bytes())
    tokens[1_000:1_002] = (511).to_bytes(2, "little")  # a row of the padded matrix, but not a piece
    (folder / "tokens.bin").write_bytes(tokens)
    for tensor_parallel in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit):
            train.main(words(corpus, tmp_path / "run", data=folder, tensor_parallel=tensor_parallel))
        assert "holds the id 511, the vocabulary has 400" in capsys.readouterr().err


def test_rows_of_a_step_are_the_same_whatever_the_layout(corpus):
    shards = open_shards(corpus.folder)
    rows = Rows(shards, shards.training_documents, 1, ROW)
    sizes = {"row_tokens": ROW, "tokens_per_batch": 8 * ROW, "train_tokens": 3 * 8 * ROW}
    config = train.TrainConfig(**sizes, micro_batch_rows=2)
    assert len(rows) >= 8
    for data_parallel in (1, 2, 4):
        taken = [
            [
                row
                for first, n, _ in loop._share(config.steps(data_parallel), config, Mesh(rank, data_parallel))
                for row in range(first, first + n)
            ]
            for rank in range(data_parallel)
        ]
        per_step = 8 // data_parallel
        for step in range(3):
            here = sorted(row for rank in taken for row in rank[step * per_step : (step + 1) * per_step])
            assert here == list(range(step * 8, step * 8 + 8))
