"""finetune.py on tables with one's own classes: trained, reported, loaded, exported, and applied to files."""

from __future__ import annotations

import csv
import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
import minisobert
from minisobert.cli import printable
from minisobert.config import PRESETS, ModelConfig
from minisobert.corpus import tokenizer
from minisobert.finetuning import apply, baselines, compare, evaluation
from minisobert.finetuning.config import FineTuneConfig, config_class
from minisobert.hub.__main__ import main as hub
from minisobert.tasks import TASKS, labels, metrics
from minisobert.tasks.dataset import Dataset, Example

TEAMS = ("Größe & Farbe", "Ops|Infra", r"$\x$ und $y$")  # the last one must not become a formula
WORDS = [a + b for a in ("ba", "du", "fi", "ko", "ze") for b in ("n", "r", "st", "m")]
ESCAPE = "\x1b]0;owned\x07 \x9b31m red"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64, "positions": 64}
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig(**sizes, architecture="modernbert"))
    torch.set_num_threads(1)


def table(path: Path, classes: int = 3, n: int = 120) -> Path:
    """A table in which the first words of a body tell its class."""
    draw = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "title", "body", "team"])
        for i in range(n):
            c = i % classes
            body = f"{WORDS[c % 20]} {WORDS[c // 20 % 20]}\r\n{' '.join(draw.choices(WORDS[10:], k=3))} {i}"
            rows.writerow([i, 'a "title"', body, TEAMS[c] if classes == 3 else f"class {c}, of a long name"])
    return path


