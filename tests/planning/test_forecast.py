"""The forecast is compared with reality: a sharded model, what autograd saves, which collectives are called."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from against_reference import interpreted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from minisobert import model, ops
from minisobert.config import PRESETS, ModelConfig, TrainConfig
from minisobert.corpus.packing import Packing
from minisobert.corpus.shards import open_shards
from minisobert.model import MaskedLM
from minisobert.ops import Documents, Dropout, dispatch
from minisobert.parallel import collectives as parallel_collectives
from minisobert.parallel import tensor as parallel_tensor
from minisobert.parallel.mesh import Mesh
from minisobert.parallel.tensor import cross_entropy, shard
from minisobert.planning import forecast
from minisobert.planning import report as planning
from minisobert.planning.forecast import Layout
from minisobert.training.meter import CHIPS
from minisobert.training.optimizer import Optimizer

SMALL = ModelConfig(layers=2, hidden=128, heads=2, ffn=512, vocabulary=384, positions=64)
# a global and a local layer, whose rotary positions have different bases
MODERN = replace(SMALL, ffn=192, architecture="modernbert", global_every=2, window=8)
ROW = 64
BASE, LARGE = PRESETS["base"], PRESETS["large"]

LAYOUTS = [
    Layout(micro_batch_rows=2, tensor_parallel=n, sequence_parallel=sequence, recompute=recompute, precision="fp32",
           row_tokens=ROW)
    for n, sequence, recompute in [
        (1, False, False), (2, False, False), (2, True, False), (1, False, True), (2, False, True), (2, True, True)
    ]
]  # fmt: skip


def options(layout: Layout) -> str:
    names = ("sequence_parallel", "recompute")
    return " ".join([f"tensor_parallel={layout.tensor_parallel}", *(name for name in names if getattr(layout, name))])


every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=options)
both_models = pytest.mark.parametrize("config", [SMALL, MODERN], ids=lambda config: config.architecture)


@pytest.fixture
def collectives(monkeypatch) -> Counter:
    """A tensor group in which only this rank exists. Its collectives are counted, and return its own data."""
    calls = Counter()

    def all_reduce(x, op=None, group=None, async_op=False):
        calls["all-reduce", x.nbytes] += 1
        return SimpleNamespace(wait=lambda: None)

    def all_gather(out, x, group=None, async_op=False):
        calls["all-gather", out.nbytes] += 1
        out.copy_(torch.cat([x] * (len(out) // len(x))))
        return SimpleNamespace(wait=lambda: None)

    def reduce_scatter(out, x, group=None, async_op=False):
        calls["reduce-scatter", x.nbytes] += 1
        out.copy_(x[: len(out)])
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    for module in (parallel_collectives, parallel_tensor):
        monkeypatch.setattr(module, "all_gather_into", all_gather)
        monkeypatch.setattr(module, "reduce_scatter_into", reduce_scatter)
    return calls


class Step:
    """Forward and backward passes of one rank in a layout."""

    def __init__(self, layout: Layout, p: float, config: ModelConfig = SMALL, bounds: tuple[int, ...] = (0, 50, 51)):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(4, config.vocabulary, (layout.tokens,), generator=generator)
        self.documents = Documents.from_bounds([*bounds, layout.tokens])
        self.positions = torch.cat([torch.arange(n) for n in self.documents.bounds.diff().tolist()]) % config.positions
        self.dropout = Dropout.for_step(p, 1, 0, config.layers)
        self.mesh = Mesh(tensor_parallel=layout.tensor_parallel)
        self.model = shard(MaskedLM(config).initialise(0), self.mesh, layout.sequence_parallel)
        self.model.encoder.recompute = layout.recompute
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.choose(layout.masked)

    def choose(self, masked: int) -> None:
        self.masked = torch.arange(masked) * 3
        self.targets = self.tokens[self.masked]

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The inputs, and all other tensors that exist before the step."""
        inputs = [self.tokens, self.positions, self.documents.start, self.documents.stop, self.masked, self.targets]
        return [*inputs, *self.model.parameters(), *(p.grad for p in self.model.parameters())]

    def loss(self) -> torch.Tensor:
        logits = self.model(self.tokens, self.positions, self.documents, self.masked, self.dropout)
        return cross_entropy(logits, self.targets, self.mesh).sum()


