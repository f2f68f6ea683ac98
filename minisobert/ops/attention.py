"""Attention over packed documents: every token sees all tokens of its own document and no others.

For one head, with s = 1/sqrt(d), and each document by itself (keep is a dropout mask, or 1):

    forward     P = softmax(s Q Kᵀ)                O = (P ∘ keep/(1-p)) V

    backward    dV = (P ∘ keep/(1-p))ᵀ dO          D = rowsum(dO ∘ O)
                dP = (dO Vᵀ) ∘ keep/(1-p)          dS = P ∘ (dP - D)
                dQ = s dS K                        dK = s dSᵀ Q

Vaswani et al. 2017; the backward form with D is FlashAttention's (Dao et al. 2022, appendix B.2).
Dimensions: T tokens, H heads, d head width, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minisobert.ops import dispatch
from minisobert.ops.dropout import Dropout

BLOCK = 1 << 20  # probabilities at a time, 4 MB in fp32


@dataclass(frozen=True)
class Documents:
    """Where each document of T tokens in a row begins and ends. Built by `from_bounds`, which validates on the host.

    bounds: (D+1,) int64 on the host: 0, …, T, increasing; document i is the tokens [bounds[i], bounds[i+1]).
    start, stop: (T,) int32 on the device: for each token the bounds of its own document.
    """

    bounds: Tensor
    start: Tensor
    stop: Tensor

    @staticmethod
    def from_bounds(bounds, device: torch.device | str = "cpu") -> Documents:
        """bounds: D+1 integers on the host (list, numpy array or CPU tensor). Raises ValueError where they are not
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


def attention_reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: Dropout | None = None):
    """Plain PyTorch, document by document: memory and time go with the documents' own sizes, never with T × T."""
    lengths = documents.bounds.diff().tolist()
    # split, not slices: its backward is one concatenation, where a slice's fills T × H × d with zeros per document
    parts = [[x.transpose(0, 1) for x in xs] for xs in zip(*(x.split(lengths) for x in (q, k, v)))]  # (H, n, d) each
    if dropout is None:
        outputs = [F.scaled_dot_product_attention(*(x[None] for x in part))[0] for part in parts]
    else:
        rows = dropout.row_hash(0, len(q))[:, None].split(lengths)  # (n, 1) each
        keys = dropout.key_hash(q.shape[1], 0, len(q))[:, None].split(lengths, 2)  # (H, 1, n)
        outputs = [_attention_with_dropout(*part, dropout, *hashes) for part, *hashes in zip(parts, rows, keys)]
    return torch.cat([out.transpose(0, 1) for out in outputs])


def _attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, dropout: Dropout, rows: Tensor, keys: Tensor) -> Tensor:
    """q, k, v: (H, n, d) of one document. A block of queries at a time, which bounds what the hashing of a long
    document's mask takes beside its probabilities."""
    heads, n, d = q.shape
    block = max(BLOCK // (heads * n), 1)
    outputs = []
    for qi, row in zip((q * d**-0.5).split(block, 1), rows.split(block)):
        probabilities = (qi @ k.transpose(1, 2)).softmax(-1)
        # a product, not masked_fill, which is slower on a CPU, forward and backward
        outputs.append((probabilities * dropout.keeps(row, keys).to(v.dtype)) @ v)
    return torch.cat(outputs, 1) * dropout.scale


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: Dropout | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v within each document. q, k, v, result: (T, H, d), one floating dtype, any strides
    (but on a GPU the last is 1).

    dropout drops elements of the probabilities, by (query token, head, key token). Raises ValueError on other shapes.
    """
    if q.dim() != 3 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v have the shapes {shapes}; all must be the same (tokens, heads, head width)")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be of one floating dtype")
    if len(q) != documents.tokens:
        raise ValueError(f"q has {len(q):,} tokens, documents {documents.tokens:,}; they must be of the same tokens")
    implementation = attention_reference
    if dispatch.takes_kernel(q):
        from minisobert.ops.kernels.attention import attention as implementation
    return implementation(q, k, v, documents, dropout)
