"""Bias and GELU in Triton, one pass each way.

The backward recomputes the input of the GELU from x and bias. The gradient of the bias is a sum over all tokens, which
a fixed grid of programs keeps in registers, as in `add_norm`. Without a bias the kernels have neither its load nor its
sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisobert.ops.kernels import check, check_contiguous, multiprocessors, on_device, options

TILE = 8, 512, 8  # rows, columns, warps: 16 elements per thread. Not tuned yet.
PROGRAMS = 4  # programs of the backward per multiprocessor: as many as fit at 64 registers per thread

# Arguments of the kernels. T tokens, n columns. Pointers are to contiguous tensors of one dtype, except `partial`.
#   x, bias        (T, n), (n,); bias may be None
#   y              (T, n): GELU(x + bias); written by the forward
#   dy, dx         (T, n): the gradients of y and x
#   partial        (programs along the rows, n) fp32: the sums of each program for the gradient of bias, or None
#   tokens         T
#   WIDTH          n
#   ROWS, COLUMNS  rows and columns of a tile
#   TANH           whether GELU has the tanh form instead of the erf form


@triton.jit
def _normal(z):
    """Φ(z), the normal distribution function, and exp(-z²/2). Abramowitz and Stegun 7.1.26: this exponential times a
    polynomial in 1/(1 + c|z|), off by at most 7e-8, which is how coarsely fp32 rounds 1. The library's erf takes twice
    the instructions."""
    bell = tl.exp2(-0.7213475204444817 * z * z)
    root = tl.rsqrt(1 + 0.2316418882663604 * tl.abs(z))
    t = root * root  # a division, 1 / x, would take more instructions
    tail = 0.5307027145 * t - 0.7265760135
    tail = ((tail * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796
    tail *= t * bell
    return tl.where(z < 0, tail, 1 - tail), bell


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    if TANH:
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        return z * tl.sigmoid(2 * u)  # (1 + tanh u) / 2 = sigmoid(2u)
    else:
        return z * _normal(z)[0]


@triton.jit
def _gelu_slope(z, TANH: tl.constexpr):
    if TANH:
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        # s' = 2 s (1 - s) du/dz
        return s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    else:
        normal, bell = _normal(z)
        return normal + z * 0.3989422804014327 * bell


@triton.jit(do_not_specialize=["tokens"])
def _bias_gelu_forward(
    x, bias, y, tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TANH: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < tokens)[:, None] & (column < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    z = tl.load(x + at, inside, 0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + column, column < WIDTH, 0.0).to(tl.float32)[None, :]
    tl.store(y + at, _gelu(z, TANH).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])
def _bias_gelu_backward(
    dy, x, bias, dx, partial, tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if bias is not None:
        b = tl.load(bias + column, column < WIDTH, 0.0).to(tl.float32)[None, :]
        db = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < tokens)[:, None] & (column < WIDTH)[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        z = tl.load(x + at, inside, 0.0).to(tl.float32)
        if bias is not None:
            z += b
        d = tl.load(dy + at, inside, 0.0).to(tl.float32) * _gelu_slope(z, TANH)
        tl.store(dx + at, d.to(dx.dtype.element_ty), inside)
        if bias is not None:
            db += d
    if bias is not None:
        tl.store(partial + tl.program_id(0) * WIDTH + column, tl.sum(db, 0), column < WIDTH)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, form: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.tanh = form == "tanh"
        y = torch.empty_like(x)
        (tokens, width), (rows, columns, warps) = x.shape, TILE
        with on_device(x):
            if tokens:
                grid = triton.cdiv(tokens, rows), triton.cdiv(width, columns)
                _bias_gelu_forward[grid](x, bias, y, tokens, width, rows, columns, ctx.tanh, **options(warps))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, bias = ctx.saved_tensors
        (tokens, width), (rows, columns, warps) = x.shape, TILE
        across = triton.cdiv(width, columns)
        down = triton.cdiv(PROGRAMS * multiprocessors(x.device), across)
        down = min(down, triton.cdiv(max(tokens, 1), rows))
        dx = torch.empty_like(x)
        partial = None if bias is None else torch.empty(down, width, dtype=torch.float32, device=x.device)
        with on_device(x):
            _bias_gelu_backward[down, across](
                dy.contiguous(), x, bias, dx, partial, tokens, width, rows, columns, ctx.tanh, **options(warps)
            )
        return dx, None if bias is None else partial.sum(0).to(bias.dtype), None


def bias_gelu(x: Tensor, bias: Tensor | None, form: str = "erf") -> Tensor:
    """As `ops.bias_gelu`. x: (T, n), contiguous. Raises ValueError on another dtype, device or layout."""
    check(x=x, bias=bias)
    check_contiguous(x=x, bias=bias)
    return _BiasGelu.apply(x, bias, form)