@pytest.mark.parametrize(
    "config, total",
    [
        (BASE, 125_709_440),
        (LARGE, 762_396_032),
        # that of transformers' ModernBertForMaskedLM with these sizes
        (PRESETS["modern-base"], 149_409_152),
        (PRESETS["modern-large"], 395_553_664),
    ],
)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_parameters_are_those_of_a_sharded_model(config, total, n):
    with torch.device("meta"):
        rank = shard(MaskedLM(config), Mesh(rank=n - 1, tensor_parallel=n))
    assert forecast.parameters(config, n) == sum(p.numel() for p in rank.parameters())
    assert forecast.parameters(config) == total


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_weights_gradients_and_optimizer_are_the_bytes_of_the_real_ones(precision, ranks):
    """SMALL's sizes divide evenly, so there is no padding. With several ranks, the optimizer is sharded."""
    dtype, mesh = torch.bfloat16 if precision == "bf16" else torch.float32, Mesh(data_parallel=ranks)
    optimizer = Optimizer(MaskedLM(SMALL).initialise(0), dtype, (0.9, 0.999), 0.01, mesh, sharded=ranks > 1)
    state = [x for part in optimizer.parts for x in optimizer.tensors(part)]
    shared = optimizer.flat.weights.untyped_storage().data_ptr()
    account = forecast.memory(SMALL, Layout(ranks, shard_optimizer=ranks > 1, precision=precision))
    assert account.weights == optimizer.flat.weights.nbytes
    assert account.gradients == optimizer.flat.gradients.nbytes
    assert account.optimizer == sum(x.nbytes for x in state if x.untyped_storage().data_ptr() != shared)


@pytest.mark.parametrize("ranks", [1, 4])
def test_muon_keeps_one_moment_of_its_matrices(ranks):
    """For a sharded optimizer, the mean over the ranks: a share with more of the embeddings has more of AdamW's second
    moments."""
    held = []
    for rank in range(ranks):
        mesh = Mesh(rank=rank, data_parallel=ranks)
        model = MaskedLM(MODERN).initialise(0)
        optimizer = Optimizer(model, torch.float32, (0.9, 0.999), 0.01, mesh, sharded=ranks > 1, momentum=0.9)
        moments = [x for part in optimizer.parts for x in optimizer.tensors(part)[1:]]
        held.append(sum(x.nbytes for x in moments))
    layout = Layout(ranks, shard_optimizer=ranks > 1, precision="fp32")
    adamw, muon = (forecast.memory(MODERN, layout, muon=muon) for muon in (False, True))
    assert muon.optimizer == sum(held) / ranks < adamw.optimizer
    assert replace(muon, optimizer=adamw.optimizer) == adamw


@interpreted
@both_models
@every_layout
@pytest.mark.parametrize("p", [0.1, 0.0])
def test_activations_are_the_bytes_that_autograd_keeps(config, layout, p, collectives, monkeypatch):
    monkeypatch.setattr(dispatch, "takes_kernel", lambda x: True)
    step, kept, rotations = Step(layout, p, config), {}, []
    inputs = {x.untyped_storage().data_ptr() for x in step.inputs}

    def rotation(*arguments) -> torch.Tensor:
        rotations.append(weakref.ref(made := ops.rotation(*arguments)))
        return made

    monkeypatch.setattr(model, "rotation", rotation)

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in inputs:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = step.loss()
    assert loss.requires_grad and len(kept) > config.layers
    for reference in rotations:  # with recomputation, a block holds its arguments where no hook sees them
        keep(reference())
    assert len(rotations) == (2 if config.is_modern else 0)
    index = step.tokens.element_size()
    assert forecast.saved_activations(config, layout, p > 0, layout.masked, index) == sum(kept.values())


