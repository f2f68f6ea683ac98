"""The training loop: batches of a fixed number of tokens, one optimizer step each, whatever the layout.

Loss and gradient of a step are sums over all masked tokens of the global batch, divided by their number; what a rank or
a micro-batch happens to hold carries no weight of its own.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Iterable

import torch
from tqdm import tqdm

from minisobert.config import ModelConfig, TrainConfig
from minisobert.corpus.loader import MicroBatch, Rows, load, spans
from minisobert.corpus.packing import ROW_TOKENS
from minisobert.model import MaskedLM
from minisobert.ops import Dropout
from minisobert.parallel.mesh import Mesh
from minisobert.parallel.tensor import cross_entropy, guessed
from minisobert.training import meter
from minisobert.training.optimizer import Optimizer
from minisobert.training.run import Progress, Run
from minisobert.training.schedule import learning_rate


def train_step(
    model: MaskedLM,
    optimizer: Optimizer,
    batches: Iterable[MicroBatch],
    config: TrainConfig,
    mesh: Mesh,
    progress: Progress,
) -> dict:
    """One step on this rank's micro-batches. Advances progress; returns the step's figures."""
    device = mesh.device
    first_row = progress.consumed_tokens // ROW_TOKENS
    dropout = Dropout.for_step(config.dropout, config.seed, progress.step, model.config.layers, device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    masked = real_tokens = pairs = 0
    for batch in batches:
        offset = (batch.first_row - first_row) * ROW_TOKENS
        here = dropout and place(dropout, offset, len(batch.tokens), model.config, config, mesh)
        logits = model(batch.tokens, batch.positions, batch.documents, batch.masked, here)
        loss = cross_entropy(logits, batch.targets, mesh).sum()
        loss.backward()
        loss_sum += loss.detach()
        masked, real_tokens, pairs = masked + len(batch.targets), real_tokens + batch.real_tokens, pairs + batch.pairs

    counts = torch.tensor([masked, real_tokens, pairs], dtype=torch.float64, device=device)
    sums = mesh.sum_over_data(torch.cat([loss_sum[None], counts]))
    mesh.sum_over_data(optimizer.gradient)
    loss, masked, real_tokens, pairs = sums.tolist()
    masked = max(masked, 1)  # nothing to guess in a whole batch: loss and gradient are 0

    tokens = progress.schedule_tokens + config.tokens_per_batch
    rate = learning_rate(
        tokens, config.train_tokens, config.learning_rate, config.warmup_fraction, config.final_learning_rate_fraction
    )
    norm, applied = optimizer.step(rate, masked, config.clip)
    progress.step += 1
    progress.consumed_tokens += config.tokens_per_batch
    progress.schedule_tokens = tokens if applied else progress.schedule_tokens
    progress.skipped += not applied
    progress.real_tokens += int(real_tokens)
    progress.loss = loss / masked
    flops = meter.training_flops(model.config, real_tokens, pairs, masked)
    return {"lr": rate, "grad_norm": norm, "real_tokens": real_tokens, "flops": flops}


def place(dropout: Dropout, offset: int, tokens: int, model: ModelConfig, config: TrainConfig, mesh: Mesh) -> Dropout:
    """dropout for what this rank has of a micro-batch whose first token has the index `offset` in the global batch."""
    return dataclasses.replace(
        dropout,
        token_offset=offset,
        head_offset=mesh.tensor_rank * model.heads // mesh.tensor_parallel,
        row_offset=mesh.tensor_rank * tokens // mesh.tensor_parallel if config.sequence_parallel else 0,
    )


@torch.no_grad()
def evaluate(model: MaskedLM, rows: Rows, config: TrainConfig, mesh: Mesh) -> tuple[float, float]:
    """Loss in nats and share of right guesses over the first eval_rows held-out rows, masked alike every time."""
    last_row = min(len(rows), config.eval_rows)
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)  # loss, right guesses, masked tokens
    share = spans(0, last_row, config.micro_batch_rows, mesh.data_rank, mesh.data_parallel)
    for batch in load(rows, share, mesh.device):
        logits = model(batch.tokens, batch.positions, batch.documents, batch.masked)
        sums[0] += cross_entropy(logits, batch.targets, mesh).sum()
        sums[1] += guessed(logits, batch.targets, mesh).sum()
        sums[2] += len(batch.targets)
    loss, right, masked = mesh.sum_over_data(sums).tolist()
    return loss / max(masked, 1), right / max(masked, 1)


def train(
    model: MaskedLM, optimizer: Optimizer, training: Rows, validation: Rows, run: Run, mesh: Mesh, progress: Progress
) -> int:
    """Trains from progress to train_tokens. Returns 0, or the number of the signal that ended it.

    One line per step goes to metrics.jsonl. SIGTERM and Ctrl-C save and leave after the step.
    """
    config = run.config
    batch_rows = config.tokens_per_batch // ROW_TOKENS
    steps = -(-config.train_tokens // config.tokens_per_batch)
    accumulation = config.accumulation(ROW_TOKENS, mesh.data_parallel)
    first_row = progress.consumed_tokens // ROW_TOKENS
    share = spans(first_row, steps * batch_rows, config.micro_batch_rows, mesh.data_rank, mesh.data_parallel)
    micro_batches = load(training, share, mesh.device)
    peak = meter.peak_flops(mesh.device)

    def passed(every: int) -> bool:
        """Whether the step just made went past a multiple of `every` tokens, or was the last one."""
        before = progress.consumed_tokens - config.tokens_per_batch
        return progress.step == steps or before // every != progress.consumed_tokens // every

    bar = tqdm(
        total=steps * config.tokens_per_batch, initial=progress.consumed_tokens, unit="tok", unit_scale=True,
        desc=config.preset, disable=not mesh.is_first, dynamic_ncols=True, smoothing=0.05,
    )  # fmt: skip
    shown, stopped = "", 0
    with bar, StopSignals() as stop:
        while progress.step < steps:
            began = time.perf_counter()
            batches = (next(micro_batches) for _ in range(accumulation))
            figures = train_step(model, optimizer, batches, config, mesh, progress)
            seconds = time.perf_counter() - began
            progress.seconds += seconds

            line = {
                "step": progress.step,
                "positions": progress.consumed_tokens,
                "tokens": progress.real_tokens,
                "loss": progress.loss,
                "lr": figures["lr"],
                "grad_norm": figures["grad_norm"],
                "tokens_per_second": figures["real_tokens"] / seconds,
                "dollars": meter.dollars(progress.seconds, mesh.world, config.price_per_gpu_hour),
                "skipped": progress.skipped,
            }
            if peak:
                line["mfu"] = figures["flops"] / seconds / mesh.world / peak
            if len(validation) and passed(config.eval_every_tokens):
                line["validation_loss"], line["validation_accuracy"] = evaluate(model, validation, config, mesh)
                shown = f" held-out {line['validation_loss']:.3f}"
            if mesh.is_first:
                run.log(line)
            bar.set_postfix_str(f"loss {progress.loss:.3f}{shown}", refresh=False)
            bar.update(config.tokens_per_batch)

            # one rank may have got the signal, or all: they leave after the same step, with the same number
            signals = torch.tensor([stop.received, stop.received > 0], device=mesh.device)
            total, ranks = mesh.sum_over_all(signals).tolist()
            stopped = total // max(ranks, 1)
            if stopped or passed(config.checkpoint_every_tokens):
                saved = run.save(optimizer, progress, mesh)
            if stopped:
                break
    micro_batches.close()
    if stopped and mesh.is_first:
        print(f"stopped after step {progress.step:,}; the same command goes on from {saved}", file=sys.stderr)
    return stopped


class StopSignals:
    """Notes SIGTERM and SIGINT (once: a second Ctrl-C interrupts at once) instead of letting them end the process."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame) -> None:
        self.received = int(number)
        signal.signal(number, self._before[number])

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
