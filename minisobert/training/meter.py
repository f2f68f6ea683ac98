"""The cost of a step: floating-point operations, model FLOP utilisation, dollars."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from minisobert.config import ModelConfig


class Chip(NamedTuple):
    flops: float  # per second, dense bf16
    memory: int  # bytes, as sold: the device's own count is a little higher


# From the vendors' datasheets. A device matches the first key that its name contains; the name alone does not tell the
# two A100s apart.
CHIPS = {
    "B200": Chip(2.25e15, 180 * 10**9),
    "H200": Chip(989e12, 141 * 10**9),
    "H100 PCIe": Chip(756e12, 80 * 10**9),
    "H100 NVL": Chip(835e12, 94 * 10**9),
    "H100": Chip(989e12, 80 * 10**9),
    "A100 40GB": Chip(312e12, 40 * 10**9),
    "A100": Chip(312e12, 80 * 10**9),
    "L40S": Chip(362e12, 48 * 10**9),
    "L4": Chip(121e12, 24 * 10**9),
    "RTX 4090": Chip(165e12, 24 * 10**9),
}


def attention_pairs(config: ModelConfig, lengths: np.ndarray) -> int:
    """The number of (query, key) pairs that see each other in documents of these lengths, in all layers together: n²
    for a document of n tokens, or only the band of a window."""
    windows = [config.window_of(layer) for layer in range(config.layers)]
    return sum(windows.count(window) * _pairs(lengths, window) for window in set(windows))


def _pairs(lengths: np.ndarray, window: int | None) -> int:
    n = lengths.astype(np.int64)
    w = n - 1 if window is None else np.minimum(n - 1, window)
    return int((n * (2 * w + 1) - w * (w + 1)).sum())


def training_flops(config: ModelConfig, tokens: int, attention_pairs: int, masked: int) -> float:
    """Multiplications and additions in the matrix products of one forward and backward pass, without recomputation.

    tokens: real ones; attention_pairs: in all layers; masked: tokens that go through the head. A product with an (m, n)
    matrix takes 2mn per token forward, and twice that backward (Kaplan et al. 2020).
    """
    h, f = config.hidden, config.ffn
    of_layer = tokens * 2 * (4 * h * h + (3 if config.is_modern else 2) * h * f)
    head = masked * 2 * (h * h + h * config.vocabulary)
    return 3.0 * (config.layers * of_layer + attention_pairs * 2 * 2 * h + head)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of one device in bf16; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((chip.flops for known, chip in CHIPS.items() if known in name), None)


def dollars(seconds: float, gpus: int, price_per_gpu_hour: float) -> float:
    return seconds / 3600 * gpus * price_per_gpu_hour


def elapsed(lines: list[dict]) -> list[float]:
    """Seconds of training up to each line of a run's metrics.jsonl, without evaluations; NaN if a line lacks them.

    A line has the real tokens of the run so far and the speed of its step, so the sum also holds for a resumed run.
    """
    seconds, tokens, found = 0.0, 0, []
    for line in lines:
        now, speed = line.get("tokens") or math.nan, line.get("tokens_per_second") or math.nan
        seconds, tokens = seconds + (now - tokens) / speed, now
        found.append(seconds)
    return found
