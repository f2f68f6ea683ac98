"""Pairs of texts that belong together, such as a question and its answer, for embeddings that retrieve.

    python finetune.py --task pairs --data pairs.csv --text question answer --model RUN --out results/search
    python finetune.py --task pairs --data site.7z --model RUN --out results/search

- Tables (.csv, .tsv, .jsonl, .parquet) with two columns, --text FIRST SECOND: the query, and the text it should find.
- Tables with one column, --text COLUMN: two adjacent passages of each text. This needs no pairs, and serves as a first
  training before a second one on few pairs (give the result of the first as --model).
- A dump: each question with its accepted answer or, if it has none, with its answer of the highest score. If the dump
  has PostLinks.xml, also each question that was closed as a duplicate, with the question that it repeats.

Pairs that share a text, even by way of other pairs, are in the same split.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from minisobert.cli import words
from minisobert.corpus.rows import xml_rows
from minisobert.corpus.tables import TABLES, Row, text_of
from minisobert.hashing import key
from minisobert.tasks import dumps
from minisobert.tasks.dataset import Dataset, Example, Task
from minisobert.tasks.files import DUMP, File, examples_of, find
from minisobert.tasks.labels import TEXT
from minisobert.tasks.splits import Labelled, dataset, fingerprint

MOST = 200_000  # questions of a dump, and as many duplicates: those with the smallest hashes of their ids
DUPLICATE = "3"  # the LinkTypeId
PASSAGE, SHORTEST = 100, 20  # words in a passage, at most and at least


def read(paths: list[Path], seed: int, *, text: tuple[str, ...] = ()) -> Dataset:
    """The pairs of some files. text: the two columns of a table, or the one column whose texts are cut in two. Raises
    ValueError if anything is wrong with a file as a whole."""
    files = find(paths, TABLES)
    if not files:
        raise ValueError(f"no {words(TABLES)} and no dump in {', '.join(map(str, paths))}")
    tables = [file for file in files if file.kind != DUMP]
    if tables and len(text) not in (1, 2):
        given = f"--text {' '.join(text)} names {len(text)} columns" if text else "--text is missing"
        raise ValueError(
            f"{tables[0]} is a table, and {given}; name two, the query's first, or one whose texts are to be cut in two"
        )
    if text and not tables:
        raise ValueError("--text is for tables, and only dumps are given; leave it out")
    notes: list[str] = []
    found: list[tuple[File, Example]] = []
    for file in files:
        if file.kind == DUMP:
            pairs = _of_dump(file.path, seed, notes)
        else:
            make = partial(_of_row, file, columns=text, seed=seed)
            pairs = examples_of(file, text, "name yours with --text", make, notes)
        found += [(file, example) for example in pairs]
    if not found:
        raise ValueError("; ".join(["pairs: no pair was found", *notes]))
    threads = _threads([example for _, example in found])
    items = [Labelled(thread, file.split, example) for thread, (file, example) in zip(threads, found)]
    largest = Counter(threads).most_common(1)[0][1]
    if largest > max(10, len(items) // 20):
        notes.append(f"{largest:,} pairs are connected by texts that they share, and are in one split")
    return dataset(TASK, (), items, seed, notes, unit="text", columns=text)


def _of_row(file: File, row: Row, columns: tuple[str, ...], seed: int) -> Example:
    """The pair in a row. Raises ValueError if it has none; the reason is worded so that rows have it in common."""
    texts = [text_of(row.fields, [column]) for column in columns]
    for column, text in zip(columns, texts):
        if not text.strip():
            raise ValueError(f"without a text in {column}")
    first, second = texts if len(texts) == 2 else passages(texts[0], seed)
    if fingerprint(first) == fingerprint(second):
        raise ValueError("its two texts are the same")
    return Example(f"{file.stem}:{row.line}", first, other=second)


def passages(text: str, seed: int) -> tuple[str, str]:
    """Two passages of at most PASSAGE words, left and right of a place that a hash of (seed, text) chooses. Raises
    ValueError for a text of fewer than 2 · SHORTEST words."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    if len(words) < 2 * SHORTEST:
        raise ValueError(f"of fewer than {2 * SHORTEST} words, too short for two passages")
    drawn = key(seed, "passages", zlib.crc32(text.encode()))
    place = SHORTEST + drawn % (len(words) - 2 * SHORTEST + 1)
    left, right = words[max(place - PASSAGE, 0) : place], words[place : place + PASSAGE]
    return text[left[0][0] : left[-1][1]], text[right[0][0] : right[-1][1]]


