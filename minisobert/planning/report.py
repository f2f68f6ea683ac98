"""`train.py --plan`: which layouts fit, and the hours and dollars that a run will take, before a GPU is rented for it.

`forecast.py` estimates one layout; this file tries many and reports those that fit.
"""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from pathlib import Path

from minisobert.cli import nearest, printable, words
from minisobert.config import ModelConfig, TrainConfig
from minisobert.corpus.packing import SPECIALS, copies_in_epoch
from minisobert.corpus.shards import read_meta
from minisobert.parallel.mesh import check_layout, tensor_parallel_sizes
from minisobert.planning.forecast import Layout, Memory, collectives, flops_per_token, memory, parameters, wire_bytes
from minisobert.training.meter import CHIPS, dollars

RESERVED = 2 * 10**9  # bytes of a GPU, for what `forecast.memory` leaves out
MOST_ROWS = 16  # rows of a micro-batch: its matrix products fill any GPU, and more rows would only take memory

# the columns of the table: heading and width
COLUMNS = {
    "data × tensor": 13, "rows": 5, "a step": 6, "weights": 8, "gradients": 9, "optimizer": 9, "activations": 11,
    "temporary": 9, "total": 6, "tensor": 7, "data": 6, "hours": 7, "dollars": 8,
}  # fmt: skip


def hours(
    model: ModelConfig, config: TrainConfig, layout: Layout, flops: float, mfu: float, length: int | None = None
) -> float:
    """Hours of the whole run. flops: peak per second of a GPU; mfu: the fraction of it that training uses; length:
    tokens of a document, by default a whole row.

    Recomputation adds a forward pass of the blocks, a third of their FLOPs, at the same speed.
    """
    length = length or config.row_tokens
    again = flops_per_token(model, length, masked=0) / 3 if layout.recompute else 0
    tokens = sum(size for _, size in config.batch_sizes())
    return tokens * (_mean_flops(model, config, length) + again) / (layout.gpus * flops * mfu) / 3600


def _mean_flops(model: ModelConfig, config: TrainConfig, length: int) -> float:
    """FLOPs per token, on average. Only the head's depend on the mask rate, which changes linearly if it changes."""
    return flops_per_token(model, length, sum(_mask_rates(config)) / 2)


def _mask_rates(config: TrainConfig) -> tuple[float, float]:
    """The mask rates at the start and at the end of training."""
    return config.mask_rate_after(0), config.mask_rate_after(config.train_tokens)


def _memory(model: ModelConfig, config: TrainConfig, layout: Layout) -> Memory:
    return memory(model, layout, dropout=config.dropout > 0, muon=config.optimizer == "muon")


