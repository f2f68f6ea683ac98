"""Near duplicates, compared with sets of tuples of words and with a comparison of all pairs."""

import itertools
import json
import lzma
import math
import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisobert.corpus import duplicates
from minisobert.corpus.duplicates import MISSED, bands, digest, near, repeated, shape, shingles, similarity

BODIES = Path(__file__).resolve().parents[2] / "../shared/data/text/question_bodies.jsonl.xz"


def grams(text):
    """Shingles by their definition, without NumPy. For ASCII only, since beyond it \\w is another set."""
    words = re.findall(r"[\w]+|[^\w\s]", text.lower(), re.ASCII)
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(a, b):
    return len(a & b) / len(a | b)


def sets(texts):
    found, starts = shingles(texts)
    return [set(found[a:b].tolist()) for a, b in itertools.pairwise(starts)]


short = st.text("aB _1.+\n", max_size=30)


@given(st.lists(short, min_size=2, max_size=8))
def test_sets_of_shingles_are_as_similar_as_the_sets_of_words(texts):
    hashed, written = sets(texts), list(map(grams, texts))
    for i, j in itertools.combinations(range(len(texts)), 2):
        assert jaccard(hashed[i], hashed[j]) == jaccard(written[i], written[j])


@given(st.lists(short, min_size=1, max_size=8))
def test_a_text_has_the_same_shingles_in_any_company(texts):
    assert sets(texts) == [sets([text])[0] for text in texts]


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("How do I use C++?", "how  do i use\nc++ ?", True),
        ("How do I use C++?", "How do I use C#?", False),
        ("a_b", "a b", False),
        ("Größe ändern", "grÖSSE ändern", False),  # ß is not folded to ss
        ("é", "É", True),
        ("naïve", "na ve", False),
        ("\u3000", "", True),
        ("a b c d e f", "a b c d e f a b c d e f"[:11], True),
        ("b a", "a b", False),
    ],
)
def test_what_words_are(one, other, same):
    a, b = sets([one, other])
    assert (a == b) is same


@given(st.text("ab \t\n\u00a0", max_size=12), st.text("ab \t\n\u00a0", max_size=12))
def test_digests_are_equal_where_texts_differ_in_white_space_alone(one, other):
    assert (digest(one) == digest(other)) == (one.split() == other.split())


@given(st.lists(st.integers(0, 6)))
def test_what_is_repeated(numbers):
    expected = [number in numbers[:i] for i, number in enumerate(numbers)]
    assert repeated(np.array(numbers, np.uint64)).tolist() == expected


@given(st.sets(st.integers(0, 20), min_size=1), st.sets(st.integers(0, 20), min_size=1))
def test_the_similarity_of_two_sets(a, b):
    assert similarity(np.array(sorted(a)), np.array(sorted(b))) == jaccard(a, b)


@pytest.mark.parametrize("threshold", [0.5, 0.55, 0.7, 0.8, 0.9, 0.99, 1])
def test_the_shape_misses_at_most_a_hundredth_at_the_threshold(threshold):
    b, r = shape(threshold)
    assert b * r <= duplicates.HASHES
    assert (1 - threshold**r) ** b <= MISSED


# What `near` finds


def alone(function, items):
    return ((item, function(item)) for item in items)


def read(texts, spans):
    """A corpus in which the span of text i is (i, i + 1)."""
    return [texts[i] for i, _ in spans.tolist()]


def found(texts, threshold, folder, run=alone, cut=7):
    spans = np.stack([np.arange(len(texts)), np.arange(len(texts)) + 1], axis=1)
    parts = np.split(spans, range(cut, len(texts), cut))
    result = near(partial(read, texts), spans, parts, threshold, folder, run, lambda part: None)
    assert not list(folder.iterdir())
    return result


def brute(texts):
    """(D,) the highest similarity of each text to an earlier one."""
    written = list(map(grams, texts))
    return np.array([max((jaccard(a, b) for b in written[:i]), default=0) for i, a in enumerate(written)])


def random_texts(rng):
    while True:
        yield [f"w{rng.randrange(1_000)}" for _ in range(150)]


def real_texts(rng):
    if not BODIES.exists():
        pytest.skip("the real texts are not beside this checkout (../shared/data)")
    with lzma.open(BODIES) as file:
        for line in file:
            if len(words := json.loads(line)["text"].split()) >= 150:
                yield words[:150]


