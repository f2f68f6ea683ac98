"""Your own labels: a class or a number for each text, from tables with your own columns.

    python finetune.py --task labels --data tickets.csv --text title body --label team --model RUN --out results/teams
    python finetune.py --task labels --data tickets.csv --label hours --number --model RUN --out results/hours

Rows without a text or a class, and rows that cannot be read, are left out and counted. The splits are given by the
names of the files or by the column --split, or they are drawn class by class (for numbers, from up to ten ranges). The
same text is never in two splits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import unicodedata
from collections import Counter
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np

from minisobert.cli import words
from minisobert.corpus.tables import TABLES, NoColumn, Row, plain, text_of
from minisobert.tasks.dataset import Dataset, Example, Option, Task
from minisobert.tasks.files import DUMP, SPLITS, File, examples_of, find
from minisobert.tasks.splits import Labelled, dataset, fingerprint

LABEL = Option(
    "for labels: column of the class (default: label); for tags: number of the tag's column, from 1 (default: last)", ""
)
TEXT = Option(
    "for labels, and for prediction: columns that make up a text (default: text); for pairs: the column of the query "
    "and the column of what it should find, or one column whose texts are cut in two",
    (),
)
ADVICE = "name yours with --text, --label and --split"
RANGES, FEWEST = 10, 20  # the most ranges from which numbers are drawn alike; the fewest texts in a range
PRECISION = 1e-5  # deviation / mean; below it, fp32 could not tell the numbers apart
_NUMBER = re.compile(r"[+-]?((\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.I | re.A)


def read(
    paths: list[Path], seed: int, *, text: tuple[str, ...] = (), label: str = "", split: str = "",
    several: bool = False, number: bool = False,
) -> Dataset:  # fmt: skip
    """Texts with a class, several classes or a number. The commonest class comes first. Classes that train lacks are
    kept, and their rows count as wrong.

    text, label, split: columns (default: "text", "label" and none). several: a text has any number of classes, in a
    list in a .jsonl, or else separated by ;. number: a text has a number instead of a class. Raises ValueError if
    anything is wrong with a file as a whole."""
    if several and number:
        raise ValueError("--several is for texts with several classes, --number for texts with a number; leave one out")
    columns, label = text or ("text",), label or "label"
    if label in columns:
        raise ValueError(f"--label {label} is one of the columns of --text; a text must not tell its class")
    notes: list[str] = []
    found, absent = [], None
    files = _files(paths)
    for file in files:
        try:
            found += _labelled(file, columns, label, split, several, number, notes)
        except NoColumn as error:  # a file in a folder may hold something else
            if file.named:
                raise
            absent = error
            notes.append(f"{file} was left out, since it has no column {error.column!r}")
    if absent and not found:
        raise absent
    if number:
        return _of_numbers([item for item, _ in found], seed, notes, columns, label)
    counts = Counter(name for _, names in found for name in names)
    if len(counts) < (1 if several else 2):
        only = f"all rows are {next(iter(counts))!r}" if counts else "no row has a text and a class"
        raise ValueError(f"labels: {only}; at least two classes are needed" + "".join(f"; {note}" for note in notes))
    classes = sorted(counts, key=lambda name: (-counts[name], name))
    index = {name: i for i, name in enumerate(classes)}
    items = []
    for item, names in found:
        of = tuple(sorted(index[name] for name in names))
        known = {"tags": of} if several else {"label": of[0]}
        # with several, a text is drawn by its rarest class, so that rare classes get their share too
        items.append(item._replace(example=dataclasses.replace(item.example, **known), group=max(of, default=0)))
    data = dataset(TASK, classes, items, seed, notes, unit="text", columns=columns)
    return _settled(dataclasses.replace(data, several=several), counts)


def _files(paths: list[Path]) -> list[File]:
    files = find(paths, TABLES)
    if dump := next((file for file in files if file.kind == DUMP), None):
        raise ValueError(f"{dump} is a dump; labels reads {words(TABLES)} with a text and a class in each row")
    if not files:
        raise ValueError(f"no {words(TABLES)} in {', '.join(map(str, paths))}")
    return files


def _labelled(
    file: File, columns: tuple[str, ...], label: str, split: str, several: bool, number: bool, notes: list[str]
) -> list[tuple[Labelled, tuple[str, ...]]]:
    """The examples of a file, with the names of their classes (none for numbers). What was left out is appended to the
    notes."""
    needed = [*columns, label, *filter(None, [split])]
    make = partial(_example, file, columns=columns, label=label, split=split, several=several, number=number)
    return list(examples_of(file, needed, ADVICE, make, notes))


def _example(
    file: File, row: Row, columns: tuple[str, ...], label: str, split: str, several: bool, number: bool
) -> tuple[Labelled, tuple[str, ...]]:
    """The example in a row, and the names of its classes. Raises ValueError if the row cannot be used; the reason is
    worded so that rows have it in common."""
    fields = row.fields
    text = text_of(fields, columns)
    value, names = (number_of(fields, label), ()) if number else (0.0, _names(fields, label, several))
    where = SPLITS.get(plain(fields, split).strip().casefold()) if split else file.split
    if not text.strip():
        raise ValueError("without a text")
    if not (names or number or (several and fields.get(label) is not None)):  # an empty list says: no class
        raise ValueError(f"without a {label}")
    if split and not where:
        raise ValueError(f"{split} is none of {', '.join(SPLITS)}")
    thread = hashlib.blake2b(fingerprint(text).encode(), digest_size=16).hexdigest()
    return Labelled(thread, where, Example(f"{file.stem}:{row.line}", text, value=value)), names


def _names(fields: dict, label: str, several: bool) -> tuple[str, ...]:
    value = fields.get(label)
    if isinstance(value, list) and not several:
        raise ValueError(f"{label} is a list, which --several takes")
    given = value if isinstance(value, list) else plain(fields, label).split(";") if several else [value]
    return tuple(dict.fromkeys(filter(None, (class_name(plain({label: each}, label)) for each in given))))


def number_of(fields: dict, column: str) -> float:
    """The number in a column. Raises ValueError if there is none, or if it is not finite; the reason is worded so that
    rows have it in common. A number may have no comma, since 1,234 is a thousand to some and about one to others."""
    value = fields.get(column)
    if isinstance(value, str):
        value = value.strip()
        if not value:
            raise ValueError(f"without a {column}")
        if not _NUMBER.fullmatch(value):
            raise ValueError(f"{column} is not a number like -1234.5 or 1e3" + ": it has a comma" * ("," in value))
    if value is None:
        raise ValueError(f"without a {column}")
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        raise ValueError(f"{column} is not a number")
    try:
        found = float(value)
    except OverflowError:  # of an integer with more than 308 digits
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{column} is not finite")
    return found


def _of_numbers(items: list[Labelled], seed: int, notes: list[str], columns: tuple[str, ...], label: str) -> Dataset:
    if not items:
        raise ValueError("; ".join([f"labels: no row has a text and a number in {label}", *notes]))
    ranges = min(RANGES, max(1, len(items) // FEWEST))
    order = np.argsort([item.example.value for item in items], kind="stable")
    for rank, i in enumerate(order):
        items[i] = items[i]._replace(group=rank * ranges // len(items))
    data = dataset(TASK, (label,), items, seed, notes, unit="text", columns=columns)
    values = np.array([e.value for e in data.train])
    with np.errstate(over="ignore", invalid="ignore"):  # results that are not finite are refused below
        mean, deviation = values.mean(), values.std()
    if values.min() == values.max():
        raise ValueError(f"labels: every {label} of train is {values[0]:g}; at least two different ones are needed")
    if not PRECISION * abs(mean) < deviation < math.sqrt(np.finfo(np.float32).max):
        raise ValueError(
            f"labels: {label} is {mean:g} ± {deviation:g} in train, and single precision cannot tell such numbers "
            "apart, or cannot hold them; subtract a constant from it, or divide it by one"
        )
    notes.append(
        f"{label} in train: from {values.min():g} to {values.max():g}, mean {mean:g}, standard deviation {deviation:g}"
    )
    return dataclasses.replace(data, number=True)


def class_name(given: str) -> str:
    """The name as given, but on one line and without control characters, which reports and terminals cannot show."""
    return " ".join("".join(c for c in given if c.isspace() or unicodedata.category(c) != "Cc").split())


def _settled(data: Dataset, counts: Counter) -> Dataset:
    """The data without classes that lost all their examples as duplicates, and with notes about its classes."""
    splits = {name: getattr(data, name) for name in ("train", "dev", "test")}
    there = sorted({c for part in splits.values() for e in part for c in _classes(data, e)})
    trained = {c for e in data.train for c in _classes(data, e)}
    if len(trained) < (1 if data.several else 2):
        raise ValueError("labels: train holds a single class; at least two are needed")
    if none := sum(not _classes(data, e) for part in splits.values() for e in part):
        data.notes.append(f"texts without a class: {none:,}")
    alike: dict[str, list[str]] = {}
    for name in counts:
        alike.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(name)
    pairs = [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    left = set(there)
    gone = [name for i, name in enumerate(data.labels) if i not in left]
    unknown = [data.labels[i] for i in there if i not in trained]
    notes = [
        (pairs, "classes that differ in case or form alone, kept apart"),
        (gone, "classes left out, since all their rows are duplicates of others"),
        (unknown, "classes of dev or test that train lacks, whose rows count as wrong"),
    ]
    data.notes.extend(f"{what}: {len(names):,} ({', '.join(names[:5])})" for names, what in notes if names)
    if not gone:
        return data
    index = {old: new for new, old in enumerate(there)}
    moved = {
        n: [dataclasses.replace(e, label=index.get(e.label, 0), tags=tuple(index[c] for c in e.tags)) for e in part]
        for n, part in splits.items()
    }
    return dataclasses.replace(data, labels=tuple(data.labels[i] for i in there), **moved)


def _classes(data: Dataset, e: Example) -> tuple[int, ...]:
    return e.tags if data.several else (e.label,)


TASK = Task(
    "labels",
    read,
    "You sort texts into classes.",
    options={
        "text": TEXT,
        "label": LABEL,
        "several": Option("for labels: a text has any number of classes, in a list or separated by ;"),
        "number": Option("for labels: predict the number in the column --label instead of a class"),
        "split": Option("for labels: column that says of each text whether it is train, dev or test", ""),
    },
    own_classes=True,
)
