"""The files of a task: found in folders and archives, recognised by their columns, read as text or as rows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minisobert.corpus.archives import contents, open_member
from minisobert.corpus.dump import POSTS
from minisobert.files import COMPRESSED, open_binary

DUMP = "dump"
LONGEST_FIELD = 1 << 24  # characters; csv's own limit of 131,072 is shorter than some posts
SPLITS = {"train": "train", "training": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev"}
SPLITS["test"] = "test"


@dataclass(frozen=True)
class File:
    """kind: one of those that `find` was asked for, or DUMP. named: by the user; a file found in a folder may belong to
    another task."""

    path: Path
    kind: str
    named: bool
    member: str = ""  # of an archive

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    @property
    def stem(self) -> str:
        return re.sub(r"(\.(csv|tsv|jsonl|parquet|txt|conll|7z|xz|gz))+$", "", Path(self.member).name or self.path.name)

    @property
    def split(self) -> str | None:
        """train, dev or test, where the name of the file says so in a word of its own."""
        if self.kind == DUMP:
            return None
        found = {SPLITS[word] for word in re.split("[^a-z]+", self.stem.lower()) if word in SPLITS}
        return found.pop() if len(found) == 1 else None

    @contextmanager
    def text(self, newline: str, errors: str = "strict") -> Iterator[io.TextIOBase]:
        """The decoded file. errors: what becomes of bytes that are not UTF-8, as of `open`. Whatever is wrong with it
        is a ValueError that names it."""
        if self.member:
            opened = open_member(self.path, [self.member])
        else:
            opened = open_binary(self.path)
        try:
            with opened as stream:
                yield io.TextIOWrapper(stream, "utf-8-sig", errors, newline)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self} is not UTF-8 ({error.reason}: {error.object[error.start : error.start + 1]!r}); "
                "convert it, e.g. with iconv"
            ) from None
        except csv.Error as error:
            raise ValueError(f"{self} is no readable .csv file ({error})") from None


def find(paths: Sequence[Path], kinds: Sequence[str] = (".csv", ".txt")) -> list[File]:
    """The files of these kinds, and dumps, in order. Raises ValueError for one that is missing or of no known kind."""
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
            known = f"a folder, .7z, {', '.join(kinds)} (.xz, .gz), or a dump's Posts.xml"
            raise ValueError(f"{path} is of no known kind: {known}")
        found += files
    return found


def _expand(path: Path, kinds: Sequence[str], named: bool) -> list[File]:
    if path.is_dir():
        return [File(path, DUMP, named)]
    if path.name.lower() == POSTS:
        return [File(path.parent, DUMP, named)]
    if path.suffix == ".7z":
        members = contents(path)
        if any(re.search(r"(^|/)posts\.xml$|\.7z$", member, re.I) for member in members):
            return [File(path, DUMP, named)]
        return [File(path, Path(m).suffix, named, m) for m in sorted(members) if Path(m).suffix in kinds]
    kind = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    return [File(path, kind, named)] if kind in kinds else []


def select(paths: Sequence[Path], task: str, layouts: dict[str, tuple[str, ...]]) -> list[tuple[File, str]]:
    """(file, layout) of every file that the task can read: a dump, or a .csv with all columns of a layout.

    layouts: name → columns, the first that fits is taken; DUMP → () for a task that can be derived from a dump. Raises
    ValueError for a file that the user named and that fits no layout, and where nothing is left.
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
            has = f"has the columns {', '.join(columns)}" if columns else empty
            raise ValueError(f"{file} {has}; {reads}")
    if not found:
        raise ValueError(f"nothing to read in {', '.join(map(str, paths))}: {reads}")
    return found


def header(file: File) -> list[str]:
    with file.text(newline="") as stream:
        return next(_reader(stream), [])


def csv_rows(file: File) -> Iterator[tuple[str, dict[str, str]]]:
    """(where it is, in words; its fields by column) of every row of a .csv file."""
    with file.text(newline="") as stream:
        reader = _reader(stream)
        columns = next(reader, [])
        for fields in reader:
            if not fields:
                continue
            where = f"{file}, line {reader.line_num}"
            if len(fields) != len(columns):
                raise ValueError(f"{where}: {len(fields)} fields, the header has {len(columns)}; is a quote missing?")
            yield where, dict(zip(columns, fields))


def _reader(stream):
    csv.field_size_limit(LONGEST_FIELD)
    return csv.reader(stream)


def class_of(name: str, classes: Sequence[str], where: str) -> int:
    if name not in classes:
        raise ValueError(f"{where}: unknown label {name!r}; the labels are {', '.join(classes)}")
    return classes.index(name)