def fine_tune(data: Path, out: Path, *options: str) -> dict:
    words = ["--task", "labels", "--data", str(data), "--text", "title", "body", "--label", "team", "--out", str(out)]
    assert finetune.main([*words, *options]) == 0
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with the results "net" and "tfidf"."""
    folder = tmp_path_factory.mktemp("labels")
    with pytest.MonkeyPatch.context() as patch:
        small.__wrapped__(patch)
        (folder / "tokenizer.model").write_bytes(tokenizer.train([" ".join(WORDS), 'a "title" 0123456789'] * 5, 320))
        data = table(folder / "tickets.csv")
        made = ("--tokenizer", str(folder / "tokenizer.model"), "--epochs", "8", "--learning-rate", "5e-3")
        fine_tune(data, folder / "net", "--model", "random:tiny", "--tokens-per-batch", "300", "--dropout", "0", *made)
        fine_tune(data, folder / "tfidf", "--model", "tfidf", "--seeds", "2")
    return folder


def predicted(folder: Path) -> dict[str, str]:
    with open(folder / "predictions.csv", newline="") as file:
        return {row["id"]: row["predicted"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("model", ["net", "tfidf"])
def test_it_is_learnt_and_what_was_kept_finds_it_again(model, results, tmp_path):
    found = json.loads((results / model / "metrics.json").read_text())
    assert found["mean"]["accuracy"] > 0.9 and set(found["per_class"]) == set(TEAMS)
    data = labels.read([results / "tickets.csv"], 0, text=("title", "body"), label="team")
    loaded = minisobert.load(results / model)
    assert loaded.labels == data.labels
    shares = loaded.classify([e.text for e in data.test])
    assert shares.shape == (12, 3) and np.allclose(shares.sum(1), 1)
    assert [data.labels[i] for i in shares.argmax(1)] == list(predicted(results / model).values())
    report = (results / model / "report.md").read_text()
    assert "| Ops\\|Infra |" in report and "`--keep-leak`" not in report and "keep_leak" not in report
    if model == "net":
        hub(["export", str(results / model), "--out", str(tmp_path / "exported")])
        again = minisobert.load(tmp_path / "exported")
        assert again.labels == loaded.labels
        np.testing.assert_allclose(again.classify([data.test[0].text]), shares[:1], atol=1e-6)
    else:
        with pytest.raises(SystemExit):
            hub(["export", str(results / model), "--out", str(tmp_path / "exported")])
        with pytest.raises(ValueError, match="is TF-IDF, which has no embeddings"):
            loaded.embed(["a"])


def toy(classes: int, n: int = 200) -> Dataset:
    draw = random.Random(1)
    of = [i % classes for i in range(n)]
    texts = [f"{WORDS[c]} {WORDS[c + 5]} {' '.join(draw.choices(WORDS, k=4))}" for c in of]
    examples = [Example(str(i), text, c) for i, (text, c) in enumerate(zip(texts, of))]
    return Dataset(TASKS["labels"], tuple(f"c{c}" for c in range(classes)), examples, examples, examples)


@pytest.mark.parametrize("classes", [2, 3])
def test_tfidf_is_that_of_scikit_learn_and_stays_so_on_disk(classes, tmp_path):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    data = toy(classes)
    config = FineTuneConfig("labels", "tfidf", ("toy",), "out")
    outcome = baselines.TfIdf(config).train(data, 1, lambda probabilities: 0.0)  # the first strength, 1, is kept
    texts, y = [e.text for e in data.train], [e.label for e in data.train]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")
    expected = (
        LogisticRegression(max_iter=1_000)
        .fit(vectorizer.fit_transform(texts), y)
        .predict_proba(vectorizer.transform(texts))
    )
    np.testing.assert_allclose(np.concatenate(outcome.test), expected, atol=1e-12)
    outcome.network.save(tmp_path)
    again = baselines.open_network(tmp_path, {"labels": data.labels})
    np.testing.assert_allclose(again.predict(texts), expected, atol=1e-6)  # weights are kept in fp32
    assert {path.name for path in tmp_path.iterdir()} == {"vocabulary.json", "linear.npz"}


def test_tfidf_of_many_classes_is_the_nearest_mean(monkeypatch):
    monkeypatch.setattr(baselines, "MANY_CLASSES", 3)
    data = toy(6)
    config = FineTuneConfig("labels", "tfidf", ("toy",), "out")
    p = np.concatenate(baselines.TfIdf(config).train(data, 1, lambda found: 0.0).test)
    from sklearn.metrics.pairwise import cosine_similarity

    texts = [e.text for e in data.train]
    x = baselines._vectorizer(min_df=2).fit_transform(texts).toarray()
    y = np.array([e.label for e in data.train])
    means = np.stack([x[y == c].mean(0) for c in range(6)])
    assert (p.argmax(1) == cosine_similarity(x, means).argmax(1)).all() and (p.argmax(1) == y).mean() > 0.9


def test_a_class_that_train_lacks_has_no_share():
    data = toy(3)
    few = Dataset(data.task, data.labels, [e for e in data.train if e.label != 1], data.dev, data.test)
    config = FineTuneConfig("labels", "tfidf", ("toy",), "out")
    p = np.concatenate(baselines.TfIdf(config).train(few, 1, lambda found: 0.0).test)
    assert (p[:, 1] == 0).all() and np.allclose(p.sum(1), 1)


def test_a_report_of_many_classes_shows_the_commonest(tmp_path, capsys):
    found = fine_tune(table(tmp_path / "t.csv", 60, 1_200), tmp_path / "out", "--model", "tfidf")
    assert len(found["per_class"]) == 60 and len(found["confusion"]) == len(found["classes"]) == metrics.MANY + 1
    assert np.sum(found["confusion"]) == found["counts"]["test"] and "roc_auc" not in found["mean"]
    report = (tmp_path / "out/report.md").read_text()
    assert "The 30 commonest in test of 60; metrics.json has all." in report
    assert "Confusion matrix of the 30 commonest in test of 60 classes." in report
    assert sum(line.startswith("| class ") for line in report.splitlines()) == 30
    with open(tmp_path / "out/predictions.csv") as file:
        assert next(csv.reader(file)) == ["id", "label", "predicted", "p_of_label", "p_of_predicted"]
    assert "960 in train, 120 in dev, 120 in test; 60 classes" in capsys.readouterr().err
    (tmp_path / "new.txt").write_text("ban ban\n\n")
    model = ("--model", str(tmp_path / "out"))
    told, _ = predict(capsys, str(tmp_path / "new.txt"), *model)
    assert told.count("class ") == 1 + 10  # the likeliest class, and the ten likeliest with their probabilities
    predict(capsys, str(tmp_path / "new.txt"), *model, "--out", str(tmp_path / "new.jsonl"))
    row = json.loads((tmp_path / "new.jsonl").read_text().splitlines()[0])
    assert len(row["probabilities"]) == 10 and next(iter(row["probabilities"])) == row["label"]
    predict(capsys, str(tmp_path / "new.txt"), *model, "--out", str(tmp_path / "new.csv"))
    with open(tmp_path / "new.csv", newline="") as file:
        assert [*csv.reader(file)] == [
            ["line", "text", "label", "p"], ["1", "ban ban", row["label"], str(row["probabilities"][row["label"]])],
            ["2", "", "", ""],
        ]  # fmt: skip


def test_figures_of_many_classes_are_those_of_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 100, 300)
    p = draw.random((300, 100)) + 3 * np.eye(100)[(truth + draw.integers(0, 2, 300)) % 100]
    data = Dataset(TASKS["labels"], tuple(map(str, range(100))), [], [], [])
    evaluated = evaluation.evaluate(data, [Example("", "", int(c)) for c in truth], list(p[:, None]))
    found = p.argmax(1)
    assert evaluated.figures["accuracy"] == sk.accuracy_score(truth, found)
    assert evaluated.figures["macro_f1"] == pytest.approx(sk.f1_score(truth, found, average="macro"), abs=1e-12)
    whole = sk.confusion_matrix(truth, found, labels=range(100))
    shown = [int(name) for name in evaluated.classes[:-1]]
    assert (evaluated.confusion[:-1, :-1] == whole[np.ix_(shown, shown)]).all()
    assert set(np.bincount(truth, minlength=100)[shown]) == set(sorted(np.bincount(truth, minlength=100))[-30:])


def test_results_are_compared_with_those_of_the_same_classes(results, tmp_path):
    other = fine_tune(table(tmp_path / "others.csv", 5, 200), tmp_path / "out", "--model", "tfidf")
    assert other["mean"]["accuracy"] > 0.5
    header, _, net, tfidf, *_ = compare.lines([results / "net", results / "tfidf", tmp_path / "out"])
    assert header.endswith("| labels team of tickets.csv: accuracy / macro-F1 "
                           "| labels team of others.csv: accuracy / macro-F1 |")  # fmt: skip
    assert net.startswith("| random:tiny --text title body |") and net.endswith("|  |")
    assert tfidf.startswith("| tfidf --text title body |") and tfidf.count("(n ") == 2


@pytest.mark.parametrize("model", ["net", "tfidf", "hf"])
def test_several_classes_a_text(model, results, tmp_path, capsys):
    draw, lines = random.Random(3), []
    for i in range(160):
        words = draw.choices(WORDS, k=3)
        of = [name for name, start in (("Größe", "ba"), ("own; type", "du")) if any(w[:2] == start for w in words)]
        lines.append({"text": " ".join([*words, str(i)]), "label": [*of, "all"]})
    write(tmp_path / "several.jsonl", lines)
    made = ["--model", "tfidf"]
    if model == "net":
        made = ["--model", "random:tiny", "--tokenizer", str(results / "tokenizer.model")]
    if model == "hf":
        hub(["export", str(results / "net"), "--out", str(tmp_path / "exported")])
        made = ["--model", f"hf:{tmp_path / 'exported'}"]
    task, out = ["--task", "labels", "--several", "--data", str(tmp_path / "several.jsonl")], tmp_path / "out"
    finetune.main([*task, "--out", str(out), *made, "--epochs", "10", "--dropout", "0", "--learning-rate", "5e-3",
                   "--tokens-per-batch", "200"])  # fmt: skip
    found = json.loads((out / "metrics.json").read_text())
    assert found["mean"]["micro_f1"] > 0.9 and found["mean"]["macro_f1"] > 0.85
    assert {path.name for path in out.iterdir()} == {
        "curves.png",
        "metrics.json",
        "model",
        "predictions.csv",
        "report.md",
    }
    assert "accuracy is that of whole sets" in (out / "report.md").read_text()
    texts = [next(e["text"] for e in lines if len(e["label"]) == n) for n in (3, 1)]
    write(tmp_path / "new.jsonl", [{"text": texts[0]}, {"text": ""}, {"text": texts[1]}])
    predict(capsys, str(tmp_path / "new.jsonl"), "--model", str(out), "--out", str(tmp_path / "new.out.jsonl"))
    both, empty, one = map(json.loads, (tmp_path / "new.out.jsonl").read_text().splitlines())
    loaded = minisobert.load(out)
    shares = loaded.classify(texts)
    np.testing.assert_allclose([list(each["probabilities"].values()) for each in (both, one)], shares, atol=1e-6)
    likely = [[name for name, p in zip(loaded.labels, row) if p >= 0.5] for row in shares]
    assert [both["labels"], one["labels"]] == likely and empty["labels"] is None
    assert len(both["labels"]) > 1 and one["labels"] == ["all"] and shares.sum(1).max() > 1.2
    told, _ = predict(capsys, str(tmp_path / "new.jsonl"), "--model", str(out))
    assert told.startswith("; ".join(both["labels"]) + "\tall ")
    predict(capsys, str(tmp_path / "new.jsonl"), "--model", str(out), "--out", str(tmp_path / "new.csv"))
    with open(tmp_path / "new.csv", newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == [";".join(both["labels"]), "", "all"]
    if model == "net":
        hub(["export", str(out), "--out", str(tmp_path / "again")])
        np.testing.assert_allclose(minisobert.load(tmp_path / "again").classify(texts), shares, atol=1e-6)
        transformers = pytest.importorskip("transformers")
        pipe = transformers.pipeline("text-classification", str(tmp_path / "again"), top_k=None)
        theirs = {each["label"]: each["score"] for each in pipe(texts)[0]}
        np.testing.assert_allclose([theirs[name] for name in loaded.labels], shares[0], atol=1e-5)
    if model == "tfidf":
        assert (shares[:, 0] == 1).all()  # the class that every text has
        with pytest.raises(SystemExit):
            finetune.main([*task, "--out", str(tmp_path / "b"), "--model", "tfidf", "--class-weights"])
        assert "--class-weights is for texts of one class" in capsys.readouterr().err


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tags_are_learnt_from_spans_and_what_is_predicted_can_be_learnt_from(results, tmp_path, capsys):
    draw, lines = random.Random(2), []
    for i in range(150):
        words, spans, at = [], [], 0
        for _ in range(5):
            word = draw.choice(WORDS)
            if word[:2] in ("ba", "du"):
                spans.append([at, at + len(word), "Größe" if word[:2] == "ba" else "own type"])
            words.append(word)
            at += len(word) + 1
        lines.append({"text": " ".join([*words, str(i)]), "spans": spans})
    write(tmp_path / "spans.jsonl", lines)
    finetune.main(["--task", "tags", "--data", str(tmp_path / "spans.jsonl"), "--out", str(tmp_path / "out"), "--model",
                   "random:tiny", "--tokenizer", str(results / "tokenizer.model"), "--epochs", "8", "--dropout", "0",
                   "--learning-rate", "5e-3", "--tokens-per-batch", "300"])  # fmt: skip
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert found["mean"]["f1"] > 0.95 and set(found["per_class"]) == {"Größe", "own type", "all entities"}
    write(tmp_path / "new.jsonl", [{"text": "ban  kor\tdust"}, {"text": ""}, {"text": "fin\nban dun"}])
    model = ("--model", str(tmp_path / "out"))
    told, _ = predict(capsys, str(tmp_path / "new.jsonl"), *model)
    assert told == "[ban](Größe)  kor\t[dust](own type)\n\nfin\n[ban](Größe) [dun](own type)\n"
    predict(capsys, str(tmp_path / "new.jsonl"), *model, "--out", str(tmp_path / "a.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["spans"] for row in rows] == [
        [[0, 3, "Größe"], [9, 13, "own type"]], [], [[4, 7, "Größe"], [8, 11, "own type"]]
    ]  # fmt: skip
    (entity, *_), *_ = minisobert.load(tmp_path / "out").entities([rows[0]["text"]])
    assert list(entity)[1:3] == rows[0]["spans"][0][:2]
    predict(capsys, str(tmp_path / "new.jsonl"), *model, "--out", str(tmp_path / "a.csv"))
    with open(tmp_path / "a.csv", newline="") as file:
        assert [json.loads(row["spans"]) for row in csv.DictReader(file)] == [row["spans"] for row in rows]
    write(tmp_path / "again.jsonl", [{**row, "text": f"{row['text']} {i}"} for i, row in enumerate(rows * 20)])
    data = TASKS["tags"].read([tmp_path / "again.jsonl"], 0)
    assert {data.labels[tag] for e in data.train for tag in e.tags} == {"O", "B-Größe", "B-own type"}


# finetune.py --predict


def predict(capsys, *words: str) -> tuple[str, list[str]]:
    capsys.readouterr()
    finetune.main(["--predict", *words])
    printed = capsys.readouterr()
    return printed.out, printed.err.splitlines()


@pytest.fixture
def posts(tmp_path) -> Path:
    path = tmp_path / "new.csv"
    good = f'title,body,more\n"a ""t""","ban ban\r\nx {ESCAPE}",1\n'
    path.write_bytes(f"{good}too few\n,,\n".encode() + b't,caf\xe9,1\n"never closed,b,c\n')
    return path


