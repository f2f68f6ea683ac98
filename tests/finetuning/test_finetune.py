"""finetune.py as its users run it, on two toy tasks that a small model learns in seconds."""

from __future__ import annotations

import csv
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
from benchmarks.peers import peer
from minisobert import tasks
from minisobert.config import PRESETS, ModelConfig
from minisobert.corpus import tokenizer
from minisobert.finetuning import encoder, loop, marking
from minisobert.finetuning.config import FineTuneConfig
from minisobert.finetuning.encoder import Network
from minisobert.hub.weights import FORMATS
from minisobert.model import Classifier, MaskedLM
from minisobert.tasks import metrics
from minisobert.tasks.dataset import Dataset, Example
from minisobert.tasks.words import word_spans
from minisobert.training.run import open_run
from tests.test_model import with_signal_everywhere

SMALL = ModelConfig(layers=2, hidden=64, heads=4, ffn=128, positions=64)
WORDS = [a + b for a in ("ba", "du", "fi", "ko", "ze") for b in ("n", "r", "st", "m")]
PYTHON = Path(sys.executable)
ROOT = Path(__file__).parents[2]


def sequence_task(paths, seed, **options) -> Dataset:
    """HQ or LQ: does a post say "please"?"""
    draw = random.Random(seed)

    def split(name: str, n: int) -> list[Example]:
        examples = []
        for i in range(n):
            words = draw.choices(WORDS, k=draw.randint(4, 12))
            if i % 2:
                words.insert(draw.randint(0, len(words)), "please")
            examples.append(Example(f"{name}-{i}", " ".join(words), i % 2))
        return examples

    notes = [f"options: {options}"] if options else ["a toy"]
    return Dataset(tasks.TASKS["quality"], ("HQ", "LQ"), split("a", 200), split("b", 60), split("c", 60), notes)


def token_task(paths, seed) -> Dataset:
    """Words in "ba" and "du" begin a Library, which "dot" continues; words in "fi" are a Class."""
    draw = random.Random(seed)
    labels = ("O", "B-Library", "I-Library", "B-Class")

    def sentence(name: str) -> Example:
        words, tags = [], []
        for _ in range(draw.randint(2, 6)):
            words += [draw.choice(("import", "class", "of")), draw.choice(WORDS)]
            tags += [0, {"ba": 1, "du": 1, "fi": 3}.get(words[-1][:2], 0)]
            if tags[-1] == 1 and draw.random() < 0.5:
                words.append("dot")
                tags.append(2)
        return Example(name, words=tuple(words), tags=tuple(tags))

    splits = [[sentence(f"{name}-{i}") for i in range(n)] for name, n in (("a", 200), ("b", 60), ("c", 60))]
    return Dataset(tasks.TASKS["ner"], labels, *splits)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer.train([" ".join(WORDS), "please import class of dot"] * 5, vocab_size=340))
    return path


def read_toys(patch: pytest.MonkeyPatch) -> None:
    """Reads the toy tasks in place of the real ones."""
    for name, read in {"quality": sequence_task, "closed": sequence_task, "ner": token_task}.items():
        patch.setitem(tasks.TASKS, name, replace(tasks.TASKS[name], read=read))


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    read_toys(monkeypatch)
    monkeypatch.setitem(PRESETS, "tiny", SMALL)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is only read at import
    torch.set_num_threads(1)


def run(task: str, out: Path, model: str = "random:tiny", **options) -> dict:
    options = {"learning_rate": 2e-3, "epochs": 6, "tokens_per_batch": 200, "dropout": 0, **options}
    flags = [("--" + name.replace("_", "-"), value) for name, value in options.items()]
    words = [word for flag, value in flags for word in ([flag] if value is True else [flag, str(value)])]
    finetune.main(["--task", task, "--model", model, "--data", "toy", "--out", str(out), *words])
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory, pieces) -> dict[str, Path]:
    """One run of each task, with two seeds."""
    with pytest.MonkeyPatch.context() as patch:
        read_toys(patch)
        patch.setitem(PRESETS, "tiny", SMALL)
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp("results")
        for task in ("quality", "ner"):
            run(task, folder / task, tokenizer=pieces, seeds=2)
    return {task: folder / task for task in ("quality", "ner")}


