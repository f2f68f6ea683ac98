"""Documents into rows of `row_tokens` tokens, by the histogram of their lengths.

A document longer than a row is cut into chunks; a chunk of n tokens takes n + 2 places, with its [CLS] and [SEP]. Which
lengths share a row is decided once, on the histogram, by best fit from the longest down ("shortest-pack-first" of Krell
et al. 2021, "Efficient Sequence Packing without Cross-contamination", arXiv 2107.02027): 15 million documents have at
most 2,046 lengths, so this takes no longer than for 15 thousand. An epoch only shuffles which chunk of a length takes
which slot, and the order of the rows; the number of rows never changes.

Weights change how often an epoch holds a document. Of n documents with weight w, every epoch holds round(w n) copies:
each document round(w n) // n times. The remaining copies go to the next documents of a fixed random order, which starts
again at its end. So after any number of epochs, the copies of two documents of an input differ by one at most. The
documents with an extra copy change from epoch to epoch, and with their lengths the number of rows changes a little. It
is still a function of (seed, epoch), and so is the place of every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from minisobert import hashing

SPECIALS = 2  # [CLS] before and [SEP] after each chunk


@dataclass(frozen=True)
class Epoch:
    """The chunks in each row of one epoch: row r has order[slots[starts[i]:starts[i + 1]]], where i = rows[r]."""

    rows: np.ndarray  # (R,) which packed row is row r of the epoch
    order: np.ndarray  # (P,) the chunks by length, shuffled within each length; with weights, P copies of them
    starts: np.ndarray  # (R+1,) where the slots of each packed row begin
    slots: np.ndarray  # (P,) for each slot a rank in `order`


class Packing:
    """P chunks of documents packed into R rows.

    chunk_start (P,) int64, chunk_length (P,) int32: where each chunk lies in tokens.bin, specials not counted.
    """

    def __init__(
        self,
        offsets: np.ndarray,
        documents: range,
        seed: int,
        row_tokens: int,
        weights: Sequence[tuple[range, float]] = (),
    ):
        """offsets: (D+1,) token offsets of all documents; documents: those to pack. Empty documents are left out.
        weights: (some of these documents, their weight), in ranges that do not overlap; all others have weight 1."""
        self.row_tokens, self.seed = row_tokens, seed
        offsets = offsets[documents.start : documents.stop + 1]
        self.chunk_start, self.chunk_length = _chunks(offsets, row_tokens)
        self._weights = [(range(r.start - documents.start, r.stop - documents.start), w) for r, w in weights if w != 1]
        # (documents,); not kept without weights, because it is 4 bytes for each of perhaps 60 million documents
        self._chunks_of = _chunk_counts(offsets, row_tokens).astype(np.uint32) if self._weights else None
        # whether all epochs have the same number of rows
        self._fixed = all(copies_in_epoch(len(r), w) % len(r) == 0 for r, w in self._weights if r)
        histogram = self._histogram(self._copies(0))
        self._starts, self._slots = _rows(pack_histogram(histogram, row_tokens), histogram)
        self._first_rows = [0, len(self)]  # of the epochs so far and of the next one; used if not `_fixed`

    def __len__(self) -> int:
        """Rows in an epoch; in the first one, if weights make epochs differ."""
        return len(self._starts) - 1

    @property
    def tokens(self) -> int:
        """Real tokens of the first epoch: all but padding, [CLS] and [SEP] included."""
        histogram = self._histogram(self._copies(0))
        return int(histogram @ (np.arange(len(histogram)) + SPECIALS))

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, places in them), int64, of rows given by their numbers in one endless order.

        If epochs differ in their number of rows, all epochs up to that of the last row are packed for it, once: about a
        second each for 15 million documents.
        """
        if self._fixed:
            return np.divmod(rows, len(self))
        while self._first_rows[-1] <= rows.max():
            histogram = self._histogram(self._copies(len(self._first_rows) - 1))
            more = sum(n for n, _ in pack_histogram(histogram, self.row_tokens))
            self._first_rows.append(self._first_rows[-1] + more)
        first_rows = np.array(self._first_rows)
        epochs = np.searchsorted(first_rows, rows, side="right") - 1
        return epochs, rows - first_rows[epochs]

    def epoch(self, epoch: int) -> Epoch:
        """One epoch with its two shuffles, which are pure functions of (seed, epoch)."""
        lengths, starts, slots = self.chunk_length, self._starts, self._slots
        if self._weights:
            copies = self._copies(epoch)
            chunks = np.repeat(np.arange(len(lengths)), copies)
            lengths = lengths[chunks]
            if not self._fixed:
                histogram = self._histogram(copies)
                starts, slots = _rows(pack_histogram(histogram, self.row_tokens), histogram)
        # Sorted by length, then by hash; all keys differ, so the order is the same on every machine.
        keys = hashing.permutation_keys(len(lengths), hashing.key(self.seed, "documents", epoch))
        order = np.argsort(lengths.astype(np.uint64) << np.uint64(32) | keys)
        if self._weights:
            order = chunks[order]
        rows = np.argsort(hashing.permutation_keys(len(starts) - 1, hashing.key(self.seed, "rows", epoch)))
        return Epoch(rows, order, starts, slots)

    def chunks(self, epoch: Epoch, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The chunks of some rows of an epoch, one row after another, (N,), and each row's number of them, (rows,)."""
        packed = epoch.rows[rows]
        first, counts = epoch.starts[packed], epoch.starts[packed + 1] - epoch.starts[packed]
        slots = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        return epoch.order[epoch.slots[slots]], counts

    def _copies(self, epoch: int) -> np.ndarray | None:
        """(chunks,): how often an epoch holds each chunk; None without weights, when it holds each once."""
        if not self._weights:
            return None
        copies = np.ones(len(self._chunks_of), np.int64)
        for documents, weight in self._weights:
            if n := len(documents):
                each, more = divmod(copies_in_epoch(n, weight), n)
                part = copies[documents.start : documents.stop]
                part[:] = each
                key = hashing.key(self.seed, "weights", documents.start)
                turns = np.argsort(hashing.permutation_keys(n, key))  # the same in every epoch
                part[np.take(turns, epoch * more % n + np.arange(more), mode="wrap")] += 1
        return np.repeat(copies, self._chunks_of)

    def _histogram(self, copies: np.ndarray | None) -> np.ndarray:
        """[n]: how many chunks of n tokens an epoch holds. bincount adds in float64, exactly below 2**53."""
        return np.bincount(self.chunk_length, copies, minlength=1).astype(np.int64)


def copies_in_epoch(documents: int, weight: float) -> int:
    """How many copies of so many documents an epoch holds: weight × documents, with a half rounded up."""
    return math.floor(weight * documents + 0.5)


def _chunk_counts(offsets: np.ndarray, row_tokens: int) -> np.ndarray:
    """How many chunks each document is cut into; 0 for an empty one."""
    return -(-np.diff(offsets) // (row_tokens - SPECIALS))


def _chunks(offsets: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(P,) start and length of each chunk: whole documents, or full chunks of a longer one and what is left of it."""
    longest = row_tokens - SPECIALS
    counts = _chunk_counts(offsets, row_tokens)
    document_start = np.repeat(offsets[:-1], counts)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = document_start + nth * longest
    length = np.minimum(np.repeat(offsets[1:], counts) - start, longest)
    return start, length.astype(np.int32)


def pack_histogram(histogram: Iterable[int], row_tokens: int) -> list[tuple[int, list[int]]]:
    """histogram[n]: how many chunks of n tokens there are. Returns (number of rows, lengths in each of them) pairs.

    Best fit, longest first: a length goes to the fullest open rows that it still fits. All chunks of one length and all
    rows with the same content are handled at once, by their counts. So the work grows with the number of lengths (2,046
    in a row of 2,048), not with the number of chunks (15 million).

    For example, in rows of 10 places, 3 chunks of 5 tokens (7 places each) and 4 of 1 token (3 places each) become
    [(3, [5, 1]), (1, [1])]: three rows of one 5 and one 1, and one row for the 1 that is left.
    """
    histogram = np.asarray(histogram)
    # open_rows[space]: stacks of equal rows with `space` places left, as [number of rows, lengths in each]
    open_rows: list[list[tuple[int, list[int]]]] = [[] for _ in range(row_tokens + 1)]
    for length in range(len(histogram) - 1, 0, -1):
        left, size = int(histogram[length]), length + SPECIALS  # chunks without a row, places that each takes
        if left and size > row_tokens:
            raise ValueError(f"a chunk of {length:,} tokens does not fit a row of {row_tokens:,}")
        space = size  # longer chunks came before, so rows with less space can never be used again
        while left:
            while space < row_tokens and not open_rows[space]:
                space += 1
            # space == row_tokens means new rows: never more than needed, and each takes as many chunks as fit
            rows, inside = open_rows[space].pop() if space < row_tokens else (max(left // (row_tokens // size), 1), [])
            # All rows of a stack take the same number of chunks, so that it stays one stack. What is left over waits
            # for the next pass of the loop
            each = min(space // size, max(left // rows, 1))
            filled = min(rows, left // each)
            if filled < rows:
                open_rows[space].append((rows - filled, inside))
            open_rows[space - each * size].append((filled, inside + [length] * each))
            left -= filled * each
            if space >= row_tokens:
                space = size  # the rows just begun may be the best fit for what is left
    return [stack for stacks in open_rows for stack in stacks if stack[1]]


def _rows(packed: list[tuple[int, list[int]]], histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as slots: (R+1,) where each row's slots begin, and (P,) for each slot a rank among all chunks by length."""
    sizes = np.repeat([len(lengths) for _, lengths in packed], [rows for rows, _ in packed]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    slots = np.empty(starts[-1], dtype=np.uint32)
    next_rank = np.cumsum(histogram) - histogram  # for each length, the first rank that no slot has yet
    at = 0
    for rows, lengths in packed:
        block = slots[at : at + rows * len(lengths)].reshape(rows, len(lengths))
        for column, length in enumerate(lengths):
            block[:, column] = np.arange(next_rank[length], next_rank[length] + rows)
            next_rank[length] += rows
        at += block.size
    return starts, slots
