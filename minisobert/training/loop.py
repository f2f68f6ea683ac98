"""The training loop: batches of a given number of tokens, one optimizer step each, whatever the layout.

Loss and gradient of a step are sums over all masked tokens of the global batch, divided by their number, however these
are spread over ranks and micro-batches. (With --loss-average micro-batch they are means of the micro-batches' means, as
in Megatron-LM.)
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from tqdm import tqdm

from minisobert.config import Step, TrainConfig
from minisobert.corpus.loader import MicroBatch, Rows, prefetch, spans
from minisobert.model import MaskedLM
from minisobert.ops import Dropout
from minisobert.parallel.mesh import KnownToAll, Mesh
from minisobert.parallel.tensor import cross_entropy, guessed_right
from minisobert.training import checkpoint, meter
from minisobert.training.checkpoint import Saver
from minisobert.training.optimizer import Optimizer
from minisobert.training.run import Progress, Run
from minisobert.training.schedule import learning_rate

SMOOTHED = 50  # the progress bar shows the mean loss of so many steps: that of one small batch jumps by half a nat


class Tally(NamedTuple):
    """The integers that the processes exchange once per step, summed over all of them."""

    masked: int = 0  # tokens to guess
    real_tokens: int = 0  # all but padding
    attention_pairs: int = 0  # (query, key) pairs that see each other, in all layers together
    signals: int = 0  # the number of the signal that asked this process to stop, or 0
    stopping: int = 0  # 1 if there was such a signal
    written: int = 0  # 1 if this process has written its part of a checkpoint
    failed: int = 0  # 1 if it could not


class TooManySkipped(KnownToAll):
    """More than --max-skipped steps in a row had no finite gradient. On rank 0 the message names the ranks at fault."""


def train_step(
    model: MaskedLM,
    optimizer: Optimizer,
    batches: Iterable[MicroBatch],
    step: Step,
    config: TrainConfig,
    mesh: Mesh,
    progress: Progress,
    tell: Callable[[], Tally],
) -> tuple[dict, Tally]:
    """One step on this rank's micro-batches. Advances progress.

    tell: returns what this process tells the others, and is called when they meet; the counts of tokens are filled in
    here. Returns the step's figures, and the tally summed over all processes.
    """
    device = mesh.device
    dropout = Dropout.for_step(config.dropout, config.seed, progress.step, model.config.layers, device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    masked = real_tokens = attention_pairs = 0
    for i, batch in enumerate(batches, 1):
        # dropout masks are hashes of a token's place in the global batch, so that the layout cannot change them
        offset = (batch.first_row - step.first_row) * config.row_tokens
        here = dropout and own_dropout(dropout, offset, len(batch.tokens), model.config.heads, config, mesh)
        # one expression: a name for the logits, the largest tensor of all, would keep them through the backward pass
        loss = cross_entropy(
            model(batch.tokens, batch.positions, batch.documents, batch.masked, here), batch.targets, mesh
        ).sum()
        if config.loss_average == "micro-batch":
            loss = loss / max(len(batch.targets), 1)
        if i == step.accumulation:  # gradients are complete after this backward pass, and may be summed during it
            optimizer.gradients.before_last_backward()
        loss.backward()
        loss_sum += loss.detach()
        masked += len(batch.targets)
        real_tokens += batch.real_tokens
        attention_pairs += meter.attention_pairs(model.config, batch.lengths)

    # The hosts know these numbers without waiting for a device. All ranks of a tensor group read the same rows and
    # count the same tokens
    own = tell()._replace(masked=masked, real_tokens=real_tokens, attention_pairs=attention_pairs)
    total = Tally(*mesh.sum_on_hosts(list(own)))
    masked, real_tokens, attention_pairs = (n // mesh.tensor_parallel for n in total[:3])
    divisor = masked if config.loss_average == "token" else step.accumulation * mesh.data_parallel
    divisor = max(divisor, 1)  # if a whole batch has nothing to guess, loss and gradient are 0

    tokens = progress.schedule_tokens + step.tokens
    rate, muon_rate = (
        learning_rate(
            tokens, config.train_tokens, peak, config.warmup_fraction, config.final_learning_rate_fraction,
            config.decay_fraction if config.schedule == "wsd" else None,
        )
        for peak in (config.learning_rate, config.muon_learning_rate)
    )  # fmt: skip
    norm, applied = optimizer.step(rate, divisor, config.clip, muon_rate)
    progress.step += 1
    progress.consumed_tokens += step.tokens
    progress.schedule_tokens = tokens if applied else progress.schedule_tokens
    progress.skipped += not applied
    progress.skipped_in_a_row = 0 if applied else progress.skipped_in_a_row + 1
    progress.real_tokens += real_tokens
    progress.loss = mesh.sum_over_data(loss_sum).item() / divisor
    if progress.skipped_in_a_row > config.max_skipped:
        report = _report(optimizer, progress, step)
        raise TooManySkipped(report if mesh.is_first else "")
    flops = meter.training_flops(model.config, real_tokens, attention_pairs, masked)
    return {"lr": rate, "grad_norm": norm, "real_tokens": real_tokens, "flops": flops}, total


def _report(optimizer: Optimizer, progress: Progress, step: Step) -> str:
    """The message: which ranks' gradients were not finite, and of which parameter first. Called by all ranks."""
    found = [f"rank {rank}: {name}" for rank, name in enumerate(optimizer.not_finite()) if name]
    return (
        f"the gradients of {progress.skipped_in_a_row} steps in a row were not finite; the last was step "
        f"{progress.step} with rows {step.first_row:,} to {step.first_row + step.rows - 1:,}, loss {progress.loss}; "
        "where it began: " + ("; ".join(found) or "in no rank's own gradient, but in their sum")
    )