def figures(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_a_small_model_learns_a_sequence_task(results):
    found = figures(results["quality"])
    assert found["counts"] == {"train": 200, "dev": 60, "test": 60}
    assert len(found["seeds"]) == 2
    assert found["mean"]["accuracy"] > 0.95
    assert found["mean"]["macro_f1"] > 0.95


def test_a_small_model_learns_a_token_task(results):
    found = figures(results["ner"])["mean"]
    assert min(found["precision"], found["recall"], found["f1"]) > 0.9


def test_the_same_command_gives_the_same_metrics(results, tmp_path, pieces):
    again = run("ner", tmp_path / "again", tokenizer=pieces, seeds=2)
    before = figures(results["ner"])
    for each in (again, before):
        del each["settings"]
    assert again == before


def test_mean_and_deviation_are_over_the_seeds(results):
    found = figures(results["quality"])
    values = [seed["accuracy"] for seed in found["seeds"]]
    assert found["mean"]["accuracy"] == pytest.approx(np.mean(values))
    assert found["std"]["accuracy"] == pytest.approx(np.std(values, ddof=1))


def test_a_report_says_what_a_person_asks(results):
    for task, plots in (("quality", {"confusion.png", "curves.png"}), ("ner", {"confusion.png"})):
        assert {path.name for path in results[task].glob("*.png")} == plots
        text = (results[task] / "report.md").read_text()
        for heading in ("## Data", "## Classes", "## The 20 worst errors", "60 in dev"):
            assert heading in text


def test_predictions_give_back_the_accuracy(results):
    with open(results["quality"] / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = figures(results["quality"])
    best = next(seed for seed in found["seeds"] if seed["seed"] == found["best_seed"])
    assert np.mean([row["label"] == row["predicted"] for row in rows]) == best["accuracy"]
    assert all(abs(float(row["p_HQ"]) + float(row["p_LQ"]) - 1) < 1e-5 for row in rows)


def test_the_saved_model_applies_to_new_posts(results, tmp_path, capsys):
    posts = tmp_path / "posts.jsonl"
    posts.write_text('{"text": "bar please kor"}\n{"text": " "}\n{"text": "bar dun\\nkor"}\n')
    finetune.main(["--predict", str(posts), "--model", str(results["quality"])])
    asked, empty, other = capsys.readouterr().out.splitlines()
    assert asked.startswith("LQ\tHQ") and not empty
    assert other.startswith("HQ\tHQ") and other.endswith("\tbar dun kor")


def test_new_posts_are_cleaned_as_those_of_training_were(results, tmp_path, capsys):
    copy = shutil.copytree(results["quality"], tmp_path / "copy")
    task = json.loads((copy / "model/task.json").read_text())
    assert task["cleaning"] == ""
    (tmp_path / "posts.txt").write_text("<p>bar&nbsp;dun</p> code kor\n")
    for cleaning, shown in (("", "<p>bar&nbsp;dun</p> code kor"), ("markup", "bar dun code kor"),
                            ("words", "<p>bar&nbsp;dun</p> kor")):  # fmt: skip
        (copy / "model/task.json").write_text(json.dumps({**task, "cleaning": cleaning}))
        finetune.main(["--predict", str(tmp_path / "posts.txt"), "--model", str(copy)])
        assert capsys.readouterr().out.rstrip("\n").split("\t")[2] == shown


def test_a_model_whose_files_are_not_those_that_were_saved_is_refused(results, tmp_path, capsys):
    copy = shutil.copytree(results["quality"], tmp_path / "copy")
    (tmp_path / "posts.txt").write_text("bar dun\n")
    task = json.loads((copy / "model/task.json").read_text())
    assert {*task["sha256"], "task.json"} == {path.name for path in (copy / "model").iterdir()}

    def said() -> str:
        with pytest.raises(SystemExit, match="2"):
            finetune.main(["--predict", str(tmp_path / "posts.txt"), "--model", str(copy)])
        return capsys.readouterr().err

    for name in task["sha256"]:
        content = (copy / "model" / name).read_bytes()
        (copy / "model" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert f"model/{name} is not the file that was saved (sha256 " in said()
        (copy / "model" / name).unlink()
        assert f"model/{name} is not the file that was saved (sha256 No such file" in said()
        (copy / "model" / name).write_bytes(content)
    (copy / "model/task.json").write_text("[")
    assert "task.json is damaged" in said()
    del task["sha256"]  # as an older version wrote it
    (copy / "model/task.json").write_text(json.dumps(task))
    finetune.main(["--predict", str(tmp_path / "posts.txt"), "--model", str(copy)])
    assert capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error(results):
    command = f"yes 'bar dun' | head -1500 | {PYTHON} finetune.py --predict - --model {results['quality']} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_entities_of_standard_input_are_marked(results):
    code = "import sys, finetune; sys.exit(finetune.main(sys.argv[1:]))"
    words = ["--predict", "-", "--model", str(results["ner"])]
    done = subprocess.run([PYTHON, "-c", code, *words], input="import  bar.\n\n", capture_output=True, text=True)
    assert done.stdout == "import  [bar](Library).\n\n", done.stderr


def test_colours_surround_an_entity_on_a_terminal_alone():
    text, tags = "use numpy, please", ["O", "B-Library", "O", "O"]
    spans = word_spans(text)
    assert marking.mark(text, spans, tags, colour=False) == "use [numpy](Library), please"
    coloured = marking.mark(text, spans, tags, colour=True)
    assert coloured.startswith("use \x1b[1;3") and coloured.endswith("Library\x1b[0m, please")


@pytest.mark.parametrize(("text", "words"), [
    ("node.js or C++? foo(bar).", ["node.js", "or", "C++", "?", "foo", "(", "bar", ")", "."]),
    ("a  b\n", ["a", "b"]),
])  # fmt: skip
def test_words_are_cut_as_in_the_corpus(text, words):
    assert [text[a:b] for a, b in word_spans(text)] == words


def network(
    pieces: Path, kind: str, positions: int = 64, dropout: float = 0.0, architecture: str = "megatron-bert",
    pooling: str = "cls",
) -> Network:  # fmt: skip
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64, "vocabulary": 384, "positions": positions}
    config = ModelConfig(**sizes, architecture=architecture)
    model = Classifier(config, 3, pooling if kind == "sequence" else "").initialise(1)
    return Network(model, tokenizer.Tokenizer(pieces), kind, dropout)


def test_words_are_encoded_as_the_sentence_is(pieces):
    ours = network(pieces, "token")
    words = ("import", "foo.bar", "(", "x", ")", "é")
    (item,) = ours.encode([Example("", words=words, tags=(0,) * 6)])
    assert item.ids[1:-1].tolist() == ours.tokenizer.encode(" ".join(words)).tolist()
    beginnings = [ours.tokenizer.decode(item.ids[p:]).split("[SEP]")[0] for p in item.places]
    assert beginnings == [(" " if i else "") + " ".join(words[i:]) for i in range(6)]


def test_dropout_depends_on_the_step_alone(pieces):
    items = network(pieces, "sequence").encode(sequence_task([], 0).dev[:3])
    p, none = (
        [network(pieces, "sequence", dropout=p).logits(items, step) for step in (None, 4, 4, 5)] for p in (0.1, 0)
    )
    assert torch.equal(p[1], p[2]) and not torch.equal(p[1], p[3]) and not torch.equal(p[1], p[0])
    assert all(torch.equal(logits, p[0]) for logits in none)


def test_words_past_the_last_position_have_no_entity(pieces):
    ours = network(pieces, "token", positions=6)
    (item,) = ours.encode([Example("", words=("please",) * 20, tags=(1,) * 20)])
    assert len(item.ids) == 6 and len(item.word_indices) <= 4
    (p,) = loop.predict(ours, [item])
    assert p.shape == (20, 3)
    assert (p[len(item.word_indices) :] == [1, 0, 0]).all()


def test_texts_that_are_cut_are_said_once(pieces):
    data = sequence_task([], 0)
    config = FineTuneConfig("quality", "random:tiny", ("toy",), "out", epochs=1)
    short = [network(pieces, "sequence", positions=10) for _ in range(2)]
    longer = sum(len(short[0].tokenizer.encode(e.text)) > 8 for e in (*data.train, *data.dev, *data.test))
    for each in short:
        loop.fit(each, data, config, 1, lambda probabilities: 0.0)
    assert 0 < longer < 320
    assert data.notes[1:] == [f"{longer} texts were longer than the model reads, and cut at their end"]


def test_a_prediction_does_not_depend_on_its_batch(pieces):
    ours = network(pieces, "sequence")
    items = ours.encode(sequence_task([], 0).dev)
    together, alone = loop.predict(ours, items), [loop.predict(ours, [item])[0] for item in items]
    np.testing.assert_allclose(np.concatenate(together), np.concatenate(alone), rtol=0, atol=1e-6)


def test_batches_hold_whole_documents_up_to_their_tokens():
    lengths = np.array([3, 4, 5, 20, 1, 1])
    assert list(loop.batches(lengths, 8, np.arange(6))) == [[0, 1], [2], [3], [4, 5]]


def test_class_weights_make_classes_count_alike():
    item = [loop.Encoded(np.zeros(1), np.zeros(1), np.zeros(1), np.array([label]), 1) for label in (0, 0, 0, 2)]
    weights = loop.class_weights(item, 3)
    assert weights[0] * 3 == pytest.approx(weights[2]) and weights[1] == 0


def test_class_weights_make_a_rare_class_likelier(pieces):
    data = sequence_task([], 0)
    rare = [e for i, e in enumerate(data.train) if e.label == 0 or i % 20 == 1]
    data = Dataset(tasks.TASKS["quality"], ("HQ", "LQ", "none"), rare, data.dev, data.test)
    share = {}
    for weigh in (False, True):
        config = FineTuneConfig(
            "quality", "random:tiny", ("toy",), "out", epochs=2, learning_rate=2e-3, tokens_per_batch=200, dropout=0,
            class_weights=weigh,
        )  # fmt: skip
        outcome = loop.fit(network(pieces, "sequence"), data, config, 1, lambda probabilities: 0.0)
        share[weigh] = np.concatenate(outcome.test)[:, 1].mean()
    assert share[True] > share[False] + 0.05


def test_one_step_trains_something(pieces):
    """The last step, here the only one, has a learning rate above 0."""
    ours, data = network(pieces, "sequence"), sequence_task([], 0)
    before = ours.module.classifier.weight.clone()
    config = FineTuneConfig("quality", "random:tiny", ("toy",), "out", epochs=1, tokens_per_batch=100_000)
    loop.fit(ours, data, config, 1, lambda probabilities: 0.0)
    assert (ours.module.classifier.weight != before).any()


def test_training_ends_when_dev_gets_no_better_and_the_best_epoch_is_kept(pieces):
    scores = iter([0.5, 0.9, 0.1, 0.1, 0.1, 0.9])
    config = FineTuneConfig("quality", "random:tiny", ("toy",), "out", epochs=6, learning_rate=1e-2)
    outcome = loop.fit(network(pieces, "sequence"), sequence_task([], 0), config, 1, lambda probabilities: next(scores))
    assert outcome.best_epoch == 2 and outcome.score == 0.9
    assert [line["epoch"] for line in outcome.epochs] == [1, 2, 3, 4, 5]
    items = outcome.network.encode(sequence_task([], 0).dev)
    assert loop.mean_loss(loop.predict(outcome.network, items), items) == outcome.epochs[1]["dev_loss"]


def test_parameters_in_bf16_learn_and_are_saved_as_they_are(pieces, tmp_path):
    ours, data = network(pieces, "sequence", dropout=0.1), sequence_task([], 0)
    ours.dtype = torch.bfloat16  # as on a GPU
    config = FineTuneConfig("quality", "random:tiny", ("toy",), "out", epochs=2, learning_rate=1e-3)
    outcome = loop.fit(ours, data, config, 1, lambda probabilities: 0.0)
    assert outcome.epochs[1]["loss"] < outcome.epochs[0]["loss"]
    assert ours.module.classifier.weight.dtype == torch.bfloat16
    ours.save(tmp_path)
    again = encoder.open_network(tmp_path, {"kind": "sequence", "labels": ["a", "b", "c"]})
    saved = dict(again.module.named_parameters())
    assert all(torch.equal(p.float().cpu(), saved[name].cpu()) for name, p in ours.module.named_parameters())


@pytest.mark.parametrize(("format", "kind", "pooling"), [
    *((format, kind, "cls") for format in FORMATS for kind in ("sequence", "token")),
    ("modernbert", "sequence", "mean"),
])  # fmt: skip
def test_logits_are_those_of_transformers(format, kind, pooling, pieces):
    """A modernbert has the head of pre-training before the classifier, as its classes in transformers have."""
    pytest.importorskip("transformers")
    architecture = "modernbert" if format == "modernbert" else "megatron-bert"
    ours = network(pieces, kind, architecture=architecture, pooling=pooling)
    ours.module.start_from(with_signal_everywhere(MaskedLM(ours.module.config)))
    head = {"sequence": "SequenceClassification", "token": "TokenClassification"}[kind]
    theirs = peer(ours.module, format, kind=head, classifier_pooling=pooling)
    texts = ("please ban dot", "dot", "ban " * 20)  # one batch of three lengths
    items = ours.encode([Example("", text, words=tuple(text.split())) for text in texts])
    with torch.no_grad():
        expected = [theirs.eval()(torch.from_numpy(item.ids)[None]).logits[0] for item in items]
        expected = [x[None] if kind == "sequence" else x[item.places] for x, item in zip(expected, items)]
        logits = ours.logits(items, None)
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-6)  # fp32, in two orders of addition
    assert logits.std(0).min() > 1e-4  # the logits do depend on the text or word


def test_an_option_reaches_its_task_alone(tmp_path):
    assert "keep_leak': True" in run("quality", tmp_path / "out", "tfidf", keep_leak=True)["notes"][0]


def test_tfidf_is_a_floor(tmp_path):
    found = run("quality", tmp_path / "out", "tfidf", seeds=2)
    assert found["mean"]["accuracy"] > 0.9 and found["std"]["accuracy"] == 0


def trained(folder: Path, corpus, **options) -> Path:
    """A run of train.py on the toy language of conftest."""
    import train
    from tests.runs import make_small, words

    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setitem)
        train.main(words(corpus, folder / "run", steps=2, **options))
    return folder / "run"


