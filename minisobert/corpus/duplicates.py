"""Finds the documents that repeat an earlier one, exactly or nearly.

Exactly: the texts are equal once every run of white space is one space; case counts. In 1 of 10,000 corpora of 60
million documents, two different texts have the same digest of 64 bits, which costs one document.

Nearly: the Jaccard similarity of the sets of 5-grams, J(A, B) = |A ∩ B| / |A ∪ B|, is at least a threshold t. A word is
a run of letters and digits in lower case, or one other character: `C++` is not `C#`. A text of fewer than five words is
one 5-gram. Not all pairs need to be compared (Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets",
chapter 3): the smallest hash of one set equals that of the other with probability J. With b·r such hashes, in b bands
of r, two documents have an equal band with probability 1 - (1 - J^r)^b. Such pairs are candidates, and the true J of
every candidate is computed. So nothing is left out that is less similar than t, and of the pairs as similar as t at
most MISSED are missed, as long as no band has more than MOST documents.

A document is left out if any earlier one is near it, even one that was left out itself. The first of a chain stays.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np

from minisobert.hashing import key

GRAM = 5  # words
MISSED = 0.01  # the share of pairs exactly at the threshold that have no equal band
HASHES = 64  # per document, at most: more would make longer bands and fewer useless comparisons, but cost time
LEAST = 0.5  # the lowest threshold: below it, so many short bands are needed that most documents share one
MOST = 100  # documents of one band that a document is compared with; without a limit, boilerplate would cost the square
_BATCH = 1_000_000  # about so many bytes of text are compared in one task of a worker

# The class of a byte: 0 separates words, 1 belongs to one, 2 is one by itself. All bytes past ASCII count as letters.
_CLASS = np.full(256, 2, np.uint8)
_CLASS[:33] = _CLASS[127] = 0
_CLASS[128:] = 1
_CLASS[[byte for byte in range(128) if chr(byte).isalnum() or chr(byte) == "_"]] = 1


def _constants(purpose: str, count: int) -> np.ndarray:
    """(count,) uint64, odd and so invertible modulo 2**64."""
    return np.array([key(i, purpose) << 32 | key(i, purpose, 1) | 1 for i in range(count)], np.uint64)


_BYTE, _PLACE = _constants("byte", 256), _constants("place", GRAM)
_BASE = 0x9E3779B97F4A7C15
_MULTIPLY, _ADD = (_constants(name, HASHES).astype(np.uint32) for name in ("multiply", "add"))


def digest(text: str) -> int:
    """64 bits, equal for texts that differ only in white space."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little")


def repeated(digests: np.ndarray) -> np.ndarray:
    """(D,) bool: whether an earlier document has the same digest. Takes at most 26 bytes of memory a document."""
    order = np.argsort(digests, kind="stable")  # equal digests in the order of the documents
    ordered = digests[order]
    found = np.zeros(len(digests), bool)
    found[order[1:][ordered[1:] == ordered[:-1]]] = True
    return found


def shape(threshold: float) -> tuple[int, int]:
    """(b, r): b bands of r hashes each. These are the longest bands that HASHES hashes allow with MISSED.

    Raises ValueError for a threshold outside of LEAST to 1.
    """
    if not LEAST <= threshold <= 1:
        raise ValueError(f"--near-duplicates is {threshold:g}; it must be from {LEAST} to 1")
    for r in range(HASHES, 0, -1):
        b = math.ceil(math.log(MISSED) / math.log1p(-(threshold**r))) if threshold < 1 else 1
        if b * r <= HASHES:
            return b, r
    raise AssertionError(f"no bands for {threshold}")


def shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all 5-grams of some texts, (S,) uint64, and where those of each text begin, (D+1,) int64; each text
    has at least one. 5-grams that a text repeats are repeated. Takes about 40 bytes of memory per byte of text."""
    encoded = [" ".join(text.lower().split()).encode() + b" " for text in texts]
    data = np.frombuffer(b" " + b"".join(encoded), np.uint8)
    kind = _CLASS[data]
    inside = (kind[1:] == 1) & (kind[:-1] == 1)  # (N-1,): no word begins between these two bytes
    begins = np.flatnonzero(~inside & (kind[1:] > 0)) + 1
    stops = np.flatnonzero(~inside & (kind[:-1] > 0)) + 1
    # The sum of byte·base^position over a word is a difference of two running sums; base^-begin makes it independent of
    # where the word is. All of it is modulo 2**64, where numpy's products wrap.
    powers = np.full(len(data), _BASE, np.uint64).cumprod()
    sums = np.concatenate([[np.uint64(0)], (_BYTE[data] * powers).cumsum()])
    inverse = np.full(len(data), pow(_BASE, -1, 1 << 64), np.uint64).cumprod()
    words = np.append((sums[stops] - sums[begins]) * inverse[begins], np.uint64(0))

    first = np.searchsorted(begins, np.cumsum([1, *map(len, encoded)]))  # (D+1,): the first word of each text
    starts = np.concatenate([[0], np.cumsum(np.maximum(np.diff(first) - GRAM + 1, 1))])
    text = np.repeat(np.arange(len(texts)), np.diff(starts))
    begin, stop = np.arange(starts[-1]) - starts[text] + first[text], first[text + 1]
    found = np.zeros(starts[-1], np.uint64)
    for i, factor in enumerate(_PLACE):
        found += words[np.where(begin + i < stop, begin + i, -1)] * factor  # past the end of a short text the word is 0
    return _mixed(found), starts


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of the result depends on every bit of x."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def bands(texts: Sequence[str], threshold: float) -> np.ndarray:
    """(b, D) uint64: the bands of each text."""
    (b, r), (found, starts) = shape(threshold), shingles(texts)
    short = (found >> np.uint64(32)).astype(np.uint32)
    result = np.zeros((b, len(texts)), np.uint64)
    for i in range(b * r):
        smallest = np.minimum.reduceat((short ^ _ADD[i]) * _MULTIPLY[i], starts[:-1])
        result[i // r] = _mixed(result[i // r] ^ smallest)
    return result


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The Jaccard similarity of two sets, each given as its members, sorted and unique."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


# Documents are given as spans, rows of (D, 2), and `read(spans)` returns their texts. `run(function, items)` yields
# (item, function(item)) in order; both functions may run in other processes.

Read = Callable[[np.ndarray], Iterable[str]]
Run = Callable[[Callable, Iterable], Iterator[tuple]]


def near(
    read: Read, spans: np.ndarray, parts: Sequence[np.ndarray], threshold: float, work: Path, run: Run, done: Callable
) -> np.ndarray:
    """(D,) bool: whether a document is near an earlier one. The result is the same for any `parts` and `run`.

    parts: the same spans in order, cut into one part per task; done: called with each part. work: a folder for 8·b
    bytes a document, which are removed again. Takes 26 bytes of memory a document in addition to the spans.
    """
    names = [work / f"band-{i}" for i in range(shape(threshold)[0])]
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open(name, "wb")) for name in names]
            for (_, part, _), found in run(_bands_of_part, ((read, part, threshold) for part in parts)):
                for file, band in zip(files, found):
                    file.write(band.tobytes())  # numpy's own writing does not report a full disk
                done(part)
        found = np.zeros(len(spans), bool)
        for name in names:
            _compare_band(np.fromfile(name, np.uint64), found, read, spans, threshold, run)
    finally:
        for name in names:
            name.unlink(missing_ok=True)
    return found


def _compare_band(
    band: np.ndarray, found: np.ndarray, read: Read, spans: np.ndarray, threshold: float, run: Run
) -> None:
    """Sets `found` for documents that are near an earlier one with an equal hash in this band."""
    order = np.argsort(band, kind="stable")
    band = band[order]
    same = band[1:] == band[:-1]
    several = np.append(same, False) | np.append(False, same)
    new = np.append(True, ~same)[several]  # where documents with another hash begin
    order = order[several]  # most documents are alone and cost nothing from here on
    first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    rank = np.arange(len(order)) - first
    for i in range(MOST):  # each is compared with the i-th of those that share its hash
        left = np.flatnonzero((rank > i) & ~found[order])
        if not len(left):
            break
        pairs = np.stack([order[first[left] + i], order[left]], axis=1)  # (P, 2)
        sizes = np.cumsum((spans[pairs, 1] - spans[pairs, 0]).sum(axis=1))
        cuts = np.unique(np.searchsorted(sizes, np.arange(_BATCH, sizes[-1], _BATCH)))
        tasks = ((read, spans[part], threshold) for part in np.split(pairs, cuts) if len(part))
        near = [answer for _, answers in run(_compare_part, tasks) for answer in answers]
        found[order[left]] = near


def _bands_of_part(task) -> np.ndarray:
    """In a worker: the bands of some documents."""
    read, spans, threshold = task
    return bands(list(read(spans)), threshold)


def _compare_part(task) -> list[bool]:
    """In a worker: whether the documents of each pair, spans (P, 2, 2), are as similar as the threshold."""
    read, pairs, threshold = task
    spans, index = np.unique(pairs.reshape(-1, 2), axis=0, return_inverse=True)
    found, starts = shingles(list(read(spans)))
    sets = [np.unique(found[a:b]) for a, b in pairwise(starts)]
    return [similarity(sets[a], sets[b]) >= threshold for a, b in index.reshape(-1, 2)]
