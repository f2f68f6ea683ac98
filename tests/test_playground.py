"""What a person looks at: guesses, plots, and the demo's own corpus."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import train
from data import stdlib
from minisobert import inference, playground, plot
from minisobert.corpus.tokenizer import CLS, MASK, SEP
from minisobert.ops import Documents
from minisobert.training.run import open_run


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    options = {"data": corpus.folder, "out": out, "preset": "tiny", "train-tokens": 8_192, "tokens-per-batch": 4_096,
               "micro-batch-rows": 2, "eval-rows": 2}  # fmt: skip
    assert train.main([word for name, value in options.items() for word in (f"--{name}", str(value))]) == 0
    return out


def test_guesses_are_the_likeliest_pieces_of_the_saved_model_where_a_mask_stands(run, capsys):
    trained = open_run(run)
    ids, places = inference.with_masks(trained, "bar[MASK] gin [MASK]")
    assert [int(ids[place]) for place in places] == [MASK, MASK] and len(places) == 2
    tokens = torch.tensor([CLS, *ids.tolist(), SEP])
    documents = Documents.from_bounds([0, len(tokens)])
    with torch.no_grad():
        logits = trained.model(tokens, torch.arange(len(tokens)), documents, torch.tensor(places) + 1)
    expected = logits[:, : trained.tokenizer.vocab_size].softmax(1)
    for row, guesses in zip(expected, inference.guess(trained, ids, places, best=4)):
        assert [p for _, p in guesses] == pytest.approx(row.sort(descending=True).values[:4].tolist())
        assert guesses[0][0] == trained.tokenizer.decode([int(row.argmax())])
    playground.main([str(run), "bar [MASK]", "--best", "2"])
    assert capsys.readouterr().out.splitlines()[0] == "bar [MASK]"


def test_a_mask_takes_the_space_before_it(run):
    trained = open_run(run)
    found = [inference.with_masks(trained, text) for text in ("bar [MASK] gin", "bar[MASK] gin")]
    assert found[0][0].tolist() == found[1][0].tolist() and found[0][1] == found[1][1]
    assert trained.tokenizer.decode(found[0][0][found[0][1][0] + 1 :]) == " gin"


def test_a_text_without_a_mask_a_folder_without_a_run_and_an_empty_plot_are_one_line(run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    for main, argv, message in (
        (playground.main, [str(run), "no mask"], "the text has no [MASK]"),
        (playground.main, [str(tmp_path), "a [MASK]"], "holds no checkpoint"),
        (playground.main, [str(run), "bar [MASK] " * 3_000], "the model reads up to 2,046"),
        (playground.main, [str(run), "a [MASK]", "--best", "100000"], "best is 100,000; it must be from 1 to 400"),
        (playground.main, [str(run), "a [MASK]", "--best", "0"], "best is 0; it must be from 1 to 400"),
        (playground.main, [str(run), "a [MASK]", "--best", "-1"], "best is -1; it must be from 1 to 400"),
        (playground.main, [str(run), "a [MASK]", "--best", "many"], "'many' is not a whole number"),
        (plot.main, [str(tmp_path)], "holds no run (no metrics.jsonl)"),
        (plot.main, [str(empty)], "is empty: the run has made no step yet"),
        (plot.main, [str(run), "--png", f"{tmp_path}/no/such.png"], "/no/such.png: No such file or directory"),
    ):
        with pytest.raises(SystemExit) as left:
            main(argv)
        error = capsys.readouterr().err
        assert left.value.code == 2 and error.count("\n") == 1 and message in error


def test_a_run_that_lacks_a_file_is_named_with_it(run, tmp_path, capsys):
    other_fields = '{"tokenizer": 1, "model": {"depth": 2}}'
    for name, change, message in (
        ("tokenizer.model", Path.unlink, "holds no tokenizer.model and no tokenizer.json"),
        ("tokenizer.model", lambda path: path.write_bytes(b"x"), "tokenizer.model is another model's"),
        ("config.json", Path.unlink, "config.json: No such file or directory"),
        ("config.json", lambda path: path.write_text("{"), "config.json is damaged"),
        ("config.json", lambda path: path.write_text("{}"), "config.json is damaged"),
        ("config.json", lambda path: path.write_text(other_fields), "config.json is damaged"),
    ):
        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        change(copy / name)
        with pytest.raises(SystemExit) as left:
            playground.main([str(copy), "a [MASK]"])
        error = capsys.readouterr().err
        assert left.value.code == 2 and error.count("\n") == 1 and message in error, error
        shutil.rmtree(copy)


def test_the_plot_is_a_png_beside_the_metrics(run):
    pytest.importorskip("matplotlib")
    plot.main([str(run)])
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert plot.moving_mean([1.0, 2.0, 6.0], 2) == [1.0, 1.5, 4.0]


def drawn(folder: Path, lines: list[dict], monkeypatch) -> tuple[dict, Path]:
    """{label: (x, y)} of the curves that plot draws of these metrics, and the PNG."""
    plt = plot.pyplot()
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", lambda figure: None)
        plot.main([str(folder)])
    (axes,) = plt.gcf().axes
    curves = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.lines}
    plt.close("all")
    return curves, folder / "loss.png"


def test_a_plot_shows_what_there_is_by_now(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    line = {"step": 1, "positions": 1_000_000, "loss": 5.0}
    later = {"step": 2, "positions": 2_000_000, "loss": 4.0}
    curves, png = drawn(tmp_path / "first", [line], monkeypatch)
    assert png.read_bytes().startswith(b"\x89PNG") and set(curves) == {"_child0", "first: training"}
    assert [list(xy) for xy in curves["first: training"]] == [[1.0], [5.0]]
    curves, _ = drawn(tmp_path / "before", [line, later], monkeypatch)  # the first evaluation
    assert [list(xy) for xy in curves["before: training"]] == [[1.0, 2.0], [5.0, 4.0]]
    lines = [{**line, "validation_loss": 4.5}, {**later, "loss": None, "validation_loss": None}, {**later, "step": 3}]
    curves, _ = drawn(tmp_path / "diverged", lines, monkeypatch)
    x, y = curves["diverged: held out"]
    assert list(x) == [1.0, 2.0] and y[0] == 4.5 and math.isnan(y[1])
    x, y = curves["diverged: training"]
    assert y[0] == 5.0 and math.isnan(y[1]) and y[2] == 4.0


def test_means_leave_out_what_is_not_finite():
    assert plot.moving_mean([1.0, math.nan, 5.0], 2) == [1.0, 1.0, 5.0]
    assert plot.moving_mean([1.0, math.nan, 5.0], 3) == [1.0, 1.0, 3.0]
    assert math.isnan(plot.moving_mean([math.nan], 1)[0])


def test_functions_and_classes_of_a_library_become_posts(tmp_path):
    (tmp_path / "pkg" / "tests").mkdir(parents=True)
    (tmp_path / "pkg" / "tests" / "test_a.py").write_text("def left_out(): pass\n")
    (tmp_path / "pkg" / "broken.py").write_text("def (\n")
    source = '"""About."""\n\ndef add(a, b=1):\n    """Sum."""\n    # plus\n    return a + b\n'
    source += "\nclass C:\n    def m(self): pass\n"
    (tmp_path / "pkg" / "a.py").write_text(source)
    assert list(stdlib.posts(tmp_path)) == [
        "pkg.a\n\nAbout.",
        "pkg.a.add(a, b=1)\n\nSum.\n\n    # plus\n    return a + b",
        "pkg.a.C.m(self)\n\n    def m(self): pass",
    ]


def test_an_option_is_no_file_to_write(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, status in ((["--help"], 0), (["--no-such-option"], 2), ([], 2)):
        with pytest.raises(SystemExit) as left:
            stdlib.main(words)
        assert left.value.code == status
    assert list(tmp_path.iterdir()) == []
