"""Predicts each figure of `make gpu` from a model of the chip, which should be right within 15 %.

    matrix products   FLOPs, at the rate of a large product on a chip at its power limit
    memory            bytes that have to move, at the share of the copy bandwidth that such kernels reach
    attention         clocks per score = OVERLAP (tensor + issue + exp2), where a multiprocessor does 4,096 bf16 FLOPs,
                      issues 128 instructions and computes 16 exp2 per clock

Instructions are counted in the compiled loops by `benchmarks.compiled --count`, and multiplied by the tiles visited.
OVERLAP is 1 if the three never run at the same time, and smaller if they do. For the forward pass it is fitted to one
published figure: Triton's 396 TFLOP/s at d = 64 on whole rows of an H100 (FlashAttention-3, Shah et al. 2024). For the
gradients, whose chains of products are longer, it is a guess. The rates are typical of such chips; none of our kernels
has been timed to set them. A dry run predicts for an H100.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from benchmarks import RESULTS, parser, show
from benchmarks.gpu.rowwise import products
from benchmarks.gpu.setting import DROPOUTS, LENGTHS, REAL, Setting, recipe
from benchmarks.instructions import Loop, read_loops, visits
from minisobert.cli import table
from minisobert.config import ModelConfig
from minisobert.ops.kernels import attention_tiles as tiles
from minisobert.planning import forecast
from minisobert.training import meter

WITHIN = 0.15
OVERLAP = {"forward": 0.79, "key gradient": 0.9, "query gradient": 0.9}
REACHED = 0.8  # share of the copy bandwidth that streaming kernels reach
FLOPS, ISSUE, EXP2 = 4_096, 128, 16  # per clock and multiprocessor of sm_90
OPTIMIZER_BYTES = 50  # per parameter: gradient, master and moments read and written, the norm, the new weights
GRADIENT_BYTES = 10  # per parameter and micro-batch: a bf16 gradient added to an fp32 sum
ELEMENT = 2


class Chip(NamedTuple):
    multiprocessors: int
    clock: float  # per second, under load
    copied: float  # bytes per second that a copy reads and writes
    multiplied: float  # FLOPs per second of a large bf16 product


CHIPS = {"H200": Chip(132, 1.755e9, 4.3e12, 672e12), "H100": Chip(132, 1.755e9, 3.0e12, 672e12)}
# TFLOP/s on an H100 at d = 64 on whole rows of 2,048 without dropout, forward and backward (FlashAttention-3)
PUBLISHED = {"sdpa-flash": (318, 264), "varlen": (318, 264), "sdpa-cudnn": (395, None)}
PASSES = {"forward": 2, "key gradient": 4, "query gradient": 3}  # matrix products per visit

# Tensors of (T, h) that the operations around attention read and write, (forward, backward)
AROUND = {"nothing": (6, 0), "bias": (6, 0), "bias apart": (6, 3), "rotary": (10, 0), "rotary apart": (10, 6)}


def chip_of(name: str, dry: bool) -> Chip | None:
    return next((chip for key, chip in CHIPS.items() if key in name), CHIPS["H100"] if dry else None)


@cache
def loops() -> dict[tuple[str, int, float], Loop]:
    """Instructions of attention's loops, by kernel, head width and dropout."""
    newest = max(RESULTS.glob("instructions-3.6*.md"))  # Triton 3.6 comes with torch 2.11 and 2.12
    return read_loops(newest.read_text())


class Attention(NamedTuple):
    """Seconds that the kernels take."""

    forward: float
    backward: float


def attention(chip: Chip, bounds: np.ndarray, heads: int, width: int, dropout: float, window: int | None = None,
              rotary: bool = False) -> Attention | None:  # fmt: skip
    """Seconds of one layer, or None if the instructions of its loops were not counted."""
    near = ", window" if window else ""
    turned = ", rotary" * rotary + near
    named = {"forward": near, "key gradient": turned, "query gradient": turned}
    counted = {kernel: loops().get((f"attention {kernel}{more}", width, dropout)) for kernel, more in named.items()}
    if not all(counted.values()):
        return None

    def seconds(kernel: str, table: dict) -> float:
        held, visited, *_ = table[ELEMENT, width][1]  # sm_90
        loop = counted[kernel]
        seen = visits(bounds, held, visited, window)
        clocks = sum(
            seen[kind] * OVERLAP[kernel] * (PASSES[kernel] * 2 * width / FLOPS + instructions / ISSUE + 1 / EXP2)
            for kind, instructions in (("whole", loop.whole), ("masked", loop.masked))
        )
        return heads * clocks / chip.multiprocessors / chip.clock

    forward = tiles.FORWARD_WINDOW if window else tiles.FORWARD_DROPOUT if dropout else tiles.FORWARD
    queries = tiles.QUERY_GRADIENT_WINDOW if window else tiles.QUERY_GRADIENT
    delta = moved(chip, 2 * ELEMENT * int(bounds[-1]) * heads * width)
    backward = seconds("key gradient", tiles.KEY_GRADIENT) + seconds("query gradient", queries)
    return Attention(seconds("forward", forward), backward + delta)