class Allocated(TorchDispatchMode):
    """Records the most bytes that tensors made inside it hold at one time."""

    def __init__(self, outside: list[torch.Tensor]):
        super().__init__()
        self.sizes = {x.untyped_storage()._cdata: 0 for x in outside}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.sizes.pop, key)
                if sum(self.sizes.values()) > self.most:
                    gc.collect(1)  # Triton's interpreter leaves tensors in cycles
                    self.most = max(self.most, sum(self.sizes.values()))
        return out


WIDE = replace(SMALL, vocabulary=8_192)
NARROW = replace(SMALL, vocabulary=1_024, ffn=32)
GATED = replace(MODERN, ffn=512)
LONGER = replace(LAYOUTS[0], micro_batch_rows=3)  # more tokens than features


@interpreted
@pytest.mark.parametrize(
    "config, layout, p",
    [
        (NARROW, LAYOUTS[0], 0.0),
        (SMALL, LAYOUTS[0], 0.1),
        (SMALL, LAYOUTS[0], 0.0),
        (SMALL, LAYOUTS[5], 0.1),
        (WIDE, LAYOUTS[1], 0.1),
        (GATED, LONGER, 0.0),
        (MODERN, LAYOUTS[5], 0.1),
    ],
    ids=[
        "the loss",
        "the last block",
        "without dropout",
        "made again, by tokens",
        "the end",
        "the gate",
        "the gate, made again, by tokens",
    ],
)
def test_activations_and_temporary_tensors_are_the_most_that_is_ever_allocated(
    config, layout, p, collectives, monkeypatch
):
    """To 1 %, since statistics and gradients of single rows and columns are not counted."""
    monkeypatch.setattr(dispatch, "takes_kernel", lambda x: True)
    step = Step(layout, p, config)
    gc.collect()
    gc.freeze()
    with Allocated(step.inputs) as allocated:
        step.loss().backward()
    gc.unfreeze()
    account = forecast.memory(config, layout, p > 0)
    assert account.activations + account.temporary == pytest.approx(allocated.most, rel=0.01)


