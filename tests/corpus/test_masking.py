"""Masking: its rates, what it never touches, and that it is a pure function of the row's key."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minisobert.corpus.masking import mask_rows
from minisobert.corpus.tokenizer import CLS, FIRST_ORDINARY_ID, MASK, PAD, SEP, Vocabulary, our_vocabulary

VOCAB_SIZE = 50_000
OURS = our_vocabulary(VOCAB_SIZE)


def rows(count=400, width=2_048, seed=0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(FIRST_ORDINARY_ID, VOCAB_SIZE, (count, width)).astype(np.int32)
    tokens[:, 0], tokens[:, 1_000], tokens[:, 1_900:] = CLS, SEP, PAD
    return tokens


def keys(count=400, first=0) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 2**32, first + count, dtype=np.uint32)[first:]


def within(share: float, expected: float, n: int) -> bool:
    """Whether a share of n draws is within 4.5 standard errors of what is expected."""
    return abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_the_rates_are_the_one_given_and_80_10_10(rate):
    original, tokens = rows(), rows()
    where, targets = mask_rows(tokens, keys(), OURS, rate)
    maskable = (original >= FIRST_ORDINARY_ID).sum()
    assert within(len(where) / maskable, rate, maskable)
    assert (targets == original.ravel()[where]).all()
    became = tokens.ravel()[where]
    assert within((became == MASK).mean(), 0.8, len(where))
    assert within((became == targets).mean(), 0.1, len(where))  # a random piece equals the original once in 50,000
    random = became[(became != MASK) & (became != targets)]
    assert within(len(random) / len(where), 0.1, len(where))
    assert random.min() >= FIRST_ORDINARY_ID and random.max() < VOCAB_SIZE
    counts = np.bincount((random - FIRST_ORDINARY_ID) * 10 // (VOCAB_SIZE - FIRST_ORDINARY_ID), minlength=10)
    assert all(within(count / len(random), 0.1, len(random)) for count in counts)


def test_what_is_masked_at_a_lower_rate_is_masked_alike_at_a_higher_one():
    few, more, all_of_them = (rows() for _ in range(3))
    (lower, _), (higher, _), (every, _) = (
        mask_rows(tokens, keys(), OURS, rate) for tokens, rate in ((few, 0.15), (more, 0.3), (all_of_them, 1))
    )
    assert 1.9 * len(lower) < len(higher) and np.isin(lower, higher, assume_unique=True).all()
    assert (few.ravel()[lower] == more.ravel()[lower]).all()
    assert (every == np.flatnonzero(rows() >= FIRST_ORDINARY_ID)).all()
    assert (more.ravel()[higher] == all_of_them.ravel()[higher]).all()


def test_without_a_rate_it_is_that_of_evaluation():
    tokens, again = rows(), rows()
    assert (mask_rows(tokens, keys(), OURS)[0] == mask_rows(again, keys(), OURS, 0.15)[0]).all()


def test_nothing_else_changes_and_specials_are_never_chosen():
    original, tokens = rows(), rows()
    where, targets = mask_rows(tokens, keys(), OURS)
    assert targets.min() >= FIRST_ORDINARY_ID
    assert len(np.unique(where)) == len(where)
    untouched = np.ones(tokens.size, bool)
    untouched[where] = False
    assert (tokens.ravel()[untouched] == original.ravel()[untouched]).all()


def test_choices_are_independent_along_the_row_and_between_rows():
    chosen = np.zeros((400, 2_048), bool)
    tokens = np.full((400, 2_048), 9, np.int32)
    where, _ = mask_rows(tokens, keys(), OURS)
    chosen.ravel()[where] = True
    for a, b in ((chosen[:, 1:], chosen[:, :-1]), (chosen[1:], chosen[:-1]), (chosen[:, 64:], chosen[:, :-64])):
        assert within((a & b).mean(), 0.15**2, a.size)


def test_a_row_is_masked_alike_wherever_it_stands():
    together, alone = rows(), rows()[5:6]
    where, _ = mask_rows(together, keys(), OURS)
    where_alone, _ = mask_rows(alone, keys()[5:6], OURS)
    assert (together[5] == alone[0]).all()
    assert (where[where // 2_048 == 5] - 5 * 2_048 == where_alone).all()
    other = rows()[5:6]
    mask_rows(other, keys()[6:7], OURS)
    assert (other != alone).any()


def test_a_row_with_nothing_to_mask_gives_nothing():
    tokens = np.full((2, 64), PAD, np.int32)
    where, targets = mask_rows(tokens, keys(2), OURS)
    assert where.shape == targets.shape == (0,) and (tokens == PAD).all()


def test_a_vocabulary_of_specials_alone_is_refused():
    with pytest.raises(ValueError, match="5 ids, and all of them are special"):
        mask_rows(rows(1), keys(1), our_vocabulary(5))


def test_the_ids_of_a_vocabulary_whose_special_ones_come_last():
    """As in ModernBERT: no special piece is chosen or drawn, and the vocabulary's own [MASK] is used."""
    theirs = Vocabulary(500, pad=490, cls=491, sep=492, mask=493, first=0, stop=490)
    tokens = np.random.default_rng(0).integers(0, 490, (200, 256)).astype(np.int32)
    tokens[:, 0], tokens[:, 100], tokens[:, 250:] = theirs.cls, theirs.sep, theirs.pad
    before = tokens.copy()
    where, targets = mask_rows(tokens, keys(200), theirs, 0.5)
    assert (before.reshape(-1)[where] == targets).all() and (targets < 490).all()
    became = tokens.reshape(-1)[where]
    random = became[(became != theirs.mask) & (became != targets)]
    assert within((became == theirs.mask).mean(), 0.8, len(where)) and random.max() < 490 and random.min() < 10