def _of_dump(dump: Path, seed: int, notes: list[str]) -> Iterator[Example]:
    """The pairs of a dump. The posts are read twice: first the questions, then their answers. At most MOST of each are
    in memory."""
    repeats = _duplicates(dump, seed, notes)
    wanted = {post for pair in repeats for post in pair}
    linked: dict[int, str] = {}
    drawn: list[tuple[int, int, str, str]] = []  # a heap of (-hash, -id, text, accepted answer)
    answered = 0
    for row in dumps.questions(dump, notes):
        post, text = int(row["Id"]), dumps.text(row["Title"], row["Body"])
        if post in wanted:
            linked[post] = text
        if row.get("AnswerCount") != "0":
            answered += 1
            entry = (-key(seed, "sample", post), -post, text, row.get("AcceptedAnswerId", ""))
            dumps.keep(drawn, entry, MOST)
    questions = {str(-post): (text, accepted) for _, post, text, accepted in drawn}
    best: dict[str, tuple[bool, int, int, str]] = {}  # question → (accepted, score, -id, text) of its answer
    for row in dumps.posts(dump, []):  # the notes above cover them
        question = questions.get(row.get("ParentId", ""))
        if row["PostTypeId"] != "2" or question is None:
            continue
        merit = row["Id"] == question[1], _score(row), -int(row["Id"])
        text = dumps.text("", row["Body"])
        if text and merit > best.get(row["ParentId"], (False, -(1 << 62)))[:3]:
            best[row["ParentId"]] = (*merit, text)
    counts = Counter("accepted" if accepted else "best" for accepted, *_ in best.values())
    dumps.note(
        dump,
        Counter(
            {
                "questions with their accepted answer": counts["accepted"],
                "questions with the answer of the highest score, as none was accepted": counts["best"],
                "questions left out by chance": answered - len(drawn),
            }
        ),
        notes,
    )
    for question in sorted(best, key=int):
        yield Example(f"{dump.name}:{question}", questions[question][0], other=best[question][-1])
    there = [(one, other) for one, other in repeats if one in linked and other in linked]
    dumps.note(dump, Counter({"questions with the one that they repeat": len(there)}), notes)
    for one, other in there:
        yield Example(f"{dump.name}:{one}-{other}", linked[one], other=linked[other])


def _score(row: dict[str, str]) -> int:
    try:
        return int(row.get("Score", "0"))
    except ValueError:
        return 0


def _duplicates(dump: Path, seed: int, notes: list[str]) -> list[tuple[int, int]]:
    """(question, question that it repeats) for at most MOST questions, ordered by id."""
    table = dumps.links(dump)
    if table is None:
        return []
    dropped: Counter = Counter()
    drawn: list[tuple[int, int, int]] = []
    with table.open() as stream:
        for row in xml_rows(stream, str(table), "postlinks", dropped):
            one, other = dumps.number(row, "PostId"), dumps.number(row, "RelatedPostId")
            if row.get("LinkTypeId") == DUPLICATE and one and other and one != other:
                dumps.keep(drawn, (-key(seed, "sample", one), -one, -other), MOST)
    dumps.note(dump, dropped, notes)
    return sorted({(-one, -other) for _, one, other in drawn})


def _threads(examples: list[Example]) -> list[str]:
    """A name for each pair. Pairs that are connected by equal texts have the same name."""
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        while parent.setdefault(text, text) != text:
            parent[text] = text = parent[parent[text]]
        return text

    digests = [[_digest(text) for text in (e.text, e.other)] for e in examples]
    for first, second in digests:
        a, b = sorted((root(first), root(second)))
        parent[b] = a  # the smaller name is kept, so that the splits do not depend on the order of the files
    return [root(first) for first, _ in digests]


def _digest(text: str) -> str:
    return hashlib.blake2b(fingerprint(text).encode(), digest_size=16).hexdigest()


TASK = Task(
    "pairs",
    read,
    "",
    kind="pair",
    figures=("recall_at_1", "recall_at_10", "mrr"),
    options={"text": TEXT},
    own_classes=True,
)