@pytest.mark.parametrize("model", ["net", "tfidf"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_what_is_written(model, kind, posts, results, tmp_path, capsys):
    out = tmp_path / f"out{kind}"
    told, errors = predict(capsys, str(posts), "--model", str(results / model), "--out", str(out))
    assert told == f"{out}: 2 texts\n"
    assert errors == [
        f"{posts}:4: 1 fields, but the header has 3; is a quote missing?",
        f"{posts}:6: not UTF-8; convert the file, e.g. with iconv",
        f"{posts}:7: a quote is missing or too many (unexpected end of data)",
        f"3 of 5 rows of {posts} were left out",
    ]
    text = f'a "t"\n\nban ban\nx {ESCAPE}'
    shares = minisobert.load(results / model).classify([text])[0]
    teams = minisobert.load(results / model).labels
    with open(out, newline="", encoding="utf-8") as file:
        if kind == ".csv":
            row, empty = csv.DictReader(file)
            found = [float(row[f"p_{team}"]) for team in teams]
            assert empty == {"line": "5", "text": "", "label": "", **{f"p_{team}": "" for team in teams}}
        else:
            row, empty = map(json.loads, file)
            found = list(row["probabilities"].values())
            assert list(row["probabilities"]) == list(teams)
            assert empty == {"line": 5, "text": "", "label": None, "probabilities": {}}
    assert (int(row["line"]), row["text"], row["label"]) == (2, text, teams[shares.argmax()])
    np.testing.assert_allclose(found, shares, atol=1e-6)
    with pytest.raises(SystemExit):
        finetune.main(["--predict", str(posts), "--model", str(results / model), "--out", str(out)])
    assert "choose a new file whose name ends in .jsonl or .csv" in capsys.readouterr().err


def test_nothing_that_a_terminal_obeys_is_printed(results, posts, tmp_path, capsys, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"\\u001b[31m": 1}\n{"text": "ban \\u001b[2J\\u202e\\u009b31m"}\n{"title": ["\\u0007"]}\n')
    for source in (posts, bad):
        told, errors = predict(capsys, str(source), "--model", str(results / "tfidf"))
        assert len(errors) == 3 + (source == posts) and printable(told + "".join(errors)) == told + "".join(errors)
        assert "\N{REPLACEMENT CHARACTER}" in told
    # reports and marked texts have no escape either
    assert "\x1b" not in printable(ESCAPE) and len(printable(ESCAPE)) == len(ESCAPE)
    task, post = {"kind": "token", "labels": ["O", f"B-A{ESCAPE}"]}, apply.Post(1, "", "ban \x1b[2J\r dun")
    line = apply._line(task, post, [(0, 3)], np.array([[0.0, 1.0]]))
    assert line == f"[ban](A{printable(ESCAPE)}) \ufffd[2J\ufffd dun"


def test_columns_are_those_of_training_or_text_or_those_that_are_named(results, tmp_path, capsys):
    model = ("--model", str(results / "tfidf"))
    texts = ["ban ban x", "bar bar y", 'a "title"']
    (tmp_path / "a.txt").write_bytes("\ufeff".encode() + "\r\n".join(texts).encode())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text, "title": None}) + "\n" for text in texts))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    (tmp_path / "a.tsv").write_text(
        "text\tmore\n" + "".join(f'"{text.replace(chr(34), chr(34) * 2)}"\t\n' for text in texts)
    )
    (tmp_path / "c.csv").write_text("x;y\n" + "".join(f"{text.replace(chr(34), '')};z\n" for text in texts[:2]))
    expected, _ = predict(capsys, str(tmp_path / "a.txt"), *model)
    assert expected.count("\n") == 3
    for name in ("a.jsonl", "b.jsonl", "a.tsv"):
        assert predict(capsys, str(tmp_path / name), *model) == (expected, [])
    found, _ = predict(capsys, str(tmp_path / "c.csv"), *model, "--text", "x")
    assert found == "".join(expected.splitlines(keepends=True)[:2])
    named = "its columns are x, y; name those that make up a text with --text"
    (tmp_path / "d.csv").write_text("\x1b[31mred,more\na,b\n")
    with pytest.raises(SystemExit):
        finetune.main(["--predict", str(tmp_path / "d.csv"), *model])
    assert "columns are \N{REPLACEMENT CHARACTER}[31mred, more" in capsys.readouterr().err
    for words, error in (((), f"no column 'title'; {named}"), (("--text", "x", "z"), f"no column 'z'; {named}")):
        with pytest.raises(SystemExit):
            finetune.main(["--predict", str(tmp_path / "c.csv"), *model, *words])
        assert error in capsys.readouterr().err


