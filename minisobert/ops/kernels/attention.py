"""Attention over packed documents in Triton, forward and backward. `docs/attention.md` derives the formulas.

Each program holds a tile of queries (for the gradients of keys and values, a tile of keys) and visits tiles of the
other side. No probability is ever written to memory. A program visits the range from `start` of its tile's first token
to `stop` of its last one; a window narrows it to [first - window, last + window]. Within that range

    all tokens of the tile are of one document      tiles that every token sees need no mask; those around them do
    documents meet inside the tile                  every visit is masked

Softmax is in base 2, because the chip has exp2 and not exp: with c = log2(e) / sqrt(d), p = exp2(c q·k - L). The
forward pass stores L = log2 Σ exp2(c q·k) for the backward pass. Statistics and sums are fp32.

Every output element is written by one program, which adds in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisobert.ops.dropout import Dropout
from minisobert.ops.kernels import attention_tiles as tiles
from minisobert.ops.kernels import check, check_device, chip_family, on_device, options, rotary
from minisobert.ops.kernels.attention_parts import (
    across,
    add_product,
    bounds,
    from_row,
    line,
    lines,
    load,
    sees,
    store,
    store_gradient,
    stretches,
    uint32,
    zeros,
)
from minisobert.ops.kernels.dropout import attention_hashes, keep, settings

# head width → the widths of its two parts
PARTS = {32: (32, 0), 64: (64, 0), 96: (64, 32), 128: (128, 0)}

# The kernels' arguments. T tokens, H heads, d head width; strides count elements. A tile is (queries, keys).
#   q, k, v, out, do           (T, H, d): the inputs, the result and its gradient; one dtype, the last stride is 1
#   dq, dk, dv                 (T, H, d): the gradients of q, k and v
#   q_t, k_t, v_t              strides from one token to the next
#   out_t, grad_t              likewise; out's strides are also do's, and grad's are those of dq, dk and dv
#   q_h, k_h, v_h              strides from one head to the next
#   out_h, grad_h              likewise
#   lse, delta                 (H, T) fp32: log2 Σ exp2(scale q·k) and rowsum(dO ∘ O) (1-p) of each query
#   start, stop                (T,) int32: the bounds of each token's document
#   row_hashes, key_hashes     (T,) and (H, T) int32: hashes of queries and keys, for the mask; None without dropout
#   tokens, scale              T; log2(e) / sqrt(d), which makes a score an exponent of 2
#   rotation, sums             the rotary positions, to rotate the gradients of q and k back; the gradients' sums
#                              over tokens: see attention_parts.py
#   window                     how far from a query its keys may be. None is compiled in and leaves no code; a number
#                              is read at run time and costs a register, so that one kernel serves all windows
#   rescale, factor            1/(1-p); 1/((1-p) sqrt(d))
#   D, REST                    the widths of the two parts of a head, see attention_parts.py
#   q_rest, k_rest, v_rest     the second part of a tile of q, whose first part is called q, and so on
#   out_rest, do_rest          likewise
#   dq_rest, dk_rest, dv_rest  likewise
#   QUERIES, KEYS              the rows of a tile of each side
#   THRESHOLD, PRECISION       p times 2**32, or 0 without dropout; that of products: "ieee" for fp32, or "tf32"
#   begin, end, row, column    for each row that a loop holds: the bounds of what it sees, and its hash
#   key_hash, MASKED           key_hashes of one head; whether [lo, hi) may hold a token that some row does not see


@triton.jit
def _attend(
    out, out_rest, total, peak, q, q_rest, begin, end, row, k, v, key_hash, lo, hi, k_t, v_t, scale,
    D: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax (Milakov and Gimelshein 2018) over the keys [lo, hi). For each query, out is Σ p v, total is
    Σ p, and peak is the largest scaled score so far, to which both are relative."""
    for n in tl.range(lo, hi, KEYS):
        kn, kn_rest = load(k, n, hi, k_t, KEYS, D, REST, MASKED)
        score = across(q, q_rest, kn, kn_rest, REST, PRECISION)
        if MASKED:
            score = tl.where(sees(begin, end, n + tl.arange(0, KEYS)), score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1) * scale)
        p = tl.exp2(score * scale - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        if THRESHOLD:
            column = uint32(line(key_hash, n, hi, KEYS, MASKED))
            p = tl.where(keep(row[:, None], column[None, :], THRESHOLD), p, scale * 0.0)
        vn, vn_rest = load(v, n, hi, v_t, KEYS, D, REST, MASKED)
        out, out_rest = add_product(out * shrink[:, None], out_rest * shrink[:, None], p, vn, vn_rest, REST, PRECISION)
        peak = higher
    return out, out_rest, total, peak


@triton.jit(do_not_specialize=["tokens", "window"])
def _attention_forward(
    q, k, v, out, lse, start, stop, row_hashes, key_hashes, tokens, window,
    q_t, q_h, k_t, k_h, v_t, v_h, out_t, out_h, scale, rescale,
    D: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    queries = first + tl.arange(0, QUERIES)
    edges = stretches(start, stop, first, tokens, window, QUERIES, KEYS)
    begin, end = bounds(start, stop, queries, tokens, window)
    qm, qm_rest = load(q + head * q_h, first, tokens, q_t, QUERIES, D, REST, True)
    row = uint32(tl.load(row_hashes + queries, queries < tokens, 0)) if THRESHOLD else None
    key_hash = key_hashes + head * tokens if THRESHOLD else None
    acc, acc_rest = zeros(QUERIES, D, REST)
    total = tl.zeros([QUERIES], tl.float32)
    # below all scores, but finite: if a query sees nothing in the first tiles, -inf - -inf would be NaN
    peak = tl.full([QUERIES], -1e38, tl.float32)
    for i in tl.static_range(1 if window is None else 0, 3):
        acc, acc_rest, total, peak = _attend(
            acc, acc_rest, total, peak, qm, qm_rest, begin, end, row, k + head * k_h, v + head * v_h, key_hash,
            edges[i], edges[i + 1], k_t, v_t, scale,
            D, REST, KEYS, i != 1, THRESHOLD, PRECISION,
        )  # fmt: skip
    total = tl.where(queries < tokens, total, 1.0)
    factor = (rescale / total)[:, None]
    store(out + head * out_h, acc * factor, acc_rest * factor, first, tokens, out_t, QUERIES, D, REST)
    tl.store(lse + head * tokens + queries, peak + tl.log2(total), queries < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _attention_delta(
    out, grad, delta, tokens, out_t, out_h, keep_rate, D: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr
):
    """delta = rowsum(dO ∘ O) keep_rate, where keep_rate is 1-p. grad is dO and has the strides of out."""
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    queries = first + tl.arange(0, QUERIES)
    o, o_rest = load(out + head * out_h, first, tokens, out_t, QUERIES, D, REST, True)
    do, do_rest = load(grad + head * out_h, first, tokens, out_t, QUERIES, D, REST, True)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if REST:
        total += tl.sum(o_rest.to(tl.float32) * do_rest.to(tl.float32), 1)
    tl.store(delta + head * tokens + queries, total * keep_rate, queries < tokens)


# In both gradients 1/(1-p) is a factor of the whole sum and is applied once, at the end. The loops compute
# dS (1-p) = P ∘ (keep ∘ dO Vᵀ - delta), where delta already contains the factor (1-p).
#
# A dropped p becomes scale * 0.0, a zero that the compiler does not know. If it knew the zero, it would round to bf16
# first and then select among 16-bit halves of registers, which it would have to take apart.


@triton.jit
def _visit_keys(
    dq, dq_rest, q, q_rest, do, do_rest, lse, delta, begin, end, row, k, v, key_hash, lo, hi, k_t, v_t, scale,
    D: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq += Σ over the keys [lo, hi) of dS k."""
    k, v = from_row(k, lo, k_t), from_row(v, lo, v_t)
    for n in tl.range(lo, hi, KEYS):
        kn, kn_rest = load(k, 0, hi - n, k_t, KEYS, D, REST, MASKED)
        vn, vn_rest = load(v, 0, hi - n, v_t, KEYS, D, REST, MASKED)
        p = tl.exp2(across(q, q_rest, kn, kn_rest, REST, PRECISION) * scale - lse[:, None])
        if MASKED:
            p = tl.where(sees(begin, end, n + tl.arange(0, KEYS)), p, 0.0)
        dp = across(do, do_rest, vn, vn_rest, REST, PRECISION)
        if THRESHOLD:
            column = uint32(line(key_hash, n, hi, KEYS, MASKED))
            dp = tl.where(keep(row[:, None], column[None, :], THRESHOLD), dp, 0.0)
        ds = p * (dp - delta[:, None])
        dq, dq_rest = add_product(dq, dq_rest, ds, kn, kn_rest, REST, PRECISION)
        k, v = from_row(k, KEYS, k_t), from_row(v, KEYS, v_t)
    return dq, dq_rest


@triton.jit(do_not_specialize=["tokens", "window"])
def _attention_query_gradient(
    q, k, v, do, dq, lse, delta, start, stop, row_hashes, key_hashes, rotation, sums, tokens, window,
    q_t, q_h, k_t, k_h, v_t, v_h, out_t, out_h, grad_t, grad_h, scale, factor,
    D: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    queries = first + tl.arange(0, QUERIES)
    edges = stretches(start, stop, first, tokens, window, QUERIES, KEYS)
    begin, end = bounds(start, stop, queries, tokens, window)
    qm, qm_rest = load(q + head * q_h, first, tokens, q_t, QUERIES, D, REST, True)
    dom, dom_rest = load(do + head * out_h, first, tokens, out_t, QUERIES, D, REST, True)
    lse_m = tl.load(lse + head * tokens + queries, queries < tokens, 0.0)
    delta_m = tl.load(delta + head * tokens + queries, queries < tokens, 0.0)
    row = uint32(tl.load(row_hashes + queries, queries < tokens, 0)) if THRESHOLD else None
    key_hash = key_hashes + head * tokens if THRESHOLD else None
    acc, acc_rest = zeros(QUERIES, D, REST)
    for i in tl.static_range(1 if window is None else 0, 3):
        acc, acc_rest = _visit_keys(
            acc, acc_rest, qm, qm_rest, dom, dom_rest, lse_m, delta_m, begin, end, row,
            k + head * k_h, v + head * v_h, key_hash, edges[i], edges[i + 1], k_t, v_t, scale,
            D, REST, KEYS, i != 1, THRESHOLD, PRECISION,
        )  # fmt: skip
    acc, acc_rest = acc * factor, acc_rest * factor
    store_gradient(dq + head * grad_h, acc, acc_rest, rotation, sums, 0, first, tokens, grad_t, QUERIES, D, REST)


@triton.jit
def _visit_queries(
    dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, begin, end, column, q, do, lse, delta, row_hashes,
    lo, hi, q_t, out_t, scale,
    D: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr,
    MASKED: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk += Σ over the queries [lo, hi) of dSᵀ q; dv += Σ (P ∘ keep)ᵀ dO. All tiles are (keys, queries) here."""
    q, do = from_row(q, lo, q_t), from_row(do, lo, out_t)
    for m in tl.range(lo, hi, QUERIES):
        qm, qm_rest = load(q, 0, hi - m, q_t, QUERIES, D, REST, MASKED)
        dom, dom_rest = load(do, 0, hi - m, out_t, QUERIES, D, REST, MASKED)
        lse_m, delta_m = lines(lse, delta, m, hi, QUERIES, MASKED)
        p = tl.exp2(across(k, k_rest, qm, qm_rest, REST, PRECISION) * scale - lse_m[None, :])
        if MASKED:  # a query sees a key if the key sees the query
            p = tl.where(sees(begin, end, m + tl.arange(0, QUERIES)), p, 0.0)
        dp = across(v, v_rest, dom, dom_rest, REST, PRECISION)
        if THRESHOLD:
            row = uint32(line(row_hashes, m, hi, QUERIES, MASKED))
            kept = tl.where(keep(row[None, :], column[:, None], THRESHOLD), p, scale * 0.0)
            ds = kept * dp - p * delta_m[None, :]  # one select less than P ∘ (keep ∘ dP - delta)
        else:
            kept, ds = p, p * (dp - delta_m[None, :])
        dv, dv_rest = add_product(dv, dv_rest, kept, dom, dom_rest, REST, PRECISION)
        dk, dk_rest = add_product(dk, dk_rest, ds, qm, qm_rest, REST, PRECISION)
        q, do = from_row(q, QUERIES, q_t), from_row(do, QUERIES, out_t)
    return dk, dk_rest, dv, dv_rest


@triton.jit(do_not_specialize=["tokens", "window"])
def _attention_key_gradient(
    q, k, v, do, dk, dv, lse, delta, start, stop, row_hashes, key_hashes, rotation, sums, tokens, window,
    q_t, q_h, k_t, k_h, v_t, v_h, out_t, out_h, grad_t, grad_h, scale, factor, rescale,
    D: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    keys = first + tl.arange(0, KEYS)
    edges = stretches(start, stop, first, tokens, window, KEYS, QUERIES)
    begin, end = bounds(start, stop, keys, tokens, window)
    kn, kn_rest = load(k + head * k_h, first, tokens, k_t, KEYS, D, REST, True)
    vn, vn_rest = load(v + head * v_h, first, tokens, v_t, KEYS, D, REST, True)
    q, do = q + head * q_h, do + head * out_h
    lse, delta = lse + head * tokens, delta + head * tokens
    column = uint32(tl.load(key_hashes + head * tokens + keys, keys < tokens, 0)) if THRESHOLD else None
    dk_n, dk_rest = zeros(KEYS, D, REST)
    dv_n, dv_rest = zeros(KEYS, D, REST)
    for i in tl.static_range(1 if window is None else 0, 3):
        dk_n, dk_rest, dv_n, dv_rest = _visit_queries(
            dk_n, dk_rest, dv_n, dv_rest, kn, kn_rest, vn, vn_rest, begin, end, column, q, do, lse, delta, row_hashes,
            edges[i], edges[i + 1], q_t, out_t, scale,
            D, REST, QUERIES, i != 1, THRESHOLD, PRECISION,
        )  # fmt: skip
    dk_n, dk_rest, dv_n, dv_rest = dk_n * factor, dk_rest * factor, dv_n * rescale, dv_rest * rescale
    store_gradient(dk + head * grad_h, dk_n, dk_rest, rotation, sums, 1, first, tokens, grad_t, KEYS, D, REST)
    store_gradient(dv + head * grad_h, dv_n, dv_rest, None, sums, 2, first, tokens, grad_t, KEYS, D, REST)


class _Attention(torch.autograd.Function):
    """Attention of q, k and v, or of one qkv tensor, whose gradient is then written as one tensor, not stacked."""

    @staticmethod
    def forward(ctx, qkv, q, k, v, start: Tensor, stop: Tensor, dropout: Dropout | None, window: int | None,
                rotation: Tensor | None, bias: Tensor | None) -> Tensor:  # fmt: skip
        if rotation is not None:
            rotary.turn(qkv, qkv, rotation, len(qkv[0]))
            if not qkv.is_inference():
                torch.autograd.graph.increment_version(qkv)  # autograd then raises if a backward needs the old values
        if qkv is not None:
            q, k, v = qkv.unbind(2)
        tokens, heads, d = q.shape
        *_, threshold, rescale = settings(dropout, q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
        rows, keys = attention_hashes(dropout, q)
        table = tiles.FORWARD_WINDOW if window else tiles.FORWARD_DROPOUT if threshold else tiles.FORWARD
        grid, meta = _launch(table, q, threshold)
        scale = math.log2(math.e) / math.sqrt(d)
        with on_device(q):
            _attention_forward[grid](
                q, k, v, out, lse, start, stop, rows, keys, tokens, window, *_strides(q, k, v, out), scale, rescale,
                **meta,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, start, stop, rows, keys, rotation)
        ctx.packed, ctx.threshold, ctx.rescale, ctx.window = qkv is not None, threshold, rescale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor):
        q, k, v, out, lse, start, stop, rows, keys, rotation = ctx.saved_tensors
        tokens, heads, d = q.shape
        do, delta = do.contiguous(), torch.empty_like(lse)
        grads = torch.empty(tokens, heads, 3, d, dtype=q.dtype, device=q.device)
        dq, dk, dv = grads.unbind(2)
        key_grid, key_meta = _launch(tiles.KEY_GRADIENT, q, ctx.threshold, held="KEYS", visited="QUERIES")
        table = tiles.QUERY_GRADIENT_WINDOW if ctx.window else tiles.QUERY_GRADIENT
        query_grid, query_meta = _launch(table, q, ctx.threshold)
        # a head of two parts is rotated back in a separate pass, because the features of a pair are in different parts
        apart = rotation is not None and PARTS[d][1] > 0
        sums = None
        if ctx.needs_input_grad[-1] and not apart:
            shape = max(key_grid[0], query_grid[0]), heads, 3, d
            sums = torch.zeros(shape, dtype=torch.float32, device=q.device)  # tiles that only one kernel has add 0
        scale, factor = math.log2(math.e) / math.sqrt(d), ctx.rescale / math.sqrt(d)
        strides = _strides(q, k, v, out, dq)
        shared = lse, delta, start, stop, rows, keys, None if apart else rotation, sums, tokens, ctx.window, *strides
        with on_device(q):
            elements, warps = tiles.DELTA
            block = elements // triton.next_power_of_2(d)
            _attention_delta[triton.cdiv(tokens, block), heads](
                out, do, delta, tokens, *_strides(out), 1 / ctx.rescale, *PARTS[d], block, **options(warps)
            )
            _attention_key_gradient[key_grid](q, k, v, do, dk, dv, *shared, scale, factor, ctx.rescale, **key_meta)
            _attention_query_gradient[query_grid](q, k, v, do, dq, *shared, scale, factor, **query_meta)
        if apart:
            rotary.turn(grads, grads, rotation, heads, back=True)
        bias = None
        if ctx.needs_input_grad[-1]:
            bias = (grads if sums is None else sums).sum(0).flatten().to(q.dtype)
        return *((grads, None, None, None) if ctx.packed else (None, dq, dk, dv)), *[None] * 5, bias


def _strides(*tensors: Tensor) -> list[int]:
    """The strides of each tensor along tokens and heads."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def _launch(table: dict, q: Tensor, threshold: int, held: str = "QUERIES", visited: str = "KEYS"):
    """The grid and the compile-time arguments of a kernel that holds tiles of one side and visits the other."""
    tokens, heads, d = q.shape
    rows, steps, warps, stages = table[q.element_size(), d][chip_family(q.device)]
    return (triton.cdiv(tokens, rows), heads), {
        "D": PARTS[d][0], "REST": PARTS[d][1], held: rows, visited: steps, "THRESHOLD": threshold,
        # exact products in fp32, at a tenth of the speed, because fp32 is used for comparisons
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
    """As `ops.attention`. q, k, v: (T, H, d), d in PARTS; the last stride must be 1, the others are free.

    Raises ValueError on another dtype, device, layout or width.
    """
    check(q=q, k=k, v=v)
    return _apply(None, q, k, v, documents, dropout, window)


def self_attention(
    qkv: Tensor,
    documents,
    dropout: Dropout | None = None,
    window: int | None = None,
    rotation: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """As `ops.self_attention`. qkv: (T, H, 3, d), d in PARTS; contiguous if there is a rotation, otherwise with strides
    as for `attention`. Raises ValueError as `attention` does."""
    check(qkv=qkv, bias=bias)
    if rotation is not None:
        rotary.check_rotation(qkv, rotation)
        if qkv.is_leaf and qkv.requires_grad:
            raise ValueError("qkv is a parameter, which rotary positions would overwrite; give a copy (qkv.clone())")
    return _apply(qkv, None, None, None, documents, dropout, window, rotation, bias)


def _apply(qkv, q, k, v, documents, dropout, window: int | None, rotation=None, bias=None) -> Tensor:
    name, x = ("q", q) if qkv is None else ("qkv", qkv)
    check_device(**{name: x, "documents.start": documents.start, "documents.stop": documents.stop})
    if x.shape[-1] not in PARTS:
        raise ValueError(f"{name} is {tuple(x.shape)}; its heads must be one of {', '.join(map(str, PARTS))} wide")
    if window is not None:
        window = min(window, len(x))  # a larger window sees no more, and position + window must fit into 31 bits
    return _Attention.apply(qkv, q, k, v, documents.start, documents.stop, dropout, window, rotation, bias)
