"""Attention over packed documents in Triton, forward and backward. `docs/attention.md` derives the formulas.

One program holds a tile of queries (or, for the gradients of keys and values, of keys) and visits tiles of the other
side, so that no probability ever reaches memory. What a tile may see lies between `start` of its first and `stop` of
its last token, less what is beyond the window of both; other tiles are not visited. Inside that range

    all tokens of the tile are of one document      what every token sees needs no mask, the steps before and behind do
    documents meet inside the tile                  every visit is masked

Softmax is in base 2, since the chip has exp2 and not exp: with c = log2(e) / sqrt(d), p = exp2(c q·k - L), where
L = log2 Σ exp2(c q·k) is what the forward leaves for the backward. Statistics and sums are fp32.

Every output element is written by one program, which adds in a fixed order: results repeat bit for bit.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisobert.config import MOST_TOKENS
from minisobert.ops.dropout import Dropout
from minisobert.ops.kernels import attention_tiles as tiles
from minisobert.ops.kernels import check, check_device, chip_family, on_device, options
from minisobert.ops.kernels.dropout import column_hash, keep, row_hash, settings

WIDTHS = (32, 64, 96, 128)  # 96 runs as 128, the columns behind it zero

# What the kernels take. T tokens, H heads, d head width; strides count elements. A tile is (queries, keys).
#   q, k, v, out, do           (T, H, d): the inputs, the result and its gradient; of one dtype, the last stride is 1
#   dq, dk, dv                 (T, H, d): the gradients of q, k and v, with the strides of out
#   q_t, k_t, v_t, out_t       strides from one token to the next; out's are do's too
#   q_h, k_h, v_h, out_h       strides from one head to the next
#   lse, delta                 (H, T) fp32: log2 Σ exp2(scale q·k) and rowsum(dO ∘ O) (1-p) of each query
#   start, stop                (T,) int32: the bounds of each token's document
#   row_hashes, key_hashes     (T,) and (H, T) int32: of queries and of keys, for the mask; None without dropout
#   tokens, scale              T; log2(e) / sqrt(d), by which a score becomes an exponent of 2
#   window                     how far from a query its keys may be. None is compiled in and leaves no code behind;
#                              a number is read at run time, for the cost of a register, and one kernel serves them all
#   rescale, factor            1/(1-p); 1/((1-p) sqrt(d))
#   D, BLOCK_D, QUERIES, KEYS  d and the power of two that it is padded to; the rows of a tile of each side
#   THRESHOLD, PRECISION       p in 2**32ths, 0 for a kernel without dropout; of products: "ieee" for fp32, or "tf32"
#   begin, end, row, column    of each row that a loop holds: the bounds of what it sees; its hash
#   key_hash, MASKED           key_hashes of one head; whether a row held may not see some token in [lo, hi)


@triton.jit
def _tile(x, row, stop, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr):
    """x[row : row + ROWS], (ROWS, BLOCK_D); stride: of rows. Columns from D on are 0, and CHECKED rows from stop on."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    # 64 bits for where the tile begins: T * stride passes 2**31 at 0.9 million tokens of the base model's qkv
    at = x + tl.cast(row, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if CHECKED and D != BLOCK_D:
        return tl.load(at, (rows[:, None] < stop - row) & (columns[None, :] < D), 0.0)
    if CHECKED:
        return tl.load(at, rows[:, None] < stop - row, 0.0)
    if D != BLOCK_D:
        return tl.load(at, columns[None, :] < D, 0.0)
    return tl.load(at)


@triton.jit
def _store(x, value, row, stop, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x[row : row + ROWS] = value, (ROWS, BLOCK_D), less rows from stop on and columns from D on; stride: of rows."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    at = x + tl.cast(row, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    tl.store(at, value.to(x.dtype.element_ty), (rows[:, None] < stop - row) & (columns[None, :] < D))


@triton.jit
def _stretches(start, stop, first, tokens, window, HELD: tl.constexpr, VISITED: tl.constexpr):
    """(lo, full, rest, hi), the edges of three stretches. What the HELD rows from `first` on may see is [lo, hi), and
    [full, rest) is whole steps of VISITED in which every row sees everything. Without a window [lo, full) is empty."""
    last = tl.minimum(first + HELD, tokens) - 1
    lo, hi = tl.load(start + first), tl.load(stop + last)
    one_document = tl.load(start + last) == lo
    if window is None:
        full, rest = lo, tl.where(one_document, lo + (hi - lo) // VISITED * VISITED, lo)
    else:
        begin, end = tl.maximum(lo, last - window), tl.minimum(hi, first + window + 1)  # what first and last both see
        lo, hi = tl.maximum(lo, first - window), tl.minimum(hi, last + window + 1)
        full = lo + tl.cdiv(begin - lo, VISITED) * VISITED
        # without a whole step in the middle all is the last stretch, the only one that need not be whole steps
        some = one_document & (full + VISITED <= end)
        full, rest = tl.where(some, full, lo), tl.where(some, full + (end - full) // VISITED * VISITED, lo)
    return lo, full, rest, hi


@triton.jit
def _bounds(start, stop, rows, tokens, window):
    """Of each of the rows the bounds of what it sees; an empty range behind the last token."""
    begin, end = tl.load(start + rows, rows < tokens, 0), tl.load(stop + rows, rows < tokens, 0)
    if window is not None:
        begin, end = tl.maximum(begin, rows - window), tl.minimum(end, rows + window + 1)
    return begin, end


@triton.jit
def _uint32(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _attend(
    out, total, peak, q, begin, end, row, k, v, key_hash, lo, hi, k_t, v_t, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax (Milakov and Gimelshein 2018) over the keys [lo, hi). Of each query: out, Σ p v; total, Σ p;
    peak, the largest scaled score so far, to which both are relative."""
    for n in tl.range(lo, hi, KEYS):
        keys = n + tl.arange(0, KEYS)
        kn = _tile(k, n, hi, k_t, KEYS, D, BLOCK_D, MASKED)
        score = tl.dot(q, tl.trans(kn), input_precision=PRECISION)
        if MASKED:
            seen = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1) * scale)
        p = tl.exp2(score * scale - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        if THRESHOLD:
            column = _uint32(tl.load(key_hash + keys, keys < hi, 0))
            p = tl.where(keep(row[:, None], column[None, :], THRESHOLD), p, 0.0)
        vn = _tile(v, n, hi, v_t, KEYS, D, BLOCK_D, MASKED)
        out = tl.dot(p.to(vn.dtype), vn, out * shrink[:, None], input_precision=PRECISION)
        peak = higher
    return out, total, peak


@triton.jit(do_not_specialize=["tokens", "window"])
def _forward(
    q, k, v, out, lse, start, stop, row_hashes, key_hashes, tokens, window,
    q_t, q_h, k_t, k_h, v_t, v_h, out_t, out_h, scale, rescale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    queries = first + tl.arange(0, QUERIES)
    edges = _stretches(start, stop, first, tokens, window, QUERIES, KEYS)
    begin, end = _bounds(start, stop, queries, tokens, window)
    qm = _tile(q + head * q_h, first, tokens, q_t, QUERIES, D, BLOCK_D, True)
    row = _uint32(tl.load(row_hashes + queries, queries < tokens, 0)) if THRESHOLD else None
    key_hash = key_hashes + head * tokens if THRESHOLD else None
    acc = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    # below all scores, but finite: where a query sees nothing in the first tiles, -inf - -inf would be NaN
    peak = tl.full([QUERIES], -1e38, tl.float32)
    for i in tl.static_range(1 if window is None else 0, 3):
        acc, total, peak = _attend(
            acc, total, peak, qm, begin, end, row, k + head * k_h, v + head * v_h, key_hash,
            edges[i], edges[i + 1], k_t, v_t, scale,
            D, BLOCK_D, KEYS, i != 1, THRESHOLD, PRECISION,
        )  # fmt: skip
    total = tl.where(queries < tokens, total, 1.0)
    acc *= (rescale / total)[:, None]
    _store(out + head * out_h, acc, first, tokens, out_t, QUERIES, D, BLOCK_D)
    tl.store(lse + head * tokens + queries, peak + tl.log2(total), queries < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _delta(
    out, grad, delta, tokens, out_t, out_h, keep_rate, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr
):
    """delta = rowsum(dO ∘ O) keep_rate, where keep_rate is 1-p. grad: dO, with the strides of out."""
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    queries = first + tl.arange(0, QUERIES)
    o = _tile(out + head * out_h, first, tokens, out_t, QUERIES, D, BLOCK_D, True).to(tl.float32)
    do = _tile(grad + head * out_h, first, tokens, out_t, QUERIES, D, BLOCK_D, True).to(tl.float32)
    tl.store(delta + head * tokens + queries, tl.sum(o * do, 1) * keep_rate, queries < tokens)


# In both gradients 1/(1-p) is a factor of the whole sum, applied once at the end: the loops work with
# dS (1-p) = P ∘ (keep ∘ dO Vᵀ - delta), where delta carries (1-p) already.


@triton.jit
def _visit_keys(
    dq, q, do, lse, delta, begin, end, row, k, v, key_hash, lo, hi, k_t, v_t, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq += Σ over the keys [lo, hi) of dS k."""
    for n in tl.range(lo, hi, KEYS):
        keys = n + tl.arange(0, KEYS)
        kn = _tile(k, n, hi, k_t, KEYS, D, BLOCK_D, MASKED)
        vn = _tile(v, n, hi, v_t, KEYS, D, BLOCK_D, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(kn), input_precision=PRECISION) * scale - lse[:, None])
        if MASKED:
            seen = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(do, tl.trans(vn), input_precision=PRECISION)
        if THRESHOLD:
            column = _uint32(tl.load(key_hash + keys, keys < hi, 0))
            dp = tl.where(keep(row[:, None], column[None, :], THRESHOLD), dp, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(kn.dtype), kn, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["tokens", "window"])
def _query_gradient(
    q, k, v, do, dq, lse, delta, start, stop, row_hashes, key_hashes, tokens, window,
    q_t, q_h, k_t, k_h, v_t, v_h, out_t, out_h, scale, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    queries = first + tl.arange(0, QUERIES)
    edges = _stretches(start, stop, first, tokens, window, QUERIES, KEYS)
    begin, end = _bounds(start, stop, queries, tokens, window)
    qm = _tile(q + head * q_h, first, tokens, q_t, QUERIES, D, BLOCK_D, True)
    dom = _tile(do + head * out_h, first, tokens, out_t, QUERIES, D, BLOCK_D, True)
    lse_m = tl.load(lse + head * tokens + queries, queries < tokens, 0.0)
    delta_m = tl.load(delta + head * tokens + queries, queries < tokens, 0.0)
    row = _uint32(tl.load(row_hashes + queries, queries < tokens, 0)) if THRESHOLD else None
    key_hash = key_hashes + head * tokens if THRESHOLD else None
    acc = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for i in tl.static_range(1 if window is None else 0, 3):
        acc = _visit_keys(
            acc, qm, dom, lse_m, delta_m, begin, end, row, k + head * k_h, v + head * v_h, key_hash,
            edges[i], edges[i + 1], k_t, v_t, scale,
            D, BLOCK_D, KEYS, i != 1, THRESHOLD, PRECISION,
        )  # fmt: skip
    _store(dq + head * out_h, acc * factor, first, tokens, out_t, QUERIES, D, BLOCK_D)


@triton.jit
def _visit_queries(
    dk, dv, k, v, begin, end, column, q, do, lse, delta, row_hashes, lo, hi, q_t, out_t, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    MASKED: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk += Σ over the queries [lo, hi) of dSᵀ q; dv += Σ (P ∘ keep)ᵀ dO. All tiles are (keys, queries) here."""
    for m in tl.range(lo, hi, QUERIES):
        queries = m + tl.arange(0, QUERIES)
        qm = _tile(q, m, hi, q_t, QUERIES, D, BLOCK_D, MASKED)
        dom = _tile(do, m, hi, out_t, QUERIES, D, BLOCK_D, MASKED)
        if MASKED:
            lse_m, delta_m = tl.load(lse + queries, queries < hi, 0.0), tl.load(delta + queries, queries < hi, 0.0)
        else:
            lse_m, delta_m = tl.load(lse + queries), tl.load(delta + queries)
        p = tl.exp2(tl.dot(k, tl.trans(qm), input_precision=PRECISION) * scale - lse_m[None, :])
        if MASKED:  # a query sees a key where the key sees the query
            seen = (queries[None, :] >= begin[:, None]) & (queries[None, :] < end[:, None])
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(v, tl.trans(dom), input_precision=PRECISION)
        kept = p
        if THRESHOLD:
            row = _uint32(tl.load(row_hashes + queries, queries < hi, 0))
            stays = keep(row[None, :], column[:, None], THRESHOLD)
            kept, dp = tl.where(stays, p, 0.0), tl.where(stays, dp, 0.0)
        dv = tl.dot(kept.to(dom.dtype), dom, dv, input_precision=PRECISION)
        ds = p * (dp - delta_m[None, :])
        dk = tl.dot(ds.to(qm.dtype), qm, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "window"])
def _key_gradient(
    q, k, v, do, dk, dv, lse, delta, start, stop, row_hashes, key_hashes, tokens, window,
    q_t, q_h, k_t, k_h, v_t, v_h, out_t, out_h, scale, factor, rescale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    keys = first + tl.arange(0, KEYS)
    edges = _stretches(start, stop, first, tokens, window, KEYS, QUERIES)
    begin, end = _bounds(start, stop, keys, tokens, window)
    kn = _tile(k + head * k_h, first, tokens, k_t, KEYS, D, BLOCK_D, True)
    vn = _tile(v + head * v_h, first, tokens, v_t, KEYS, D, BLOCK_D, True)
    q, do = q + head * q_h, do + head * out_h
    lse, delta = lse + head * tokens, delta + head * tokens
    column = _uint32(tl.load(key_hashes + head * tokens + keys, keys < tokens, 0)) if THRESHOLD else None
    dk_n, dv_n = tl.zeros([KEYS, BLOCK_D], tl.float32), tl.zeros([KEYS, BLOCK_D], tl.float32)
    for i in tl.static_range(1 if window is None else 0, 3):
        dk_n, dv_n = _visit_queries(
            dk_n, dv_n, kn, vn, begin, end, column, q, do, lse, delta, row_hashes,
            edges[i], edges[i + 1], q_t, out_t, scale,
            D, BLOCK_D, QUERIES, i != 1, THRESHOLD, PRECISION,
        )  # fmt: skip
    _store(dk + head * out_h, dk_n * factor, first, tokens, out_t, KEYS, D, BLOCK_D)
    _store(dv + head * out_h, dv_n * rescale, first, tokens, out_t, KEYS, D, BLOCK_D)


@triton.jit(do_not_specialize=["token_offset", "head_offset", "tokens"], do_not_specialize_on_alignment=["key"])
def _hashes(rows, keys, key, token_offset, head_offset, tokens, PER_HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Writes row_hashes to rows and key_hashes to keys, once per call: a visit that hashed its rows and columns itself
    would pay as much again as half of `keep`. key: pointer to the mask's. token_offset, head_offset: of the first token
    and head in the global batch. PER_HEAD: numbers that a head takes. BLOCK: tokens of a program."""
    token, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    column = column_hash((head + head_offset).to(tl.uint32) * PER_HEAD + (token + token_offset).to(tl.uint32))
    tl.store(keys + head * tokens + token, column.to(tl.int32, bitcast=True), token < tokens)
    if head == 0:
        row = row_hash(token + token_offset, key)
        tl.store(rows + token, row.to(tl.int32, bitcast=True), token < tokens)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, start: Tensor, stop: Tensor, dropout: Dropout | None, window: int | None) -> Tensor:
        tokens, heads, d = q.shape
        key, token_offset, threshold, rescale = settings(dropout, q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
        rows = keys = None
        with on_device(q):
            if threshold:
                rows = torch.empty(tokens, dtype=torch.int32, device=q.device)
                keys = torch.empty(heads, tokens, dtype=torch.int32, device=q.device)
                block, warps = tiles.HASHES
                _hashes[triton.cdiv(tokens, block), heads](
                    rows, keys, key, token_offset, dropout.head_offset, tokens, MOST_TOKENS, block, **options(warps)
                )
            table = tiles.FORWARD_WINDOW if window else tiles.FORWARD_DROPOUT if threshold else tiles.FORWARD
            grid, meta = _launch(table, q, threshold)
            scale = math.log2(math.e) / math.sqrt(d)
            _forward[grid](
                q, k, v, out, lse, start, stop, rows, keys, tokens, window, *_strides(q, k, v, out), scale, rescale,
                **meta,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, start, stop, rows, keys)
        ctx.threshold, ctx.rescale, ctx.window = threshold, rescale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor):
        q, k, v, out, lse, start, stop, rows, keys = ctx.saved_tensors
        tokens, heads, d = q.shape
        do = do.contiguous()
        dq, dk, dv, delta = (torch.empty_like(x) for x in (out, out, out, lse))
        scale, factor = math.log2(math.e) / math.sqrt(d), ctx.rescale / math.sqrt(d)
        strides = _strides(q, k, v, out)
        with on_device(q):
            elements, warps = tiles.DELTA
            padded = triton.next_power_of_2(d)
            block = elements // padded
            _delta[triton.cdiv(tokens, block), heads](
                out, do, delta, tokens, *strides[-2:], 1 / ctx.rescale, d, padded, block, **options(warps)
            )
            table = tiles.KEY_GRADIENT_WINDOW if ctx.window else tiles.KEY_GRADIENT
            grid, meta = _launch(table, q, ctx.threshold, held="KEYS", visited="QUERIES")
            _key_gradient[grid](
                q, k, v, do, dk, dv, lse, delta, start, stop, rows, keys, tokens, ctx.window, *strides,
                scale, factor, ctx.rescale, **meta,
            )  # fmt: skip
            grid, meta = _launch(tiles.QUERY_GRADIENT, q, ctx.threshold)
            _query_gradient[grid](
                q, k, v, do, dq, lse, delta, start, stop, rows, keys, tokens, ctx.window, *strides,
                scale, factor, **meta,
            )  # fmt: skip
        return dq, dk, dv, None, None, None, None


def _strides(*tensors: Tensor) -> list[int]:
    """Of each its strides along tokens and heads."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def _launch(table: dict, q: Tensor, threshold: int, held: str = "QUERIES", visited: str = "KEYS"):
    """The grid and the compile-time arguments of a kernel that holds tiles of one side and visits the other."""
    tokens, heads, d = q.shape
    padded = triton.next_power_of_2(d)
    rows, steps, warps, stages = table[q.element_size(), padded][chip_family(q.device)]
    return (triton.cdiv(tokens, rows), heads), {
        "D": d, "BLOCK_D": padded, held: rows, visited: steps, "THRESHOLD": threshold,
        # exact products in fp32, at a tenth of the speed: who asks for fp32 wants it for comparisons
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        **options(warps, stages),
    }  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents,
    dropout: Dropout | None = None,
    window: int | None = None,
) -> Tensor:
    """As `ops.attention`. q, k, v: (T, H, d), d in WIDTHS; strides may be any but the last, which is 1.

    Raises ValueError on another dtype, device, layout or width.
    """
    check(q=q, k=k, v=v)
    check_device(q=q, **{"documents.start": documents.start, "documents.stop": documents.stop})
    if q.shape[2] not in WIDTHS:
        raise ValueError(f"q is {tuple(q.shape)}; its heads must be one of {', '.join(map(str, WIDTHS))} wide")
    if window is not None:
        window = min(window, len(q))  # a larger one sees no more, and position + window must fit 31 bits
    return _Attention.apply(q, k, v, documents.start, documents.stop, dropout, window)