def test_of_many_bad_rows_the_first_are_named_and_all_are_counted(results, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 100 + '{"text": "ban"}\n')
    _, errors = predict(capsys, str(path), "--model", str(results / "tfidf"))
    assert errors[0] == f"{path}:1: no JSON object" and len(errors) == apply.NAMED + 1
    assert errors[-1] == f"100 of 101 rows of {path} were left out"


def test_memory_does_not_grow_with_the_file(results, tmp_path, capsys, monkeypatch):
    path, peaks = tmp_path / "a.jsonl", []
    network, task, clean = apply.open_fine_tuned(results / "tfidf")
    monkeypatch.setattr(apply, "open_fine_tuned", lambda model: (network, task, clean))
    monkeypatch.setattr(apply, "probabilities", lambda network, examples: [np.array([[0.2, 0.5, 0.3]])] * len(examples))
    for n in (1_000, 6_000):
        path.write_text((json.dumps({"text": "ban " * 500}) + "\n") * n)
        out = tmp_path / f"{n}.jsonl"
        tracemalloc.start()
        apply.apply("", str(path), str(out))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert out.read_text().count("\n") == n
    assert peaks[1] < 1.2 * peaks[0] < path.stat().st_size / 2


def test_an_option_of_columns_is_for_its_task_or_for_prediction():
    with pytest.raises(ValueError, match="--text is for --task labels or pairs, and --task is quality"):
        config_class()(task="quality", model="tfidf", data=("x",), out="y", text=("a",))
    assert config_class()(predict="x", model="y", text=("a",), out="z.csv").text == ("a",)
    with pytest.raises(ValueError, match="--label is for --task labels or tags, and --task is none"):
        config_class()(predict="x", model="y", label="a")
