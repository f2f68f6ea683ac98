"""minisobert.load: a loaded model says what the model computes, one text at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import finetune
import minisobert
import train
from minisobert import embed, inference, tasks
from minisobert.hub.__main__ import main as hub
from minisobert.ops import Documents
from minisobert.tasks.dataset import Dataset, Example
from minisobert.training.run import open_run
from tests.conftest import sentences
from tests.runs import make_small, words

TEXTS = [*sentences(40, seed=5), "", "x", " ".join(sentences(60, seed=6))]


@pytest.fixture(scope="module", params=["tiny", "modern-tiny"])
def run(request, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setitem)
        more = {"muon_learning_rate": 8e-3, "learning_rate": 8e-3} if request.param != "tiny" else {}
        train.main(words(corpus, out, preset=request.param, steps=3, **more))
    return out


def state_of(trained, text: str) -> torch.Tensor:
    special, longest = trained.tokenizer.vocabulary, trained.model.config.positions - 2
    ids = torch.tensor([special.cls, *trained.tokenizer.encode(text)[:longest].tolist(), special.sep])
    return trained.model.encoder(ids, torch.arange(len(ids)), Documents.from_bounds([0, len(ids)]))


def test_vectors_are_the_means_of_final_states(run, capsys, monkeypatch):
    monkeypatch.setattr(inference, "EVAL_TOKENS", 300)  # several batches
    monkeypatch.setattr(inference, "CHUNK", 7)
    model, trained = minisobert.load(run), open_run(run)
    trained.model.config.__dict__["positions"] = model.model.config.__dict__["positions"] = 100  # cuts the last text
    found = model.embed(TEXTS)
    assert found.dtype == np.float32 and found.shape == (len(TEXTS), 64)
    with torch.no_grad():
        expected = torch.stack([state_of(trained, text).mean(0) for text in TEXTS]).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    cut = sum(len(trained.tokenizer.encode(text)) > 98 for text in TEXTS)
    assert f"{cut} of {len(TEXTS)} texts were cut to their first 98 tokens" in capsys.readouterr().err
    assert 1 < cut < 20
    assert model.embed([]).shape == (0, 64)


def test_guesses(run):
    model = minisobert.load(run)
    (guesses,) = model.fill_mask("bar [MASK] gin", best=3)
    assert len(guesses) == 3 and guesses[0][1] >= guesses[1][1] > 0
    for wrong, expected in (("no mask", r"no \[MASK\]"), ("[MASK] " + "bar " * 3_000, "tokens; the model reads up to")):
        with pytest.raises(ValueError, match=expected):
            model.fill_mask(wrong)
    with pytest.raises(ValueError, match="is not a model that classifies"):
        model.classify(["a"])
    with pytest.raises(ValueError, match="give a list"):
        model.embed("a")


def test_vectors_in_a_file(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:9]))
    out = tmp_path / "vectors.npy"
    embed.main([str(run), str(tmp_path / "posts.jsonl"), "--out", str(out)])
    assert "9 texts, 64 numbers each" in capsys.readouterr().out
    expected = minisobert.load(run).embed(TEXTS[:9])
    capsys.readouterr()
    assert np.array_equal(np.load(out), expected)
    assert [path.name for path in tmp_path.glob("*vectors*")] == ["vectors.npy"]
    for wrong in (str(out), str(tmp_path / "vectors"), str(tmp_path / "nowhere" / "v.npy")):
        with pytest.raises(SystemExit) as left:
            embed.main([str(run), str(tmp_path / "posts.jsonl"), "--out", wrong])
        assert left.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert np.array_equal(np.load(out), expected)


def toy(kind: str):
    """A toy task: does a text contain "bar", or which words are "bar"?"""
    task = tasks.TASKS["quality" if kind == "sequence" else "ner"]

    def read(paths, seed, **options) -> Dataset:
        examples = []
        for i, text in enumerate(sentences(60, seed=7)):
            found = tuple(text.split())
            if kind == "sequence":
                examples.append(Example(str(i), text, int("bar" in found)))
            else:
                examples.append(Example(str(i), words=found, tags=tuple(int(word == "bar") for word in found)))
        return Dataset(task, ("no", "yes") if kind == "sequence" else ("O", "B-Bar"), examples, examples, examples)

    return task, read


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_what_was_fine_tuned_says_what_predict_prints(kind, run, tmp_path, monkeypatch, capsys):
    from dataclasses import replace

    task, read = toy(kind)
    monkeypatch.setitem(tasks.TASKS, task.name, replace(task, read=read))
    out = tmp_path / "out"
    finetune.main(["--task", task.name, "--model", str(run), "--data", "toy", "--out", str(out), "--epochs", "8",
                   "--tokens-per-batch", "400", "--learning-rate", "5e-3", "--dropout", "0"])  # fmt: skip
    model, texts = minisobert.load(out), ["bar sees bar", "the  dog\tand bar", "dog", "an other"]
    capsys.readouterr()
    (tmp_path / "posts.txt").write_text("".join(f"{text}\n" for text in texts))
    finetune.main(["--predict", str(tmp_path / "posts.txt"), "--model", str(out)])
    printed = capsys.readouterr().out.splitlines()
    if kind == "sequence":
        shares = model.classify(texts)
        assert shares.shape == (4, 2) and model.labels == ("no", "yes")
        expected = ["  ".join(f"{label} {p:.1%}" for label, p in zip(model.labels, row)) for row in shares]
        assert [line.split("\t")[1] for line in printed] == expected
        hub(["export", str(out), "--out", str(tmp_path / "exported")])
        np.testing.assert_allclose(minisobert.load(tmp_path / "exported").classify(texts), shares, atol=1e-6)
        capsys.readouterr()
        model.classify([*texts, "bar " * 3_000])
        assert "1 of 5 texts were cut to their first" in capsys.readouterr().err
        with pytest.raises(ValueError, match="is not a model that tags"):
            model.entities(texts)
    else:
        found = model.entities(texts)
        assert [len(each) for each in found] == [line.count("](") for line in printed]
        for text, each in zip(texts, found):
            assert all(text[e.start : e.stop] == e.text and e.kind == "Bar" for e in each)
        assert sum(map(len, found)) > 0
        hub(["export", str(out), "--out", str(tmp_path / "exported")])
        assert minisobert.load(tmp_path / "exported").entities(texts) == found
    assert model.embed(texts).shape == (4, 64)
    with pytest.raises(ValueError, match="was fine-tuned and no longer guesses words"):
        model.fill_mask("a [MASK]")
