"""Packing loses nothing, repeats nothing, fills rows, and draws every epoch anew."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisobert.corpus.packing import SPECIALS, Packing, pack_histogram

ROW = 2_048
DUMPS = Path(__file__).parents[2] / "../shared/data/dumps"


def offsets_of(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def pack(lengths, seed=1, row_tokens=ROW) -> Packing:
    return Packing(offsets_of(lengths), range(len(lengths)), seed, row_tokens)


def rows_of(packing: Packing, epoch: int) -> list[list[int]]:
    """The chunks of every row, by the public way to ask for them."""
    view = packing.epoch(epoch)
    chunks, counts = packing.chunks(view, np.arange(len(packing)))
    return [row.tolist() for row in np.split(chunks, np.cumsum(counts)[:-1])]


@settings(deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=200), st.integers(0, 3), st.integers(4, 33))
def test_every_token_is_in_exactly_one_place_of_every_epoch(lengths, epoch, row_tokens):
    packing = pack(lengths, row_tokens=row_tokens)
    rows = rows_of(packing, epoch) if len(packing) else []
    for row in rows:
        assert sum(packing.chunk_length[row] + SPECIALS) <= row_tokens and row
    covered = [
        token
        for chunk in chain(*rows)
        for token in range(packing.chunk_start[chunk], packing.chunk_start[chunk] + packing.chunk_length[chunk])
    ]
    assert sorted(covered) == list(range(sum(lengths)))


def test_a_piece_never_spans_two_documents_and_is_whole_where_the_document_fits():
    lengths = [5, 2_046, 2_047, 9_000, 1]
    packing, offsets = pack(lengths), offsets_of(lengths)
    chunks = list(zip(packing.chunk_start.tolist(), packing.chunk_length.tolist()))
    assert chunks == [
        (0, 5), (5, 2_046), (2_051, 2_046), (4_097, 1), *((4_098 + i * 2_046, 2_046) for i in range(4)),
        (4_098 + 4 * 2_046, 9_000 - 4 * 2_046), (offsets[4], 1),
    ]  # fmt: skip


def test_epochs_have_the_same_number_of_rows_and_other_neighbours():
    # many documents of each length: who is alone with its length has the same neighbours in every epoch
    lengths = np.random.default_rng(0).integers(1, 20, 3_000) * 20
    packing = pack(lengths)
    first, second, again = rows_of(packing, 0), rows_of(packing, 1), rows_of(packing, 0)
    assert first == again
    assert len(first) == len(second) == len(packing)
    neighbours = [{frozenset(pair) for row in rows for pair in pairwise(row)} for rows in (first, second)]
    assert len(neighbours[0] & neighbours[1]) < 0.1 * len(neighbours[0])
    assert rows_of(pack(lengths, seed=2), 0) != first


def test_the_order_of_documents_of_one_length_is_a_fair_shuffle():
    # 200 documents of one length, a row each: over many epochs every document comes early as often as late
    packing = pack([2_000] * 200)
    places = np.zeros((200, 400))
    for epoch in range(400):
        places[np.concatenate(rows_of(packing, epoch)), epoch] = np.arange(200)
    # the mean of 400 places uniform on 0 … 199 has the standard error 57.7 / 20
    assert np.abs(places.mean(1) - 99.5).max() < 4.5 * 57.7 / 20
    consecutive = np.corrcoef(places[:, :-1].ravel(), places[:, 1:].ravel())[0, 1]
    assert abs(consecutive) < 4.5 / np.sqrt(200 * 399)


def test_best_fit_on_the_histogram_wastes_next_to_nothing():
    lengths = np.random.default_rng(0).lognormal(5.3, 1, 20_000).astype(int) + 1
    packing = pack(lengths)
    at_least = -(-packing.tokens // ROW)
    assert packing.tokens == sum(lengths) + SPECIALS * len(packing.chunk_length)
    assert len(packing) <= 1.001 * at_least


def test_a_histogram_is_packed_by_multiplicity():
    histogram = np.zeros(60, dtype=int)
    histogram[[8, 18, 28]] = [1_000_000, 500_000, 1_000_000]  # 10, 20 and 30 places in rows of 40
    packed = pack_histogram(histogram, row_tokens=40)
    assert {(rows, tuple(sorted(row))) for rows, row in packed} == {(1_000_000, (8, 28)), (250_000, (18, 18))}
    with pytest.raises(ValueError, match="a chunk of 59 tokens does not fit a row of 40"):
        pack_histogram(np.ones(60, dtype=int), row_tokens=40)


@pytest.mark.skipif(not DUMPS.is_dir(), reason="../shared/data/dumps is not there")
def test_a_real_dump_is_packed_at_least_99_and_a_half_percent_full(tmp_path):
    from data.prepare import prepare
    from minisobert.corpus.shards import open_shards

    prepare([DUMPS / "german.meta.stackexchange.com.7z"], tmp_path / "out", vocab_size=2_000, workers=1)
    shards = open_shards(tmp_path / "out")
    packing = Packing(shards.offsets, range(shards.meta["documents"]), 0, ROW)
    assert packing.tokens / (len(packing) * ROW) >= 0.995


def test_the_example_of_pack_histogram_is_what_it_returns():
    assert pack_histogram([0, 4, 0, 0, 0, 3], 10) == [(3, [5, 1]), (1, [1])]
