"""Parity with the real Megatron-LM: four steps from the same weights on the same batches give the same losses, gradient
norms and weights.

minisobert runs its own training step with `--loss-average micro-batch` on packed documents; Megatron pads them.
Megatron computes the learning rate from the tokens before a step, so that its first is 0; here ours gets the same rate.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import finish, launch

from minisobert.config import ModelConfig, TrainConfig
from minisobert.corpus.loader import MicroBatch
from minisobert.model import MaskedLM
from minisobert.ops import Documents
from minisobert.parallel import mesh, tensor
from minisobert.training import loop
from minisobert.training.optimizer import Optimizer
from minisobert.training.run import Progress
from minisobert.training.schedule import learning_rate

pytest.importorskip("megatron.core", reason="parity with Megatron-LM needs megatron-core")
import megatron_peer as megatron

CONFIG = ModelConfig(layers=2, hidden=64, heads=4, ffn=128, vocabulary=256, positions=32)
STEPS, MICRO_BATCHES, PEAK = 4, 2, 1e-3
RECIPE = megatron.Recipe(peak=PEAK, warmup_steps=2, decay_steps=8)
LAYOUTS = [(1, 2), (2, 1)]  # (data, tensor) parallel, with two processes


def initial() -> MaskedLM:
    model = MaskedLM(CONFIG).initialise(0)
    with torch.no_grad():  # no zeros and no ones, so that every path carries signal
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.02)
    return model


def batches() -> list[list[megatron.MicroBatch]]:
    """Micro-batches of four documents. The second one of each step has more masked tokens, so that each weighs less."""
    generator = torch.Generator().manual_seed(0)

    def draw(rate: float) -> megatron.MicroBatch:
        lengths = torch.randint(5, 33, (4,), generator=generator)
        tokens, labels = torch.randint(5, CONFIG.vocabulary, (2, 4, 32), generator=generator)
        real = torch.arange(32) < lengths[:, None]
        masked = (torch.rand(4, 32, generator=generator) < rate) & real
        masked[:, 1] = True
        return megatron.MicroBatch(tokens.where(real, 0), lengths, labels.where(real, 0), masked.float())

    return [[draw(0.2), draw(0.4)] for _ in range(STEPS)]


def packed(batch: megatron.MicroBatch, first_row: int) -> MicroBatch:
    real = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    masked = batch.masked[real].nonzero()[:, 0]
    lengths = batch.lengths.tolist()
    return MicroBatch(
        batch.tokens[real], torch.cat([torch.arange(n) for n in lengths]),
        Documents.from_bounds([0, *batch.lengths.cumsum(0).tolist()]), masked, batch.labels[real][masked],
        lengths=batch.lengths.numpy(), first_row=first_row,
    )  # fmt: skip


def ours(tensor_parallel: int, out: Path) -> int:
    """Trains on this process's share, and writes the results."""
    size = MICRO_BATCHES * TrainConfig.row_tokens
    config = TrainConfig(
        tokens_per_batch=size, micro_batch_rows=1, train_tokens=RECIPE.decay_steps * size, dropout=0.0,
        warmup_fraction=RECIPE.warmup_steps / RECIPE.decay_steps, learning_rate=PEAK, loss_average="micro-batch",
    )  # fmt: skip
    loop.learning_rate = lambda tokens, *rest: learning_rate(tokens - size, *rest)
    losses, norms, rates = [], [], []
    with mesh.start(tensor_parallel, timeout=60) as here:
        model = tensor.shard(initial(), here)
        optimizer = Optimizer(model, torch.float32, (config.beta1, config.beta2), config.weight_decay, here)
        progress = Progress()
        for batch, step in zip(batches(), config.steps(here.data_parallel)):
            share = [packed(b, step.first_row) for b in batch[here.data_rank :: here.data_parallel]]
            figures, _ = loop.train_step(model, optimizer, share, step, config, here, progress, loop.Tally)
            losses.append(progress.loss)
            norms.append(figures["grad_norm"])
            rates.append(figures["lr"])
        torch.save({name: p.detach() for name, p in model.named_parameters()}, out / f"{here.rank}.pt")
        (out / f"{here.rank}.json").write_text(json.dumps([losses, norms, rates, here.data_rank]))
    loop.learning_rate = learning_rate
    return 0


@pytest.fixture(scope="module")
def megatrons(tmp_path_factory) -> dict[tuple[int, int], megatron.Trained]:
    weights = {name: p.detach() for name, p in initial().named_parameters()}
    arguments = CONFIG, weights, batches(), RECIPE
    trained = megatron.spawn(2, [tp for _, tp in LAYOUTS], tmp_path_factory.mktemp("megatron"), *arguments)
    return dict(zip(LAYOUTS, trained))


@pytest.fixture(scope="module")
def minisoberts(tmp_path_factory) -> dict[tuple[int, int], megatron.Trained]:
    root = tmp_path_factory.mktemp("ours")
    folders = {layout: root / str(layout) for layout in [(1, 1), *LAYOUTS]}
    for folder in folders.values():
        folder.mkdir()
    log = root / "log"
    assert finish(launch([partial(ours, 1, folders[1, 1])], log)) == [0], log.read_text()
    jobs = [partial(ours, tp, folders[dp, tp]) for dp, tp in LAYOUTS]
    assert finish(launch(jobs, log, 2)) == [0, 0], log.read_text()
    trained = {}
    for (dp, tp), folder in folders.items():
        losses, norms, rates, _ = json.loads((folder / "0.json").read_text())
        slices = [torch.load(folder / f"{rank}.pt") for rank in range(tp)]
        weights = {name: whole(name, [each[name] for each in slices]) for name in slices[0]}
        trained[dp, tp] = megatron.Trained(losses, norms, rates, weights)
    return trained


def whole(name: str, slices: list[torch.Tensor]) -> torch.Tensor:
    dimension = tensor.splits.split_dimension(name)
    return slices[0] if dimension is None else torch.cat(slices, dimension)


@pytest.mark.parametrize("theirs", LAYOUTS, ids=lambda layout: f"Megatron {layout}")
@pytest.mark.parametrize("layout", [(1, 1), *LAYOUTS], ids=str)
def test_losses_norms_and_weights_are_megatrons(minisoberts, megatrons, layout, theirs):
    found, expected = minisoberts[layout], megatrons[theirs]
    assert found.rates == pytest.approx([0, PEAK / 2, PEAK, PEAK * 0.85]) == expected.rates
    assert min(expected.norms) > RECIPE.clip  # every step is clipped
    assert found.losses == pytest.approx(expected.losses, rel=0, abs=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    before = dict(initial().named_parameters())
    assert found.weights.keys() == expected.weights.keys() == before.keys()
    for name, w in expected.weights.items():
        delta, moved = found.weights[name] - w, w - before[name].detach()
        if name.endswith("qkv.bias"):  # the true gradient of a key's bias is zero, so Adam steps on rounding errors
            delta, moved = (x.unflatten(0, (CONFIG.heads, 3, -1))[:, [0, 2]] for x in (delta, moved))
        # ten times closer than our own layouts must be to each other, so that a forgotten weight decay would not pass
        assert delta.norm() <= 1e-4 * moved.norm(), name
        assert delta.abs().max() <= PEAK, name
