"""Counted randomness: every random choice is a hash of (seed, what it is for, where it is).

No generator state is kept or saved. A choice can be computed again from its coordinates alone: by another rank, after a
restart, or in a backward pass. (Only initialisation uses a generator.)
"""

from __future__ import annotations

import zlib

import numpy as np

MASK32 = 0xFFFFFFFF


def lowbias32(x):
    """The 32-bit integer hash `lowbias32` (Wellons 2018, "Prospecting for hash functions"), a bijection on [0, 2**32).

    x: a Python int, a uint32 numpy array or an int64 torch tensor, with values in [0, 2**32). Returns the same kind.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK32  # 64-bit products wrap, but their low 32 bits are right
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def key(seed: int, purpose: str, *coordinates: int) -> int:
    """A 32-bit key for one purpose at one place, e.g. `key(seed, "dropout", step, layer, site)`."""
    h = zlib.crc32(purpose.encode())
    for part in (seed, *coordinates):
        while True:  # 32 bits at a time, at least once, so that large seeds and steps count in full
            h = lowbias32(lowbias32(h) ^ (part & MASK32))
            part >>= 32
            if part in (0, -1):
                break
    return h


def permutation_keys(n: int, key: int) -> np.ndarray:
    """(n,) uint32, all different: sorting by them shuffles range(n). n < 2**32.

    They are a bijection of the index, so there are no ties and every sorting algorithm gives the same order.
    """
    index = np.arange(n, dtype=np.uint32)
    index ^= np.uint32(key)
    # without this second key, index `key` would always come first: lowbias32(0) is 0
    return lowbias32(lowbias32(index) ^ np.uint32(lowbias32((key + 0x9E3779B9) & MASK32)))


def mix(key: int, *columns: np.ndarray) -> np.ndarray:
    """(n,) uint32: a hash of the key and each row's numbers, the low 32 bits of each of the (n,) integer columns."""
    hashes = np.full(len(columns[0]), key, np.uint32)
    for column in columns:
        hashes = lowbias32(hashes ^ lowbias32(column.astype(np.uint32)))
    return hashes