@both_models
@every_layout
def test_collectives_of_forward_and_backward_are_those_that_are_called(config, layout, collectives):
    step, masked = Step(layout, 0.1, config), [7, 5, 7]  # micro-batches
    for m in masked:
        step.choose(m)
        step.loss().backward()
    expected = Counter()
    for row in forecast.collectives(config, layout, masked):
        if row.group == "tensor" and row.name != "gradients by tokens":  # the optimizer's
            expected[row.operation, row.bytes] += row.calls
    assert collectives == expected
    assert bool(expected) == (layout.tensor_parallel > 1)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_ring_sends_a_part_in_each_of_its_rounds(n):
    """A rank sends one n-th in each of n - 1 rounds, and the same again to distribute the sums."""
    size, layout = 64_000, Layout(tensor_parallel=n)
    rounds = {"reduce-scatter": n - 1, "all-gather": n - 1, "all-reduce": 2 * (n - 1)}
    for operation, count in rounds.items():
        row = forecast.Collective("", "tensor", operation, size, calls=3)
        assert forecast.wire_bytes([row], layout, "tensor") == 3 * count * (size // n)
        assert forecast.wire_bytes([row], layout, "data") == 0


@pytest.mark.parametrize("model", [SMALL, replace(MODERN, global_every=1)], ids=lambda model: model.architecture)
def test_hours_are_those_of_the_flops_that_the_profiler_of_torch_counts(model):
    """One document fills the row. With recomputation, the profiler sees the blocks twice."""
    config = TrainConfig(train_tokens=4_000, tokens_per_batch=400, row_tokens=40, mask_rate=0.15)
    for recompute in (False, True):
        layout = Layout(recompute=recompute, row_tokens=40, mask_rate=0.15)
        step = Step(layout, 0.1, model, bounds=(0,))  # with dropout, attention is products, which the profiler counts
        with FlopCounterMode(display=False) as counter:
            step.loss().backward()
        seconds = 3600 * planning.hours(model, config, layout, flops=1e9, mfu=0.5, length=40)
        assert seconds == pytest.approx(100 * counter.get_total_flops() / 0.5e9)
    assert planning.hours(model, config, Layout(4, 2), 1e9, 0.5) == pytest.approx(
        planning.hours(model, config, Layout(), 1e9, 0.5) / 8
    )


def test_memory_follows_the_highest_mask_rate_and_time_the_mean():
    """The model has a head that takes most of its computation."""
    model = replace(MODERN, vocabulary=8_192)

    def plan(**options) -> tuple[float, float]:
        config = TrainConfig(preset="modern-tiny", row_tokens=ROW, tokens_per_batch=64 * ROW, gpus=1, **options)
        (layout, *_) = planning.layouts(model, config, 1, CHIPS["H100"].memory)
        return layout.masked / layout.tokens, planning.hours(model, config, layout, 1e12, 0.5)

    rates = {options: plan(mask_rate=0.15, mask_schedule=options) for options in ("", "0.4:0.2", "0.2:0.4")}
    constant = {rate: plan(mask_rate=rate) for rate in (0.15, 0.3, 0.4)}
    assert rates[""] == constant[0.15]
    for schedule in ("0.4:0.2", "0.2:0.4"):
        assert rates[schedule][0] == constant[0.4][0] == pytest.approx(0.4, abs=1e-3)
        assert rates[schedule][1] == pytest.approx(constant[0.3][1])
    assert constant[0.3][1] > 1.1 * constant[0.15][1]


@pytest.mark.parametrize("gpu", ["RTX 4090", "L4"])
def test_large_trains_on_a_24_gb_gpu(gpu):
    account = forecast.memory(LARGE, Layout(micro_batch_rows=1, recompute=True))
    assert account.total + planning.RESERVED <= CHIPS[gpu].memory == 24 * 10**9


@pytest.mark.parametrize("gpus", [1, 4, 8, 64])
def test_layouts_fit_use_all_gpus_and_make_up_a_batch(gpus):
    config, memory = TrainConfig(preset="large"), CHIPS["L40S"].memory
    found = planning.layouts(LARGE, config, gpus, memory)
    for layout in found:
        assert layout.gpus == gpus and LARGE.heads % layout.tensor_parallel == 0
        assert config.tokens_per_batch % (layout.tokens * layout.data_parallel) == 0
        assert forecast.memory(LARGE, layout).total < memory
    # layouts further down need more machinery, each for a larger micro-batch
    assert found == sorted(found, key=lambda x: (x.tensor_parallel, x.recompute, x.shard_optimizer))
    for a, b in pairwise(found):
        assert a.tensor_parallel < b.tensor_parallel or a.micro_batch_rows < b.micro_batch_rows
    assert found[0].tensor_parallel == 1 and not found[0].recompute


def test_the_plan_is_of_the_sizes_that_the_options_give():
    """Not the preset's: rows of 8,192 fit a model without a table of positions."""
    config = TrainConfig(preset="modern-large", layers=2, row_tokens=8_192, gpus=1, micro_batch_rows=1)
    page = planning.report(config)
    assert f"{forecast.parameters(replace(PRESETS['modern-large'], layers=2)):,} parameters in 2 layers" in page
    assert any(line.split()[3:5] == ["1", "64"] for line in page.splitlines())  # 524,288 tokens, 8,192 at a time


def test_the_plan_shows_what_fits_and_what_was_given():
    config = TrainConfig(preset="large", price_per_gpu_hour=2.0, gpus=4, gpu="A100 40GB", micro_batch_rows=16)
    page = planning.report(config)
    assert "762,396,032 parameters" in page and "51,499 steps" in page and "4 × A100 40GB" in page
    first = next(line for line in page.splitlines() if line.lstrip().startswith("4 × 1"))
    hours = planning.hours(LARGE, config, Layout(4), CHIPS["A100 40GB"].flops, 0.4)
    assert f"{hours:,.1f}" in first and f"{8 * hours:,.0f}" in first
    assert page.endswith("(does not fit)") and page.count("as given") == 1
    page = planning.report(replace(config, gpus=64, gpu="H100", micro_batch_rows=8))
    assert "as given: tokens_per_batch" in page  # four rows for each GPU
    page = planning.report(replace(config, gpus=32, gpu="H100", tensor_parallel=32))
    assert "as given: 16 attention heads cannot be split over --tensor-parallel 32; choose 4, 8 or 16" in page
    page = planning.report(replace(config, batch_schedule="0:131072,1e9:524288"))
    assert "57,221 steps of 131,072 then 524,288" in page  # 7,630 of the first 1e9, 49,591 of the rest


def test_the_plan_shows_the_epochs_and_the_weights_of_the_data(corpus, tmp_path):
    def plan(data) -> list[str]:
        config = TrainConfig(preset="base", data=str(data), train_tokens=2_000_000, tokens_per_batch=65_536)
        return planning.report(config).splitlines()

    def tokens_in_an_epoch(line: str) -> int:
        return int(re.search(r"about ([\d,]+) tokens in an epoch", line)[1].replace(",", ""))

    assert "vocabulary 50,048" in plan(tmp_path / "none")[0]
    without = plan(corpus.folder)
    assert "vocabulary 512" in without[0] and corpus.vocab_size in range(385, 513)  # the next multiple of 128
    packing = Packing(corpus.offsets, corpus.training_documents, 1, 2_048)
    epoch = tokens_in_an_epoch(without[2])
    assert epoch == pytest.approx(packing.tokens, rel=0.02)
    assert without.pop(2).endswith(f"; this run is {2_000_000 / epoch:,.2f} epochs")
    folder = shutil.copytree(corpus.folder, tmp_path / "weighted")
    cut, end = 300, len(corpus.training_documents)
    meta = json.loads((folder / "meta.json").read_text())
    meta["weights"] = [
        {"input": name, "weight": w, "documents": [a, b], "tokens": int(corpus.offsets[b] - corpus.offsets[a])}
        for name, w, a, b in (("so.7z", 2.0, 0, cut), ("wiki.jsonl", 0.3, cut, end))
    ]
    (folder / "meta.json").write_text(json.dumps(meta))
    lines = plan(folder)
    assert [line for line in lines if line not in without] == lines[2:5] and lines[:2] + lines[5:] == without
    shards = open_shards(folder)
    packing = Packing(shards.offsets, shards.training_documents, 1, 2_048, shards.weights)
    epoch = tokens_in_an_epoch(lines[2])
    assert epoch == pytest.approx(packing.tokens, rel=0.02)
    epochs = 2_000_000 / epoch
    assert lines[2].endswith(f"this run is {epochs:,.2f} epochs")
    assert f"so.7z, weight 2: {2 * cut:,} documents in an epoch ({cut:,} are there), " in lines[3]
    assert lines[3].endswith(f"each is read {2 * epochs:,.2f} times")
    there = end - cut
    held = int(0.3 * there + 0.5)
    assert f"wiki.jsonl, weight 0.3: {held:,} documents in an epoch ({there:,} are there), " in lines[4]
    shares = [float(re.search(r"([\d.]+)% of its tokens", line)[1]) for line in lines[3:5]]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    (folder / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        plan(folder)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gpu": "RTX 4090", "gpus": 1}, r"on 1 × 24 GB takes at least [\d.]+ GB on each; choose"),
        ({"gpus": 48}, "524,288 tokens cannot be split over 48 GPUs .* choose --gpus 16, 32 or 64"),
        ({"gpu": "H1000"}, "--gpu is H1000; choose B200, .* or RTX 4090"),
        ({"mfu": 40.0}, "--mfu is 40.0; it must be"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(monkeypatch, options, message):
    if options.get("gpu") == "RTX 4090":
        monkeypatch.setitem(PRESETS, "large", replace(LARGE, layers=240))
    with pytest.raises(ValueError, match=message) as error:
        planning.report(TrainConfig(**{"preset": "large", **options}))
    assert "\n" not in str(error.value)
