"""Micro-batches hold the documents of the shards, and a row is the same whichever rank asks for it and when."""

from __future__ import annotations

import threading
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minisobert.corpus.loader import Rows, prefetch, spans
from minisobert.corpus.tokenizer import CLS, FIRST_ORDINARY_ID, PAD, SEP, our_vocabulary

ROW = 2_048

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(corpus):
    return Rows(corpus, corpus.training_documents, 3, ROW)


def unmasked(batch) -> np.ndarray:
    tokens = batch.tokens.numpy().copy()
    tokens[batch.masked.numpy()] = batch.targets.numpy()
    return tokens


def test_an_epoch_holds_each_training_document_once(corpus, rows):
    seen = []
    for first in range(0, len(rows), 3):
        batch = rows.micro_batch(first, min(3, len(rows) - first))
        tokens, bounds = unmasked(batch), batch.documents.bounds.tolist()
        for start, stop in pairwise(bounds):
            document = tokens[start:stop]
            if document[0] == PAD:
                assert (document == PAD).all() and stop % ROW == 0
                continue
            assert document[0] == CLS and document[-1] == SEP and (document[1:-1] >= FIRST_ORDINARY_ID).all()
            seen.append(document[1:-1].tobytes())
    expected = [
        corpus.tokens[start : min(start + 2_046, corpus.offsets[i + 1])].astype(np.int32).tobytes()
        for i in corpus.training_documents
        for start in range(corpus.offsets[i], corpus.offsets[i + 1], 2_046)  # chunks of a longer document
    ]
    assert len(expected) > len(corpus.training_documents)
    assert sorted(seen) == sorted(expected)


def test_positions_restart_in_every_document_and_rows_are_full_width(rows):
    batch = rows.micro_batch(0, 4)
    assert batch.tokens.shape == batch.positions.shape == (4 * ROW,)
    assert batch.documents.tokens == 4 * ROW
    expected = np.concatenate([np.arange(n) for n in batch.documents.bounds.diff().tolist()])
    assert (batch.positions.numpy() == expected).all()
    real = [n for n, first in zip(batch.documents.bounds.diff().tolist(), batch.documents.bounds) if
            batch.tokens[first] != PAD]  # fmt: skip
    assert batch.real_tokens == sum(real) and batch.lengths.tolist() == real


def same(a, b) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in ((a.tokens, b.tokens), (a.positions, b.positions), (a.documents.bounds, b.documents.bounds),
                     (a.masked, b.masked), (a.targets, b.targets))
    )  # fmt: skip


def test_a_row_is_the_same_in_any_company_and_after_any_restart(corpus, rows):
    together = rows.micro_batch(0, 8)
    again = Rows(corpus, corpus.training_documents, 3, ROW)  # has never made the rows before
    for row in (7, 2):
        alone = again.micro_batch(row, 1)
        part = slice(row * ROW, (row + 1) * ROW)
        assert torch.equal(together.tokens[part], alone.tokens)
        inside = (together.masked >= part.start) & (together.masked < part.stop)
        assert torch.equal(together.masked[inside] - part.start, alone.masked)
        assert torch.equal(together.targets[inside], alone.targets)


def test_the_next_epoch_has_other_rows_and_other_masks_and_a_batch_may_span_both(rows):
    last, first = rows.micro_batch(len(rows) - 1, 1), rows.micro_batch(len(rows), 1)
    spanning = rows.micro_batch(len(rows) - 1, 2)
    assert torch.equal(spanning.tokens, torch.cat([last.tokens, first.tokens]))
    masks = [torch.zeros(ROW, dtype=torch.bool).index_fill(0, rows.micro_batch(r, 1).masked, True) for r in
             (0, len(rows), 1)]  # fmt: skip
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_weighted_rows_are_the_same_for_any_split_and_after_any_restart(corpus):
    """Across the ends of several epochs, which differ in their number of rows."""
    half = len(corpus.training_documents) // 2
    weights = [(range(half), 0.1), (range(half, 2 * half), 0.3)]

    def weighted() -> Rows:
        return Rows(corpus, corpus.training_documents, 3, 512, weights=weights)

    rows = weighted()
    epochs, _ = rows.packing.locate(np.arange(90))
    assert epochs[-1] >= 2 and len(set(np.bincount(epochs)[:-1])) > 1
    together = rows.micro_batch(0, 90)
    for width in (1, 4, 9):
        other = weighted()
        parts = [other.micro_batch(first, min(width, 90 - first)) for first in range(0, 90, width)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), together.tokens)
        assert torch.equal(torch.cat([part.targets for part in parts]), together.targets)
    assert same(weighted().micro_batch(80, 9), rows.micro_batch(80, 9))  # has never made the epochs before


def test_training_and_validation_are_masked_apart(corpus):
    one, other = (Rows(corpus, corpus.validation_documents, 3, ROW, purpose) for purpose in ("masking", "validation"))
    assert not torch.equal(one.micro_batch(0, 1).masked, other.micro_batch(0, 1).masked)


@pytest.mark.parametrize(("ranks", "width"), [(1, 1), (1, 4), (2, 2), (4, 1), (3, 2)])
def test_the_ranks_together_read_each_row_once(ranks, width):
    read = [row for rank in range(ranks) for first, n in spans(5, 41, width, rank, ranks) for row in
            range(first, first + n)]  # fmt: skip
    assert sorted(read) == list(range(5, 41))


def test_loading_in_the_background_gives_the_same_in_order_and_ends_with_its_reader(rows):
    wanted = list(spans(0, 12, 2, 0, 1))
    batches = list(prefetch(rows, wanted, CPU))
    assert len(batches) == 6
    assert all(same(batch, rows.micro_batch(*span)) for batch, span in zip(batches, wanted))
    unfinished = prefetch(rows, iter(lambda: (0, 1), None), CPU)
    next(unfinished)
    unfinished.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_an_error_in_the_background_reaches_the_reader(rows):
    with pytest.raises(ValueError):
        list(prefetch(rows, [(0, -1)], CPU))


def test_the_example_of_micro_batch_is_what_it_makes():
    a, b, c, d, e = ids = np.arange(5) + FIRST_ORDINARY_ID
    tokens = np.zeros(75, np.uint16)
    tokens[[70, 71, 72, 20, 21]] = ids
    shards = SimpleNamespace(offsets=np.array([20, 22, 70, 73]), tokens=tokens, vocabulary=our_vocabulary(50))
    rows = Rows(shards, range(3), 1, 10)
    two = rows.packing.chunk_start != 22  # the two documents of the example, without the one between them
    rows.packing.chunk_start, rows.packing.chunk_length = rows.packing.chunk_start[two], rows.packing.chunk_length[two]
    rows.packing._starts, rows.packing._slots = np.array([0, 2]), np.array([1, 0])  # the longer document first
    batch = rows.micro_batch(0, 1, mask_rate=0.0)
    assert batch.tokens.tolist() == [CLS, a, b, c, SEP, CLS, d, e, SEP, PAD]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0]
    assert batch.documents.bounds.tolist() == [0, 5, 9, 10]
    assert (batch.real_tokens, batch.lengths.tolist()) == (9, [5, 4])
