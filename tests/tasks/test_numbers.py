"""Tables whose label is a number: what counts as one, what is left out with a note, and how splits are drawn."""

from __future__ import annotations

import json
from decimal import Decimal

import numpy as np
import pytest

from minisobert.tasks import labels, metrics


def read(tmp_path, rows: list, **options):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}", "score": v, **more}) + "\n" for i, v, more in rows))
    return labels.read([path], 0, label="score", number=True, **options)


def column(values) -> list:
    return [(i, value, {}) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(3, 3.0), (-2.5, -2.5), (" 7 ", 7.0), ("1e-3", 0.001), ("+.5", 0.5), ("4.", 4.0), (Decimal("1.25"), 1.25)],
)
def test_what_is_a_number(given, expected):
    assert labels.number_of({"x": given}, "x") == expected


@pytest.mark.parametrize(
    ("given", "why"),
    [("1,234", "it has a comma"), ("3,5", "it has a comma"), ("1_000", "not a number like"), ("٣", "not a number like"),
     ("0x10", "not a number like"), ("+-inf", "not a number like"), ("five", "not a number like"), ("", "without a x"),
     (None, "without a x"), ("nan", "not finite"), ("-Infinity", "not finite"), (float("nan"), "not finite"),
     ("1e999", "not finite"), (10**400, "not finite"), (True, "is not a number"), ([1], "is not a number")],
)  # fmt: skip
def test_what_is_not_a_number(given, why):
    with pytest.raises(ValueError, match=why):
        labels.number_of({"x": given}, "x")


def test_rows_without_a_number_are_left_out_and_counted(tmp_path):
    data = read(tmp_path, column([*range(40), "1,5", "2,5", None, float("nan")]))
    everything = [*data.train, *data.dev, *data.test]
    assert sorted(e.value for e in everything) == [*range(40)] and data.labels == ("score",) and data.number
    left_out = [note.partition(": ")[2] for note in data.notes if "left out" in note]
    assert left_out == [
        "2 rows left out, score is not a number like -1234.5 or 1e3: it has a comma (first: line 41)",
        "1 row left out, without a score (first: line 43)",
        "1 row left out, score is not finite (first: line 44)",
    ]
    (said,) = [note for note in data.notes if "standard deviation" in note]
    values = np.array([e.value for e in data.train])
    assert said == (f"score in train: from {values.min():g} to {values.max():g}, mean {values.mean():g}, "
                    f"standard deviation {values.std():g}")  # fmt: skip


@pytest.mark.parametrize("n", [20, 57, 1_000])
def test_every_range_of_numbers_is_in_every_split(n, tmp_path):
    values = np.random.default_rng(n).lognormal(0, 2, n)
    data = read(tmp_path, column(values))
    ranks = {value: rank for rank, value in enumerate(sorted(values))}
    ranges = min(10, max(1, n // 20))
    for part in (data.train, data.dev, data.test):
        counts = np.bincount([ranks[e.value] * ranges // n for e in part], minlength=ranges)
        assert counts.min() > 0 and counts.max() - counts.min() <= (2 if part is data.train else 1)
    assert 0.05 <= len(data.test) / n <= 0.1 + 1 / n


def test_the_same_text_with_another_number_is_told_from_a_repetition(tmp_path):
    rows = [*column(range(40)), (0, 0, {}), (1, 17, {})]
    notes = read(tmp_path, rows).notes
    assert sum("a duplicate with the same label" in note for note in notes) == 1
    assert sum("a duplicate with another label" in note for note in notes) == 1


@pytest.mark.parametrize(
    ("values", "error"),
    [([5] * 30, "every score of train is 5"), (["a"] * 3, "no row has a text and a number in score"),
     ([1e9 + i % 2 for i in range(30)], "single precision cannot tell such numbers apart"),
     ([1e300 * (-1) ** i for i in range(30)], "or cannot hold them; subtract")],
)  # fmt: skip
def test_numbers_that_cannot_be_learnt(values, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        read(tmp_path, column(values))


def test_several_numbers_a_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="leave one out"):
        read(tmp_path, column(range(30)), several=True)


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_scikit_learn_and_scipy(seed):
    sk, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 5, 60).astype(float) * 1e3**seed  # many ties
    predicted = np.round(truth / 1e3**seed + draw.normal(0, 2, 60)) * 1e3**seed
    found = metrics.of_numbers(truth, predicted)
    assert found == pytest.approx({
        "rmse": sk.mean_squared_error(truth, predicted) ** 0.5, "mae": sk.mean_absolute_error(truth, predicted),
        "spearman": stats.spearmanr(truth, predicted).statistic, "r2": sk.r2_score(truth, predicted),
    }, rel=1e-12)  # fmt: skip


def test_a_figure_without_a_denominator_is_0():
    assert metrics.of_numbers([0.1] * 3, [1, 2, 3])["r2"] == 0
    assert metrics.of_numbers([1, 2, 3], [0.1] * 3)["spearman"] == 0
    assert metrics.of_numbers([1, 2, 3], [2] * 3)["r2"] == 0
