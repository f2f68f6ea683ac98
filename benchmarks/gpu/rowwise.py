"""The ceilings, and what is bound by them: copies and matrix products; layer norm, bias and GELU, cross-entropy.

A speed in bytes counts what has to be read and written once, in bf16, whatever an implementation moves beside it:

    add_norm        forward  branch, residual → residual, normal             backward  3 read, 1 written; 2 with dropout
    layer_norm      forward  x → normal                                      backward  2 read, 1 written
    bias_gelu       forward  x → y                                           backward  2 read, 1 written
    cross_entropy   forward  logits →                                        with its backward  logits twice, d logits
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.setting import DTYPE, Setting
from benchmarks.gpu.timing import check, seconds
from minisobert.config import ModelConfig
from minisobert.ops import Dropout, add_norm, bias_gelu, cross_entropy

BYTES = DTYPE.itemsize
EPS = 1e-5
TOLERANCE = 0.01  # a few roundings to bf16's 8 bits: x + b, the residual, the result


def copy(setting: Setting) -> dict:
    source = torch.empty(setting.copy_bytes, dtype=torch.int8, device=setting.device).random_()
    target = torch.empty_like(source)
    time = seconds(lambda: target.copy_(source), setting.device)
    return {"seconds": time, "bytes_per_second": 2 * setting.copy_bytes / time}


def gemm(setting: Setting, m: int, n: int, k: int) -> dict:
    """(m, k) times (k, n) in bf16, on random numbers: zeros would spare the chip power and run faster."""
    a = torch.randn(m, k, dtype=DTYPE, device=setting.device)
    b = torch.randn(n, k, dtype=DTYPE, device=setting.device)
    time = seconds(lambda: F.linear(a, b), setting.device)
    return {"seconds": time, "tflops": 2.0 * m * n * k / time / 1e12, "shape": [m, n, k]}


def products(model: ModelConfig, tokens: int, masked: int) -> dict[str, tuple[int, int, int]]:
    """The matrix products of a model's forward pass, (m, n, k) each; backward takes each twice, transposed."""
    h, f = model.hidden, model.ffn
    return {
        "qkv": (tokens, 3 * h, h),
        "attention_output": (tokens, h, h),
        "ffn_input": (tokens, f, h),
        "ffn_output": (tokens, h, f),
        "decoder": (masked, model.vocabulary, h),
    }


def _inputs(setting: Setting, *shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=DTYPE, device=setting.device, requires_grad=True) for shape in shapes]


def _both_ways(function: Callable, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    outputs = function(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, gradients)]


def _measure(setting: Setting, function, ours, inputs, gradients, forward_bytes: int, backward_bytes: int) -> dict:
    """ours: what the function must agree with, or None."""
    result = {}
    if ours:
        theirs = _both_ways(function, inputs, gradients)
        result["difference"] = check(_both_ways(ours, inputs, gradients), theirs, TOLERANCE)
        del theirs
    outputs = function(*inputs)
    forward = seconds(lambda: function(*inputs), setting.device)
    backward = seconds(lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True), setting.device)
    return result | {
        "forward_seconds": forward,
        "backward_seconds": backward,
        "forward_bytes_per_second": forward_bytes / forward,
        "backward_bytes_per_second": backward_bytes / backward,
    }


def measure_norm(setting: Setting, width: int, dropout: float, name: str) -> dict:
    """One of NORM. All but the bare layer norm also add bias, branch and residual."""
    tokens = setting.tokens
    draw = Dropout.for_step(dropout, 0, 0, 1, setting.device)
    here = draw and draw.at(0, "ffn_output")

    def ours(branch, bias, residual, weight, norm_bias):
        return add_norm(branch, bias, residual, weight, norm_bias, EPS, here)

    def torchs(branch, bias, residual, weight, norm_bias):
        residual = residual + F.dropout(branch + bias, dropout)
        return residual, F.layer_norm(residual, (width,), weight, norm_bias, EPS)

    matrix, vector, element = (tokens, width), (width,), tokens * width * BYTES
    if name == "layer_norm":
        inputs = _inputs(setting, matrix, vector, vector)
        gradients = [torch.randn_like(inputs[0])]
        return _measure(
            setting, lambda x, w, b: F.layer_norm(x, (width,), w, b, EPS), None, inputs, gradients,
            2 * element, 3 * element,
        )  # fmt: skip
    function = {"minisobert": ours, "eager": torchs, "compiled": None}[name] or setting.compile(torchs)
    inputs = _inputs(setting, matrix, vector, matrix, vector, vector)
    gradients = [torch.randn_like(inputs[0]), torch.randn_like(inputs[0])]
    compared = ours if name != "minisobert" and not dropout else None  # with dropout each draws a mask of its own
    return _measure(
        setting, function, compared, inputs, gradients, 4 * element, (5 if dropout else 4) * element
    )  # fmt: skip


NORM = ("minisobert", "eager", "compiled", "layer_norm")


def measure_gelu(setting: Setting, width: int, name: str) -> dict:
    def torchs(x, bias):
        return F.gelu(x + bias)

    function = {"minisobert": bias_gelu, "eager": torchs, "compiled": None}[name] or setting.compile(torchs)
    inputs = _inputs(setting, (setting.tokens, width), (width,))
    element = setting.tokens * width * BYTES
    compared = bias_gelu if name != "minisobert" else None
    gradients = [torch.randn_like(inputs[0])]
    return _measure(setting, function, compared, inputs, gradients, 2 * element, 3 * element)


GELU = ("minisobert", "eager", "compiled")


def measure_cross_entropy(setting: Setting, name: str) -> dict:
    """Forward alone, and forward with backward: ours writes the gradient over the logits, so that it runs only once."""
    masked, vocabulary = setting.logits
    (logits,) = _inputs(setting, setting.logits)
    targets = torch.randint(vocabulary, (masked,), device=setting.device)

    def in_bf16(logits, targets):
        return F.cross_entropy(logits, targets, reduction="none")

    def in_fp32(logits, targets):
        return F.cross_entropy(logits.float(), targets, reduction="none")

    functions = {"minisobert": cross_entropy, "eager-bf16": in_bf16, "eager-fp32": in_fp32, "compiled-fp32": None}
    function = functions[name] or setting.compile(in_fp32)

    def both_ways(function, logits) -> list[Tensor]:
        # a view, since what a kernel may overwrite is no leaf
        loss = function(logits.view_as(logits), targets)
        return [loss, *torch.autograd.grad(loss.sum(), logits)]

    result = {}
    if name != "minisobert":
        theirs = both_ways(function, logits)
        ours = both_ways(cross_entropy, logits.detach().clone().requires_grad_())
        result["difference"] = check(ours, theirs, TOLERANCE)
        del ours, theirs
    forward = seconds(lambda: function(logits.view_as(logits), targets), setting.device)
    both = seconds(lambda: both_ways(function, logits), setting.device)
    element = masked * vocabulary * BYTES
    return result | {
        "forward_seconds": forward,
        "both_seconds": both,
        "forward_bytes_per_second": element / forward,
        "both_bytes_per_second": 3 * element / both,
    }


CROSS_ENTROPY = ("minisobert", "eager-bf16", "eager-fp32", "compiled-fp32")