def own_dropout(dropout: Dropout, offset: int, tokens: int, heads: int, config: TrainConfig, mesh: Mesh) -> Dropout:
    """The dropout of this rank's part of a micro-batch whose first token has the index `offset` in the global batch.

    tokens: number of tokens in the micro-batch; heads: of the whole model.
    """
    return dataclasses.replace(
        dropout,
        token_offset=offset,
        head_offset=mesh.tensor_rank * heads // mesh.tensor_parallel,
        row_offset=mesh.tensor_rank * tokens // mesh.tensor_parallel if config.sequence_parallel else 0,
    )


@torch.no_grad()
def evaluate(model: MaskedLM, rows: Rows, config: TrainConfig, mesh: Mesh) -> tuple[float, float]:
    """Loss in nats and share of right guesses over the first eval_rows held-out rows, always with the same masks."""
    last_row = min(len(rows), config.eval_rows)
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)  # loss, right guesses, masked tokens
    share = spans(0, last_row, config.micro_batch_rows, mesh.data_rank, mesh.data_parallel)
    for batch in prefetch(rows, share, mesh.device):
        logits = model(batch.tokens, batch.positions, batch.documents, batch.masked)
        sums[0] += cross_entropy(logits, batch.targets, mesh).sum()
        sums[1] += guessed_right(logits, batch.targets, mesh).sum()
        sums[2] += len(batch.targets)
    loss, right, masked = mesh.sum_over_data(sums).tolist()
    return loss / max(masked, 1), right / max(masked, 1)


