"""Layer norm, bias and GELU, and cross-entropy beside torch's; and the ceilings: copies and matrix products.

A speed in bytes counts the bf16 tensors that must be read or written once, even if an implementation moves more:

    add_norm        forward  branch, residual → residual, normal             backward  3 read, 1 written; 2 with dropout
    layer_norm      forward  x → normal                                      backward  2 read, 1 written
    bias_gelu       forward  x → y                                           backward  2 read, 1 written
    cross_entropy   forward  logits →                                        with its backward  logits twice, d logits

For add_norm, torch computes F.layer_norm(residual + dropout(x + bias)), eager or compiled; layer_norm is F.layer_norm
alone. Our cross_entropy is compared with F.cross_entropy on bf16 or fp32 logits. Ours overwrites the logits with their
gradient, so its backward pass can run only once; every backward pass is therefore timed together with its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.gpu import timing
from benchmarks.gpu.setting import DTYPE, Setting
from benchmarks.gpu.timing import seconds
from minisobert.config import ModelConfig
from minisobert.corpus import masking
from minisobert.ops import Dropout, add_norm, bias_gelu, cross_entropy

EPS = 1e-5
CROSS_ENTROPIES = ("minisobert", "eager-bf16", "eager-fp32", "compiled-fp32")
PRODUCTS = ("qkv", "attention_output", "ffn_input", "ffn_output", "decoder")


def measure_copy(setting: Setting) -> dict:
    source = torch.empty(setting.copy_bytes, dtype=torch.int8, device=setting.device).random_()
    target = torch.empty_like(source)
    time = seconds(lambda: target.copy_(source), setting.device)
    return {"seconds": time, "bytes_per_second": 2 * setting.copy_bytes / time}


def measure_gemm(setting: Setting, preset: str | None = None, product: str | None = None) -> dict:
    """Times (m, k) by (k, n) in bf16, on random numbers: zeros would take less power and run faster.

    The product is square, or one of PRODUCTS of a preset's forward pass.
    """
    m = n = k = setting.gemm
    if preset:
        model, rows, _ = setting.models[preset]
        tokens = rows * setting.row_tokens
        m, n, k = products(model, tokens, int(masking.EVALUATION_RATE * tokens))[product]
    a, b = (torch.randn(rows, k, dtype=DTYPE, device=setting.device) for rows in (m, n))
    time = seconds(lambda: F.linear(a, b), setting.device)
    return {"seconds": time, "tflops": 2.0 * m * n * k / time / 1e12, "shape": [m, n, k]}


def products(model: ModelConfig, tokens: int, masked: int) -> dict[str, tuple[int, int, int]]:
    """The matrix products of a model's forward pass, (m, n, k) each. The backward pass has two for each of them."""
    h, f, v = model.hidden, model.ffn, model.vocabulary
    gated = 2 if model.is_modern else 1
    shapes = (tokens, 3 * h, h), (tokens, h, h), (tokens, gated * f, h), (tokens, h, f), (masked, v, h)
    return dict(zip(PRODUCTS, shapes))


def _measure(setting: Setting, name: str, functions: dict[str, Callable], shapes: list[tuple[int, ...]],
             moved: tuple[int, int], ours: Callable | None = None, together: bool = False) -> dict:  # fmt: skip
    """functions: by name; any other name is the eager function, compiled. shapes: those of the inputs. moved: how many
    tensors as large as the first input must be read or written, forward and backward. ours: the function to compare
    with. together: time the backward pass together with the forward pass."""
    function = functions.get(name) or setting.compile(functions[name.replace("compiled", "eager")])
    inputs = [torch.randn(shape, dtype=DTYPE, device=setting.device, requires_grad=True) for shape in shapes]
    result = timing.measure(function, None if name == "minisobert" else ours, inputs, together)
    for direction, tensors in zip(("forward", "backward"), moved):
        result[f"{direction}_bytes_per_second"] = tensors * inputs[0].nbytes / result[f"{direction}_seconds"]
    return result


def measure_norm(setting: Setting, width: int, dropout: float, name: str) -> dict:
    """layer_norm is the norm alone; all others also add bias, branch and residual."""
    matrix, vector = (setting.tokens, width), (width,)
    if name == "layer_norm":
        alone = {name: lambda x, weight, bias: F.layer_norm(x, vector, weight, bias, EPS)}
        return _measure(setting, name, alone, [matrix, vector, vector], (2, 3))
    step = Dropout.for_step(dropout, 0, 0, 1, setting.device)
    here = step and step.at(0, "ffn_output")

    def ours(branch, bias, residual, weight, norm_bias):
        return add_norm(branch, bias, residual, weight, norm_bias, EPS, here)

    def eager(branch, bias, residual, weight, norm_bias):
        residual = residual + F.dropout(branch + bias, dropout)
        return residual, F.layer_norm(residual, vector, weight, norm_bias, EPS)

    functions, shapes = {"minisobert": ours, "eager": eager}, [matrix, vector, matrix, vector, vector]
    compared = None if dropout else ours  # with dropout each draws its own mask
    return _measure(setting, name, functions, shapes, (4, 5 if dropout else 4), compared)


def measure_gelu(setting: Setting, width: int, name: str) -> dict:
    functions = {"minisobert": bias_gelu, "eager": lambda x, bias: F.gelu(x + bias)}
    return _measure(setting, name, functions, [(setting.tokens, width), (width,)], (2, 3), bias_gelu)


def measure_cross_entropy(setting: Setting, name: str) -> dict:
    logits = (int(masking.EVALUATION_RATE * setting.tokens), setting.vocabulary)
    targets = torch.randint(setting.vocabulary, logits[:1], device=setting.device)
    functions = {
        "minisobert": lambda logits: cross_entropy(logits.view_as(logits), targets),  # it may not overwrite a leaf
        "eager-bf16": lambda logits: F.cross_entropy(logits, targets, reduction="none"),
        "eager-fp32": lambda logits: F.cross_entropy(logits.float(), targets, reduction="none"),
    }
    return _measure(setting, name, functions, [logits], (1, 3),
                    ours=lambda logits: cross_entropy(logits.clone(), targets), together=True)  # fmt: skip