def moved(chip: Chip, size: float) -> float:
    """Seconds to stream `size` bytes."""
    return size / (REACHED * chip.copied)


def micro_batch(chip: Chip, setting: Setting, preset: str, lengths: str, dropout: float,
                rows: int | None = None) -> dict[str, float]:  # fmt: skip
    """Seconds of the forward and backward pass, by part."""
    model, usual, _ = setting.models[preset]
    rows = rows or usual
    tokens, h, f = rows * setting.row_tokens, model.hidden, model.ffn
    batch = setting.packed(lengths, tokens, 0, preset)
    bounds, masked = batch.documents.bounds.numpy(), len(batch.masked)
    windows = [model.window_of(layer) for layer in range(model.layers)]
    of_window = {
        window: attention(chip, bounds, model.heads, model.head_width, dropout, window, model.is_modern)
        for window in set(windows)
    }
    layers = [of_window[window] for window in windows]
    *of_layer, decoder = products(model, tokens, masked).values()
    flops = 3 * 2.0 * (model.layers * sum(m * n * k for m, n, k in of_layer) + np.prod(decoder) + masked * h * h)
    # (T, h) and (T, f) tensors that are read and written, forward and backward
    norm = 2 * (4 + 4 + (dropout > 0)) * h
    gelu = (3 + 5) * f if model.is_modern else (2 + 3) * f
    turned = 4 * h if model.is_modern else 0
    return {
        "matrix products": flops / chip.multiplied,
        "attention, forward": sum(layer.forward for layer in layers) if all(layers) else None,
        "attention, backward": sum(layer.backward for layer in layers) if all(layers) else None,
        "layer norms": moved(chip, model.layers * norm * tokens * ELEMENT),
        "GELU": moved(chip, model.layers * gelu * tokens * ELEMENT),
        "loss": moved(chip, 4 * masked * model.vocabulary * ELEMENT),
        "the rest": moved(
            chip,
            ELEMENT * tokens * (10 * h + model.layers * turned) + GRADIENT_BYTES * forecast.parameters(model),
        ),
    }  # fmt: skip


def training(chip: Chip, setting: Setting, preset: str, lengths: str, dropout: float, rows: int | None = None) -> dict:
    model, usual, _ = setting.models[preset]
    rows = rows or usual
    parts = micro_batch(chip, setting, preset, lengths, dropout, rows)
    if None in parts.values():
        return {}
    tokens = rows * setting.row_tokens
    batch = setting.packed(lengths, tokens, 0, preset)
    accumulation, one = setting.tokens_per_batch // tokens, sum(parts.values())
    optimizer = moved(chip, OPTIMIZER_BYTES * forecast.parameters(model))
    if model.is_modern:
        optimizer += muon(chip, model)
    rate = accumulation / (accumulation * one + optimizer)  # micro-batches a second
    pairs = meter.attention_pairs(model, batch.lengths)
    flops = meter.training_flops(model, batch.real_tokens, pairs, len(batch.masked))
    return {
        "micro_batch_seconds": one,
        "optimizer_seconds": optimizer,
        "tokens_per_second": rate * batch.real_tokens,
        "micro_batch_tokens_per_second": batch.real_tokens / one,
        "mfu": rate * flops / meter.CHIPS["H100"].flops,
        "peak_bytes": memory(setting, preset, rows, dropout),
    }


def memory(setting: Setting, preset: str, rows: int, dropout: float) -> int:
    """Bytes at the peak, as `--plan` estimates them."""
    model, *_ = setting.models[preset]
    layout = forecast.Layout(micro_batch_rows=rows, row_tokens=setting.row_tokens, mask_rate=recipe(preset).mask_rate)
    return forecast.memory(model, layout, dropout > 0, muon=model.is_modern).total


def muon(chip: Chip, model: ModelConfig) -> float:
    """Seconds of Muon's five iterations, each of three bf16 products per matrix (`docs/muon.md`)."""
    h, f = model.hidden, model.ffn
    shapes = [(3 * h, h), (h, h), (2 * f, h), (f, h)]
    flops = sum(5 * 2 * (2 * min(a, b) ** 2 * max(a, b) + min(a, b) ** 3) for a, b in shapes)
    return model.layers * flops / chip.multiplied


