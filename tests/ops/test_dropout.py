"""The dropout mask: the published hash, the right rate, and independence along every coordinate."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from minisobert.hashing import lowbias32
from minisobert.ops import Dropout, drop

P = 0.1


def lowbias32_of_the_publication(x: int) -> int:
    """The hash of one value, translated from the article's C, in uint32 arithmetic."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def features(step=0, layer=0, site="ffn_output", seed=1, token_offset=0, shape=(512, 512)) -> np.ndarray:
    """Which elements of the hidden states are dropped."""
    dropout = Dropout.for_step(P, seed, step, layers=3).at(layer, site)
    return (drop(torch.ones(shape), dataclasses.replace(dropout, token_offset=token_offset)) == 0).numpy()


def pairs(heads=4, tokens=256, **offsets) -> np.ndarray:
    """Which elements (heads, queries, keys) of the attention probabilities are dropped."""
    dropout = dataclasses.replace(Dropout.for_step(P, 1, 0, layers=3).at(1, "attention"), **offsets)
    return ~dropout.keeps(dropout.row_hash(0, tokens)[:, None], dropout.key_hash(heads, 0, tokens)[:, None]).numpy()


def test_the_mask_is_the_published_hash_bit_for_bit():
    values = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1, *range(10**9, 10**9 + 50)]
    expected = [lowbias32_of_the_publication(x) for x in values]
    assert [lowbias32(x) for x in values] == expected
    assert lowbias32(np.array(values, dtype=np.uint32)).tolist() == expected
    assert lowbias32(torch.tensor(values)).tolist() == expected

    dropout = Dropout.for_step(P, seed=7, step=3, layers=2).at(1, "attention_output")
    key = int(dropout.keys) % 2**32
    dropped = drop(torch.ones(8, 5), dataclasses.replace(dropout, token_offset=1_000)) == 0
    for i in range(8):
        row = lowbias32_of_the_publication(lowbias32_of_the_publication(1_000 + i) ^ key)
        for j in range(5):
            assert dropped[i, j] == is_dropped(row, lowbias32_of_the_publication(j))


def is_dropped(row: int, column: int) -> bool:
    product = (row | 1) * (column | 1) % 2**32
    signed = product - 2**32 if product >= 2**31 else product
    return signed < round(P * 65_536) * 2**16 - 2**31