@pytest.fixture(scope="module")
def from_a_run(tmp_path_factory, corpus):
    return trained(tmp_path_factory.mktemp("run"), corpus)


def test_a_run_lends_its_encoder_and_tokenizer(from_a_run, tmp_path):
    found = run("quality", tmp_path / "out", str(from_a_run))
    assert found["mean"]["accuracy"] > 0.9
    assert (tmp_path / "out/model/tokenizer.model").read_bytes() == (from_a_run / "tokenizer.model").read_bytes()


def the_saved_model_finds_in_test_what_the_trained_one_found(task: str, folder: Path, capsys) -> None:
    with open(folder / "out/predictions.csv", newline="") as file:
        predicted = [row["predicted"] for row in csv.DictReader(file)]
    test = tasks.TASKS[task].read([], tasks.SPLIT_SEED).test
    (folder / "posts.txt").write_text("".join(f"{e.text or ' '.join(e.words)}\n" for e in test))
    capsys.readouterr()
    finetune.main(["--predict", str(folder / "posts.txt"), "--model", str(folder / "out")])
    lines = capsys.readouterr().out.splitlines()
    if task == "quality":
        assert [line.partition("\t")[0] for line in lines] == predicted
    else:
        ends = np.cumsum([len(e.words) for e in test])
        entities = [metrics.entities(predicted[end - len(e.words) : end]) for e, end in zip(test, ends)]
        assert [line.count("](") for line in lines] == list(map(len, entities))


