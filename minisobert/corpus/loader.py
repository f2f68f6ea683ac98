"""Shards → micro-batches of packed, masked rows, made in the background. The only file of `corpus` that imports torch.

Rows are numbered in one endless order: row g is row g % R of epoch g // R, or, if weights make epochs differ in their
number of rows, the row that `Packing.locate` finds. The content of a row depends only on the seed, the weights and g.
So a position in the data is one integer, and a batch has the same rows however it is split over ranks and
micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minisobert import hashing
from minisobert.corpus.masking import EVALUATION_RATE, mask_rows
from minisobert.corpus.packing import SPECIALS, Epoch, Packing
from minisobert.corpus.shards import Shards
from minisobert.ops.attention import Documents

PREFETCH = 4  # micro-batches made ahead


@dataclass(frozen=True)
class MicroBatch:
    """Some rows, one after another, as T tokens. M of them are to be guessed."""

    tokens: Tensor  # (T,) int32, masked
    positions: Tensor  # (T,) int32, 0 at the beginning of each document
    documents: Documents  # padding at the end of a row is a document too
    masked: Tensor  # (M,) int64, indices into tokens
    targets: Tensor  # (M,) int64, the ids that were there
    lengths: np.ndarray  # (documents,) int64: tokens of each, without padding
    first_row: int  # in the global order

    @property
    def real_tokens(self) -> int:
        """All tokens but padding."""
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self

        def move(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True)

        documents = replace(self.documents, start=move(self.documents.start), stop=move(self.documents.stop))
        moved = {name: move(getattr(self, name)) for name in ("tokens", "positions", "masked", "targets")}
        return replace(self, documents=documents, **moved)


class Rows:
    """The rows of some of the shards' documents, by their number in the global order."""

    def __init__(
        self,
        shards: Shards,
        documents: range,
        seed: int,
        row_tokens: int,
        purpose: str = "masking",
        weights: Sequence[tuple[range, float]] = (),
    ):
        """purpose: of the masks; those of training and validation differ by it. weights: see `Packing`."""
        self.shards, self.seed, self.purpose = shards, seed, purpose
        self.packing = Packing(shards.offsets, documents, seed, row_tokens, weights)
        self._epochs: dict[int, Epoch] = {}

    def __len__(self) -> int:
        """Rows in an epoch; see `Packing`."""
        return len(self.packing)

    def micro_batch(self, first_row: int, rows: int, mask_rate: float = EVALUATION_RATE) -> MicroBatch:
        """Rows first_row, …, first_row + rows - 1; they may span two epochs.

        An example: one row of 10 tokens that holds two documents, of 3 and of 2 tokens. In tokens.bin their ids a b c
        begin at 70 and their ids d e at 20.

            place               0     1  2  3  4     5     6  7  8     9
            tokens            [CLS]   a  b  c  [SEP] [CLS] d  e  [SEP] [PAD]
            positions           0     1  2  3  4     0     1  2  3     0
            counts            [2]            lengths           [5, 4]     with [CLS] and [SEP]
            padding           [1]            ends              [2]        a padding document is inserted there
            document_lengths  [5, 4, 1]      bounds            [0, 5, 9, 10]
            starts            [0, 5]         stops             [5, 9]     of the real documents only
            places            [1, 2, 3, 6, 7]                             where ids go
            source            [70, 71, 72, 20, 21]                        where in tokens.bin they come from
        """
        width = self.packing.row_tokens
        epochs, row_in_epoch = self.packing.locate(np.arange(first_row, first_row + rows))
        parts = [self.packing.chunks(self._epoch(e), row_in_epoch[epochs == e]) for e in np.unique(epochs).tolist()]
        chunks, counts = (np.concatenate(part) for part in zip(*parts))

        # The documents: chunks with their specials, and after the last chunk of a row the padding that it needs
        row_of_chunk = np.repeat(np.arange(rows), counts)
        lengths = self.packing.chunk_length[chunks].astype(np.int64) + SPECIALS
        padding = width - np.bincount(row_of_chunk, lengths, minlength=rows).astype(np.int64)
        ends = np.cumsum(counts)[padding > 0]
        document_lengths = np.insert(lengths, ends, padding[padding > 0])
        bounds = np.concatenate([[0], np.cumsum(document_lengths)])
        is_padding = np.insert(np.zeros(len(lengths), bool), ends, True)
        starts, stops = bounds[:-1][~is_padding], bounds[1:][~is_padding]

        positions = np.arange(rows * width) - np.repeat(bounds[:-1], document_lengths)
        vocabulary = self.shards.vocabulary
        tokens = np.full(rows * width, vocabulary.pad, dtype=np.int32)
        # All ids are gathered at once; a loop over documents in Python would cost more than everything else here
        inner = lengths - SPECIALS
        nth = np.arange(inner.sum()) - np.repeat(np.cumsum(inner) - inner, inner)  # index of an id in its chunk
        places = np.repeat(starts + 1, inner) + nth
        source = np.repeat(self.packing.chunk_start[chunks], inner) + nth
        tokens[places] = self.shards.tokens[source]
        tokens[starts], tokens[stops - 1] = vocabulary.cls, vocabulary.sep

        coordinates = zip(epochs.tolist(), row_in_epoch.tolist())
        keys = np.array([hashing.key(self.seed, self.purpose, *at) for at in coordinates], dtype=np.uint32)
        masked, targets = mask_rows(tokens.reshape(rows, width), keys, vocabulary, mask_rate)
        return MicroBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(positions.astype(np.int32)),
            Documents.from_bounds(bounds),
            torch.from_numpy(masked),
            torch.from_numpy(targets),
            lengths=lengths,
            first_row=first_row,
        )

    def _epoch(self, epoch: int) -> Epoch:
        if epoch not in self._epochs:
            self._epochs = {e: self._epochs[e] for e in self._epochs if e == epoch - 1}  # a batch spans two at most
            self._epochs[epoch] = self.packing.epoch(epoch)
        return self._epochs[epoch]


def prefetch(rows: Rows, spans: Iterable[tuple], device: torch.device) -> Iterator[MicroBatch]:
    """The micro-batches of (first row, rows) or (first row, rows, mask rate) spans, on the device. A background thread
    prepares a few of them ahead."""
    pool, pending = ThreadPoolExecutor(1, thread_name_prefix="loader"), deque()
    try:
        for span in spans:
            pending.append(pool.submit(rows.micro_batch, *span))
            if len(pending) > PREFETCH:
                yield pending.popleft().result().to(device)
        while pending:
            yield pending.popleft().result().to(device)
    finally:
        pool.shutdown(cancel_futures=True)


def spans(first_row: int, last_row: int, rows: int, rank: int, ranks: int) -> Iterator[tuple[int, int]]:
    """One rank's part of the rows [first_row, last_row): every ranks-th group of `rows` rows, as (first row, rows)."""
    for first in range(first_row + rank * rows, last_row, ranks * rows):
        yield first, min(rows, last_row - first)
