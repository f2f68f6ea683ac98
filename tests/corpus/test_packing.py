"""Packing loses nothing, repeats nothing, fills rows, and draws every epoch anew."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
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


def pack(lengths, seed=1, row_tokens=ROW, weights=()) -> Packing:
    return Packing(offsets_of(lengths), range(len(lengths)), seed, row_tokens, weights)


def rows_of(packing: Packing, epoch: int) -> list[list[int]]:
    """The chunks of every row, from the public method."""
    view = packing.epoch(epoch)
    chunks, counts = packing.chunks(view, np.arange(len(view.rows)))
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
    # many documents of each length, since a document with a length of its own has the same neighbours in every epoch
    lengths = np.random.default_rng(0).integers(1, 20, 3_000) * 20
    packing = pack(lengths)
    first, second, again = rows_of(packing, 0), rows_of(packing, 1), rows_of(packing, 0)
    assert first == again
    assert len(first) == len(second) == len(packing)
    neighbours = [{frozenset(pair) for row in rows for pair in pairwise(row)} for rows in (first, second)]
    assert len(neighbours[0] & neighbours[1]) < 0.1 * len(neighbours[0])
    assert rows_of(pack(lengths, seed=2), 0) != first


def test_the_order_of_documents_of_one_length_is_a_fair_shuffle():
    # 200 documents of one length, one per row: over many epochs, every document comes early as often as late
    packing = pack([2_000] * 200)
    places = np.zeros((200, 400))
    for epoch in range(400):
        places[np.concatenate(rows_of(packing, epoch)), epoch] = np.arange(200)
    # the mean of 400 places, uniform on 0 … 199, has a standard error of 57.7 / 20
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


SOURCES = st.lists(
    st.tuples(
        st.lists(st.integers(1, 70), max_size=25),
        st.one_of(st.sampled_from([0.5, 1.0, 2.0, 3.0, 0.1, 1.5]), st.floats(0.01, 4)),
    ),
    min_size=1,
    max_size=4,
)


def ranges_of(sources) -> list[tuple[range, float]]:
    ends = np.cumsum([0, *(len(lengths) for lengths, _ in sources)]).tolist()
    return [(range(*ends_of), weight) for ends_of, (_, weight) in zip(pairwise(ends), sources)]


def documents_of(packing: Packing, lengths, epoch: int) -> Counter:
    """How often an epoch holds each document. Asserts that it always holds the whole document."""
    chunks = Counter(chain(*rows_of(packing, epoch))) if len(packing) else Counter()
    found, offsets = Counter(), offsets_of(lengths)
    for document, (start, stop) in enumerate(pairwise(offsets.tolist())):
        its = [i for i, at in enumerate(packing.chunk_start.tolist()) if start <= at < stop]
        assert sum(packing.chunk_length[its]) == stop - start
        (found[document],) = {chunks[i] for i in its}
    return found


@settings(deadline=None, max_examples=60)
@given(SOURCES, st.integers(0, 9), st.integers(4, 33))
def test_every_epoch_holds_as_many_documents_of_a_source_as_its_weight_says(sources, seed, row_tokens):
    lengths, ranges = [n for of, _ in sources for n in of], ranges_of(sources)
    packing = pack(lengths, seed, row_tokens, ranges)
    total: Counter = Counter()
    for epoch in range(4):
        found = documents_of(packing, lengths, epoch)
        for row in rows_of(packing, epoch) if len(packing) else []:
            assert row and sum(packing.chunk_length[row] + SPECIALS) <= row_tokens
        for documents, weight in ranges:
            copies = [found[document] for document in documents]
            assert abs(sum(copies) - Fraction(weight) * len(documents)) <= Fraction(1, 2)
            assert not copies or max(copies) - min(copies) <= 1
        total += found
        for documents, _ in ranges:  # no document falls behind, whatever the number of epochs
            copies = [total[document] for document in documents]
            assert not copies or max(copies) - min(copies) <= 1


@pytest.mark.parametrize(("weight", "epochs", "each"), [(0.5, 2, 1), (0.25, 4, 1), (1.25, 4, 5), (0.3, 10, 3)])
def test_after_a_few_epochs_every_document_came_up_equally_often(weight, epochs, each):
    lengths = np.random.default_rng(0).integers(1, 60, 120)
    packing = pack(lengths, 3, 64, [(range(20, 120), weight)])
    whole = sum((documents_of(packing, lengths, epoch) for epoch in range(epochs)), Counter())
    assert {whole[document] for document in range(20, 120)} == {each}
    assert {whole[document] for document in range(20)} == {epochs}  # documents outside all ranges have a weight of 1
    first = documents_of(packing, lengths, 0)  # the order of turns is not the order on disk
    turn = [document for document in range(20, 120) if first[document] == math.ceil(weight)]
    assert turn != [*range(turn[0], turn[0] + len(turn))]


@settings(deadline=None, max_examples=60)
@given(SOURCES, st.integers(0, 9), st.lists(st.integers(0, 200), min_size=1, max_size=10))
def test_a_row_lies_in_the_epoch_that_counting_from_the_first_one_finds(sources, seed, asked):
    lengths, ranges = [n for of, _ in sources for n in of], ranges_of(sources)
    packing = pack(lengths, seed, 33, ranges)
    if not len(packing):
        return
    counted = []
    epoch = 0
    while len(counted) <= max(asked):
        counted += [(epoch, place) for place in range(len(packing.epoch(epoch).rows))]
        epoch += 1
    other = pack(lengths, seed, 33, ranges)  # is asked for rows in another order
    for row in asked:
        at = [(int(e), int(p)) for e, p in zip(*other.locate(np.array([row, row + 1])))]
        assert at[0] == counted[row]
    together = packing.locate(np.array(asked))
    assert [*zip(*(each.tolist() for each in together))] == [counted[row] for row in asked]
    if all(weight == int(weight) for _, weight in ranges):  # the number of rows is the same in every epoch
        assert {len(packing.epoch(epoch).rows) for epoch in range(4)} == {len(packing)}
    assert packing.tokens == sum(sum(packing.chunk_length[row] + SPECIALS) for row in rows_of(packing, 0))


def test_with_a_fraction_the_rows_of_epochs_differ_in_number():
    """Otherwise the test above would show nothing."""
    lengths = np.random.default_rng(1).integers(1, 60, 300)
    packing = pack(lengths, 1, 64, [(range(300), 0.3)])
    assert len({len(packing.epoch(epoch).rows) for epoch in range(5)}) > 1


def test_weights_of_1_change_nothing():
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    packing, same = pack(lengths), pack(lengths, weights=[(range(200), 1.0), (range(200, 500), 1)])
    assert rows_of(packing, 3) == rows_of(same, 3)
    assert rows_of(packing, 3) != rows_of(pack(lengths, weights=[(range(200), 2.0)]), 3)


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
