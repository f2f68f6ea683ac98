"""Gated GELU in Triton, one pass each way.

Both are bound by memory. Per element of the result in bf16, the forward reads a and b and writes one number, 6 bytes;
the backward reads a, b and dy and writes da and db, 10 bytes. Only x is saved: the backward recomputes GELU(a) and its
slope.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisobert.ops.kernels import check, check_contiguous, on_device, options
from minisobert.ops.kernels.bias_gelu import _gelu, _gelu_slope

# Rows, columns, warps: 16 elements per thread. Tiles are narrow because presets have 576, 1,152 and 2,624 columns:
# tiles of 512 would cover 576 with 1,024. Not tuned yet.
TILE = 32, 128, 8

# Arguments of the kernels. T tokens, f features of each half. Pointers are to contiguous tensors of one dtype.
#   x, dx          (T, 2f): [a, b], and its gradient
#   y, dy          (T, f): GELU(a) ∘ b, written by the forward, and its gradient
#   tokens         T
#   WIDTH          f
#   ROWS, COLUMNS  rows and columns of a tile
#   TANH           whether GELU has the tanh form instead of the erf form


@triton.jit(do_not_specialize=["tokens"])
def _gated_gelu_forward(
    x, y, tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TANH: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < tokens)[:, None] & (column < WIDTH)[None, :]
    row = row.to(tl.int64)[:, None]
    at = row * (2 * WIDTH) + column[None, :]
    a = tl.load(x + at, inside, 0.0).to(tl.float32)
    b = tl.load(x + at + WIDTH, inside, 0.0).to(tl.float32)
    tl.store(y + row * WIDTH + column[None, :], (_gelu(a, TANH) * b).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])
def _gated_gelu_backward(
    dy, x, dx, tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TANH: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < tokens)[:, None] & (column < WIDTH)[None, :]
    row = row.to(tl.int64)[:, None]
    at = row * (2 * WIDTH) + column[None, :]
    a = tl.load(x + at, inside, 0.0).to(tl.float32)
    b = tl.load(x + at + WIDTH, inside, 0.0).to(tl.float32)
    d = tl.load(dy + row * WIDTH + column[None, :], inside, 0.0).to(tl.float32)
    tl.store(dx + at, (d * b * _gelu_slope(a, TANH)).to(dx.dtype.element_ty), inside)
    tl.store(dx + at + WIDTH, (d * _gelu(a, TANH)).to(dx.dtype.element_ty), inside)


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, form: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tanh = form == "tanh"
        tokens, both = x.shape
        y = torch.empty(tokens, both // 2, dtype=x.dtype, device=x.device)
        _launch(_gated_gelu_forward, x, y, tanh=ctx.tanh)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _launch(_gated_gelu_backward, dy.contiguous(), x, dx, tanh=ctx.tanh)
        return dx, None


def _launch(kernel, *tensors: Tensor, tanh: bool) -> None:
    x = tensors[-2]  # in both kernels the last but one, before the output
    tokens, width = x.shape[0], x.shape[1] // 2
    rows, columns, warps = TILE
    with on_device(x):
        if tokens:
            grid = triton.cdiv(tokens, rows), triton.cdiv(width, columns)
            kernel[grid](*tensors, tokens, width, rows, columns, tanh, **options(warps))


def gated_gelu(x: Tensor, form: str = "erf") -> Tensor:
    """As `ops.gated_gelu`. x: (T, 2f), contiguous. Raises ValueError on another dtype, device or layout."""
    check(x=x)
    check_contiguous(x=x)
    return _GatedGelu.apply(x, form)