def variants(texts, count, rng):
    """Texts of 150 words, each with copies in which more and more consecutive words are replaced. Their similarities to
    the original are 0.93, 0.90, 0.80 and 0.62, higher if the change is near an end and lower between two copies."""
    result = []
    for words in itertools.islice(texts, count):
        result.append(" ".join(words))
        for changes in (1, 1, 4, 12, 30):
            copy = words.copy()
            at = rng.randrange(150 - changes)
            copy[at : at + changes] = [f"new{rng.random()}"[2:] for _ in range(changes)]
            result.append(" ".join(copy))
    rng.shuffle(result)
    return result


@pytest.mark.parametrize("texts", [random_texts, real_texts])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_what_is_found_is_near_and_nearly_all_that_is_near_is_found(tmp_path, threshold, texts):
    rng = random.Random(1)
    texts = variants(texts(rng), 40, rng)
    is_near, left_out = brute(texts) >= threshold, found(texts, threshold, tmp_path)
    assert 40 < is_near.sum() < 220  # of 240: both kinds occur
    assert not (left_out & ~is_near).any()  # precision is 1, by the true similarity
    # each near text is missed with probability MISSED at most; allowed are three standard deviations above the mean
    missed, most = int((is_near & ~left_out).sum()), is_near.sum() * MISSED
    assert missed <= most + 3 * math.sqrt(most)


def test_how_often_two_texts_share_a_band_is_what_theory_says():
    """1,000 pairs of texts of 60 words that differ in 8 consecutive words: 48 of 64 runs are the same."""
    b, r = shape(0.8)
    pairs = [([f"a{i}x{k}" for k in range(60)], i) for i in range(1_000)]
    one = bands([" ".join(words) for words, _ in pairs], 0.8)
    other = bands([" ".join([*words[:52], *(f"b{i}x{k}" for k in range(8))]) for words, i in pairs], 0.8)
    expected = 1 - (1 - (48 / 64) ** r) ** b
    share = (one == other).any(axis=0).mean()
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 1_000)
    alike = (one == other).mean()  # by band: all of its r hashes agree with probability J^r
    assert abs(alike - (48 / 64) ** r) < 4 * math.sqrt(0.25 / 12_000) * 2


def test_the_result_does_not_depend_on_parts_or_on_the_order_in_which_they_are_made(tmp_path, monkeypatch):
    rng = random.Random(2)
    texts = variants(random_texts(rng), 40, rng)
    first = found(texts, 0.8, tmp_path)

    def backwards(function, items):
        items = list(items)
        done = {i: function(item) for i, item in reversed(list(enumerate(items)))}
        return ((item, done[i]) for i, item in enumerate(items))

    monkeypatch.setattr(duplicates, "_BATCH", 3)
    assert first.any()
    for cut in (1, 1_000):
        assert (found(texts, 0.8, tmp_path, run=backwards, cut=cut) == first).all()


def in_one_bucket(texts, threshold):
    return np.zeros((shape(threshold)[0], len(texts)), np.uint64)


def test_within_a_bucket_all_that_is_near_an_earlier_document_is_found(tmp_path, monkeypatch):
    """Including texts that are far from the first one in the bucket, or near one that was itself left out."""
    monkeypatch.setattr(duplicates, "bands", in_one_bucket)
    rng = random.Random(3)
    texts = variants(random_texts(rng), 16, rng)
    assert len(texts) <= duplicates.MOST
    assert (found(texts, 0.8, tmp_path) == (brute(texts) >= 0.8)).all()


def test_copies_cost_one_comparison_each_and_boilerplate_at_most_a_fixed_number(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(duplicates, "bands", in_one_bucket)
    monkeypatch.setattr(duplicates, "similarity", lambda a, b: compared.append(0) or similarity(a, b))
    monkeypatch.setattr(duplicates, "MOST", 5)
    copies = [" ".join([*(f"w{k}" for k in range(50)), str(i)]) for i in range(300)]
    assert found(copies, 0.8, tmp_path).sum() == 299
    assert len(compared) == 299

    compared.clear()
    assert not found([f"text {i}" for i in range(20)], 0.8, tmp_path).any()
    assert len(compared) == shape(0.8)[0] * sum(min(i, 5) for i in range(20))


def test_one_document_and_none_that_share_anything(tmp_path):
    assert found(["alone"], 0.8, tmp_path).tolist() == [False]
    assert found(["one", "two"], 0.8, tmp_path).tolist() == [False, False]