@pytest.mark.parametrize(("task", "pooling"), [("quality", "cls"), ("quality", "mean"), ("ner", "cls")])
def test_a_modern_run_is_fine_tuned_saved_and_applied(task, pooling, corpus, tmp_path, capsys):
    begun = trained(tmp_path, corpus, preset="modern-tiny", optimizer="adamw")
    found = run(task, tmp_path / "out", str(begun), epochs=4, pooling=pooling)
    assert found["mean"]["accuracy"] > 0.9
    assert json.loads((tmp_path / "out/model/config.json").read_text())["architecture"] == "modernbert"
    the_saved_model_finds_in_test_what_the_trained_one_found(task, tmp_path, capsys)


def test_fine_tuning_begins_with_the_head_that_pre_training_has_made(corpus, tmp_path, monkeypatch):
    """Compared before the first step; the classifier depends on the seed."""
    begun = trained(tmp_path, corpus, preset="modern-tiny", optimizer="adamw")
    config = FineTuneConfig("quality", str(begun), ("toy",), "out")
    seen = []
    monkeypatch.setattr(encoder, "fit", lambda network, *others: seen.append(network.module))
    for seed in (1, 2):
        encoder.Start(config).train(sequence_task([], 0), seed, score=None)
    expected = open_run(begun).model.mlm_head.state_dict()
    for model in seen:
        assert all(torch.equal(w, expected[name]) for name, w in model.head.state_dict().items())
        assert model.pooler is None
    assert not torch.equal(seen[0].classifier.weight, seen[1].classifier.weight)