def train(
    model: MaskedLM, optimizer: Optimizer, training: Rows, validation: Rows, run: Run, mesh: Mesh, progress: Progress,
    stop: StopSignals,
) -> int:  # fmt: skip
    """Trains from progress to train_tokens. Returns 0, or the number of the signal that ended it.

    Writes one line per step to metrics.jsonl. After SIGTERM or Ctrl-C it completes the step, saves and returns. Raises,
    on all ranks, TooManySkipped, or SaveFailed if a checkpoint cannot be written.
    """
    config = run.config
    steps, read_ahead = itertools.tee(config.steps(mesh.data_parallel, progress.consumed_tokens))
    micro_batches = prefetch(training, _share(read_ahead, config, mesh), mesh.device)
    saver = Saver(run.folder / "checkpoints", config.keep_checkpoints, mesh)
    peak = meter.peak_flops(mesh.device)
    *_, (last, size) = config.batch_sizes()

    bar = tqdm(
        total=last + size, initial=progress.consumed_tokens, unit="tok", unit_scale=True, desc=config.name,
        disable=not mesh.is_first, dynamic_ncols=True, smoothing=0.05,
    )  # fmt: skip
    # tqdm uses the time of day: if the clock were set back by an hour, the bar would stop for one
    bar._time, bar.start_t, bar.last_print_t = time.monotonic, time.monotonic(), time.monotonic()
    shown, stopped = "", 0
    recent: deque[float] = deque(maxlen=SMOOTHED)

    def tell() -> Tally:
        written, failed = saver.flags
        return Tally(signals=stop.received, stopping=int(stop.received > 0), written=written, failed=failed)

    def lost() -> str:
        saved = checkpoint.steps(saver.folder)
        return f"all steps after {saved[-1]} are lost" if saved else "nothing had been saved"

    stop.promise = "will save and exit after this step; Ctrl-C again exits at once"
    stop.lost = lost
    with bar:
        for step in steps:

            def passed(every: int, before: int = progress.consumed_tokens) -> bool:
                """Whether the step just made went past a multiple of `every` tokens, or was the last one."""
                done = progress.consumed_tokens
                return done >= config.train_tokens or before // every != done // every

            began = time.perf_counter()
            batches = itertools.islice(micro_batches, step.accumulation)
            try:
                figures, total = train_step(model, optimizer, batches, step, config, mesh, progress, tell)
            except TooManySkipped:
                saver.wait()  # a checkpoint that is being written is sound
                raise
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
            recent.append(progress.loss)
            bar.set_postfix_str(f"loss {sum(recent) / len(recent):.3f}{shown}", refresh=False)
            bar.update(step.tokens)

            # one rank may have received a signal, or all: all leave after the same step, with the same number
            stopped = total.signals // max(total.stopping, 1)
            saver.advance(total.written, total.failed)
            if stopped or passed(config.checkpoint_every_tokens):
                run.save(saver, optimizer, progress, line.get("validation_loss"))
            if stopped:
                break
    micro_batches.close()
    stop.promise = "the last checkpoint is being saved; Ctrl-C again exits at once"
    saver.wait()
    if stopped and mesh.is_first:
        print(f"stopped after step {progress.step:,}; repeat the command to resume from {saver.last}", file=sys.stderr)
    return stopped


def _share(steps: Iterable[Step], config: TrainConfig, mesh: Mesh) -> Iterator[tuple[int, int, float]]:
    """(first row, rows, mask rate) of each of this rank's micro-batches."""
    for step in steps:
        last = step.first_row + step.rows
        for span in spans(step.first_row, last, config.micro_batch_rows, mesh.data_rank, mesh.data_parallel):
            yield *span, step.mask_rate


class StopSignals:
    """Handles SIGTERM and Ctrl-C. The first is noted and the promise printed; without a promise it ends the process.

    A thread receives them, because a handler would have to wait while the main thread is in one operation, such as the
    backward pass of a large model on a CPU.
    """

    def __init__(self, speaks: bool):
        self.received = 0  # number of the first signal
        self.promise = ""  # what is printed after a first signal; if it is empty, a first signal ends the process
        self.lost = lambda: "nothing is lost"  # describes what an immediate end loses
        self._speaks = speaks

    def __enter__(self) -> StopSignals:
        self._numbers, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def _listen(self) -> None:
        while number := os.read(self._numbers, 1):  # until the other end is closed
            if number[0] in self._before:
                self._note(number[0])
        os.close(self._numbers)

    def _note(self, number: int) -> None:
        if self.promise and not self.received:
            self.received, self._since = number, time.monotonic()
            self._say(self.promise)
        # a terminal sends Ctrl-C to all processes, and torchrun, which is one of them, forwards it to its own
        elif not self.received or time.monotonic() > self._since + 1:
            try:
                self._say(f"exited at once; {self.lost()}")
            finally:
                os._exit(128 + number)

    def _say(self, text: str) -> None:
        if self._speaks:
            with suppress(OSError):  # the terminal is gone
                os.write(2, f"\ntrain.py: {text}\n".encode())  # below the progress bar

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakeup)
        # The thread may hold the last reference to what `lost` refers to, tensors included. A thread that releases a
        # tensor while the interpreter shuts down aborts the process
        self._thread.join()


def _ignore(number: int, frame) -> None:
    """Does nothing. Without a handler in Python, `_listen` would not receive the signal."""