def layouts(model: ModelConfig, config: TrainConfig, gpus: int, gpu_memory: int) -> list[Layout]:
    """The layouts in bf16 that fit on `gpus` GPUs with gpu_memory bytes each. Those to try first come first:

    - without tensor parallelism, since it communicates in every layer. With it comes sequence parallelism, which sends
      hardly more and needs less memory;
    - then without recomputation, which costs a forward pass;
    - then without a sharded optimizer, though it costs little;
    - each with the largest micro-batch that fits, up to MOST_ROWS, and only if that is larger than those of earlier
      layouts with the same tensor parallelism.

    Raises ValueError if nothing fits.
    """
    batch = math.gcd(*(size for _, size in config.batch_ramp))
    rows, rest = divmod(batch, config.row_tokens)
    found, totals = [], []
    for tensor_parallel in tensor_parallel_sizes(model, gpus, config.row_tokens):
        data_parallel, most = gpus // tensor_parallel, 0
        if rest or rows % data_parallel:
            continue
        choices = [n for n in range(1, MOST_ROWS + 1) if rows // data_parallel % n == 0]
        for recompute in (False, True):
            for shard_optimizer in (False, True) if data_parallel > 1 else (False,):
                one = Layout(
                    data_parallel, tensor_parallel, 1, tensor_parallel > 1, shard_optimizer, recompute,
                    row_tokens=config.row_tokens, mask_rate=max(_mask_rates(config)),
                )  # fmt: skip
                tried = [replace(one, micro_batch_rows=n) for n in choices]
                needed = [_memory(model, config, layout).total + RESERVED for layout in tried]
                totals += needed
                fitting = [layout for layout, total in zip(tried, needed) if total <= gpu_memory]
                if fitting and fitting[-1].micro_batch_rows > most:
                    found.append(fitting[-1])
                    most = fitting[-1].micro_batch_rows
    if not totals:
        divisors = [n for n in range(1, rows + 1) if rows % n == 0] if not rest else []
        choices = [f"--gpus {words(nearest(divisors, gpus))}"] if divisors else []
        choices += config.near_batches(gpus * config.row_tokens)
        split = f"a batch of {batch:,} tokens cannot be split over {gpus} GPUs by rows of {config.row_tokens:,}"
        raise ValueError(f"{split}; choose {', or '.join(choices)}")
    if not found:
        raise ValueError(
            f"{config.name} on {gpus} × {gpu_memory / 1e9:.0f} GB takes at least {min(totals) / 1e9:.1f} GB on each; "
            "choose a --gpu with more memory, or more --gpus"
        )
    return found


def report(config: TrainConfig, init: ModelConfig | None = None) -> str:
    """What `train.py --plan` prints: the run, the layouts that fit its GPUs and, below them, the layout that was given.
    init: the model of --init.

    Raises ValueError if --gpu is not known or nothing fits.
    """
    path = Path(config.data) / "meta.json"  # a plan may come before its data
    data = read_meta(path) if path.is_file() else {}
    model = config.model_config(data.get("vocab_size", ModelConfig.vocabulary), init)
    gpu, mfu = config.gpu, config.mfu
    given = Layout(
        max(config.gpus // config.tensor_parallel, 1), config.tensor_parallel, config.micro_batch_rows,
        config.sequence_parallel, config.shard_optimizer, config.recompute,
        "fp32" if config.precision == "fp32" else "bf16", config.row_tokens, max(_mask_rates(config)),
    )  # fmt: skip
    if gpu not in CHIPS:
        raise ValueError(f"--gpu is {gpu}; choose {words(CHIPS)}")
    chip, price, sizes = CHIPS[gpu], config.price_per_gpu_hour, [f"{size:,}" for _, size in config.batch_ramp]
    fitting = layouts(model, config, config.gpus, chip.memory)
    gigabytes = f"{'GB of each GPU':^57} {'GB it sends a step':>19}"
    lines = [
        f"{config.name}: {parameters(model):,} parameters in {model.layers} layers, "
        f"hidden {model.hidden:,}, {model.heads} heads, vocabulary {model.vocabulary:,}",
        f"{config.train_tokens:,} tokens in {len([*config.batch_sizes()]):,} steps of {words(sizes, 'then')}; "
        f"{_mean_flops(model, config, config.row_tokens) / 1e9:.2f} GFLOP a token, if documents were as long as rows "
        "(less otherwise)",
        *(_epochs(config, data) if data else []),
        f"{config.gpus} × {gpu}: {chip.memory / 1e9:.0f} GB, of which {RESERVED / 1e9:.0f} are kept free; "
        f"{chip.flops / 1e12:,.0f} TFLOP/s in bf16, MFU {mfu:g} in each layout; "
        + (f"${price:g} an hour each" if price else "no --price-per-gpu-hour"),
        "",
        f"{'GPUs':>13} {'micro-batch':>12} {gigabytes} {'whole run':>16}",
        " ".join(f"{name:>{width}}" for name, width in COLUMNS.items()) + "  options",
        *(_line(model, config, layout, gpu, mfu) for layout in fitting),
    ]
    if given not in fitting:
        try:
            lines += ["as given:", _line(model, config, given, gpu, mfu)]
        except ValueError as error:
            lines += [f"as given: {error}"]
    return "\n".join(lines)


def _epochs(config: TrainConfig, data: dict) -> list[str]:
    """How often the run reads the data, whose meta.json this is, and what an epoch holds of inputs with weights."""
    (training, documents), inputs = data["validation_documents"], data.get("weights", [])
    epoch = (data["tokens"] / documents + SPECIALS) * training  # held-out documents are as long as others
    found = []  # of each input: documents, copies in an epoch, and the tokens of these
    for one in inputs:
        there = one["documents"][1] - one["documents"][0]
        copies = copies_in_epoch(there, one["weight"])
        tokens = (one["tokens"] / there + SPECIALS) * copies if there else 0
        found.append((there, copies, tokens))
    epoch = sum(tokens for *_, tokens in found) if inputs else epoch
    if not epoch:
        return []
    epochs = config.train_tokens / epoch  # rows are full except for less than a hundredth
    lines = [f"{config.data}: about {epoch:,.0f} tokens in an epoch; this run is {epochs:,.2f} epochs"]
    for one, (there, copies, tokens) in zip(inputs, found):
        lines.append(
            f"  {one['input']}, weight {one['weight']:g}: {copies:,} documents in an epoch ({there:,} are there), "
            f"{tokens / epoch:.1%} of its tokens; each is read {epochs * copies / max(there, 1):,.2f} times"
        )
    return [printable(line) for line in lines]


def _line(model: ModelConfig, config: TrainConfig, layout: Layout, gpu: str, mfu: float) -> str:
    """A line of the table. Raises ValueError if the model or the batch cannot be split this way."""
    check_layout(model, config.gpus, layout.tensor_parallel, config.row_tokens)
    chip = CHIPS[gpu]
    for _, size in config.batch_ramp:  # checks all sizes; the line has the passes of the last
        given = replace(config, micro_batch_rows=layout.micro_batch_rows)
        passes = given.accumulation(size, layout.data_parallel)
    kinds = _memory(model, config, layout)
    sent = collectives(model, layout, [layout.masked] * passes)
    time = hours(model, config, layout, chip.flops, mfu)
    gigabytes = (*astuple(kinds), kinds.total, *(wire_bytes(sent, layout, group) for group in ("tensor", "data")))
    cells = [
        f"{layout.data_parallel} × {layout.tensor_parallel}",
        layout.micro_batch_rows,
        passes,
        *(f"{n / 1e9:.2f}" for n in gigabytes),
        f"{time:,.1f}",
        f"{dollars(3600 * time, layout.gpus, config.price_per_gpu_hour):,.0f}" if config.price_per_gpu_hour else "–",
    ]
    row = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values()))
    options = [name for name in ("sequence_parallel", "shard_optimizer", "recompute") if getattr(layout, name)]
    options += ["(does not fit)"] if kinds.total + RESERVED > chip.memory else []
    return f"{row}  {' '.join(options)}".replace("_", "-").rstrip()
