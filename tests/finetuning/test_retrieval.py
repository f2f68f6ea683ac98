"""Embeddings trained on pairs: the loss, the gradient cache, the ranks, and a model from training to use."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune
import minisobert
from minisobert.config import PRESETS, ModelConfig
from minisobert.corpus import tokenizer
from minisobert.finetuning import baselines, report, retrieval
from minisobert.finetuning.config import config_class
from minisobert.hub.__main__ import main as hub
from minisobert.hub.weights import FORMATS
from minisobert.model import Embedder
from minisobert.tasks import metrics, pairs
from minisobert.tasks.dataset import Example
from tests.tasks.test_tasks import table as csv_of

SIZES = {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64, "positions": 64}
QUERIES = [a + b for a in ("ba", "du", "fi", "ko", "ze") for b in ("n", "r", "st", "m")]
OTHERS = [a + b for a in ("gla", "pre", "snu", "tro") for b in ("lk", "mp", "nt", "rg", "x")]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "modern-tiny", ModelConfig(**SIZES, architecture="modernbert"))
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig(**SIZES))
    torch.set_num_threads(1)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def test_the_loss_is_cross_entropy_both_ways():
    queries, others = unit(6, 8), unit(6, 8, seed=1)
    similarities, own = queries @ others.T / retrieval.TEMPERATURE, torch.arange(6)
    both = F.cross_entropy(similarities, own) + F.cross_entropy(similarities.T, own)
    loss = retrieval.contrastive_loss(queries, others, torch.zeros(6, 6, dtype=torch.bool))
    assert torch.allclose(loss, 6 * both / 2)


def test_what_belongs_together_is_no_negative():
    queries, others, together = unit(3, 8), unit(3, 8, seed=1), torch.zeros(3, 3, dtype=torch.bool)
    together[0, 1] = True
    similarities = (queries @ others.T / retrieval.TEMPERATURE).tolist()
    terms = [(0, [0, 2]), (1, [0, 1, 2]), (2, [0, 1, 2])]  # for each query, its own text and those it is told from
    rows = sum(np.logaddexp.reduce([similarities[i][j] for j in js]) - similarities[i][i] for i, js in terms)
    terms = [(0, [0, 1, 2]), (1, [1, 2]), (2, [0, 1, 2])]
    columns = sum(np.logaddexp.reduce([similarities[i][j] for i in js]) - similarities[j][j] for j, js in terms)
    assert float(retrieval.contrastive_loss(queries, others, together)) == pytest.approx((rows + columns) / 2)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer.train([" ".join(QUERIES), " ".join(OTHERS)] * 5, 340))
    return tokenizer.open_tokenizer(path)


def test_training_reads_the_first_tokens_of_a_text(results):
    settings = config_class()(
        task="pairs", model="random:modern-tiny", data=("x",), out="x", tokenizer=str(results / "tiny/model"),
        pair_tokens=8,
    )  # fmt: skip
    shorten = retrieval.Start(settings)._shortened
    assert shorten(np.arange(8)).tolist() == [*range(8)]
    assert shorten(np.arange(20)).tolist() == [*range(7), 19]  # [CLS] … [SEP]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_in_parts_are_those_of_the_whole(dropout, ours):
    """With parts of one or two texts, the sum is the gradient that autograd finds through all vectors at once."""
    model = Embedder(ModelConfig(**SIZES, architecture="modernbert")).initialise(0)
    network = retrieval.Network(model, ours, dropout)
    queries = network.encode([" ".join(QUERIES[i : i + 1 + i % 3]) for i in range(5)])
    others = network.encode([" ".join(OTHERS[i : i + 2]) for i in range(5)])
    none = torch.zeros(5, 5, dtype=torch.bool)
    loss = network.backward(queries, others, none, 12, 3)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    ids = [*queries, *others]
    lengths = np.array([len(each) for each in ids])
    parts = list(retrieval.batches(lengths, 12, np.argsort(lengths, kind="stable")))
    assert len(parts) > 3
    vectors = torch.empty(10, SIZES["hidden"])
    for i, part in enumerate(parts):
        vectors[part] = network.vectors([ids[j] for j in part], 3, i)
    whole = retrieval.contrastive_loss(vectors[:5], vectors[5:], none)
    whole.backward()
    assert loss == pytest.approx(float(whole.detach()), rel=1e-6)
    for mine, parameter in zip(found, model.parameters()):
        assert torch.allclose(mine, parameter.grad, atol=1e-6, rtol=1e-4)
    if not dropout:  # with dropout, one part drops other units than several parts
        model.zero_grad()
        assert network.backward(queries, others, none, 10_000, 3) == pytest.approx(loss, rel=1e-6)
        for mine, parameter in zip(found, model.parameters()):
            assert torch.allclose(mine, parameter.grad, atol=1e-6, rtol=1e-4)
    again = network.vectors(queries, 3, 1)
    assert torch.equal(again, network.vectors(queries, 3, 1))
    assert torch.equal(again, network.vectors(queries, 3, 2)) == (dropout == 0)


def test_ranks_are_those_of_scikit_learn():
    ranking = pytest.importorskip("sklearn.metrics")
    queries, others = unit(30, 4).numpy(), unit(30, 4, seed=1).numpy()
    task = retrieval.search([Example(str(i), f"q{i}", other=f"a{i}") for i in range(30)])
    figures = metrics.of_ranks(np.stack(retrieval.found(task, queries, others))[:, 0])
    scores = queries @ others.T
    assert figures["mrr"] == pytest.approx(ranking.label_ranking_average_precision_score(np.eye(30), scores))
    for k in (1, 10):
        assert figures[f"recall_at_{k}"] == pytest.approx(ranking.top_k_accuracy_score(np.arange(30), scores, k=k))


def test_vectors_that_are_all_the_same_find_nothing():
    task = retrieval.search([Example(str(i), f"q{i}", other=f"a{i}") for i in range(20)])
    results = retrieval.found(task, np.ones((20, 2)), np.ones((20, 2)))
    assert [rank for rank, _ in results] == [20] * 20
    assert all(first != own for (_, first), own in zip(results, task.targets))


def test_other_right_texts_neither_help_nor_hurt():
    """A query has two texts, and the other one is nearer. A repeated text is only one candidate."""
    examples = [Example("0", "q", other="a"), Example("1", "Q", other="b"), Example("2", "r", other="A ")]
    task = retrieval.search(examples, [Example("3", "s", other="c"), Example("4", "t", other="d")], most=3)
    assert task.candidates == ["a", "b", "c"] and task.targets.tolist() == [0, 1, 0]
    vectors = {"a": [0.8, 0.6], "b": [1.0, 0.0], "c": [0.9, 0.1]}
    results = retrieval.found(task, np.array([[1.0, 0.0]] * 3), np.array([vectors[c] for c in task.candidates]))
    # for the first query, c comes before its a, and b does not count; for the third, both come before its text
    assert [rank for rank, _ in results] == [2, 1, 3]
    assert [task.candidates[first] for _, first in results] == ["c", "b", "b"]


def table(path: Path, n: int = 240) -> Path:
    """An answer is its question in another language: they share no word, so that TF-IDF finds nothing."""
    draw = random.Random(0)
    chosen = [draw.sample(range(20), 3) for _ in range(n)]
    rows = [(" ".join(QUERIES[j] for j in each), " ".join(OTHERS[j] for j in sorted(each))) for each in chosen]
    return csv_of(path, "question,answer", rows)


@pytest.fixture(scope="module")
def results(tmp_path_factory, ours) -> Path:
    """A folder with the results of each architecture and of tfidf."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "tokenizer.model").write_bytes(ours.content)
    data = ["--task", "pairs", "--data", str(table(folder / "pairs.csv")), "--text", "question", "answer"]
    with pytest.MonkeyPatch.context() as patch:
        small.__wrapped__(patch)
        for preset, seeds in {"modern-tiny": 2, "tiny": 1}.items():
            options = ["--model", f"random:{preset}", "--tokenizer", str(folder / "tokenizer.model"), "--dropout", "0"]
            options += ["--epochs", "12", "--learning-rate", "1e-2", "--pairs-per-batch", "48", "--seeds", str(seeds)]
            assert finetune.main([*data, *options, "--tokens-per-batch", "300", "--out", str(folder / preset)]) == 0
        assert finetune.main([*data, "--model", "tfidf", "--out", str(folder / "tfidf")]) == 0
    return folder


