"""Dropout whose mask is a hash of each element's place, not a draw from a generator.

    y = x * keep / (1 - p)         keep[i, j] = row_hash[i] * column_hash[j] >= round(p * 65,536) * 2**16 - 2**31

    row_hash[i]    = lowbias32(lowbias32(i) ^ key) | 1       i: index of the token in the global batch
    column_hash[j] = lowbias32(j) | 1                        j: feature, or head * 2**24 + index of the key's token
    key            = a hash of (seed, step, layer, site)

The product is one of signed 32-bit integers, and wraps. The mask of an element depends neither on the layout (which
rank, which micro-batch) nor on the order in which masks are computed, and a backward pass can recompute it instead of
storing it. p is rounded to 1/65,536.

One multiplication per element is all that attention can afford, and it is enough, because both factors are hashes. A
random odd number times a fixed odd number is a random odd number, so every row and every column drops at the rate p. In
column c, two rows r and s have the products r c and s c, which depend on each other only through r / s. Unless that is
a fraction of small numbers, which hashes do not give, such pairs fill the square evenly (Knuth, volume 2, 3.3.4, the
spectral test). The tests look for what would show otherwise: pairs of rows and of columns, rectangles, and the largest
singular value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minisobert import hashing
from minisobert.config import MOST_TOKENS
from minisobert.ops import dispatch

MASKS = 2  # version of the formula above; a run can only be resumed with the one that it began with
SITES = ("embedding", "attention", "attention_output", "ffn_output")


@dataclass(frozen=True)
class Dropout:
    """Which elements to drop, for all layers of one step, or (after `at`) for one site.

    p: probability in [0, 1).
    keys: (layers, sites) int32 on the device, the bits of unsigned keys, made once per step; () for one site.
    token_offset: index in the global batch of the first token at hand. head_offset: index in the model of the first
    head. row_offset: added to token_offset for hidden states, if a rank has only some of their tokens, but all tokens
    in attention.
    """

    p: float
    keys: Tensor
    token_offset: int = 0
    head_offset: int = 0
    row_offset: int = 0

    def __post_init__(self):
        if not 0 <= self.p < 1:
            raise ValueError(f"dropout is {self.p}; it must be at least 0 and less than 1")

    @staticmethod
    def for_step(p: float, seed: int, step: int, layers: int, device: torch.device | str = "cpu") -> Dropout | None:
        """The Dropout of one optimizer step; None for p = 0, which costs nothing."""
        keys = [[hashing.key(seed, site, step, layer) for site in SITES] for layer in range(layers)]
        dropout = Dropout(p, _int32(torch.tensor(keys)).to(device, non_blocking=True))
        return dropout if dropout.threshold else None

    def at(self, layer: int, site: str) -> Dropout:
        token_offset = self.token_offset + (self.row_offset if site != "attention" else 0)
        return replace(self, keys=self.keys[layer, SITES.index(site)], token_offset=token_offset)

    @property
    def threshold(self) -> int:
        """p in 65,536ths: as many values of a product's upper 16 bits are dropped, the lowest ones."""
        return min(round(self.p * 65_536), 65_535)

    @property
    def scale(self) -> float:
        return 65_536 / (65_536 - self.threshold)

    def row_hash(self, start: int, stop: int) -> Tensor:
        """(stop - start,) int32, for the tokens [start, stop) of those at hand."""
        index = torch.arange(start + self.token_offset, stop + self.token_offset, device=self.keys.device)
        return _lowbias32(_lowbias32(_int32(index)) ^ self.keys) | 1

    def column_hash(self, start: int, stop: int) -> Tensor:
        """(stop - start,) int32, for the features [start, stop)."""
        return _lowbias32(_int32(torch.arange(start, stop, device=self.keys.device))) | 1

    def key_hash(self, heads: int, start: int, stop: int) -> Tensor:
        """(heads, stop - start) int32, for the keys of the tokens [start, stop) of those at hand."""
        head = torch.arange(self.head_offset, self.head_offset + heads, device=self.keys.device)
        token = torch.arange(start + self.token_offset, stop + self.token_offset, device=self.keys.device)
        return _lowbias32(_int32(head[:, None] * MOST_TOKENS + token)) | 1

    def keeps(self, row_hash: Tensor, column_hash: Tensor) -> Tensor:
        """True where an element is kept; the two hashes are broadcast against each other."""
        return row_hash * column_hash >= (self.threshold << 16) - (1 << 31)


def drop_reference(x: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return x
    rows, features = x.shape
    keep = dropout.keeps(dropout.row_hash(0, rows)[:, None], dropout.column_hash(0, features))
    return x * (keep.to(x.dtype) * dropout.scale)


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Dropout by itself. x: (T, h), any floating dtype; None drops nothing. Raises ValueError on another shape."""
    if x.dim() != 2:
        raise ValueError(f"x is {tuple(x.shape)}; it must be (tokens, hidden)")
    implementation = drop_reference
    if dispatch.takes_kernel(x):
        from minisobert.ops.kernels.dropout import drop as implementation
    return implementation(x, dropout)


def _int32(x: Tensor) -> Tensor:
    """The low 32 bits of int64 values, as int32 (conversion wraps)."""
    return x.to(torch.int32)


def _lowbias32(x: Tensor) -> Tensor:
    """`hashing.lowbias32` on int32 tensors: products wrap; an arithmetic right shift has its sign bits masked."""
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ (x >> 16 & 0xFFFF)
