"""Applies a fine-tuned model to new posts: `finetune.py --predict FILE|- --model DIR [--out FILE.jsonl|FILE.csv]`.

Rows are read, and predictions are written, a few hundred at a time, so that a file may be larger than memory. A row
that cannot be read is named and left out. What is printed has no control characters of terminals; what is written to a
file is the text as it was read.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minisobert.cli import printable, words
from minisobert.corpus.packing import SPECIALS
from minisobert.corpus.sources import STDIN, TextFile, kind_of
from minisobert.corpus.tables import KINDS, OBJECTS, Row, check_columns, rows, text_of
from minisobert.corpus.texts import Reading, texts
from minisobert.files import new_file
from minisobert.finetuning import baselines, encoder, huggingface, marking, retrieval
from minisobert.finetuning.kept import read_task
from minisobert.finetuning.loop import predict
from minisobert.tasks import TASKS, metrics
from minisobert.tasks.dataset import Example
from minisobert.tasks.files import DUMP, File, find
from minisobert.tasks.words import word_spans

SHOWN = 60  # characters of a post beside its class
LIKELIEST = 10  # with more than MANY classes, how many probabilities are shown
CHUNK = 512  # texts that are encoded at a time
NAMED = 20  # after this many rows that cannot be read, further ones are only counted
PATIENCE = 2.0  # seconds after which a progress bar appears

Network = encoder.Network | huggingface.Network | baselines.Linear


class Post(NamedTuple):
    line: int
    text: str  # as it was read
    cleaned: str  # as the model reads it


def open_fine_tuned(model: str | Path) -> tuple[Network, dict, Callable[[str], str]]:
    """The network that finetune.py saved, its task.json, and the function that cleaned the texts it was trained on.
    Raises ValueError if there is none, or if its files are not those that were saved."""
    folder = Path(model) / "model"
    try:
        task = read_task(folder)
    except OSError:
        raise ValueError(f"{model} holds no fine-tuned model; give the --out of finetune.py") from None
    known = {"": str, **(TASKS[task["task"]].cleaning if task["task"] in TASKS else {})}
    if task["cleaning"] not in known:
        raise ValueError(
            f"{model} was trained on texts of {task['task']} cleaned by {task['cleaning']!r}, which this version of "
            "minisobert does not know; use the version that trained it"
        )
    if task["kind"] == "pair":
        return retrieval.open_network(folder), task, known[task["cleaning"]]
    kinds = {"transformers": huggingface, "tfidf": baselines}
    return kinds.get(task["format"], encoder).open_network(folder, task), task, known[task["cleaning"]]


def probabilities(network: Network, examples: list[Example]) -> list[np.ndarray]:
    """For each example its probabilities (size, classes), or its number (1, 1), as from `loop.predict`."""
    if isinstance(network, baselines.Linear):
        return list(network.predict([e.text for e in examples])[:, None])
    return predict(network, network.encode(examples))


def apply(model: str, source: str, out: str = "", columns: Sequence[str] = ()) -> None:
    """Prints a line for each post: its class, all probabilities and the beginning of its text; or its number and the
    beginning of its text; or, for a token task, its whole text with the entities marked, in colour on a terminal. A
    post without text gives an empty line.

    out: a new .jsonl or .csv to write instead. columns: the columns of a table that make up a text (default: those of
    training, or "text" if the table has none of them). Raises ValueError if there is no such model or file, or if the
    file has no text.
    """
    network, task, clean = open_fine_tuned(model)
    if task["kind"] == "pair":
        raise ValueError(
            f"{model} was trained on pairs and makes vectors; use python -m minisobert.embed {model} {source}"
        )
    trained = task.get("columns") or ("text",)
    posts = _posts(_file(source), source, columns or trained, clean, guess=not columns)
    count = 0
    with _writer(out, task) as write, tqdm(unit="text", delay=PATIENCE, disable=not out) as bar:
        while chunk := list(islice(posts, CHUNK)):
            spans = [word_spans(post.cleaned) if task["kind"] == "token" else [] for post in chunk]
            examples = [
                Example("", post.cleaned, words=tuple(post.cleaned[slice(*span)] for span in inside))
                for post, inside in zip(chunk, spans)
            ]
            for post, inside, p in zip(chunk, spans, probabilities(network, examples)):
                write(post, inside, p)
            count += len(chunk)
            bar.update(len(chunk))
    say_cut(network, count)
    if out:
        print(printable(f"{out}: {count:,} texts"))


def say_cut(network: Network, count: int) -> None:
    """Prints how many of `count` texts were longer than a network of ours reads, if any, and how they were read."""
    if cut := getattr(network, "cut", 0):
        longest = network.module.config.positions - SPECIALS
        how = f"cut to their first {longest:,} tokens"
        if windows := getattr(network, "windows", 0):
            how = f"read in {windows:,} windows of {longest:,} tokens"
        print(f"{cut:,} of {count:,} texts were {how}", file=sys.stderr)
        network.cut = network.windows = 0


def _file(source: str) -> File:
    if source == "-":
        return File(Path("/dev/stdin"), ".txt", named=True)
    if Path(source).is_dir():
        raise ValueError(f"--predict is {source}, a folder; name one file")
    found = find([Path(source)], KINDS)
    if len(found) != 1 or found[0].kind == DUMP:
        raise ValueError(f"--predict is {source}; give a single file, {words(KINDS)}")
    return found[0]


def _posts(file: File, source: str, columns: Sequence[str], clean: Callable[[str], str], guess: bool) -> Iterator[Post]:
    """Yields the posts. Rows that cannot be read are named on standard error, but only if some row has text. guess:
    whether to take the column "text" if none of `columns` is there. Raises ValueError at the end if no row has text."""
    bad: list[str] = []
    count = total = texts_there = 0
    for row in rows(file):
        total += 1
        if guess and "text" in row.fields and not any(column in row.fields for column in columns):
            columns = ("text",)
        if row.fields and file.kind not in OBJECTS:
            check_columns(file, columns, list(row.fields), "name those that make up a text with --text")
        try:
            text = _text(row, columns)
        except ValueError as error:
            count += 1
            bad += [f"{source}:{row.line}: {error}"] if count <= NAMED else []
            continue
        texts_there += bool(text.strip())
        if texts_there and bad:
            print(printable("\n".join(bad)), file=sys.stderr)
            bad = []
        yield Post(row.line, text, clean(text))
    if not texts_there:
        first = (
            f"{bad[0]}; no other row has text" if bad else f"{source} has no text; give one post per line, or a .jsonl"
        )
        raise ValueError(first)
    if bad:
        print(printable("\n".join(bad)), file=sys.stderr)
    if count:
        print(printable(f"{count:,} of {total:,} rows of {source} were left out"), file=sys.stderr)


def _text(row: Row, columns: Sequence[str]) -> str:
    """Raises ValueError, with the reason, for a row that cannot be used."""
    if row.problem:
        raise ValueError(row.problem)
    if not any(column in row.fields for column in columns):
        raise ValueError(f"it has no {words(columns)}")
    return text_of(row.fields, columns)


@contextmanager
def _writer(out: str, task: dict) -> Iterator[Callable[[Post, list[tuple[int, int]], np.ndarray], None]]:
    """A function that writes a post, given the spans of its words and its probabilities. out: "" for standard
    output."""
    if not out:
        yield lambda post, inside, p: print(_line(task, post, inside, p))
        return
    with new_file(out, (".jsonl", ".csv")) as path, open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        is_csv = Path(out).suffix == ".csv"
        if is_csv:
            table.writerow(["line", "text", *_columns(task)])

        def write(post: Post, inside: list[tuple[int, int]], p: np.ndarray) -> None:
            found = _answer(task, post, inside, p)
            if is_csv:
                table.writerow([post.line, post.text, *_cells(task, found)])
            else:
                file.write(json.dumps({"line": post.line, "text": post.text, **found}, ensure_ascii=False) + "\n")

        yield write


def _answer(task: dict, post: Post, inside: list[tuple[int, int]], p: np.ndarray) -> dict:
    """What the line of a .jsonl says about a post."""
    labels, has_text = task["labels"], bool(post.text.strip())
    if task["kind"] == "token":
        return {"spans": [[start, stop, kind] for kind, start, stop in entities(labels, inside, p)]}
    if task.get("number"):
        return {"number": float(f"{p[0, 0]:.8g}") if has_text else None}
    shares = {name: round(float(x), 6) for name, x in likeliest(labels, p[0])} if has_text else {}
    if task.get("several"):
        return {"labels": classes(labels, p[0]) if has_text else None, "probabilities": shares}
    return {"label": labels[p[0].argmax()] if has_text else None, "probabilities": shares}


def _columns(task: dict) -> list[str]:
    """The columns of a .csv after the text."""
    if task["kind"] == "token":
        return ["spans"]
    if task.get("number"):
        return ["number"]
    if len(task["labels"]) <= metrics.MANY:
        return ["label", *(f"p_{name}" for name in task["labels"])]
    return ["label"] if task.get("several") else ["label", "p"]


def _cells(task: dict, found: dict) -> list:
    """The contents of these columns. found: what `_answer` returned."""
    if "spans" in found:
        return [json.dumps(found["spans"], ensure_ascii=False)]
    if "number" in found:
        return [found["number"]]
    label = ";".join(found["labels"] or ()) if "labels" in found else found["label"]
    names = task["labels"] if len(task["labels"]) <= metrics.MANY else [] if task.get("several") else [label]
    return [label, *(found["probabilities"].get(name) for name in names)]


def _line(task: dict, post: Post, inside: list[tuple[int, int]], p: np.ndarray) -> str:
    """What a terminal shows of a post."""
    labels, text = task["labels"], printable(post.cleaned)  # of the same length, so the words stay where they were
    if not text.strip():
        return ""
    if task["kind"] == "token":
        return marking.mark(text, inside, [printable(labels[i]) for i in p.argmax(1)], colour=sys.stdout.isatty())
    beginning = " ".join(text.split())[:SHOWN]
    if task.get("number"):
        return f"{p[0, 0]:.6g}\t{beginning}"
    shares = "  ".join(f"{label} {share:.1%}" for label, share in likeliest(labels, p[0]))
    found = "; ".join(classes(labels, p[0])) if task.get("several") else labels[p[0].argmax()]
    return f"{printable(found)}\t{printable(shares)}\t{beginning}"


def likeliest(labels: Sequence[str], p: np.ndarray) -> Iterable[tuple[str, float]]:
    """(class, probability) for all classes in their order; the LIKELIEST alone if there are more than MANY."""
    order = np.arange(len(p)) if len(p) <= metrics.MANY else np.argsort(-p, kind="stable")[:LIKELIEST]
    return [(labels[i], p[i]) for i in order]


def classes(labels: Sequence[str], p: np.ndarray) -> list[str]:
    """The classes of a text that may have several: those that are likelier than not."""
    return [labels[i] for i in np.flatnonzero(p >= 0.5)]


def entities(labels: Sequence[str], spans: list[tuple[int, int]], p: np.ndarray) -> list[tuple[str, int, int]]:
    """(type, begin, end) of each entity of a text, in characters and in order. spans: (begin, end) of each word; p:
    (words, tags)."""
    found = sorted(metrics.entities([labels[i] for i in p.argmax(1)]), key=lambda entity: entity[1])
    return [(kind, spans[first][0], spans[stop - 1][1]) for kind, first, stop in found]


def read(source: str) -> list[str]:
    """The posts of a file: the `text` of each object or row, or each line. Raises ValueError if there is no text."""
    path = Path(source)
    kind = ".txt" if path == STDIN else kind_of(path.name)
    file = TextFile(path, kind if kind in KINDS else ".txt")
    try:
        posts = [text for _, text in texts(file, Counter(), reading=Reading(document="line", unreadable=0))]
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror}") from None
    if not any(map(str.strip, posts)):
        raise ValueError(f"{source} has no text; give one post per line, or a .jsonl")
    return posts
