"""What a step cost: floating-point operations, model FLOP utilisation, dollars."""

from __future__ import annotations

import torch

from minisobert.config import ModelConfig

# Dense bf16 FLOP/s by the makers' datasheets; the first name that the device's own contains.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def training_flops(config: ModelConfig, tokens: int, pairs: int, masked: int) -> float:
    """Multiplications and additions of the matrix products of one forward and backward pass, recomputation not counted.

    tokens: real ones; pairs: of tokens that see each other, Σ n² over the documents; masked: tokens through the head.
    A product with an (m, n) matrix takes 2mn per token forward, and twice that backward (Kaplan et al. 2020).
    """
    h, f = config.hidden, config.ffn
    per_layer = tokens * 2 * (4 * h * h + 2 * h * f) + pairs * 2 * 2 * h
    head = masked * 2 * (h * h + h * config.vocabulary)
    return 3.0 * (config.layers * per_layer + head)


def peak_flops(device: torch.device) -> float | None:
    """Of one device in bf16; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for chip, flops in PEAK_FLOPS.items() if chip in name), None)


def dollars(seconds: float, gpus: int, price_per_gpu_hour: float) -> float:
    return seconds / 3600 * gpus * price_per_gpu_hour
