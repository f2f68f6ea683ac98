"""Attention's kernels against the fp64 reference, at awkward shapes of tiles, documents and the last tile."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from against_reference import (
    DOCUMENTS,
    TOO_SMALL,
    attention_by_mask,
    compare,
    interpreted,
    mask,
    qkv,
    random,
    tolerance,
)

from minisobert.ops import Documents, Dropout, attention_reference, rotary_reference, rotation
from minisobert.ops.kernels import attention as kernels
from minisobert.ops.kernels import attention_parts
from minisobert.ops.kernels.attention import attention, self_attention

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]
DTYPES = [torch.bfloat16, torch.float32]
P = [0.0, 0.3]
LENGTHS = [0, 1, 64, 128, 193, 322, 622]  # documents of 1, 63, 64, 65, 129 and 300 tokens


def check(parts, documents, dropout):
    compare(
        lambda *x: attention(*x, documents, dropout),
        lambda *x: attention_reference(*x, documents, dropout),
        parts,
        # with one key per query, dS is the rounding error of dO·v (about 11 at d = 64) times keys of 3 over sqrt(d)
        least=4.0 if documents.bounds.diff().max() == 1 else 0.01,
    )


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bounds", DOCUMENTS.values(), ids=DOCUMENTS)
def test_output_and_gradients_at_awkward_shapes(bounds, dtype, p):
    parts, documents = qkv(bounds, 1, 64, dtype)
    check(parts, documents, mask(p, "attention", token_offset=2_048, head_offset=3))


@pytest.mark.parametrize(
    ("window", "bounds", "dtype", "p"),
    [
        (1, LENGTHS, torch.float16, 0.3),
        (5, LENGTHS, torch.float16, 0.0),
        (64, LENGTHS, torch.float16, 0.3),
        (5, [0, 40, 130], torch.float32, 0.0),  # exact products are slow in the interpreter
        (40, [0, 1, 130], torch.float32, 0.3),
    ],
    ids=str,
)
def test_windows(window, bounds, dtype, p):
    parts, documents = qkv(bounds, 1, 64, dtype)
    dropout = mask(p, "attention", token_offset=2_048, head_offset=3)
    compare(
        lambda *x: attention(*x, documents, dropout, window),
        lambda *x: attention_by_mask(*x, documents, dropout, window),
        parts,
    )


@triton.jit
def _edges(start, stop, edges, tokens, window, HELD: tl.constexpr, VISITED: tl.constexpr):
    found = attention_parts.stretches(start, stop, tl.program_id(0) * HELD, tokens, window, HELD, VISITED)
    for i in tl.static_range(4):
        tl.store(edges + tl.program_id(0) * 4 + i, found[i])


@pytest.mark.parametrize("window", [None, 1, 5, 63, 64, 65, 1_000])
@pytest.mark.parametrize(("held", "visited"), [(16, 16), (32, 16), (64, 64), (128, 64), (128, 32)])
def test_a_tile_visits_no_step_that_nobody_sees_and_masks_none_that_all_see(held, visited, window):
    documents = Documents.from_bounds(LENGTHS)
    at = torch.arange(documents.tokens)
    seen = documents.start[:, None] == documents.start
    if window is not None:
        seen &= (at[:, None] - at).abs() <= window
    tiles = triton.cdiv(documents.tokens, held)
    found = torch.empty(tiles, 4, dtype=torch.int32)
    _edges[(tiles,)](documents.start, documents.stop, found, documents.tokens, window, held, visited)
    for rows, (lo, full, rest, hi) in zip(seen.split(held), found.tolist(), strict=True):
        # rows behind the last token see nothing
        anyone, everyone = rows.any(0), rows.all(0) & (len(rows) == held)
        assert (lo, hi) == (anyone.nonzero().min(), anyone.nonzero().max() + 1)
        steps = {n for n in range(lo, hi - visited + 1, visited) if everyone[n : n + visited].all()}
        assert set(range(full, rest, visited)) == steps and (rest - full) % visited == 0
        assert steps or full == lo  # since the first masked stretch consists of whole steps


def test_tiles_beyond_the_window_are_not_visited():
    """NaN times a probability of 0 is NaN, so no such tile may be loaded, forward or backward."""
    parts, documents = qkv([0, 450], 1, 32, torch.float16)
    window, most = 5, 128  # the window, and the most tokens in a tile
    for x in parts:
        x[:60] = x[390:] = torch.nan
    leaves = [x.detach().requires_grad_() for x in parts]
    out = attention(*leaves, documents, None, window)
    near = slice(60 + window + most, 390 - window - most)
    assert out[:60].isnan().all()
    for x in (out, *torch.autograd.grad(out, leaves, torch.ones_like(out))):
        assert x[near].isfinite().all() and len(x[near])


def test_a_window_larger_than_every_document_is_none():
    parts, documents = qkv([0, 100, 300], 1, 32, torch.float16)  # fp16 has the same tiles, so the bits are the same
    dropout = mask(0.3, "attention")
    for window in (199, 2**31 - 1):
        assert torch.equal(attention(*parts, documents, dropout, window), attention(*parts, documents, dropout))


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 96, 128])
def test_head_widths(d, dtype, p):
    parts, documents = qkv([0, 40, 41, 150], 2, d, dtype)
    check(parts, documents, mask(p, "attention"))


@pytest.mark.parametrize(("d", "p", "window"), [(64, 0.3, None), (96, 0.0, None), (32, 0.0, 20)])
def test_one_tensor_of_all_three_gives_the_same_bits_and_its_gradient_as_one(d, p, window):
    parts, documents = qkv([0, 40, 150], 2, d, torch.bfloat16)
    dropout = mask(p, "attention")
    whole = torch.stack(parts, 2).requires_grad_()
    leaves = [x.detach().requires_grad_() for x in parts]
    out, expected = self_attention(whole, documents, dropout, window), attention(*leaves, documents, dropout, window)
    upstream = random(*out.shape, dtype=out.dtype)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    (gradient,) = torch.autograd.grad(out, whole, upstream)
    assert torch.equal(out, expected) and gradient.is_contiguous()
    assert torch.equal(gradient, torch.stack(expected_gradients, 2))


@pytest.mark.parametrize(
    ("d", "dtype", "p", "window", "has_rotation", "has_bias"),
    [
        (64, torch.bfloat16, 0.3, None, False, True),
        (64, torch.bfloat16, 0.0, 20, True, False),
        (32, torch.float32, 0.0, None, True, True),
        (96, torch.bfloat16, 0.0, None, False, True),
        (96, torch.float32, 0.3, None, True, True),
        (128, torch.float16, 0.3, None, True, False),
    ],
    ids=str,
)
def test_what_surrounds_attention_in_a_block(d, dtype, p, window, has_rotation, has_bias):
    """Compared with plain functions in fp64 and their autograd, which know nothing of the fusion."""
    parts, documents = qkv([0, 40, 41, 150], 2, d, dtype)  # 150: the last tile has rows without tokens
    dropout, turn = mask(p, "attention"), rotation(torch.arange(150) % 41, d, 10_000.0)
    bias = random(6 * d, dtype=dtype, seed=3)

    def kernel(x, b):  # x includes the bias already; its gradient is still wanted
        y = x + b.detach().view(2, 3, d)
        return self_attention(y, documents, dropout, window, turn if has_rotation else None, b if has_bias else None)

    def plain(x, b):
        y = x + b.view(2, 3, d)
        y = y + (y.to(dtype) - y).detach()  # rounded like the kernel's input, which is not the kernel's error
        y = rotary_reference(y, turn) if has_rotation else y
        return attention_by_mask(*y.unbind(2), documents, dropout, window)

    whole, allowed = torch.stack(parts, 2), 3 * tolerance(dtype)  # rotated queries and keys are rounded once more
    if has_bias:
        compare(kernel, plain, (whole, bias), allowed)
    else:
        compare(lambda x: kernel(x, bias), lambda x: plain(x, bias.double()), (whole,), allowed)


def test_rotary_positions_overwrite_qkv_and_whoever_needs_it_is_told():
    parts, documents = qkv([0, 40, 150], 2, 64, torch.float32)
    turn = rotation(torch.arange(150), 64, 10_000.0)
    x = torch.stack(parts, 2)
    expected = rotary_reference(x, turn)
    leaf = x.clone().requires_grad_()
    whole = leaf * 1
    squares = whole.square().sum()  # keeps `whole` for its backward
    self_attention(whole, documents, rotation=turn).sum().backward()
    assert torch.allclose(whole, expected, atol=1e-5) and leaf.grad.isfinite().all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    with pytest.raises(ValueError, match="qkv is a parameter, which rotary positions would overwrite"):
        self_attention(leaf, documents, rotation=turn)
    with torch.inference_mode():
        self_attention(x.clone(), documents, rotation=turn)


def test_queries_keys_and_values_may_have_strides_of_their_own():
    (q, k, v), documents = qkv([0, 40, 150], 2, 32, torch.float32)
    check((q, k.transpose(0, 1).contiguous().transpose(0, 1), v.contiguous()), documents, None)


@pytest.mark.parametrize(
    ("bounds", "heads", "strides"),
    [([0, 130, 300], 1, (1 << 23, 96, 1)), ([0, 9, 20], 4, (96, 3 << 28, 1))],
    ids=["by token", "by head"],
)
def test_offsets_beyond_31_bits(bounds, heads, strides):
    """The last element of q, k and v is 2.4 billion after the first, as with a million tokens of a wide model."""
    parts, documents = qkv(bounds, heads, 32, torch.float16)
    memory = torch.UntypedStorage(2 * 2_520_000_000)  # 5 GB of addresses, but only a few hundred pages are touched
    far = [torch.empty(0, dtype=x.dtype).set_(memory, 32 * i, x.shape, strides) for i, x in enumerate(parts)]
    for x, y in zip(far, parts):
        x.copy_(y)
    check(far, documents, None)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_mask_is_the_references_bit_for_bit_forward_and_backward(p):
    """Equal scores make all probabilities 1/n, and values and upstream gradients that are rows of the identity show
    each of them. There are three documents of 100 tokens, so that tiles hold parts of two.
    """
    n, heads, documents = 100, 2, Documents.from_bounds([0, 100, 200, 300])
    dropout = mask(p, "attention", token_offset=4_096, head_offset=7)
    rows, keys = dropout.row_hash(0, 3 * n), dropout.key_hash(heads, 0, 3 * n)
    expected = dropout.keeps(rows[:, None], keys[:, None])  # (heads, T, T)

    q = torch.zeros(3 * n, heads, 128, dtype=torch.float16)
    one = torch.eye(n, 128).half().repeat(3, 1)[:, None].expand(-1, heads, -1).clone().requires_grad_()
    out = attention(q, q, one, documents, dropout)
    out.backward(one.detach())
    kept = total = 0
    for i in range(3):
        span = slice(i * n, (i + 1) * n)
        truth = expected[:, span, span]
        assert torch.equal(out[span, :, :n].transpose(0, 1) != 0, truth)
        assert torch.equal(one.grad[span, :, :n].permute(1, 2, 0) != 0, truth)
        kept, total = kept + int((out[span] != 0).sum()), total + truth.numel()
    bound = 4.5 * math.sqrt(p * (1 - p) / total) + 1 / 65_536  # 4.5 standard errors: one run in 150,000
    assert abs(1 - kept / total - p) < bound


@pytest.mark.parametrize("p", TOO_SMALL)
def test_dropout_that_rounds_to_nothing_drops_nothing(p):
    parts, documents = qkv([0, 40, 70], 1, 32, torch.float32)
    check(parts, documents, Dropout(p, mask(0.3, "attention").keys))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # in masked pairs
def test_scores_far_from_zero_neither_overflow_nor_vanish():
    (q, k, v), documents = qkv([0, 70, 131], 1, 32, torch.float32)
    compare(
        lambda q, k, v: attention(q, k, v, documents),
        lambda q, k, v: attention_reference(q, k, v, documents),
        (q * 30, k * 30, v),
        allowed=1e-3,  # rounding scores of 5,000 makes errors of 5e-4, the relative error of a probability
    )


def test_a_token_sees_nothing_of_other_documents():
    (q, k, v), documents = qkv([0, 50, 120, 200], 1, 32, torch.float32)
    out = attention(q, k, v, documents)
    others = [x.clone() for x in (q, k, v)]
    for x in others:
        x[50:120] = -3 * x[50:120]
    changed = attention(*others, documents)
    assert torch.equal(out[:50], changed[:50]) and torch.equal(out[120:], changed[120:])
    assert not torch.equal(out[50:120], changed[50:120])


def test_results_repeat_bit_for_bit():
    parts, documents = qkv([0, 40, 200], 2, 64, torch.float16)
    dropout = mask(0.1, "attention")

    def run():
        x = [part.detach().requires_grad_() for part in parts]
        out = attention(*x, documents, dropout)
        return out, *torch.autograd.grad(out.float().square().sum(), x)

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_tiles_that_lie_in_one_document_are_not_masked(monkeypatch):
    """One document of whole tiles: with `start` and `stop` as they are, the loop that masks has nothing to do.

    Shown by breaking it: bounds that would hide every key change nothing, since nobody looks at them.
    """
    (q, k, v), documents = qkv([0, 256], 1, 64, torch.float16)
    partial, rest = qkv([0, 254], 1, 64, torch.float16)
    expected, expected_partial = attention(q, k, v, documents), attention(*partial, rest)
    monkeypatch.setattr(kernels, "bounds", lambda start, stop, rows, tokens, window: (rows, rows))
    assert torch.equal(attention(q, k, v, documents), expected)
    assert not torch.equal(attention(*partial, rest), expected_partial)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: (q.double(), q.double(), q.double()), "q is torch.float64; the kernels take torch.bfloat16"),
        (lambda q: (q, q, q.to("meta")), "v is on meta, q on cpu; they must be on the same device"),
        (lambda q: (q, q.transpose(1, 2).contiguous().transpose(1, 2), q), r"k has the strides .* the last must be 1"),
        (lambda q: (q[..., :80],) * 3, r"q is \(10, 2, 80\); its heads must be one of 32, 64, 96, 128 wide"),
    ],
)
def test_wrong_arguments_are_refused_before_any_launch(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(torch.zeros(10, 2, 96)), Documents.from_bounds([0, 10]))


def test_wrong_documents_and_dropout_are_refused():
    q = torch.zeros(10, 2, 32)
    with pytest.raises(ValueError, match=r"documents.start is on meta, q on cpu"):
        attention(q, q, q, Documents.from_bounds([0, 10], device="meta"))
    step = mask(0.1, "attention")
    with pytest.raises(ValueError, match=r"dropout.keys is \(1,\) torch.int32; dropout.at\(layer, site\) holds one"):
        attention(q, q, q, Documents.from_bounds([0, 10]), type(step)(0.1, step.keys[None]))
    with pytest.raises(ValueError, match=r"dropout is 1\.5; it must be at least 0 and less than 1"):
        type(step)(1.5, step.keys)