def test_what_words_cannot_tell_is_learnt(results):
    found = json.loads((results / "modern-tiny/metrics.json").read_text())
    beside = found["beside"]
    assert found["mean"]["recall_at_10"] > 2 * beside["the model before this training"]["recall_at_10"]
    assert found["mean"]["mrr"] > 2 * beside["TF-IDF"]["mrr"]
    alone = json.loads((results / "tfidf/metrics.json").read_text())
    assert alone["mean"]["mrr"] == beside["TF-IDF"]["mrr"]
    report = (results / "modern-tiny/report.md").read_text()
    assert "| TF-IDF | " in report and "pairs to train on" in report and "confusion" not in report
    data = pairs.read([results / "pairs.csv"], 0, text=("question", "answer"))
    with open(results / "modern-tiny/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [e.id for e in data.test]
    best = next(each for each in found["seeds"] if each["seed"] == found["best_seed"])
    assert np.mean([1 / int(row["rank"]) for row in rows]) == pytest.approx(best["mrr"])


def test_the_loaded_model_gives_the_ranks_of_the_report(results):
    data = pairs.read([results / "pairs.csv"], 0, text=("question", "answer"))
    task = retrieval.searches(data)[1]
    model = minisobert.load(results / "modern-tiny")
    queries, candidates = (F.normalize(torch.from_numpy(model.embed(part))).numpy() for part in task[:2])
    found = retrieval.found(task, queries, candidates)
    with open(results / "modern-tiny/predictions.csv", newline="") as file:
        assert [str(rank) for rank, _ in found] == [row["rank"] for row in csv.DictReader(file)]
    with pytest.raises(ValueError, match="no longer guesses words"):
        model.fill_mask("ban [MASK]")


@pytest.mark.parametrize("format", FORMATS)
def test_the_export_gives_the_same_vectors_in_transformers(format, results, tmp_path):
    """The mean of AutoModel's final states, as in sentence-transformers (checked once, with version 6.2.0)."""
    transformers = pytest.importorskip("transformers")
    source = results / ("modern-tiny" if format == "modernbert" else "tiny")
    hub(["export", str(source), "--out", str(tmp_path / "out"), "--as", format])
    options = json.loads((tmp_path / "out/sentence_bert_config.json").read_text()).get("model_args", {})
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True, **options)
    assert not any(info.values())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["ban dur", "fist kom zer glalk trorg", " ".join(OTHERS)]
    batch = theirs(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    expected = ((states * mask).sum(1) / mask.sum(1)).numpy()
    for folder in (source, tmp_path / "out"):
        assert np.abs(minisobert.load(folder).embed(texts) - expected).max() < 1e-5
    # what transformers saves can be imported
    model.save_pretrained(tmp_path / "saved")
    theirs.save_pretrained(tmp_path / "saved")
    assert np.abs(minisobert.load(tmp_path / "saved").embed(texts) - expected).max() < 1e-5
    card = (tmp_path / "out/README.md").read_text()
    assert "sentence-similarity" in card and "| TF-IDF |" in card


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--model", "hf:bert"], "--task pairs trains models of minisobert, and --model is hf:bert"),
        (["--model", "random:modern-tiny", "--class-weights"], "--task pairs has no classes"),
        (["--model", "random:modern-tiny", "--pooling", "mean"], "leave out --class-weights and --pooling"),
    ],
)
def test_what_pairs_do_not_have_is_one_line(options, expected, results, tmp_path, capsys):
    data = ["--task", "pairs", "--data", str(results / "pairs.csv"), "--text", "question", "answer"]
    with pytest.raises(SystemExit) as end:
        finetune.main([*data, *options, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and expected in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_of_pairs_predicts_nothing_and_is_no_run(results, tmp_path, capsys):
    hub(["export", str(results / "tiny"), "--out", str(tmp_path / "exported")])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        finetune.main(["--predict", str(results / "pairs.csv"), "--model", str(results / "tiny")])
    with pytest.raises(SystemExit):
        hub(["import", str(tmp_path / "exported"), "--out", str(tmp_path / "run")])
    predicted, imported = capsys.readouterr().err.splitlines()
    assert "was trained on pairs and makes vectors" in predicted and "holds an encoder without its head" in imported


def test_training_goes_on_from_pairs(results, tmp_path, capsys):
    data = ["--task", "pairs", "--data", str(results / "pairs.csv"), "--text", "question", "answer"]
    made = ["--model", str(results / "tiny"), "--epochs", "1", "--learning-rate", "1e-9", "--out", str(tmp_path / "on")]
    assert finetune.main([*data, *made]) == 0
    before, after = (
        json.loads((folder / "metrics.json").read_text()) for folder in (results / "tiny", tmp_path / "on")
    )
    assert after["beside"]["the model before this training"] == before["mean"]  # the seed that was kept
    with pytest.raises(SystemExit):
        finetune.main([*data, "--model", str(results / "tfidf"), "--out", str(tmp_path / "none")])


def test_without_scikit_learn_the_report_lacks_that_row_alone(results, monkeypatch):
    def missing():
        raise ValueError("no scikit-learn")

    monkeypatch.setattr(baselines, "_check_installed", missing)
    data = pairs.read([results / "pairs.csv"], 0, text=("question", "answer"))
    assert report._beside(data, []) == {}
