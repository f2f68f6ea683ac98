"""Attention over packed documents: a token sees only its own document, or only the part of it that is within a window.

For one head and one document, with s = 1/sqrt(d) and keep a dropout mask, or 1 without dropout:

    forward     P = softmax(s Q Kᵀ)                O = (P ∘ keep/(1-p)) V

    backward    dV = (P ∘ keep/(1-p))ᵀ dO          D = rowsum(dO ∘ O)
                dP = (dO Vᵀ) ∘ keep/(1-p)          dS = P ∘ (dP - D)
                dQ = s dS K                        dK = s dSᵀ Q

Vaswani et al. 2017; the backward form with D is FlashAttention's (Dao et al. 2022, appendix B.2).
A window w keeps only the band |i - j| <= w of P (Beltagy et al. 2020): at most Σ n min(n, 2w + 1) scores, not Σ n².
Dimensions: T tokens, H heads, d head width, D documents, n tokens of one document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minisobert.ops import dispatch
from minisobert.ops.dropout import Dropout
from minisobert.ops.rotary import check_shapes, rotary_reference

BLOCK = 1 << 20  # probabilities computed at a time: 4 MB in fp32
LEAST_BLOCK = 64  # queries per block with a window: fewer are slower, more compute scores that no query sees


@dataclass(frozen=True)
class Documents:
    """Where each document begins and ends among T packed tokens. Build it with `from_bounds`, which checks on the host.

    bounds: (D+1,) int64 on the host: 0, …, T, increasing; document i is the tokens [bounds[i], bounds[i+1]).
    start, stop: (T,) int32 on the device: the bounds of each token's own document.
    """

    bounds: Tensor
    start: Tensor
    stop: Tensor

    @staticmethod
    def from_bounds(bounds, device: torch.device | str = "cpu") -> Documents:
        """bounds: D+1 integers on the host (list, numpy array or CPU tensor). Raises ValueError unless they are
        0, …, T, strictly increasing."""
        bounds = torch.as_tensor(bounds)
        if bounds.device.type != "cpu" or bounds.is_floating_point() or bounds.dim() != 1:
            kind = f"{tuple(bounds.shape)} {bounds.dtype} on {bounds.device}"
            raise ValueError(f"bounds is {kind}; it must be one-dimensional and of integers on the CPU")
        bounds = bounds.to(torch.int64)
        lengths = bounds.diff()
        if len(bounds) < 2 or bounds[0] != 0:
            raise ValueError(f"bounds is {bounds.tolist()[:3]}…; it must begin with 0 and hold at least one document")
        if (lengths <= 0).any():
            at = int((lengths <= 0).nonzero()[0])
            raise ValueError(f"bounds[{at + 1}] is {bounds[at + 1]} after {bounds[at]}; bounds must increase")
        start = bounds[:-1].repeat_interleave(lengths).to(torch.int32)
        stop = bounds[1:].repeat_interleave(lengths).to(torch.int32)
        return Documents(bounds, start.to(device, non_blocking=True), stop.to(device, non_blocking=True))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        return int(self.bounds[-1])


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    dropout: Dropout | None = None,
    window: int | None = None,
):
    """Plain PyTorch, document by document: memory and time depend on the lengths of the documents, not on T²."""
    if window is not None:
        return _windowed(q, k, v, documents, dropout, window)
    lengths = documents.bounds.diff().tolist()
    # split, not slices: its backward is one concatenation; each slice's would fill T × H × d with zeros
    parts = [[x.transpose(0, 1) for x in xs] for xs in zip(*(x.split(lengths) for x in (q, k, v)))]  # (H, n, d) each
    if dropout is None:
        outputs = [F.scaled_dot_product_attention(*(x[None] for x in part))[0] for part in parts]
    else:
        rows = dropout.row_hash(0, len(q))[:, None].split(lengths)  # (n, 1) each
        keys = dropout.key_hash(q.shape[1], 0, len(q))[:, None].split(lengths, 2)  # (H, 1, n)
        outputs = [_attention_with_dropout(*part, dropout, *hashes) for part, *hashes in zip(parts, rows, keys)]
    return torch.cat([out.transpose(0, 1) for out in outputs])


def _attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, dropout: Dropout, rows: Tensor, keys: Tensor) -> Tensor:
    """q, k, v: (H, n, d) of one document. Computes a block of queries at a time, which bounds the memory that
    hashing the mask takes besides the probabilities."""
    heads, n, d = q.shape
    block = max(BLOCK // (heads * n), 1)
    outputs = []
    for qi, row in zip((q * d**-0.5).split(block, 1), rows.split(block)):
        probabilities = (qi @ k.transpose(1, 2)).softmax(-1)
        # a product, because masked_fill is slower on a CPU, forward and backward
        outputs.append((probabilities * dropout.keeps(row, keys).to(v.dtype)) @ v)
    return torch.cat(outputs, 1) * dropout.scale


def _windowed(q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: Dropout | None, window: int) -> Tensor:
    """All documents at once, cut into blocks at least as long as the window, so that a query sees only keys of its own
    block and of the two next to it."""
    tokens, heads, d = q.shape
    block = min(max(window, LEAST_BLOCK), tokens)
    blocks = -(-tokens // block)
    spare = blocks * block - tokens

    def cut(x: Tensor) -> Tensor:
        """(T, H, …) → (blocks, H, block, …), with zeros after the last token."""
        padded = torch.cat([x, x.new_zeros(spare, *x.shape[1:])]) if spare else x
        return padded.unflatten(0, (blocks, block)).transpose(1, 2)

    def around(x: Tensor) -> Tensor:
        """(blocks, H, block, …) → (blocks, H, 3 block, …): the previous block, the block itself and the next one."""
        none = torch.zeros_like(x[:1])
        return torch.cat([torch.cat([none, x[:-1]]), x, torch.cat([x[1:], none])], 2)

    query = torch.arange(blocks * block, device=q.device)
    # a query after the last token sees itself, since the softmax of no scores and its gradient would be NaN
    start, stop = (torch.cat([bound, query[tokens:] + i]) for i, bound in enumerate((documents.start, documents.stop)))
    first, last = torch.maximum(start, query - window), torch.minimum(stop, query + window + 1)
    key = query.view(blocks, 1, block)[:, :, :1] - block + torch.arange(3 * block, device=q.device)
    seen = (key >= first.view(blocks, block, 1)) & (key < last.view(blocks, block, 1))
    seen = seen[:, None]  # (blocks, 1, block, 3 block)
    q, k, v = cut(q), around(cut(k)), around(cut(v))
    if dropout is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    else:
        rows = cut(dropout.row_hash(0, tokens)[:, None, None])
        keys = around(cut(dropout.key_hash(heads, 0, tokens).T[:, :, None])).transpose(2, 3)
        scores = q @ k.transpose(2, 3) * d**-0.5
        probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out = (probabilities * dropout.keeps(rows, keys).to(v.dtype)) @ v * dropout.scale
    return out.transpose(1, 2).flatten(0, 1)[:tokens]


class WithBias(torch.autograd.Function):
    """Returns qkv unchanged. The backward pass also returns the gradient of the bias that was already added to qkv."""

    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor) -> Tensor:
        return qkv.view_as(qkv)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, grad.flatten(1).sum(0)


def self_attention_reference(
    qkv: Tensor,
    documents: Documents,
    dropout: Dropout | None = None,
    window: int | None = None,
    rotation: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    if bias is not None:
        qkv = WithBias.apply(qkv, bias)
    if rotation is not None:
        qkv = rotary_reference(qkv, rotation)
    return attention_reference(*qkv.unbind(2), documents, dropout, window)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    dropout: Dropout | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v within each document. q, k, v, result: (T, H, d), one floating dtype, any strides (on
    a GPU the last must be 1).

    window: how far from a query, on either side, the keys that it sees may be; None: its whole document.
    dropout drops elements of the probabilities, by (query token, head, key token). Raises ValueError on other shapes.
    """
    if q.dim() != 3 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v have the shapes {shapes}; all must be the same (tokens, heads, head width)")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be of one floating dtype")
    _check(len(q), documents, window)
    implementation = attention_reference
    if dispatch.takes_kernel(q):
        from minisobert.ops.kernels.attention import attention as implementation
    return implementation(q, k, v, documents, dropout, window)


