"""Finds the files of a task in folders and archives, recognises them by their columns, and reads them."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from minisobert.corpus.archives import contents
from minisobert.corpus.dump import POSTS
from minisobert.corpus.sources import TextFile, kind_of
from minisobert.corpus.tables import LONGEST_FIELD, NOT_UTF8, OBJECTS, Row, check_columns, rows

T = TypeVar("T")
DUMP = "dump"
SPLITS = {"train": "train", "training": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev"}
SPLITS["test"] = "test"
SUFFIXES = ["csv", "tsv", "jsonl", "ndjson", "json", "parquet", "txt", "conll", "7z", "xz", "gz", "zst", "bz2"]


@dataclass(frozen=True)
class File(TextFile):
    """A file of a task. kind: one of the kinds that `find` was asked for, or DUMP. named: the user named it; a file
    found in a folder may belong to another task."""

    named: bool = False

    @property
    def stem(self) -> str:
        parts = (Path(self.member).name or self.path.name).split(".")
        while len(parts) > 1 and parts[-1].lower() in SUFFIXES:
            parts.pop()
        return ".".join(parts)

    @property
    def split(self) -> str | None:
        """train, dev or test, if the name of the file says so in a word of its own."""
        if self.kind == DUMP:
            return None
        found = {SPLITS[word] for word in re.split("[^a-z]+", self.stem.lower()) if word in SPLITS}
        return found.pop() if len(found) == 1 else None

    @contextmanager
    def text(self, newline: str, errors: str = "strict", **options) -> Iterator[io.TextIOBase]:
        try:
            with super().text(newline, errors, **options) as stream:
                yield stream
        except csv.Error as error:
            raise ValueError(f"{self} cannot be read as .csv ({error})") from None


def find(paths: Sequence[Path], kinds: Sequence[str] = (".csv", ".txt")) -> list[File]:
    """The files of these kinds, and dumps, in order. Raises ValueError if a path is missing or of another kind."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if path.is_dir() and not any(p.name.lower() == POSTS for p in path.iterdir()):
            inside = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            found += [file for p in inside for file in _expand(p, kinds, named=False)]
            continue
        files = _expand(path, kinds, named=True)
        if not files:
            known = f"a folder, .7z, {', '.join(kinds)} (.gz, .xz, .zst, .bz2), or a dump's Posts.xml"
            raise ValueError(f"{path} is of an unknown kind; give {known}")
        found += files
    return found


def _expand(path: Path, kinds: Sequence[str], named: bool) -> list[File]:
    if path.is_dir():
        return [File(path, DUMP, named=named)]
    if path.name.lower() == POSTS:
        return [File(path.parent, DUMP, named=named)]
    if path.suffix.lower() == ".7z":
        members = contents(path)
        if any(re.search(r"(^|/)posts\.xml$|\.7z$", member, re.I) for member in members):
            return [File(path, DUMP, named=named)]
        return [File(path, kind_of(m), m, named) for m in sorted(members) if Path(m).suffix.lower() in kinds]
    kind = kind_of(path.name)
    return [File(path, kind, named=named)] if kind in kinds else []


def select(paths: Sequence[Path], task: str, layouts: dict[str, tuple[str, ...]]) -> list[tuple[File, str]]:
    """(file, layout) for every file that the task can read: a dump, or a .csv with all columns of a layout.

    layouts: name → columns, of which the first that fits is taken; DUMP → () if the task can be derived from a dump.
    Raises ValueError if a file that the user named fits no layout, or if no file fits one.
    """
    wanted = " or ".join(", ".join(columns) for columns in layouts.values() if columns)
    reads = f"{task} reads a .csv file with the columns {wanted}; or a dump"
    found = []
    for file in find(paths):
        columns = header(file) if file.kind == ".csv" else []
        layout = next((name for name, needed in layouts.items() if needed and set(needed) <= set(columns)), None)
        if file.kind == DUMP:
            layout = DUMP
        if layout:
            found.append((file, layout))
        elif file.named:
            empty = "has no columns" if file.kind == ".csv" else "is text without columns"
            names = ", ".join(" ".join(name.split()) for name in columns)  # a name may span lines
            has = f"has the columns {names}" if columns else empty
            raise ValueError(f"{file} {has}; {reads}")
    if not found:
        raise ValueError(f"nothing to read in {', '.join(map(str, paths))}: {reads}")
    return found


def header(file: File) -> list[str]:
    with file.text(newline="") as stream:
        return next(_reader(stream), [])


def csv_rows(file: File) -> Iterator[tuple[str, dict[str, str]]]:
    """(where it is, in words; its fields, by column) of every row in a .csv file."""
    with file.text(newline="") as stream:
        reader = _reader(stream)
        columns = next(reader, [])
        for fields in reader:
            if not fields:
                continue
            where = f"{file}, line {reader.line_num}"
            if len(fields) != len(columns):
                raise ValueError(
                    f"{where} has {len(fields)} fields, but the header has {len(columns)}; is a quote missing?"
                )
            yield where, dict(zip(columns, fields))


def _reader(stream):
    csv.field_size_limit(LONGEST_FIELD)
    return csv.reader(stream)


def examples_of(
    file: File, needed: Sequence[str], advice: str, make: Callable[[Row], T], notes: list[str]
) -> Iterator[T]:
    """Yields what `make` returns for each row of a table. A row that cannot be read, or for which `make` raises
    ValueError, is left out and counted in the notes, by its reason.

    needed: columns that the file must have. Raises NoColumn, with the advice, for one that it lacks, and ValueError for
    a file that is not UTF-8: leaving out its rows with accents would not be enough.
    """
    left_out: Counter = Counter()
    first: dict[str, int] = {}  # reason → line
    there: dict[str, None] = {}
    checked = file.kind in OBJECTS  # their rows need not all have the same columns
    for row in rows(file):
        if row.problem == NOT_UTF8:
            raise ValueError(f"{file}:{row.line}: {row.problem}")
        there |= dict.fromkeys(row.fields)
        if row.fields and not checked:
            check_columns(file, needed, list(row.fields), advice)
            checked = True
        try:
            if row.problem:
                raise ValueError(row.problem)
            example = make(row)
        except ValueError as error:
            left_out[str(error)] += 1
            first.setdefault(str(error), row.line)
            continue
        yield example
    check_columns(file, needed, list(there), advice)
    for why, n in left_out.items():
        notes.append(f"{file}: {n:,} row{'s' * (n > 1)} left out, {why} (first: line {first[why]:,})")


def class_of(name: str, classes: Sequence[str], where: str) -> int:
    if name not in classes:
        raise ValueError(f"{where}: unknown label {name!r}; the labels are {', '.join(classes)}")
    return classes.index(name)
