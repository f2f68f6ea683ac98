"""A task that is defined in this file: its record in TASKS is enough to make it a task everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import finetune
from data import decontamination
from data import tasks as derived
from minisobert.config import PRESETS, ModelConfig
from minisobert.corpus import tokenizer
from minisobert.finetuning import chat, compare
from minisobert.tasks import TASKS, dumps
from minisobert.tasks.dataset import Dataset, Example, Option, Task
from minisobert.tasks.files import class_of, csv_rows, select
from minisobert.tasks.splits import Labelled, dataset

COLUMNS, CLASSES = ("Id", "Text", "Tone"), ("calm", "loud")
VERBS = ("fold", "merge", "parse", "split", "print", "sort")


def read(paths: list[Path], seed: int, *, whole: bool = False) -> Dataset:
    items, notes = [], [f"whole: {whole}"]
    for file, _ in select(paths, SHOUTING.name, {"posts": COLUMNS}):
        for where, row in csv_rows(file):
            label = class_of(row["Tone"], CLASSES, where)
            items.append(Labelled(row["Id"], file.split, Example(row["Id"], row["Text"].lower(), label), group=label))
    return dataset(SHOUTING, CLASSES, items, seed, notes, cleaning="lower")


def derive(dump: Path, seed: int, notes: list[str]) -> list[dict[str, str]]:
    texts = [(row["Id"], dumps.text("", row["Body"])) for row in dumps.posts(dump, notes)]
    return [dict(zip(COLUMNS, (id, text, "loud" if text.endswith("now!") else "calm"))) for id, text in texts]


SHOUTING = Task(
    "shouting",
    read,
    "Tell whether a post shouts.",
    figures=("macro_f1", "accuracy"),
    options={"whole": Option("for shouting, keep the whole post")},
    cleaning={"lower": str.lower},
    derive=derive,
    columns=COLUMNS,
    classes=CLASSES,
    published=(("the neighbours", "Nobody 1999", "12.3 / 45.6"),),
)


@pytest.fixture(autouse=True)
def shouting(monkeypatch):
    monkeypatch.setitem(TASKS, "shouting", SHOUTING)


@pytest.fixture
def site(tmp_path) -> Path:
    """A dump in which every second answer is in capitals."""
    (tmp_path / "site").mkdir()
    verbs = [f"{a} and {b} or {c}" for a in VERBS for b in VERBS for c in VERBS]
    posts = (f'<row Id="{i}" PostTypeId="2" ParentId="1" Body="{text}, {("please", "now!")[i % 2]}" />'
             for i, text in enumerate(verbs))  # fmt: skip
    (tmp_path / "site/Posts.xml").write_text("<posts>\n" + "\n".join(posts) + "\n</posts>\n")
    return tmp_path / "site"


@pytest.fixture
def texts(site, tmp_path) -> Path:
    """The task set that data.tasks makes from the dump."""
    derived.derive(site, tmp_path / "texts")
    return tmp_path / "texts"


def fine_tune(texts: Path, out: Path, model: str, *options: str) -> dict:
    command = ["--task", "shouting", "--data", str(texts), "--out", str(out), "--model", model, *options]
    assert finetune.main(command) == 0
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("main", [finetune.main, chat.main, derived.main])
def test_every_command_lists_it_with_its_option(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "shouting" in shown and (main is derived.main or "--whole" in shown)


def test_it_is_derived_from_a_dump_learnt_and_compared(texts, tmp_path):
    assert [path.name for path in texts.iterdir()] == ["shouting.csv"]
    found = fine_tune(texts, tmp_path / "out", "tfidf", "--whole")
    assert found["mean"]["accuracy"] == 1 and found["notes"][0] == "whole: True"
    assert "dev_accuracy" in found["seeds"][0]  # the task's main figure
    header, _, ours, *theirs = compare.lines([tmp_path / "out"])
    assert header.endswith("| shouting: macro-F1 / accuracy |")
    assert ours.startswith("| tfidf --whole |") and ours.endswith(" 100.0 / 100.0 (n 22) |")
    assert "| the neighbours † (Nobody 1999) |  |  |  |  | 12.3 / 45.6 |" in theirs


def test_a_network_learns_it_and_cleans_new_posts_as_it_does(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig(layers=1, hidden=32, heads=2, ffn=64, positions=64))
    torch.set_num_threads(1)
    model = tmp_path / "tokenizer.model"
    model.write_bytes(tokenizer.train([*VERBS, "and or please now!"] * 5, vocab_size=300))
    options = ("--tokenizer", str(model), "--epochs", "4", "--learning-rate", "5e-3", "--tokens-per-batch", "200")
    assert fine_tune(texts, tmp_path / "out", "random:tiny", *options)["mean"]["accuracy"] > 0.9
    (tmp_path / "posts.txt").write_text("FOLD AND PARSE, NOW!\n")
    capsys.readouterr()
    finetune.main(["--predict", str(tmp_path / "posts.txt"), "--model", str(tmp_path / "out")])
    label, _, shown = capsys.readouterr().out.split("\t")
    assert (label, shown) == ("loud", "fold and parse, now!\n")


def test_a_model_whose_cleaning_is_unknown_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/task.json").write_text(json.dumps({"task": "shouting", "cleaning": "lower"}))
    monkeypatch.delitem(TASKS, "shouting")
    with pytest.raises(SystemExit, match="2"):
        finetune.main(["--predict", __file__, "--model", str(tmp_path)])
    assert "texts of shouting cleaned by 'lower', which this version" in capsys.readouterr().err


def test_a_chat_model_is_told_what_it_is_about(texts, tmp_path, monkeypatch):
    class Parrot:
        used, asked = (), 0

        def __init__(self, *server):
            pass

        def ask(self, messages: list[dict]) -> str:
            assert messages[0]["content"].startswith("Tell whether a post shouts. Answer with one of these labels")
            return "loud" if messages[-1]["content"].endswith("now!") else "calm"

    monkeypatch.setattr(chat, "Chat", Parrot)
    command = ["--task", "shouting", "--data", str(texts), "--model", "parrot", "--out", str(tmp_path / "out")]
    assert chat.main(command) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["mean"]["accuracy"] == 1


def test_its_option_is_for_it_alone(capsys):
    with pytest.raises(SystemExit, match="2"):
        finetune.main(["--task", "ner", "--model", "tfidf", "--data", "x", "--out", "y", "--whole"])
    assert capsys.readouterr().err == "finetune.py: --whole is for --task shouting, and --task is ner; leave it out\n"


def test_its_texts_are_kept_out_of_a_corpus(texts):
    assert decontamination.read([f"shouting={texts}"]).counts == {"shouting": 44}
