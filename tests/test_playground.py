"""The guesses of the playground, and the demo's own corpus."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import train
from data import stdlib
from minisobert import inference, playground
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


def test_a_text_without_a_mask_and_a_folder_without_a_run_are_one_line(run, tmp_path, capsys):
    for main, argv, message in (
        (playground.main, [str(run), "no mask"], "the text has no [MASK]"),
        (playground.main, [str(tmp_path), "a [MASK]"], "holds no checkpoint"),
        (playground.main, [str(run), "bar [MASK] " * 3_000], "the model reads up to 2,046"),
        (playground.main, [str(run), "a [MASK]", "--best", "100000"], "best is 100,000; it must be from 1 to 400"),
        (playground.main, [str(run), "a [MASK]", "--best", "0"], "best is 0; it must be from 1 to 400"),
        (playground.main, [str(run), "a [MASK]", "--best", "-1"], "best is -1; it must be from 1 to 400"),
        (playground.main, [str(run), "a [MASK]", "--best", "many"], "'many' is not a whole number"),
    ):
        with pytest.raises(SystemExit) as left:
            main(argv)
        error = capsys.readouterr().err
        assert left.value.code == 2 and error.count("\n") == 1 and message in error


def test_a_run_that_lacks_a_file_is_named_with_it(run, tmp_path, capsys):
    other_fields = '{"tokenizer": 1, "model": {"depth": 2}}'
    for name, change, message in (
        ("tokenizer.model", Path.unlink, "holds no tokenizer.model and no tokenizer.json"),
        ("tokenizer.model", lambda path: path.write_bytes(b"x"), "tokenizer.model is the tokenizer of another model"),
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