def figures(name: str, setting: Setting, machine: str, result: dict) -> dict[str, float | None]:
    """The predicted fields of a result, those that the model covers. name: that of the measurement.

    Nothing here touches the device, which may be out of order after a failed measurement.
    """
    chip = chip_of(machine, setting.dry)
    if chip is None:
        return {}
    stage, *about = name.split("/")
    if stage == "ceilings":
        if about[0] == "copy":
            return {"bytes_per_second": chip.copied, "seconds": 2 * setting.copy_bytes / chip.copied}
        m, n, k = result["shape"]
        return {"tflops": chip.multiplied / 1e12, "seconds": 2.0 * m * n * k / chip.multiplied}
    if stage in ("attention", "surroundings"):
        return _attention(chip, setting, about)
    if stage in ("add_norm", "bias_gelu", "cross_entropy") and about[-1] == "minisobert":
        fields = {}
        for direction in ("forward", "backward"):
            fields[f"{direction}_bytes_per_second"] = REACHED * chip.copied
            size = result[f"{direction}_bytes_per_second"] * result[f"{direction}_seconds"]
            fields[f"{direction}_seconds"] = moved(chip, size)
        return fields
    if stage == "training" and about[-1] == "minisobert":
        preset, lengths, dropout, _ = about
        return training(chip, setting, preset, lengths, float(dropout))
    if stage == "rows":
        rows, dropout = about
        return training(chip, setting, "base", "posts", float(dropout), int(rows))
    if stage == "train.py":
        rows, preset = result["rows"], about[0]
        fields = training(chip, setting, preset, "posts", result["dropout"], rows)
        return {name: fields.get(name) for name in ("tokens_per_second", "mfu", "peak_bytes")}
    if stage == "profile":
        parts = micro_batch(chip, setting, about[0], "posts", result["dropout"])
        return {} if None in parts.values() else {"seconds": sum(parts.values()), "parts": parts}
    return {}


def _attention(chip: Chip, setting: Setting, about: list[str]) -> dict[str, float | None]:
    """The fields of a measurement of attention. Its last part names an implementation or a surrounding operation."""
    width, lengths, dropout, name = int(about[0]), about[1], float(about[2]), about[3]
    if name in PUBLISHED and (width, lengths, dropout) == (64, "rows", 0.0):
        return dict(zip(("forward_tflops", "backward_tflops"), PUBLISHED[name]))
    batch, heads = setting.packed(lengths, setting.tokens, 0), setting.heads[width]
    found = attention(chip, batch.documents.bounds.numpy(), heads, width, dropout, None, name == "rotary")
    if found is None or name not in ("minisobert", *AROUND):
        return {}
    work = 4.0 * width * heads * int((batch.lengths**2).sum()) / 1e12
    around = [moved(chip, n * ELEMENT * setting.tokens * heads * width) for n in AROUND.get(name, (0, 0))]
    forward, backward = found.forward + around[0], found.backward + around[1]
    return {
        "forward_seconds": forward,
        "forward_tflops": work / forward,
        "backward_seconds": backward,
        "backward_tflops": 2.5 * work / backward,
    }


def main() -> None:
    options = parser("gpu.predict", "--write", writes="benchmarks/results/gpu/predicted.md").parse_args()
    setting, lines = REAL, ["# What `make gpu` should find", ""]
    lines += [
        "`python -m benchmarks.gpu.predict` computed these figures from a model of the chip "
        "([predict.py](../../gpu/predict.py)), before any of them was measured. The model should be within 15 %. "
        "`make gpu` prints its measurements beside them. *Passes saved*: what a micro-batch would take longer if qkv's "
        "bias, or its rotary positions, had passes of their own.",
    ]
    for name, chip in CHIPS.items():
        rows = []
        for width, lengths, dropout in product(setting.heads, LENGTHS, DROPOUTS):
            found = _attention(chip, setting, [str(width), lengths, str(dropout), "minisobert"])
            speeds = [f"{found[f'{direction}_tflops']:.0f}" for direction in ("forward", "backward")]
            rows.append([width, lengths, f"{dropout:g}", *speeds])
        lines += ["", f"## {name}: attention, TFLOP/s on visible pairs", ""]
        lines += table(["d", "documents", "dropout", "forward", "backward"], rows)
        rows, head = [], []
        for preset, (model, of_micro_batch, _) in setting.models.items():
            for lengths, dropout in product(LENGTHS, setting.dropouts(preset)):
                parts = micro_batch(chip, setting, preset, lengths, dropout)
                found, head = training(chip, setting, preset, lengths, dropout), list(parts)
                times = [f"{1e3 * seconds:.1f}" for seconds in (*parts.values(), found["optimizer_seconds"])]
                tensors = AROUND["rotary apart" if model.is_modern else "bias apart"][1] * model.layers
                saved = moved(chip, tensors * ELEMENT * of_micro_batch * setting.row_tokens * model.hidden)
                shares = (
                    f"{saved / sum(parts.values()):.1%}",
                    f"{found['tokens_per_second']:,.0f}",
                    f"{found['mfu']:.0%}",
                )
                rows.append([preset, of_micro_batch, lengths, f"{dropout:g}", *times, *shares])
        lines += ["", f"## {name}: training, ms of a micro-batch and of the optimizer, tokens/s of steps", ""]
        lines += table(
            ["", "rows", "documents", "dropout", *head, "optimizer", "passes saved", "tokens/s", "MFU"], rows
        )
    show(lines, "gpu/predicted", options.write)


if __name__ == "__main__":
    main()
