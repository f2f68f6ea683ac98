"""Compares a kernel with its reference in fp64, for tests in Triton's interpreter and on a GPU alike."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minisobert.ops import Documents, Dropout

# conftest.py sets it if there is no GPU. Triton reads it once, at import, so a process has the one or the other
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="with a GPU kernels do not run on CPU tensors: tests/gpu tests them (or set TRITON_INTERPRET=1)",
)

# Bounds of documents that a tile may meet. A tile has 16 to 128 queries, and visits 16 to 64 keys at a time.
DOCUMENTS = {
    "one token": [0, 1],
    "a prime, one document": [0, 131],
    "a document per token": list(range(68)),
    "documents of a tile and one token more or less": [0, 63, 127, 192, 193, 320, 449, 576],
    "long and short, none aligned": [0, 1, 64, 65, 197, 300],
}

TOO_SMALL = (0.0, 1e-6)  # rates of dropout that are 0 when rounded to a multiple of 1/65,536


def tolerance(dtype: torch.dtype) -> float:
    """The largest error that is allowed, as a share of the largest element.

    bf16, fp16: rounding a result costs half an eps. It is a sum of probabilities or their gradients, which were rounded
    too: as much again, if all were rounded the same way. A second eps is for delta, computed from the rounded output.
    fp32: sums of up to a thousand terms, whose errors grow like the root of their number: 16 eps.
    """
    eps = torch.finfo(dtype).eps
    return 16 * eps if dtype == torch.float32 else 2 * eps


def random(*shape: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu", scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def qkv(bounds: list[int], heads: int, d: int, dtype: torch.dtype, device: str = "cpu"):
    """q, k and v as the model gives them, which are views of one tensor; and their documents."""
    tokens = bounds[-1]
    parts = random(tokens, heads, 3, d, dtype=dtype, device=device).unbind(2)
    return parts, Documents.from_bounds(bounds, device)


def mask(p: float, site: str, device: str = "cpu", token_offset: int = 0, head_offset: int = 0) -> Dropout | None:
    step = Dropout.for_step(p, seed=5, step=3, layers=2, device=device)
    return step and Dropout(p, step.at(1, site).keys, token_offset, head_offset)


def attention_by_mask(q, k, v, documents: Documents, dropout: Dropout | None, window: int | None = None) -> Tensor:
    """Attention by its formula, with the whole T × T matrix."""
    tokens, heads, d = q.shape
    at = torch.arange(tokens, device=q.device)
    seen = documents.start[:, None] == documents.start
    if window is not None:
        seen &= (at[:, None] - at).abs() <= window
    scores = torch.einsum("ihd,jhd->hij", q, k) / d**0.5
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    if dropout:
        keep = dropout.keeps(dropout.row_hash(0, tokens)[:, None], dropout.key_hash(heads, 0, tokens)[:, None, :])
        probabilities = probabilities.masked_fill(~keep, 0) * dropout.scale
    return torch.einsum("hij,jhd->ihd", probabilities, v)


def compare(
    kernel: Callable,
    reference: Callable,
    inputs: tuple[Tensor, ...],
    allowed: float | None = None,
    least: float = 0.01,
) -> None:
    """Asserts that the outputs and all gradients of kernel(*inputs) are those of the reference in fp64.

    allowed: error as a share of a tensor's largest element, or of `least` if that is larger. If a whole tensor is 0
    because larger numbers cancel, as in the gradients of queries that see one key, rounding errors are relative to
    those numbers.
    """
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = _tuple(kernel(*ours)), _tuple(reference(*exact))
    upstream = [random(*y.shape, dtype=y.dtype, seed=9 + i, device=y.device) for i, y in enumerate(out)]
    gradients = torch.autograd.grad(out, ours, upstream)
    expected_gradients = torch.autograd.grad(expected, exact, [g.double() for g in upstream])
    names = [f"output {i}" for i in range(len(out))] + [f"gradient of input {i}" for i in range(len(ours))]
    for name, x, y in zip(names, (*out, *gradients), (*expected, *expected_gradients)):
        assert_close(x, y, name, tolerance(inputs[0].dtype) if allowed is None else allowed, least)


def assert_close(x: Tensor, expected: Tensor, name: str, allowed: float, least: float = 0.01) -> None:
    x, expected = x.detach().double(), expected.detach().double()
    assert x.shape == expected.shape, name
    if x.numel():
        error = (x - expected).abs().max() / expected.abs().max().clamp(min=least)
        assert error <= allowed, f"{name}: {error:.2e} of its largest element, allowed are {allowed:.2e}"  # NaN fails


def _tuple(x) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)
