"""Shards → micro-batches of packed, masked rows, made in the background. The only file of `corpus` that knows torch.

Rows have numbers in one endless order: row g is row g % R of epoch g // R. What is in a row depends on nothing but the
seed and g, so a position is one integer, and any split of a batch over ranks and micro-batches holds the same rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minisobert import hashing
from minisobert.corpus.masking import mask_rows
from minisobert.corpus.packing import SPECIALS, Epoch, Packing
from minisobert.corpus.shards import Shards
from minisobert.corpus.tokenizer import CLS, PAD, SEP
from minisobert.ops.attention import Documents

PREFETCH = 4  # micro-batches made ahead


@dataclass(frozen=True)
class MicroBatch:
    """Some rows in a line, T tokens. M of them are to be guessed."""

    tokens: Tensor  # (T,) int32, masked
    positions: Tensor  # (T,) int32, 0 at the beginning of each document
    documents: Documents  # padding at the end of a row is a document too
    masked: Tensor  # (M,) int64, indices into tokens
    targets: Tensor  # (M,) int64, what stood there
    real_tokens: int  # all but padding
    pairs: int  # of tokens that see each other: the sum of squares of the documents' lengths, padding left out
    first_row: int  # of the global order

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self

        def move(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True)

        documents = replace(self.documents, start=move(self.documents.start), stop=move(self.documents.stop))
        moved = {name: move(getattr(self, name)) for name in ("tokens", "positions", "masked", "targets")}
        return replace(self, documents=documents, **moved)


class Rows:
    """The rows of some documents of the shards, by their number in the global order."""

    def __init__(self, shards: Shards, documents: range, seed: int, row_tokens: int, purpose: str = "masking"):
        """purpose: what the masks are for; training and validation draw theirs apart."""
        self.shards, self.seed, self.purpose = shards, seed, purpose
        self.packing = Packing(shards.offsets, documents, seed, row_tokens)
        self._epochs: dict[int, Epoch] = {}

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.packing)

    def micro_batch(self, first_row: int, rows: int) -> MicroBatch:
        """Rows first_row, …, first_row + rows - 1; they may span two epochs."""
        width = self.packing.row_tokens
        epochs, row_in_epoch = np.divmod(np.arange(first_row, first_row + rows), len(self))
        parts = [self.packing.pieces(self._epoch(e), row_in_epoch[epochs == e]) for e in np.unique(epochs).tolist()]
        pieces, counts = (np.concatenate(part) for part in zip(*parts))

        # Pieces with their specials, and what padding each row needs, as the documents of T tokens in a line.
        row_of_piece = np.repeat(np.arange(rows), counts)
        lengths = self.packing.piece_length[pieces].astype(np.int64) + SPECIALS
        padding = width - np.bincount(row_of_piece, lengths, minlength=rows).astype(np.int64)
        ends = np.cumsum(counts)[padding > 0]
        document_lengths = np.insert(lengths, ends, padding[padding > 0])
        bounds = np.concatenate([[0], np.cumsum(document_lengths)])
        is_padding = np.insert(np.zeros(len(lengths), bool), ends, True)
        starts, stops = bounds[:-1][~is_padding], bounds[1:][~is_padding]

        positions = np.arange(rows * width) - np.repeat(bounds[:-1], document_lengths)
        tokens = np.full(rows * width, PAD, dtype=np.int32)
        inner = np.repeat(self.packing.piece_start[pieces] - starts - 1, lengths - SPECIALS)  # source - destination
        places = np.repeat(starts + 1 - (np.cumsum(lengths - SPECIALS) - (lengths - SPECIALS)), lengths - SPECIALS)
        places += np.arange(len(places))
        tokens[places] = self.shards.tokens[places + inner]
        tokens[starts], tokens[stops - 1] = CLS, SEP

        coordinates = zip(epochs.tolist(), row_in_epoch.tolist())
        keys = np.array([hashing.key(self.seed, self.purpose, *at) for at in coordinates], dtype=np.uint32)
        masked, targets = mask_rows(tokens.reshape(rows, width), keys, self.shards.vocab_size)
        return MicroBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(positions.astype(np.int32)),
            Documents.from_bounds(bounds),
            torch.from_numpy(masked),
            torch.from_numpy(targets),
            real_tokens=int(lengths.sum()),
            pairs=int((lengths**2).sum()),
            first_row=first_row,
        )

    def _epoch(self, epoch: int) -> Epoch:
        if epoch not in self._epochs:
            self._epochs = {e: self._epochs[e] for e in self._epochs if e == epoch - 1}  # a batch spans two at most
            self._epochs[epoch] = self.packing.epoch(epoch)
        return self._epochs[epoch]


def load(rows: Rows, spans: Iterable[tuple[int, int]], device: torch.device) -> Iterator[MicroBatch]:
    """The micro-batches of (first row, rows) spans, on the device, a few made ahead in a background thread."""
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
