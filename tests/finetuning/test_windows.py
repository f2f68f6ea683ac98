"""Texts longer than the model reads, in overlapping windows: nothing of them is lost, and short texts do not change."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

import finetune
import minisobert
from minisobert.config import PRESETS, ModelConfig
from minisobert.corpus import tokenizer
from minisobert.finetuning import apply, encoder, loop
from minisobert.hub.__main__ import main as hub
from minisobert.model import Classifier
from minisobert.ops import Documents
from minisobert.tasks.dataset import Example
from minisobert.tasks.words import word_spans
from tests.test_model import with_signal_everywhere

WORDS = [a + b for a in ("ba", "du", "fi", "ko", "ze") for b in ("n", "r", "st", "m")]
LONGEST = 14
SIZES = {"layers": 2, "hidden": 32, "heads": 2, "ffn": 64, "positions": LONGEST + 2}


@pytest.fixture(scope="module")
def pieces() -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer(tokenizer.train([" ".join(WORDS), "end"] * 5, 320))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig(**SIZES, architecture="modernbert"))
    torch.set_num_threads(1)


def network(pieces, kind: str, pooling: str = "", long: str = "windows", architecture: str = "modernbert", **options):
    config = ModelConfig(**SIZES, architecture=architecture, vocabulary=384)
    model = with_signal_everywhere(Classifier(config, 3, pooling).initialise(0))
    return encoder.Network(model, pieces, kind, long=long, **options)


def by_itself(model: Classifier, ids: np.ndarray, place: int, special) -> np.ndarray:
    """The logits of one window, without any code of fine-tuning."""
    tokens = torch.tensor([special.cls, *ids.tolist(), special.sep])
    documents = Documents.from_bounds([0, len(tokens)])
    with torch.no_grad():
        return model(tokens, torch.arange(len(tokens)), documents, torch.tensor([place]))[0].numpy()


def text(n: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n))


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 14, 510])
def test_windows_hold_every_token_and_overlap(longest):
    for n in range(longest + 1, 8 * longest + 3):
        spans = encoder.window_spans(n, longest)
        starts = np.array([start for start, _ in spans])
        assert starts[0] == 0 and spans[-1][1] == n and all(stop - start == longest for start, stop in spans)
        apart = np.diff(starts)
        assert apart.max() <= longest - int(longest * encoder.OVERLAP) and apart.max() - apart.min() <= 1
        # fewer windows would not be enough
        assert longest + (len(spans) - 2) * (longest - int(longest * encoder.OVERLAP)) < n


@pytest.mark.parametrize("seed", range(5))
def test_a_word_stands_in_the_window_where_it_is_furthest_from_an_edge(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, [3, 6, 40][seed % 3], 40)  # with 40, some words are longer than a window
    stop = np.cumsum(lengths)
    first, n = stop - lengths, int(stop[-1])
    spans = encoder.window_spans(n, LONGEST)
    row = np.concatenate([[-1, *range(*span), -1] for span in spans])  # which token of the text is at each place
    places = encoder.places_in_windows(first, stop, spans)
    assert (row[places] == first).all() and (np.diff(places) > 0).all()
    for begin, end, place in zip(first, stop, places):
        rooms = [min(begin - left, right - end) for left, right in spans if left <= begin < right]
        left, right = spans[place // (LONGEST + 2)]
        assert min(begin - left, right - end) == max(rooms)
        if end - begin == 1 and LONGEST // 8 <= begin < n - LONGEST // 8:
            assert max(rooms) >= LONGEST // 8


@pytest.mark.parametrize("architecture", ["modernbert", "megatron-bert"])
@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_a_short_text_is_the_same_to_the_bit(kind, architecture, pieces):
    fills = next(each for n in range(20) if len(pieces.encode(each := text(n))) == LONGEST)
    examples = [Example("", each, words=tuple(each.split())) for each in ("", "ban", text(5), fills)]
    pooling = "cls" if kind == "sequence" else ""
    cut, windows = (network(pieces, kind, pooling, long, architecture) for long in ("cut", "windows"))
    items = [each.encode(examples) for each in (cut, windows)]
    assert all(not item.seams for each in items for item in each) and cut.cut == windows.cut == 0
    for one, other in zip(loop.predict(cut, items[0]), loop.predict(windows, items[1])):
        assert (one == other).all()


@pytest.mark.parametrize(
    ("architecture", "pooling"), [("modernbert", "cls"), ("modernbert", "mean"), ("megatron-bert", "cls")]
)
def test_logits_of_a_document_are_the_mean_of_its_windows(architecture, pooling, pieces, monkeypatch):
    net = network(pieces, "sequence", pooling, architecture=architecture)
    texts = [text(n, n) for n in (3, 40, LONGEST, 25)]
    items = net.encode([Example("", each) for each in texts])
    expected, count = [], []
    for each in texts:
        ids = pieces.encode(each)
        spans = encoder.window_spans(len(ids), LONGEST) if len(ids) > LONGEST else [(0, len(ids))]
        found = [by_itself(net.module, ids[a:b], 0, pieces.vocabulary) for a, b in spans]
        expected.append(np.mean(found, 0))
        count.append(len(spans))
    assert max(count) > 3 and min(count) == 1 and np.std(expected, 0).min() > 5e-4
    assert (net.cut, net.windows) == (sum(c > 1 for c in count), sum(c for c in count if c > 1))
    np.testing.assert_allclose(net.logits(items, None).detach(), expected, atol=1e-6)
    np.testing.assert_allclose(net.logits(items, 0).detach(), expected, atol=1e-6)  # in training, without dropout
    pack, seen = encoder.packed, []
    monkeypatch.setattr(encoder, "packed", lambda windows, device: seen.append(len(windows)) or pack(windows, device))
    net.logits(items, None)
    monkeypatch.setattr(encoder, "EVAL_TOKENS", 2 * (LONGEST + 2))  # the windows of a text go in several parts
    np.testing.assert_allclose(net.logits(items, None).detach(), expected, atol=1e-6)
    net.logits(items, 0)
    assert seen == [10, 2, 2, 2, 2, 2, 10]  # with gradients, they always go together
    order = [3, 0, 2, 1]
    np.testing.assert_allclose(
        net.logits([items[i] for i in order], None).detach(), np.array(expected)[order], atol=1e-6
    )


def test_the_gradient_of_a_document_reaches_all_its_windows(pieces):
    net = network(pieces, "sequence", "cls")
    (item,) = net.encode([Example("", f"{text(40)} end")])
    net.logits([item], 0).sum().backward()
    gradient = net.module.encoder.embeddings.word.weight.grad
    assert (gradient[torch.from_numpy(item.ids)].abs().sum(1) > 0).all()


def test_every_word_of_a_long_text_is_tagged_by_a_window(pieces, monkeypatch):
    net, cut = network(pieces, "token"), network(pieces, "token", long="cut")
    sentence = Example("", words=tuple(text(40).split()))
    (item,), (shorter,) = net.encode([sentence]), cut.encode([sentence])
    assert (item.word_indices == range(40)).all() and len(shorter.word_indices) < 20
    (p,), (of_cut,) = loop.predict(net, [item]), loop.predict(cut, [shorter])
    assert p[:, 0].max() < 1 and (of_cut[len(shorter.word_indices) :, 0] == 1).all()
    encoded = [pieces.encode(f" {word}" if i else word) for i, word in enumerate(sentence.words)]
    ids, stop = np.concatenate(encoded), np.cumsum([len(each) for each in encoded])
    spans = encoder.window_spans(len(ids), LONGEST)
    logits = net.logits([item], None).detach().numpy()
    for i, begin in enumerate(stop - [len(each) for each in encoded]):
        left, right = max(
            (span for span in spans if span[0] <= begin < span[1]), key=lambda s: min(begin - s[0], s[1] - stop[i])
        )
        alone = by_itself(net.module, ids[left:right], 1 + begin - left, pieces.vocabulary)
        np.testing.assert_allclose(logits[i], alone, atol=1e-5)
    monkeypatch.setattr(encoder, "EVAL_TOKENS", 2 * LONGEST)
    np.testing.assert_allclose(net.logits([item], None).detach(), logits, atol=1e-5)


MADE = ["--epochs", "6", "--dropout", "0", "--learning-rate", "5e-3", "--tokens-per-batch", "300", "--model",
        "random:tiny"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(pieces, tmp_path_factory):
    """A folder with texts whose last words alone tell the class or entity, and with the results "labels" and "tags"."""
    folder = tmp_path_factory.mktemp("windows")
    (folder / "tokenizer.model").write_bytes(pieces.content)
    with open(folder / "labels.jsonl", "w") as file:
        for i in range(120):
            body = f"{text(16, i)} {['end', WORDS[0]][i % 2]} {['end', WORDS[0]][i % 2]}"
            file.write(json.dumps({"text": body, "label": ["yes", "no"][i % 2]}) + "\n")
    with open(folder / "tags.jsonl", "w") as file:
        for i in range(120):
            body = f"{text(16, i)} end"
            file.write(json.dumps({"text": body, "spans": [[len(body) - 3, len(body), "End"]]}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        small.__wrapped__(patch)
        for task in ("labels", "tags"):
            run(folder, task, folder / task, "--long", "windows")
    return folder


def run(folder, task: str, out, *options: str) -> dict:
    data, made = str(folder / f"{task}.jsonl"), [*MADE, "--tokenizer", str(folder / "tokenizer.model")]
    assert finetune.main(["--task", task, "--data", data, "--out", str(out), *made, *options]) == 0
    return json.loads((out / "metrics.json").read_text())


def test_what_stands_at_the_end_of_long_texts_is_learnt(folder, tmp_path):
    for task, name in (("labels", "accuracy"), ("tags", "f1")):
        found = json.loads((folder / task / "metrics.json").read_text())
        cut = run(folder, task, tmp_path / task)
        assert found["mean"][name] > 0.9 and cut["mean"][name] < 0.8
        assert cut["notes"][-1] == "120 texts were longer than the model reads, and cut at their end"
        assert found["notes"][:-1] == cut["notes"][:-1]
        assert found["notes"][-1] == "120 texts were longer than the model reads, and read in 240 windows"
        assert "| `long` | `windows` |" in (folder / task / "report.md").read_text()


def test_what_was_kept_reads_windows_as_in_training(folder, tmp_path, capsys):
    classes = minisobert.load(folder / "labels")
    bodies = [f"{text(30, 900 + i)} {['end end', 'ban ban'][i % 2]}" for i in range(8)]
    capsys.readouterr()
    shares = classes.classify(bodies)
    assert [classes.labels[i] for i in shares.argmax(1)] == ["yes", "no"] * 4
    said = capsys.readouterr().err
    assert "8 of 8 texts were read in" in said and f"windows of {LONGEST} tokens" in said and "cut" not in said
    tags = minisobert.load(folder / "tags")
    body = f"{text(60, 7)} end"
    (found,) = tags.entities([body])
    assert [(e.kind, e.text) for e in found] == [("End", "end")]
    path = tmp_path / "new.txt"
    path.write_text("\n".join(bodies))
    finetune.main(["--predict", str(path), "--model", str(folder / "labels"), "--out", str(tmp_path / "out.jsonl")])
    rows = [*map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())]
    np.testing.assert_allclose([list(row["probabilities"].values()) for row in rows], shares, atol=1e-6)
    network, _, _ = apply.open_fine_tuned(folder / "tags")
    inside = word_spans(body)
    (p,) = apply.probabilities(network, [Example("", words=tuple(body[a:b] for a, b in inside))])
    assert apply.entities(tags.labels, inside, p) == [("End", len(body) - 3, len(body))]


def test_the_card_of_an_export_says_that_transformers_reads_beginnings(folder, tmp_path):
    hub(["export", str(folder / "labels"), "--out", str(tmp_path / "out")])
    assert (
        "reading longer texts in overlapping windows. transformers does not" in (tmp_path / "out/README.md").read_text()
    )


def test_tfidf_reads_whole_texts_anyway_and_models_of_others_are_refused(folder, tmp_path, capsys):
    found = run(folder, "labels", tmp_path / "tfidf", "--model", "tfidf", "--long", "windows", "--tokenizer", "")
    assert found["mean"]["accuracy"] > 0.9 and "`long`" not in (tmp_path / "tfidf/report.md").read_text()
    with pytest.raises(SystemExit):
        run(folder, "labels", tmp_path / "hf", "--model", "hf:x", "--long", "windows", "--tokenizer", "")
    assert "--long windows is for models of minisobert, and --model is hf:x; leave it out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(folder, "pairs", tmp_path / "pairs", "--long", "windows")
    assert "--long windows is for classes, tags and numbers; with --task pairs leave it out" in capsys.readouterr().err
