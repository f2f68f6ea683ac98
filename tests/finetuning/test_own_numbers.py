"""finetune.py --number: numbers are learnt, reported, saved, loaded, exported and predicted, always as themselves."""

from __future__ import annotations

import csv
import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
import minisobert
from minisobert.config import PRESETS, ModelConfig
from minisobert.corpus import tokenizer
from minisobert.finetuning import apply, baselines, chat, compare, encoder, evaluation, loop, standard
from minisobert.finetuning.config import FineTuneConfig, config_class
from minisobert.finetuning.start import read_data
from minisobert.hub.__main__ import main as hub
from minisobert.tasks import labels
from minisobert.tasks.dataset import Dataset, Example
from tests.tasks.test_tasks import table as csv_of

WORDS = [a + b for a in ("ba", "du", "fi", "ko", "ze") for b in ("n", "r", "st", "m")]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64, "positions": 64}
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig(**sizes, architecture="modernbert"))
    monkeypatch.setitem(PRESETS, "old", ModelConfig(**sizes))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.set_num_threads(1)


def table(path: Path, n: int = 240) -> Path:
    """A table with years, which the share of words in "ba" and "du" tells; two rows have none."""
    draw = random.Random(0)
    texts = [draw.choices(WORDS, k=6) for _ in range(n)]
    rows = [(" ".join([*t, str(i)]), 2000 + 4 * sum(w[:2] in ("ba", "du") for w in t)) for i, t in enumerate(texts)]
    return csv_of(path, "text,year", [*rows, ("ban", "1,999"), ("dun", "")])


def fine_tune(folder: Path, out: Path, *options: str) -> dict:
    words = ["--task", "labels", "--data", str(folder / "t.csv"), "--label", "year", "--number", "--out", str(out)]
    assert finetune.main([*words, *options]) == 0
    return json.loads((out / "metrics.json").read_text())