def test_head_and_key_token_select_the_attention_mask_bit_for_bit():
    dropped = pairs(heads=3, tokens=4, token_offset=70, head_offset=5)
    key = int(Dropout.for_step(P, 1, 0, layers=3).at(1, "attention").keys) % 2**32
    hashed = lowbias32_of_the_publication
    for head, query, token in np.ndindex(3, 4, 4):
        row, column = hashed(hashed(70 + query) ^ key), hashed((5 + head) * 2**24 + 70 + token)
        assert dropped[head, query, token] == is_dropped(row, column)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_p_and_the_mean_is_kept(p):
    dropout = Dropout.for_step(p, seed=2, step=9, layers=1).at(0, "embedding")
    y = drop(torch.ones(2_048, 512), dropout)
    n = y.numel()
    rate = float((y == 0).double().mean())
    assert abs(rate - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 1 / 65_536  # 4.5 standard errors: one run in 150,000
    kept = y[y != 0]
    assert torch.equal(kept, kept[0].expand_as(kept)) and kept[0] == pytest.approx(1 / (1 - p), rel=1e-4)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two masks, in standard errors of that of independent masks."""
    expected, n = P * P, a.size
    return float(((a & b).mean() - expected) / math.sqrt(expected * (1 - expected) / n))


def test_masks_are_independent_along_every_coordinate():
    mask = features()
    others = {
        "next token": (mask[1:], mask[:-1]),
        "next feature": (mask[:, 1:], mask[:, :-1]),
        "distant token": (mask[256:], mask[:-256]),
        "distant feature": (mask[:, 128:], mask[:, :-128]),
        "transposed": (mask, mask.T),
        "next step": (mask, features(step=1)),
        "next layer": (mask, features(layer=1)),
        "other site": (mask, features(site="attention_output")),
        "other seed": (mask, features(seed=2)),
        "next micro-batch": (mask, features(token_offset=2_048)),
    }
    attention = pairs()
    others |= {
        "next head": (attention[1:], attention[:-1]),
        "next query": (attention[:, 1:], attention[:, :-1]),
        "next key": (attention[:, :, 1:], attention[:, :, :-1]),
        "query and key swapped": (attention, attention.transpose(0, 2, 1)),
        "other heads": (attention, pairs(head_offset=4)),
    }
    assert {name: z for name, pair in others.items() if abs(z := correlation(*pair)) > 4.5} == {}
    # each row and each column drops at the rate too; this bounds the largest of 512 deviations
    for axis in (0, 1):
        z = (mask.mean(axis) - P) / math.sqrt(P * (1 - P) / 512)
        assert np.abs(z).max() < 5


def structure(dropped: np.ndarray, p: float) -> dict[str, float]:
    """Measures of an (n, n) mask, in standard errors: rates of rows and columns, correlations of all pairs of rows, of
    columns and of the corners of rectangles; and its largest singular value over that of independent elements."""
    n, generator = len(dropped), np.random.default_rng(0)
    z = (dropped - p) / math.sqrt(p * (1 - p))
    rows, columns = z @ z.T / math.sqrt(n), z.T @ z / math.sqrt(n)
    np.fill_diagonal(rows, 0), np.fill_diagonal(columns, 0)
    (i, k), (j, l) = generator.integers(0, n, (2, 2, 1_000_000))
    apart = (i != k) & (j != l)
    corners = (z[i, j] * z[k, l] * z[i, l] * z[k, j])[apart]
    return {
        "rate of a row": np.abs(z.sum(1)).max() / math.sqrt(n),
        "rate of a column": np.abs(z.sum(0)).max() / math.sqrt(n),
        "spread of pairs of rows": rows.std(),
        "spread of pairs of columns": columns.std(),
        "pair of rows": np.abs(rows).max(),
        "pair of columns": np.abs(columns).max(),
        "rectangles": abs(corners.mean()) * math.sqrt(len(corners)),
        "singular value": np.linalg.norm(z, 2) / (2 * math.sqrt(n)),
    }


# bounds for the largest of a million pairs, whose distribution has long tails at small rates; with one hash less, the
# measures exceed them
ALLOWED = {
    "rate of a row": 5, "rate of a column": 5, "spread of pairs of rows": 1.01, "spread of pairs of columns": 1.01,
    "pair of rows": 7.5, "pair of columns": 7.5, "rectangles": 4.5, "singular value": 1.03,
}  # fmt: skip


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_mask_has_no_more_structure_than_independent_draws(p):
    def mask(step: int, head: int, n: int = 1_024) -> np.ndarray:
        dropout = dataclasses.replace(Dropout.for_step(p, 1, step, layers=1).at(0, "attention"), head_offset=head)
        return ~dropout.keeps(dropout.row_hash(0, n)[:, None], dropout.key_hash(1, 0, n)[0]).numpy()

    for step, head in ((0, 0), (1, 5), (77, 11)):
        found = structure(mask(step, head), p)
        assert {name: value for name, value in found.items() if not value < ALLOWED[name]} == {}
    # two masks that are too simple: with a sum instead of the product, and with factors that are not hashes
    n = np.arange(1_024, dtype=np.uint32)
    hashes = lowbias32(n), lowbias32(n + np.uint32(1 << 24))
    for bits in (hashes[0][:, None] + hashes[1], (2 * n[:, None] + 1) * (hashes[1] | np.uint32(1))):
        found = structure(bits < p * 2**32, p)
        assert any(value > 2 * ALLOWED[name] for name, value in found.items()), found


def test_a_part_of_the_batch_has_its_part_of_the_mask():
    whole = features(shape=(64, 32))
    assert (features(shape=(16, 32), token_offset=48) == whole[48:]).all()
    attention = pairs(heads=4, tokens=64)
    assert (pairs(heads=2, tokens=16, token_offset=48, head_offset=2) == attention[2:, 48:, 48:]).all()


def test_no_dropout_costs_nothing():
    assert Dropout.for_step(0.0, seed=0, step=0, layers=1) is None
