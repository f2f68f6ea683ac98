"""The dropout mask in Triton: hashes of rows and columns, the decision, and dropout by itself.

A kernel with dropout computes the hashes of its rows and columns, broadcasts them against each other and calls `keep`.
Its backward does so again, so no mask is stored. The mask is bit for bit that of `ops.dropout.Dropout`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisobert.config import MOST_TOKENS
from minisobert.ops.dropout import Dropout
from minisobert.ops.kernels import check, check_contiguous, check_device, on_device, options

HASHES = 1_024, 4  # tokens, warps
TILE = 2_048, 4  # elements, warps. Not tuned yet: 16 elements per thread, because they fill loads of 16 bytes


@triton.jit
def _lowbias32(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_hash(token, key):
    """token: indices in the global batch; key: pointer to the key of the site."""
    return _lowbias32(_lowbias32(token.to(tl.uint32)) ^ tl.load(key).to(tl.uint32, bitcast=True)) | 1


@triton.jit
def column_hash(column):
    """column: features; or, in attention, head * 2**24 + token of the key."""
    return _lowbias32(column.to(tl.uint32)) | 1


@triton.jit
def keep(row, column, THRESHOLD: tl.constexpr):
    """True where an element is kept. row, column: hashes, uint32, that broadcast against each other."""
    return (row * column).to(tl.int32, bitcast=True) >= THRESHOLD - 2**31


def settings(dropout: Dropout | None, like: Tensor) -> tuple[Tensor | None, int, int, float]:
    """The mask of `like`: (pointer to the key, index of the first token, p in units of 2**-32, 1/(1-p)). (None, 0, 0,
    1.0) keeps everything and compiles a kernel without dropout. Raises ValueError unless the keys are one int32 on the
    device of `like`."""
    if dropout is None:
        return None, 0, 0, 1.0
    keys = dropout.keys
    if keys.dtype != torch.int32 or keys.dim():
        raise ValueError(f"dropout.keys is {tuple(keys.shape)} {keys.dtype}; dropout.at(layer, site) holds one int32")
    check_device(input=like, **{"dropout.keys": keys})
    return keys, dropout.token_offset, dropout.threshold << 16, dropout.scale


@triton.jit(do_not_specialize=["token_offset", "head_offset", "tokens"], do_not_specialize_on_alignment=["key"])
def _attention_hashes(rows, keys, key, token_offset, head_offset, tokens, PER_HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """rows: (T,), hashes of queries; keys: (H, T), hashes of keys; key: pointer to the mask's key. token_offset,
    head_offset: index of the first token in the global batch, and of the first head in the model. tokens: T. PER_HEAD:
    columns per head. BLOCK: tokens per program."""
    token, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    column = column_hash((head + head_offset).to(tl.uint32) * PER_HEAD + (token + token_offset).to(tl.uint32))
    tl.store(keys + head * tokens + token, column.to(tl.int32, bitcast=True), token < tokens)
    if head == 0:
        row = row_hash(token + token_offset, key)
        tl.store(rows + token, row.to(tl.int32, bitcast=True), token < tokens)


def attention_hashes(dropout: Dropout | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The hashes of queries (T,) and of keys (H, T), int32, for the mask of q, (T, H, d). (None, None) if all are kept.

    They are computed once per call: hashing rows and columns at every visit of a tile would cost half of `keep` more.
    """
    key, token_offset, threshold, _ = settings(dropout, q)
    if not threshold:
        return None, None
    tokens, heads, _ = q.shape
    rows = torch.empty(tokens, dtype=torch.int32, device=q.device)
    keys = torch.empty(heads, tokens, dtype=torch.int32, device=q.device)
    block, warps = HASHES
    offsets = token_offset, dropout.head_offset
    grid = (triton.cdiv(tokens, block), heads)
    with on_device(q):
        _attention_hashes[grid](rows, keys, key, *offsets, tokens, MOST_TOKENS, block, **options(warps))
    return rows, keys


# Arguments of the kernel. T tokens, h features.
#   x, out           (T, h) each, contiguous, of one dtype
#   elements, width  T * h; h
#   key, offset      from `settings`: pointer to the key of the mask, index of the first token in the global batch
#   rescale          1/(1-p)
#   THRESHOLD        p in units of 2**-32
#   BLOCK            elements of a tile
#
# Do not specialise on the offset of a micro-batch: each new value would trigger a recompile.


@triton.jit(do_not_specialize=["offset"], do_not_specialize_on_alignment=["key"])
def _dropout(x, out, elements, width, key, offset, rescale, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr):
    # 64 bits: T * h passes 2**31 at 2.8 million tokens of 768
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    row, column = (at // width).to(tl.int32), (at % width).to(tl.int32)
    stays = keep(row_hash(row + offset, key), column_hash(column), THRESHOLD)
    y = tl.load(x + at, inside).to(tl.float32) * rescale
    tl.store(out + at, tl.where(stays, y, 0.0).to(out.dtype.element_ty), inside)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dropout: Dropout) -> Tensor:
        ctx.dropout = dropout
        return _launch(x, dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _launch(grad.contiguous(), ctx.dropout), None


def _launch(x: Tensor, dropout: Dropout) -> Tensor:
    key, offset, threshold, rescale = settings(dropout, x)
    out = torch.empty_like(x)
    block, warps = TILE
    with on_device(x):
        if x.numel():
            grid = (triton.cdiv(x.numel(), block),)
            _dropout[grid](x, out, x.numel(), x.shape[1], key, offset, rescale, threshold, block, **options(warps))
    return out


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """As `ops.drop`. x: (T, h), contiguous. Raises ValueError on anything else."""
    if dropout is None:
        return x
    check(x=x)
    check_contiguous(x=x)
    return _Drop.apply(x, dropout)