def self_attention(
    qkv: Tensor,
    documents: Documents,
    dropout: Dropout | None = None,
    window: int | None = None,
    rotation: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`attention` of queries, keys and values in one tensor (T, H, 3, d), with the rotary positions and the gradient of
    the bias. Returns (T, H, d). Raises ValueError on other shapes.

    rotation: (2, T, d/2) from `ops.rotation`. It is applied to queries and keys first; on a GPU that overwrites qkv.
    bias: (3 H d,). It must already have been added to qkv without a gradient (`bias.detach()`); it gets its gradient
    here.

    On a GPU this saves passes over memory: the gradient is written as one tensor, and is rotated back and added up for
    the bias while it is in registers.
    """
    if qkv.dim() != 4 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv is {tuple(qkv.shape)} {qkv.dtype}; it must be floating, (tokens, heads, 3, head width)")
    _check(len(qkv), documents, window)
    if rotation is not None:
        check_shapes(qkv, rotation)
    if bias is not None and bias.shape != (features := qkv[0].numel(),):
        raise ValueError(f"bias is {tuple(bias.shape)}; it must be ({features},), one for each feature of qkv")
    implementation = self_attention_reference
    if dispatch.takes_kernel(qkv):
        from minisobert.ops.kernels.attention import self_attention as implementation
    return implementation(qkv, documents, dropout, window, rotation, bias)


def _check(tokens: int, documents: Documents, window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None")
    if tokens != documents.tokens:
        raise ValueError(f"q has {tokens:,} tokens, documents {documents.tokens:,}; they must be of the same tokens")
