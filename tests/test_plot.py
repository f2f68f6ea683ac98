"""Plots of runs: their panels, their curves, and labels that do not cover each other."""

from __future__ import annotations

import json
import math
import random
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisobert import plot
from minisobert.training.meter import dollars, elapsed
from minisobert.training.run import read_metrics

pytest.importorskip("matplotlib")
from matplotlib.text import Text


def write(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def lines(steps: int = 40, price: float = 0.0, every: int = 10, level: float = 4.0) -> list[dict]:
    """Metrics as train.py writes them: 1,000 row positions per step, of which 900 are real, and 300 per second."""
    found = []
    for step in range(1, steps + 1):
        line = {"step": step, "positions": 1_000 * step, "tokens": 900 * step, "loss": level + 4 / step, "lr": 1e-3,
                "grad_norm": 1.0, "tokens_per_second": 300.0, "dollars": dollars(3 * step, 8, price)}  # fmt: skip
        found.append(line | ({"validation_loss": level + 2 / step} if step % every == 0 else {}))
    return found


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a plot and returns its axes: (the large one, the small ones by title)."""
    plt = plot.pyplot()

    def draw(runs: list[Path], picture=plot.plot_all, **options):
        plt.close("all")
        with monkeypatch.context() as patch:
            patch.setattr(plt, "close", lambda figure: None)
            picture(runs, tmp_path / "picture.png", **options)
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        (large,) = (axes for axes in plt.gcf().axes if axes.get_title("left").startswith("Loss"))
        return large, {axes.get_title("left"): axes for axes in plt.gcf().axes if axes is not large}

    yield draw
    plt.close("all")


def data(line) -> tuple[list, list]:
    return list(line.get_xdata()), list(line.get_ydata())


def test_a_picture_shows_what_there_is_by_now(tmp_path, draw):
    first, second, third = ({"step": n, "positions": n * 1_000_000, "loss": 6.0 - n} for n in (1, 2, 3))
    large, small = draw([write(tmp_path / "one", [first])])
    assert small == {} and data(large.lines[1]) == ([1e6], [5.0]) and large.lines[1].get_marker() == "."
    large, _ = draw([write(tmp_path / "before", [first, second])])  # the first evaluation
    assert data(large.lines[1]) == ([1e6, 2e6], [5.0, 4.0]) and large.lines[1].get_marker() == ""
    diverged = [first | {"validation_loss": 4.5}, second | {"loss": None, "validation_loss": None}, third]
    large, _ = draw([write(tmp_path / "diverged", diverged)])
    raw, smooth, held_out = (data(line) for line in large.lines)
    assert held_out == ([1e6], [4.5]) and raw[0] == smooth[0] == [1e6, 2e6, 3e6]
    assert smooth[1][0] == 5.0 and math.isnan(smooth[1][1]) and smooth[1][2] == 3.0


def test_panels_are_those_of_which_a_run_has_figures(tmp_path, draw):
    with_price, without = write(tmp_path / "priced", lines(price=2.0)), write(tmp_path / "free", lines(20, every=99))
    titles = ["loss over time", "loss over cost", "learning rate", "norm of the gradient", "tokens a second"]
    large, small = draw([without])
    assert list(small) == [title for title in titles if title != "loss over cost"]
    large, small = draw([without, with_price])
    assert list(small) == titles
    assert small["loss over time"].get_xlabel() == "minutes of training" and len(small["loss over cost"].lines) == 2
    assert data(small["loss over cost"].lines[0])[0][-1] == pytest.approx(40 * 3 / 3600 * 8 * 2)
    assert data(small["learning rate"].lines[1]) == ([1_000.0 * n for n in range(1, 41)], [1e-3] * 40)
    assert [text.get_text() for text in large.texts[1:]] == ["free 4.20", "priced 4.05"]  # training, held out
    large, small = draw([with_price], plot.plot, entropy=6.5)
    assert small == {} and [text.get_text() for text in large.texts] == [
        "training 4.10", "held out 4.05", "unigram entropy\nof the corpus 6.50"
    ]  # fmt: skip


def test_a_spike_of_the_norm_leaves_the_rest_to_be_seen(tmp_path, draw):
    spiked = lines()
    _, small = draw([write(tmp_path / "calm", spiked)])
    assert small["norm of the gradient"].get_yscale() == "linear"
    spiked[5]["grad_norm"] = 1e6
    _, small = draw([write(tmp_path / "spiked", spiked)])
    assert small["norm of the gradient"].get_yscale() == "log"


def test_the_labels_of_eight_runs_that_end_alike_stand_apart_in_their_order(tmp_path, draw):
    levels = random.Random(1).sample([4 + n / 1_000 for n in range(8)], 8)
    runs = [write(tmp_path / f"run-of-a-rather-long-name-{level}", lines(level=level)) for level in levels]
    runs.append(write(tmp_path / "short", lines(5, level=0.5)))
    large, _ = draw(runs)
    labels = large.texts[1:]
    large.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in labels]  # without the lines that lead to them
    right = large.figure.bbox.x1
    for i, j in combinations(range(9), 2):
        assert not boxes[i].overlaps(boxes[j]) and boxes[i].x1 <= right
        if i < j < 8:
            assert (boxes[i].y0 < boxes[j].y0) == (levels[i] < levels[j])
    assert [text.get_color() for text in labels] == [*plot.COLORS, plot.COLORS[0]]
    assert large.lines[-2].get_linestyle() == "--"  # the ninth run has the first one's colour


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 400)), min_size=1, max_size=12))
def test_spreading_parts_what_would_cover_each_other_and_leaves_the_rest(places):
    boxes = [(100.0 * x, 100.0 * x + 150, float(y), 20.0) for x, y in places]
    found = plot.spread(boxes, 0, 400)
    for (i, one), (j, other) in combinations(enumerate(boxes), 2):
        if abs(one[0] - other[0]) <= 150:
            assert abs(found[i] - found[j]) > 19
            assert (found[i] - found[j]) * (one[2] - other[2]) >= 0
    if all(abs(a[2] - b[2]) >= 20 for a, b in combinations(boxes, 2)):
        assert found == [box[2] for box in boxes]


def test_runs_of_the_same_name_are_told_apart_by_the_folders_above(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plot.names([Path("a/run"), Path("b/run")]) == ["a/run", "b/run"]
    assert plot.names([Path("x/a/run"), Path("y/a/run"), Path("z")]) == ["x/a/run", "y/a/run", "z"]
    assert plot.names([Path("run"), Path("run/")]) == ["run", "run"]
    assert plot.names([Path(".")]) == [tmp_path.name]
    (long,) = plot.names([Path("n" * 30 + "\x1b" + "m" * 30)])
    assert len(long) == plot.LONGEST and "…" in long


def test_numbers_have_their_units():
    assert [plot.short(n) for n in (0, 0.5, 999, 1_500, 2e7, 2.7e10)] == ["0", "0.5", "999", "1.5 k", "20 M", "27 B"]


def test_time_is_that_of_the_steps_and_goes_on_where_a_run_was_resumed():
    found = lines()
    assert elapsed(found) == pytest.approx([3.0 * n for n in range(1, 41)])
    for line in found[20:]:  # on a machine with half the speed
        line["tokens_per_second"] = 150.0
    assert elapsed(found)[-1] == pytest.approx(3 * 20 + 6 * 20)
    assert all(map(math.isnan, elapsed([{"step": 1, "positions": 9, "loss": 1.0}])))


@given(st.lists(st.sampled_from([1.0, 2.0, 5.0, math.nan]), min_size=1), st.integers(1, 9))
def test_means_leave_out_what_is_not_finite(values, width):
    for i, mean in enumerate(plot.moving_mean(values, width)):
        window = [v for v in values[max(i - width + 1, 0) : i + 1] if v == v]
        assert mean == pytest.approx(sum(window) / len(window)) if window else math.isnan(mean)


def test_the_command_writes_beside_the_metrics_and_a_mistake_is_one_line(tmp_path, capsys):
    run, empty = write(tmp_path / "run", lines()), write(tmp_path / "empty", [])
    nan = write(tmp_path / "nan", [line | {"loss": None} for line in lines(every=99)])
    plot.main([str(run), str(nan)])
    said = capsys.readouterr()
    assert said.out == f"{run / 'loss.png'}\n" and (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert said.err == f"{nan}: no step has a finite loss; its line is left out\n" and read_metrics(nan)
    for argv, message in (
        ([str(run), str(tmp_path)], "holds no run (no metrics.jsonl)"),
        ([str(empty)], "is empty: the run has made no step yet"),
        ([str(run), "--png", f"{tmp_path}/no/such.png"], "/no/such.png: No such file or directory"),
    ):
        with pytest.raises(SystemExit) as left:
            plot.main(argv)
        error = capsys.readouterr().err
        assert left.value.code == 2 and error.count("\n") == 1 and message in error
