"""Dropout whose mask is a hash of where an element stands, not a draw from a generator.

    y = x * keep / (1 - p)        keep[i, j] = (lowbias32(row_hash[i] ^ column_hash[j]) >> 16) >= round(p * 65,536)

    row_hash[i]    = lowbias32(lowbias32(i) ^ key)           i: index of the token in the global batch
    column_hash[j] = lowbias32(j)                            j: feature, or head * 2**24 + index of the key's token
    key            = a hash of (seed, step, layer, site)

The mask of an element therefore depends neither on the layout (which rank, which micro-batch) nor on the order in which
masks are made, and a backward pass can make it again instead of storing it. The threshold is a multiple of 2**16, so p
is kept to 1/65,536, and the hash's last xor-shift, which changes low bits alone, need not be computed. Its first one,
x ^ (x >> 16), is linear in xor: the methods that hash rows and columns take it there, and not once per element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minisobert import hashing
from minisobert.config import MOST_TOKENS
from minisobert.ops import dispatch

SITES = ("embedding", "attention", "attention_output", "ffn_output")


@dataclass(frozen=True)
class Dropout:
    """Which elements to drop, for all layers of one step, or (after `at`) for one site.

    p: probability in [0, 1).
    keys: (layers, sites) int32 on the device, the bits of unsigned keys, made once per step; () for one site.
    token_offset: index in the global batch of the first token at hand. head_offset: likewise of the first head.
    row_offset: what to add for hidden states, where a rank has some tokens of them and all tokens in attention.
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
        """p in 65,536ths: a hash whose upper 16 bits are below it is dropped."""
        return min(round(self.p * 65_536), 65_535)

    @property
    def scale(self) -> float:
        return 65_536 / (65_536 - self.threshold)

    def row_hash(self, start: int, stop: int) -> Tensor:
        """(stop - start,) int32, for the tokens [start, stop) of those at hand."""
        index = torch.arange(start + self.token_offset, stop + self.token_offset, device=self.keys.device)
        return _xor_shift_16(_lowbias32(_lowbias32(_int32(index)) ^ self.keys))

    def column_hash(self, start: int, stop: int) -> Tensor:
        """(stop - start,) int32, for the features [start, stop)."""
        return _xor_shift_16(_lowbias32(_int32(torch.arange(start, stop, device=self.keys.device))))

    def key_hash(self, heads: int, start: int, stop: int) -> Tensor:
        """(heads, stop - start) int32, for the keys of the tokens [start, stop) of those at hand."""
        head = torch.arange(self.head_offset, self.head_offset + heads, device=self.keys.device)
        token = torch.arange(start + self.token_offset, stop + self.token_offset, device=self.keys.device)
        return _xor_shift_16(_lowbias32(_int32(head[:, None] * MOST_TOKENS + token)))

    def keeps(self, row_hash: Tensor, column_hash: Tensor) -> Tensor:
        """True where an element is kept; the two hashes are broadcast against each other."""
        # as unsigned integers, hash >= threshold << 16; flipping the sign bit of both makes that a signed comparison
        return _mix(row_hash ^ column_hash).bitwise_xor_(-(1 << 31)) >= (self.threshold << 16) - (1 << 31)


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


# `hashing.lowbias32` once more, on int32 tensors: several times faster on a CPU than int64, where attention needs one
# hash per head and pair of tokens. Products wrap; an arithmetic right shift needs its sign bits cut off.


def _xor_shift_16(x: Tensor) -> Tensor:
    return x ^ ((x >> 16) & 0xFFFF)


def _mix(x: Tensor) -> Tensor:
    """What lies between the first and the last step of lowbias32, in place."""
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - (1 << 32)
    return x


def _lowbias32(x: Tensor) -> Tensor:
    return _xor_shift_16(_mix(_xor_shift_16(x)))
