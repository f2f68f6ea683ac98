"""Documents from files of text: each line or paragraph or the whole of a `.txt` or `.md`, and each row of a table
(KINDS of tables.py). Every kind may be packed, in a .zip, or standard input, and is read a piece at a time."""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tqdm import tqdm

from minisobert.cli import printable, words
from minisobert.corpus.sources import LONGEST, NotText, TextFile, lines
from minisobert.corpus.tables import NOT_UTF8, OBJECTS, TABLES, NoColumn, Row, check_columns, is_unicode, rows

PLAIN = (".txt", ".md")
KINDS = (*TABLES, *PLAIN)
DOCUMENTS = ("file", "line", "paragraph")
FEW = 0.01  # share of a file's lines that may be unreadable if no other is given; they are left out
HOPELESS = 1_000  # a file is given up after so many unreadable lines, if they are more than half
ADVICE = "name yours with --text-key"


class Reading(NamedTuple):
    """How files are read. keys: columns or keys that make up a text. document: what makes a document in a .txt or .md,
    one of DOCUMENTS; "" means a line of a .txt and the whole of a .md. unreadable: share of a file's lines that may be
    unreadable; these are left out."""

    keys: tuple[str, ...] = ("text",)
    document: str = ""
    unreadable: float = FEW


AS_IT_COMES = Reading()


def texts(
    file: TextFile,
    dropped: Counter,
    progress: Callable[[int], object] = lambda size: None,
    reading: Reading = AS_IT_COMES,
) -> Iterator[tuple[int, str]]:
    """(number, text) of every document, with line ends as \\n. The number is that of its first line or row, from 0. An
    empty line of a .txt is an empty text.

    Lines that cannot be read are left out and counted in `dropped`; a line on standard error shows the first. progress:
    called with the number of unpacked bytes read since its last call. Raises ValueError if more lines are unreadable
    than `reading` allows, for a file that is not text or lacks a column (if all lines may be unreadable, it is left out
    and counted), and for a packed file that is truncated or damaged.
    """
    bad = total = 0
    first = ""
    seen: set[str] = set()
    there: list[str] = []
    keys = ("text",) if file.kind in PLAIN else reading.keys
    try:
        for row in _rows(file, reading, progress):
            if isinstance(row, str):
                total += 1
                yield total - 1, row
                continue
            total += row.lines
            if len(seen) < len(keys) and row.fields:
                there = list(row.fields)
                if file.kind not in OBJECTS:
                    check_columns(file, keys, there, ADVICE)
                seen |= row.fields.keys() & {*keys}
            try:
                text = _text(row, keys)
            except ValueError as error:
                bad += row.lines
                dropped["malformed lines"] += row.lines
                first = first or f"{file}:{row.line}: {error}"
                if bad >= HOPELESS and bad > total / 2 and reading.unreadable < 1:
                    break
                continue
            yield row.line - 1, text
        if bad > total * reading.unreadable:
            advice = ", more than one in a hundred; --skip-unreadable leaves them out" if reading.unreadable else ""
            raise ValueError(f"{first} ({bad:,} of the first {total:,} lines cannot be read{advice})")
        if seen:  # a key that no object has is misspelt
            check_columns(file, keys, list(dict.fromkeys((*there, *sorted(seen)))), ADVICE)
    except (NotText, NoColumn) as error:
        if reading.unreadable < 1:
            raise
        dropped["unreadable files"] += 1
        first = first or str(error)
    if first:
        share = f"{bad:,} of {total:,} lines" if bad else "the file"
        tqdm.write(printable(f"note: {first} ({share} left out)"), file=sys.stderr)


def _text(row: Row, keys: tuple[str, ...]) -> str:
    """The text of a row. Raises ValueError, with the reason, if it has none. A lone \\r stays, as in all shards."""
    if row.problem:
        raise ValueError(row.problem)
    parts = []
    for key in keys:
        value = row.fields.get(key)
        if isinstance(value, str):
            part = value.replace("\r\n", "\n").strip("\n")
            if not (part.isascii() or is_unicode(part)):
                escaped = any("\udc80" <= c <= "\udcff" for c in part)
                raise ValueError(NOT_UTF8 if escaped else f"{key} holds half of a surrogate pair")
            parts.append(part)
        elif value is not None:
            raise ValueError(f"{key} is {_KINDS.get(type(value), type(value).__name__)}, not text")
        elif key in row.fields:
            parts.append("")
    if not parts:
        there = ", ".join(" ".join(name.split()) for name in list(row.fields)[:30])[:300] or "none"
        raise ValueError(f"it has no {words(map(repr, keys))}; its keys are {there}; {ADVICE}")
    return parts[0] if len(parts) == 1 else "\n\n".join(part for part in parts if part.strip())


_KINDS = {int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "a JSON object"}


def _rows(file: TextFile, reading: Reading, progress: Callable[[int], object]) -> Iterator[Row | str]:
    if file.kind not in PLAIN:
        yield from rows(file, reading.keys, progress)
        return
    document = reading.document or ("line" if file.kind == ".txt" else "file")
    read = {"file": _whole, "line": _by_line, "paragraph": _by_paragraph}[document]
    with file.text("\n", errors="surrogateescape", progress=progress) as stream:
        yield from read(stream, file)


def _by_line(stream: io.TextIOBase, file: TextFile) -> Iterator[Row | str]:
    """Yields lines of ASCII as they are, since these can have neither a mark nor broken bytes. A Row for each of a
    million titles takes twice as long as everything else."""
    for number, line in enumerate(lines(stream, file), 1):
        if line.isascii():
            yield line.removesuffix("\n").removesuffix("\r")
            continue
        yield Row(number, {"text": line.lstrip("\ufeff")})  # concatenated files have a mark inside


def _by_paragraph(stream: io.TextIOBase, file: TextFile) -> Iterator[Row]:
    """Paragraphs: lines up to one without text."""
    found: list[str] = []
    first = size = 0
    for number, line in enumerate(lines(stream, file), 1):
        line = line.lstrip("\ufeff")
        if line.strip():
            first = first if found else number
            found.append(line)
            size += len(line)
            _check_size(size, file, "a paragraph")
        elif found:
            yield Row(first, {"text": "".join(found)}, lines=len(found))
            found, size = [], 0
    if found:
        yield Row(first, {"text": "".join(found)}, lines=len(found))


def _whole(stream: io.TextIOBase, file: TextFile) -> Iterator[Row]:
    text = stream.read(LONGEST)
    _check_size(len(text) + 1, file, "one document")
    bad = next((n for n, line in enumerate(text.split("\n"), 1) if not is_unicode(line)), 0)
    yield Row(bad, {}, NOT_UTF8) if bad else Row(1, {"text": text})


def _check_size(size: int, file: TextFile, what: str) -> None:
    if size > LONGEST:
        raise ValueError(f"{file} is {what} of more than {LONGEST:,} characters; choose --document line or paragraph")
