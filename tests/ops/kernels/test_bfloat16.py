"""bf16 in the interpreter that tests/bfloat16.py has mended, compared with torch."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from against_reference import interpreted, random
from bfloat16 import rounded

pytestmark = interpreted


def test_rounding_is_torchs_for_every_exponent_at_and_beside_each_tie():
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (upper[:, None] | lower).view(np.float32)
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    ours = rounded(x)
    assert np.array_equal(np.isnan(ours), np.isnan(x)) and np.array_equal(ours, expected, equal_nan=True)


@triton.jit
def _arithmetic(x, y, sums, products, casts, largest, n: tl.constexpr):
    at = tl.arange(0, n)
    a, b = tl.load(x + at), tl.load(y + at, at < n - 1, 3.0)
    tl.store(sums + at, a + b)
    tl.store(products + at, a * b)
    tl.store(casts + at, (a.to(tl.float32) * b.to(tl.float32) + 1).to(tl.bfloat16))
    tl.store(largest + at, tl.maximum(tl.abs(a), tl.where(at < 9, 0.0, b)))


def test_arithmetic_is_torchs():
    x, y = random(64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16, seed=1)
    found = torch.empty(4, 64, dtype=torch.bfloat16)
    _arithmetic[(1,)](x, y, *found, 64)
    y[-1] = 3
    fused = (x.float() * y.float() + 1).bfloat16()
    largest = torch.maximum(x.abs(), torch.where(torch.arange(64) < 9, 0.0, y))
    assert torch.equal(found, torch.stack([x + y, x * y, fused, largest]))


@triton.jit
def _products(x, y, out, n: tl.constexpr):
    at = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.trans(tl.load(y + at))))


def test_products_of_matrices_are_those_of_their_values():
    x, y = random(32, 32, dtype=torch.bfloat16), random(32, 32, dtype=torch.bfloat16, seed=1)
    out = torch.empty(32, 32)
    _products[(1,)](x, y, out, 32)
    assert torch.allclose(out.double(), x.double() @ y.double().T, rtol=1e-6, atol=1e-5)