def test_a_random_model_of_the_size_of_a_run(corpus, tmp_path, monkeypatch):
    begun = trained(tmp_path, corpus, preset="modern-tiny", optimizer="adamw", layers=3)
    started = encoder.Start(FineTuneConfig("quality", f"random:{begun}", ("toy",), "out"))
    run = open_run(begun)
    assert started.model_config == run.model.config and started.model_config.layers == 3
    assert started.tokenizer.encode("please import").tolist() == run.tokenizer.encode("please import").tolist()
    seen = []
    monkeypatch.setattr(encoder, "fit", lambda network, *others: seen.append(network.module))
    started.train(sequence_task([], 0), 1, score=None)
    fresh = Classifier(run.model.config, 2, "cls").initialise(1)
    assert all(torch.equal(a, b) for a, b in zip(seen[0].parameters(), fresh.parameters()))


def test_a_run_with_the_tokenizer_of_another_is_refused(from_a_run, tmp_path, capsys):
    """Even if it has the same number of pieces."""
    other = shutil.copytree(from_a_run, tmp_path / "other")
    size = tokenizer.Tokenizer(other / "tokenizer.model").vocab_size
    letters = [chr(c) for c in range(0x4E00, 0x4E00 + size - 261)]  # all pieces but 5 and the bytes
    (other / "tokenizer.model").write_bytes(tokenizer.train(["".join(letters)], vocab_size=size, coverage=1))
    assert tokenizer.Tokenizer(other / "tokenizer.model").vocab_size == size
    refused(capsys, "tokenizer.model is the tokenizer of another model", model=str(other), out=str(tmp_path / "out"))
    (other / "tokenizer.model").unlink()
    refused(capsys, "holds no tokenizer.model", model=str(other), out=str(tmp_path / "out"))