MADE = ["--epochs", "6", "--dropout", "0", "--learning-rate", "5e-3", "--tokens-per-batch", "200"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with the results "tiny", "old", "tfidf" and "hf"; the last continues from an export of "tiny"."""
    folder = tmp_path_factory.mktemp("numbers")
    with pytest.MonkeyPatch.context() as patch:
        small.__wrapped__(patch)
        (folder / "tokenizer.model").write_bytes(tokenizer.train([" ".join(WORDS), "0123456789"] * 5, 320))
        table(folder / "t.csv")
        for name in ("tiny", "old"):
            fine_tune(folder, folder / name, "--model", f"random:{name}", "--tokenizer",
                      str(folder / "tokenizer.model"), *MADE)  # fmt: skip
        fine_tune(folder, folder / "tfidf", "--model", "tfidf", "--seeds", "2")
        hub(["export", str(folder / "tiny"), "--out", str(folder / "tiny-exported")])
        described = json.loads((folder / "tiny-exported/config.json").read_text())
        assert described.pop("problem_type") == "regression"  # as in folders of other people, who left it out
        (folder / "tiny-exported/config.json").write_text(json.dumps(described))
        fine_tune(folder, folder / "hf", "--model", f"hf:{folder / 'tiny-exported'}", *MADE[2:], "--epochs", "1")
    return folder


def predictions(folder: Path) -> list[dict]:
    with open(folder / "predictions.csv", newline="") as file:
        return [*csv.DictReader(file)]


@pytest.mark.parametrize("model", ["tiny", "old", "tfidf", "hf"])
def test_it_is_learnt_and_what_was_kept_gives_the_number_itself(model, results, capsys, tmp_path):
    found = json.loads((results / model / "metrics.json").read_text())
    mean = found["beside"]["always the mean of train"]
    assert found["mean"]["r2"] > 0.6 and found["mean"]["rmse"] < mean["rmse"] / 1.5 and mean["r2"] <= 0
    rows = predictions(results / model)
    data = labels.read([results / "t.csv"], 0, label="year", number=True)
    assert [float(row["label"]) for row in rows] == [e.value for e in data.test]
    loaded = minisobert.load(results / model)
    numbers = loaded.numbers([e.text for e in data.test])
    assert numbers.shape == (len(rows),) and abs(numbers.mean() - 2010) < 4 and loaded.labels == ("year",)
    np.testing.assert_allclose(numbers, [float(row["predicted"]) for row in rows], rtol=1e-6)
    error = numbers - [e.value for e in data.test]
    assert found["mean"]["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
    assert loaded.numbers([]).shape == (0,)
    with pytest.raises(ValueError, match=r"predicts a number, year, not classes; call numbers\(texts\)"):
        loaded.classify(["a"])
    assert {p.name for p in (results / model).iterdir()} == {
        "metrics.json", "model", "predictions.csv", "report.md", "scatter.png",
    }  # fmt: skip
    (tmp_path / "new.txt").write_text("ban dun ban\n\nko ze\n")
    expected = loaded.numbers(["ban dun ban", "ko ze"])
    capsys.readouterr()
    finetune.main(["--predict", str(tmp_path / "new.txt"), "--model", str(results / model)])
    assert capsys.readouterr().out == f"{expected[0]:.6g}\tban dun ban\n\n{expected[1]:.6g}\tko ze\n"
    for kind in ("jsonl", "csv"):
        out = tmp_path / f"out.{kind}"
        finetune.main(["--predict", str(tmp_path / "new.txt"), "--model", str(results / model), "--out", str(out)])
        with open(out, newline="") as file:
            written = [*map(json.loads, file)] if kind == "jsonl" else [*csv.DictReader(file)]
        assert written[1]["number"] in (None, "") and list(written[0]) == ["line", "text", "number"]
        np.testing.assert_allclose([float(written[i]["number"]) for i in (0, 2)], expected, rtol=1e-6)


def test_the_report_tells_errors_beside_those_of_the_mean(results):
    found = json.loads((results / "tfidf/metrics.json").read_text())
    report = (results / "tfidf/report.md").read_text()
    mean = found["beside"]["always the mean of train"]
    assert f"| always the mean of train | {mean['rmse']:.4g} | {mean['mae']:.4g} |" in report
    assert "![true and predicted numbers]" in report
    assert "row left out, year is not a number like -1234.5 or 1e3: it has a comma (first: line 242)" in report
    for absent in ("confusion", "curves.png", "## Classes", "accuracy"):
        assert absent not in report
    rows = predictions(results / "tfidf")
    errors = [abs(float(row["label"]) - float(row["predicted"])) for row in rows]
    worst = rows[int(np.argmax(errors))]
    truth, predicted = float(worst["label"]), float(worst["predicted"])
    assert f"1. `{worst['id']}`: **{truth:g}**, predicted **{predicted:g}**" in report
    assert (results / "tfidf/scatter.png").stat().st_size > 5_000


@pytest.mark.parametrize("format", ["modernbert", "megatron-bert", "xlm-roberta-xl"])
def test_transformers_gives_the_same_number(format, results, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, out = results / ("tiny" if format == "modernbert" else "old"), tmp_path / "exported"
    hub(["export", str(model), "--out", str(out), "--as", format])
    texts = ["ban dun ban", "ko ze fin", "ban " * 20]
    numbers = minisobert.load(model).numbers(texts)
    described = json.loads((out / "config.json").read_text())
    assert described["problem_type"] == "regression" and described["id2label"] == {"0": "year"}
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert theirs.config.num_labels == 1
    for options in ({"function_to_apply": "none"}, {}):
        pipe = transformers.pipeline(
            "text-classification", model=theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(out), **options
        )
        np.testing.assert_allclose([each["score"] for each in pipe(texts)], numbers, rtol=0, atol=1e-5 * 2_000)
    again = minisobert.load(out)
    np.testing.assert_allclose(again.numbers(texts), numbers, rtol=1e-7)
    assert again.labels == ("year",)
    card = (out / "README.md").read_text()
    assert 'function_to_apply="none"' in card and "to predict the number `year`" in card and "top_k" not in card
    assert "| on test | 1 seed | always the mean of train |" in card


def test_a_model_of_transformers_is_kept_as_one_of_regression(results):
    transformers = pytest.importorskip("transformers")
    texts = ["ban dun ban", "ko ze fin"]
    pipe = transformers.pipeline("text-classification", str(results / "hf/model"))
    numbers = minisobert.load(results / "hf").numbers(texts)
    np.testing.assert_allclose([each["score"] for each in pipe(texts)], numbers, rtol=1e-6)


def test_standard_scores_are_exported_within_1e_5(results, tmp_path):
    """The same without the mean of 2010, at which the last digit of fp32 is 1e-4."""
    transformers = pytest.importorskip("transformers")
    network, _, _ = apply.open_fine_tuned(results / "old")
    with torch.no_grad():
        network.module.classifier.bias -= 2010
    network.save(tmp_path)
    from minisobert.hub import export

    out = tmp_path / "out"
    out.mkdir()
    export.write(out, export.Source(network.module, network.tokenizer, "SequenceClassification", 0.0, ["x"],
                                    number=True), "xlm-roberta-xl")  # fmt: skip
    text = "ban dun ko ze"
    pipe = transformers.pipeline("text-classification", str(out), function_to_apply="none")
    (p,) = apply.probabilities(network, [Example("", text)])
    assert pipe(text)[0]["score"] == pytest.approx(p[0, 0], abs=1e-5) and minisobert.load(out).numbers([text]) == p


def test_a_network_in_bf16_gives_years_and_not_decades(results, monkeypatch):
    """As on a GPU, where parameters have the 8 significant bits of bf16: 2010 would become 2016."""
    made = encoder.Network.__init__

    def in_bf16(self, *arguments, **options):
        made(self, *arguments, **options)
        self.dtype = torch.bfloat16

    monkeypatch.setattr(encoder.Network, "__init__", in_bf16)
    config = config_class()(task="labels", model="random:tiny", data=(str(results / "t.csv"),), out="x", label="year",
                            number=True, tokenizer=str(results / "tokenizer.model"), dropout=0.0, epochs=6,
                            learning_rate=5e-3, tokens_per_batch=200)  # fmt: skip
    data = read_data(config)
    outcome = encoder.Start(config).train(data, 1, partial(evaluation.dev_score, data))
    errors = np.concatenate(outcome.test)[:, 0] - [e.value for e in data.test]
    assert np.abs(errors).mean() < 2 and outcome.network.module.classifier.bias.dtype == torch.float32
    again = loop.predict(outcome.network, outcome.network.encode(data.dev))
    np.testing.assert_allclose(np.concatenate(again), np.concatenate(outcome.dev), atol=0.1)


def test_learning_does_not_depend_on_the_unit(results):
    """Metres or miles, from 0 or from sea level: the networks differ only in their last layer."""
    found = []
    for scale, shift in ((1.0, 0.0), (1e3, -5e4)):
        draw = random.Random(1)
        texts = [" ".join(draw.choices(WORDS, k=5)) for _ in range(60)]
        examples = [Example(str(i), t, value=t.count("ba") * scale + shift) for i, t in enumerate(texts)]
        data = Dataset(labels.TASK, ("x",), examples[:40], examples[40:50], examples[50:], number=True)
        config = FineTuneConfig("labels", "random:tiny", ("x",), "x", tokenizer=str(results / "tokenizer.model"),
                                epochs=2, learning_rate=1e-3)  # fmt: skip
        outcome = encoder.Start(config).train(data, 1, lambda found: 0.0)
        found.append((outcome, np.concatenate(outcome.test), np.concatenate(outcome.dev)))
    (one, *ours), (other, *theirs) = found
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose((b + 5e4) / 1e3, a, atol=1e-4)
    for a, b in zip(one.epochs, other.epochs):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["dev_loss"] == pytest.approx(
            b["dev_loss"], rel=1e-4
        )
    gradient = one.network.module.encoder.embeddings.word.weight, other.network.module.encoder.embeddings.word.weight
    torch.testing.assert_close(*gradient, atol=1e-4, rtol=0)


class Odd(torch.nn.Module):
    def __init__(self, bias: bool, after=lambda x: x):
        super().__init__()
        self.last, self.after = torch.nn.Linear(4, 1, bias=bias), after

    def forward(self, x):
        return self.after(self.last(x)).detach().numpy()


def test_a_network_whose_last_layer_cannot_take_the_mean_over_is_refused():
    values, x = np.array([1.0, 5.0, 9.0]), torch.randn(8, 4)
    with pytest.raises(ValueError, match="does not end in a linear layer with a bias"):
        standard.Standard(Odd(bias=False), values)
    for after, fits in ((lambda x: x, True), (torch.tanh, False)):
        module = Odd(bias=True, after=after)
        scale = standard.Standard(module, values)
        if fits:
            (before,) = scale.back([module(x)])
            scale.fold(lambda: [module(x)])  # noqa: B023
            np.testing.assert_allclose(module(x), before, rtol=1e-6)
        else:
            with pytest.raises(ValueError, match="changes the output of its last layer"):
                scale.fold(lambda: [module(x)])  # noqa: B023


def test_tfidf_is_ridge_regression(tmp_path):
    from sklearn.linear_model import Ridge

    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=5)) for _ in range(100)]
    examples = [Example(str(i), t, value=1e6 + t.count("ba")) for i, t in enumerate(texts)]
    data = Dataset(labels.TASK, ("x",), examples, examples, examples, number=True)
    config = FineTuneConfig("labels", "tfidf", ("toy",), "out")
    outcome = baselines.TfIdf(config).train(data, 1, lambda found: 0.0)  # the first penalty is kept
    x = baselines._vectorizer(min_df=2).fit_transform(texts)
    expected = Ridge(alpha=baselines.TfIdf.PENALTIES[0]).fit(x.toarray(), [e.value for e in data.train])
    np.testing.assert_allclose(np.concatenate(outcome.test)[:, 0], expected.predict(x.toarray()), atol=0.02)
    outcome.network.save(tmp_path)
    again = baselines.open_network(tmp_path, {"labels": ["x"], "number": True})
    np.testing.assert_allclose(again.predict(texts), np.concatenate(outcome.test), atol=1e-5)


def test_results_of_numbers_are_compared_by_what_has_no_unit(results):
    header, _, tiny, tfidf, *_ = compare.lines([results / "tiny", results / "tfidf"])
    assert header.endswith("| labels number year of t.csv: spearman / r2 |")
    assert tiny.startswith("| random:tiny |") and tfidf.startswith("| tfidf |") and "2 seeds" in tfidf


@pytest.mark.parametrize(
    ("options", "error"),
    [(["--class-weights"], "--class-weights is for texts of one class; with --number leave it out"),
     (["--several"], "--several is for texts with several classes, --number for texts with a number; leave one out")],
)  # fmt: skip
def test_options_of_classes_are_refused(options, error, results, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fine_tune(results, tmp_path / "out", "--model", "tfidf", *options)
    assert error in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_chat_models_are_asked_for_classes_alone(results, tmp_path, capsys):
    with pytest.raises(SystemExit):
        chat.main(["--task", "labels", "--data", str(results / "t.csv"), "--label", "year", "--number", "--model", "m",
                   "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "c.jsonl")])  # fmt: skip
    assert "a chat model is asked for one class per text; leave out --number" in capsys.readouterr().err
