"""Residual add and layer norm in Triton, one pass each way. `docs/layer_norm.md` derives the backward.

Both passes are bound by memory. Per element of a bf16 tensor, the forward reads branch and residual and writes the new
residual and its normed copy, 8 bytes. The backward reads the gradients of both and the residual and writes one
gradient, 8 bytes (10 with dropout, where branch and residual have different gradients). It recomputes the normed values
from the residual, and the mask from its hash. For a bias that is None the kernels have no load and no sum.

The gradients of weight, bias and norm bias are sums over all tokens. A fixed grid of G programs, each with every G-th
tile of rows, keeps the sums in registers and writes one partial sum each, which torch adds up. There are no atomics, so
the bits are the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisobert.ops.dropout import Dropout
from minisobert.ops.kernels import check, check_contiguous, multiprocessors, on_device, options
from minisobert.ops.kernels.dropout import column_hash, keep, row_hash, settings

WIDTHS = range(128, 8_192 + 1)

# padded width: (rows of a tile, warps forward, warps backward). 16 elements per thread, which in half precision are two
# 16-byte loads from each input; 8 or 32 where 16 would spill. Not tuned on a GPU yet.
TILES = {
    128: (16, 4, 4), 256: (4, 2, 2), 512: (4, 4, 8), 1_024: (2, 4, 4), 2_048: (2, 8, 8), 4_096: (1, 16, 8),
    8_192: (1, 8, 16),
}  # fmt: skip
WIDE = tl.constexpr(4_096)  # beyond it the backward's sums do not fit into registers; torch computes that of bias
# Warps of the backward per multiprocessor, as many as its registers hold. Each program writes 12 bytes per feature.
RESIDENT_WARPS = 16


# Arguments of the kernels. T tokens, h hidden. Pointers are to contiguous tensors of one dtype, fp32 where stated.
# The letters are those of the formulas in `ops/add_norm.py`.
#   branch, bias, residual    (T, h), (h,) or None, (T, h): x, b, r
#   weight, norm_bias         (h,), (h,) or None: w, c
#   new_residual, normal      (T, h): r', n; written by the forward
#   mean, rstd                (T,) fp32: μ, 1/sqrt(σ² + ε) of each token; written by the forward
#   d_new_residual, d_normal  (T, h): the gradients of r' and n; the first is None if r' is not used
#   d_residual, d_branch      (T, h): the gradients of r and x; one tensor if nothing is dropped
#   partial                   (programs, 1 to 3, h) fp32: the sums of each program for w, then for c and b if given
#   tokens, eps               T; ε
#   key, offset, rescale      the dropout mask, from `settings`: pointer to its key, index of the first token, 1/(1-p)
#   THRESHOLD                 p in units of 2**-32; 0 compiles a kernel without dropout
#   WIDTH, BLOCK              h, and the power of two that a row is padded to
#   ROWS                      rows of a tile
#   NORM_BIAS, BIAS           whether norm_bias and bias were given
#
# Do not specialise on values that change between calls, nor on the alignment of rstd, which begins T numbers after
# mean: each new value would trigger a recompile.


@triton.jit(do_not_specialize=["tokens", "offset"], do_not_specialize_on_alignment=["key", "rstd"])
def _add_norm_forward(
    branch, bias, residual, weight, norm_bias, new_residual, normal, mean, rstd, tokens, eps, key, offset, rescale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    features = column < WIDTH
    inside = (row < tokens)[:, None] & features[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    x = tl.load(branch + at, inside, 0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + column, features, 0.0).to(tl.float32)[None, :]
    if THRESHOLD:
        stays = keep(row_hash(row + offset, key)[:, None], column_hash(column)[None, :], THRESHOLD)
        x = tl.where(stays, x * rescale, 0.0)
    rounded = (x + tl.load(residual + at, inside, 0.0).to(tl.float32)).to(new_residual.dtype.element_ty)
    tl.store(new_residual + at, rounded, inside)
    # normalise the rounded residual, which is all that the backward will have
    r = rounded.to(tl.float32)
    mu = tl.sum(r, 1) / WIDTH
    centred = tl.where(inside, r - mu[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    w = tl.load(weight + column, features, 0.0).to(tl.float32)
    c = 0.0 if norm_bias is None else tl.load(norm_bias + column, features, 0.0).to(tl.float32)[None, :]
    y = centred * scale[:, None] * w[None, :] + c
    tl.store(normal + at, y.to(normal.dtype.element_ty), inside)
    tl.store(mean + row, mu, row < tokens)
    tl.store(rstd + row, scale, row < tokens)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["tokens", "offset"], do_not_specialize_on_alignment=["key", "rstd"])
def _add_norm_backward(
    d_new_residual, d_normal, new_residual, weight, mean, rstd, d_residual, d_branch, partial, tokens, key, offset,
    rescale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, THRESHOLD: tl.constexpr,
    NORM_BIAS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    EARLY: tl.constexpr = BLOCK <= WIDE
    column = tl.arange(0, BLOCK)
    features = column < WIDTH
    # as large as the tile, so that sums across threads happen only once, at the end
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    dc = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    rows = tl.arange(0, ROWS)
    at = rows[:, None] * WIDTH + column[None, :]
    # the widest tiles recompute the column hashes for each row: no registers are left to keep them
    for first in tl.range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS, disable_licm=BLOCK > WIDE):
        row = first + rows
        inside = (row < tokens)[:, None] & features[None, :]
        base = tl.cast(first, tl.int64) * WIDTH
        mu = tl.load(mean + row, row < tokens, 0.0)[:, None]
        scale = tl.load(rstd + row, row < tokens, 0.0)[:, None]
        dn = tl.load(d_normal + base + at, inside, 0.0).to(tl.float32)
        r = tl.load(new_residual + base + at, inside, 0.0).to(tl.float32)
        if EARLY and d_new_residual is not None:  # with the other loads, not after the sums that wait for them
            d = tl.load(d_new_residual + base + at, inside, 0.0)
        unit = (r - mu) * scale
        # reloaded from the cache each time: registers limit how many programs run side by side
        g = dn * tl.load(weight + column, features, 0.0).to(tl.float32)[None, :]
        sum_g, sum_gu = tl.reduce((g, g * unit), 1, _add_pairs)
        mean_g, mean_gu = sum_g[:, None] / WIDTH, sum_gu[:, None] / WIDTH
        if BLOCK > WIDE:  # even more so here: read again from the cache instead of keeping it
            dn = tl.load(d_normal + base + at, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
            r = tl.load(new_residual + base + at, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
            unit = (r - mu) * scale
            g = dn * tl.load(weight + column, features, 0.0, eviction_policy="evict_first").to(tl.float32)[None, :]
        dw += dn * unit
        if NORM_BIAS:
            dc += dn
        dx = (g - mean_g - unit * mean_gu) * scale
        if d_new_residual is None:
            d = dx
        elif EARLY:
            d = dx + d.to(tl.float32)
        else:
            d = dx + tl.load(d_new_residual + base + at, inside, 0.0).to(tl.float32)
        tl.store(d_residual + base + at, d.to(d_residual.dtype.element_ty), inside)
        if THRESHOLD:
            stays = keep(row_hash(row + offset, key)[:, None], column_hash(column)[None, :], THRESHOLD)
            d = tl.where(stays, d * rescale, 0.0)
            tl.store(d_branch + base + at, d.to(d_branch.dtype.element_ty), inside)
        if BIAS and BLOCK <= WIDE:
            db += tl.where(inside, d, 0.0)
    at = partial + tl.program_id(0) * (1 + NORM_BIAS + BIAS) * WIDTH + column
    tl.store(at, tl.sum(dw, 0), features)
    if NORM_BIAS:
        tl.store(at + WIDTH, tl.sum(dc, 0), features)
    if BIAS:
        tl.store(at + (1 + NORM_BIAS) * WIDTH, tl.sum(db, 0), features)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, branch, bias, residual, weight, norm_bias, eps: float, dropout: Dropout | None):
        ctx.set_materialize_grads(False)  # the residual of the last block is unused: no zeros to read
        ctx.dropout, ctx.norm_bias, ctx.bias = dropout, norm_bias is not None, bias is not None
        tokens, width = branch.shape
        new_residual, normal = torch.empty_like(branch), torch.empty_like(branch)
        mean, rstd = torch.empty(2, tokens, dtype=torch.float32, device=branch.device)
        ctx.save_for_backward(new_residual, weight, mean, rstd)
        if tokens:
            block = triton.next_power_of_2(width)
            rows, warps, _ = TILES[block]
            key, offset, threshold, rescale = settings(dropout, branch)
            with on_device(branch):
                _add_norm_forward[triton.cdiv(tokens, rows),](
                    branch, bias, residual, weight, norm_bias, new_residual, normal, mean, rstd, tokens, eps,
                    key, offset, rescale, width, block, rows, threshold, **options(warps),
                )  # fmt: skip
        return new_residual, normal

    @staticmethod
    @once_differentiable
    def backward(ctx, d_new_residual: Tensor | None, d_normal: Tensor | None):
        new_residual, weight, mean, rstd = ctx.saved_tensors
        tokens, width = new_residual.shape
        d_normal = torch.zeros_like(new_residual) if d_normal is None else d_normal.contiguous()
        d_new_residual = d_new_residual if d_new_residual is None else d_new_residual.contiguous()
        d_residual = torch.empty_like(new_residual)
        key, offset, threshold, rescale = settings(ctx.dropout, weight)
        # without dropout, branch and residual have the same gradient
        d_branch = torch.empty_like(new_residual) if threshold else d_residual
        block = triton.next_power_of_2(width)
        rows, _, warps = TILES[block]
        if block > WIDE.value and width % 8:  # rows are not aligned: loads of single elements take more registers
            warps *= 2
        programs = max(RESIDENT_WARPS // warps, 1) * multiprocessors(weight.device)
        programs = min(programs, triton.cdiv(max(tokens, 1), rows))
        sums = 1 + ctx.norm_bias + ctx.bias
        partial = torch.empty(programs, sums, width, dtype=torch.float32, device=weight.device)
        # With fewer sums ptxas aims at 80 registers per thread and spills a few on some chips. It does not if told how
        # many there are: 65,536 for the warps that run side by side.
        few = block <= WIDE.value and not (ctx.norm_bias or ctx.bias)
        limit = {"maxnreg": 65_536 // (32 * RESIDENT_WARPS)} if few else {}
        with on_device(weight):
            _add_norm_backward[programs,](
                d_new_residual, d_normal, new_residual, weight, mean, rstd, d_residual, d_branch, partial, tokens,
                key, offset, rescale, width, block, rows, threshold, ctx.norm_bias, ctx.bias, **options(warps), **limit,
            )  # fmt: skip
        dw, *others = partial.sum(0).to(weight.dtype)
        dc = others.pop(0) if ctx.norm_bias else None
        db = others.pop(0) if ctx.bias else None
        if ctx.bias and block > WIDE.value:
            db = d_branch.sum(0, dtype=torch.float32).to(weight.dtype)
        return d_branch, db, d_residual, dw, dc, None, None


def add_norm(
    branch: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """As `ops.add_norm`. branch, residual: (T, h), contiguous, h in WIDTHS.

    Raises ValueError on another dtype, device, layout or width.
    """
    tensors = dict(branch=branch, bias=bias, residual=residual, weight=weight, norm_bias=norm_bias)
    check(**tensors)
    check_contiguous(**tensors)
    if branch.shape[1] not in WIDTHS:
        raise ValueError(f"branch is {tuple(branch.shape)}; it must be {WIDTHS[0]} to {WIDTHS[-1]:,} wide")
    settings(dropout, branch)
    return _AddNorm.apply(branch, bias, residual, weight, norm_bias, eps, dropout)