def refused(capsys, expected: str, **options) -> None:
    """Asserts that the command prints one line that says so, exits with 2, and writes nothing."""
    options = {"task": "quality", "data": "toy", **options}
    words = [word for name, value in options.items() if value for word in ("--" + name.replace("_", "-"), value)]
    with pytest.raises(SystemExit) as left:
        finetune.main([word for word in words if word != "yes"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert expected in error.splitlines()[-1] and "Traceback" not in error, error
    assert "out" not in options or not Path(options["out"]).exists()


@pytest.mark.parametrize(("expected", "options"), [
    ("--task is missing", {"task": ""}),
    ("--out is missing", {"model": "tfidf"}),
    ("folder of a train.py run, for a model as large as that run's, or random:tiny", {"model": "random:huge"}),
    ("needs --tokenizer", {"model": "random:tiny"}),
    ("which is not a folder; give a run", {"model": "nowhere"}),
    ("holds no checkpoint", {"model": "EMPTY"}),
    ("choose a run", {"model": "tfidf", "task": "ner"}),
    ("--binary is for --task closed", {"model": "tfidf", "binary": "yes"}),
    ("transformers cannot load", {"model": "hf:nowhere/at-all"}),
    ("No such file", {"model": "random:tiny", "tokenizer": "nowhere"}),
    ("give --model", {"model": "tfidf", "predict": "-"}),
    ("must be at least 1", {"model": "tfidf", "seeds": "0"}),
    ("not a SentencePiece model", {"model": "random:tiny", "tokenizer": __file__}),
    ("which a megatron-bert does not", {"model": "random:tiny", "tokenizer": "PIECES", "pooling": "mean"}),
    ("--pooling mean is for modern models of minisobert", {"model": "tfidf", "pooling": "mean"}),
    ("choose a lower one", {"model": "random:tiny", "tokenizer": "PIECES", "learning_rate": "1e30"}),
])  # fmt: skip
def test_a_mistake_is_one_line(expected, options, tmp_path, pieces, capsys):
    (tmp_path / "empty").mkdir()
    named = {"EMPTY": str(tmp_path / "empty"), "PIECES": str(pieces)}
    options = {name: named.get(value, value) for name, value in options.items()}
    if "missing" not in expected:
        options["out"] = str(tmp_path / "out")
    refused(capsys, expected, **options)


def test_nothing_that_exists_is_overwritten(results, capsys):
    before = (results["quality"] / "metrics.json").read_bytes()
    with pytest.raises(SystemExit):
        finetune.main(["--task", "quality", "--model", "tfidf", "--data", "toy", "--out", str(results["quality"])])
    assert "exists already" in capsys.readouterr().err
    assert (results["quality"] / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("source", ["missing.txt", "empty.txt", "broken.jsonl"])
def test_a_file_to_predict_that_cannot_be_read_is_one_line(source, results, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "broken.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(SystemExit) as left:
        finetune.main(["--predict", str(tmp_path / source), "--model", str(results["quality"])])
    error = capsys.readouterr().err
    assert left.value.code == 2 and source in error and error.count("\n") == 1


def test_a_folder_without_a_model_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--predict", "-", "--model", str(tmp_path)])
    assert "holds no fine-tuned model" in capsys.readouterr().err


def tiny_of_hugging_face(kind: str, folder: Path) -> Path:
    """A randomly initialised BERT or RoBERTa, with a tokenizer for the words of the toy tasks."""
    transformers = pytest.importorskip("transformers")
    words = [*WORDS, "please", "import", "class", "of", "dot"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    if kind == "bert":
        vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
        pieces = transformers.BertTokenizerFast(vocab=vocabulary)
        config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=40, **sizes)
        model = transformers.BertModel(config)
    else:
        letters = sorted({letter for word in words for letter in word})
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        vocabulary = {piece: i for i, piece in enumerate([*special, "Ġ", *letters, *(f"Ġ{x}" for x in letters)])}
        merges = [("Ġ", x) for x in letters]
        pieces = transformers.RobertaTokenizerFast(vocab=vocabulary, merges=merges)
        config = transformers.RobertaConfig(
            vocab_size=len(vocabulary), max_position_embeddings=40, pad_token_id=1, **sizes
        )
        model = transformers.RobertaModel(config)
    model.save_pretrained(folder)
    pieces.save_pretrained(folder)
    return folder


def test_weights_that_an_encoder_lacks_are_not_made_up(tmp_path, capsys):
    folder = tiny_of_hugging_face("bert", tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_hidden_layers": 2}, {"intermediate_size": 48}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        refused(capsys, "lacks", model=f"hf:{folder}", out=str(tmp_path / "out"))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    refused(capsys, "transformers cannot load", model=f"hf:{folder}", out=str(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("task", ["quality", "ner"])
def test_an_encoder_of_hugging_face_is_trained_and_applied(kind, task, tmp_path, capsys):
    folder = tiny_of_hugging_face(kind, tmp_path / kind)
    found = run(task, tmp_path / "out", f"hf:{folder}", epochs=6, learning_rate=5e-3)["mean"]
    assert found["accuracy"] > 0.8
    the_saved_model_finds_in_test_what_the_trained_one_found(task, tmp_path, capsys)
