"""Reads tables as people have them, a row at a time: .csv (comma, semicolon or tab), .tsv, .jsonl or .ndjson, .json,
.parquet (extra [tables]), and lines of .txt.

A row that cannot be read affects no other: it comes with the reason, so that the caller can count or report it.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import BinaryIO, NamedTuple

from minisobert.corpus.sources import HEAD, LONGEST, NotText, TextFile, lines

OBJECTS = (".jsonl", ".ndjson", ".json")  # each row may have keys of its own
TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".ndjson", ".json")
KINDS = (*TABLES, ".txt")
MOST_NAMES, LONGEST_NAME = 30, 40  # columns in a message, and characters of each: without a header these are texts
LONGEST_FIELD = 1 << 24  # characters of a field of a .csv; csv's own limit of 131,072 is shorter than some posts
NOT_UTF8 = "not UTF-8; convert the file, e.g. with iconv"
_BETWEEN = re.compile("[\\s,\ufeff]*")  # between the values of a .json


class NoColumn(ValueError):
    def __init__(self, column: str, message: str):
        super().__init__(message)
        self.column = column


class Row(NamedTuple):
    line: int  # on which it begins, from 1; its number in a .parquet, and in an array of a .json
    fields: dict  # column → value: text, or any JSON value for OBJECTS
    problem: str = ""  # why it cannot be read; then it has no fields
    lines: int = 1  # lines of the file that it takes up: many, after a stray quote


def rows(
    file: TextFile, columns: Sequence[str] = (), progress: Callable[[int], object] = lambda size: None
) -> Iterator[Row]:
    """The rows of a file of one of KINDS; a .txt has the column "text". Empty lines are left out, except in a .txt.
    columns: if a .parquet has all of these, only these are read. progress: called with the number of unpacked bytes
    read since its last call. Raises ValueError if the header is damaged or has a name twice, or if the file is not
    text."""
    if file.kind == ".parquet":
        yield from _parquet(file, columns, progress)
        return
    read = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".txt": _lines}.get(file.kind, _csv)
    newline = "" if read is _csv else "\n"
    with file.text(newline, errors="surrogateescape", progress=progress) as stream:
        yield from read(lines(stream, file) if read in (_jsonl, _lines) else stream, file)


def text_of(fields: dict, columns: Sequence[str]) -> str:
    """The columns that are not empty, separated by blank lines. Raises ValueError for a value that is not text."""
    for column in columns:
        if isinstance(fields.get(column), (bool, int, float)):
            raise ValueError(f"{column} is a number, not text")
    return "\n\n".join(text for column in columns if (text := plain(fields, column).strip("\n")).strip())


def plain(fields: dict, column: str) -> str:
    """A value as text, with line ends as \\n; "" if there is none. Numbers become text. Raises ValueError for other
    values that are not text."""
    value = fields.get(column)
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if not isinstance(value, str | None):
        raise ValueError(f"{column} is a {'list' if isinstance(value, list) else 'JSON object'}, not text")
    text = (value or "").replace("\r\n", "\n").replace("\r", "\n")
    if not is_unicode(text):  # JSON can hold half of a surrogate pair
        raise ValueError(f"{column} holds half of a surrogate pair")
    return text


def check_columns(file: TextFile, wanted: Sequence[str], there: Sequence[str], advice: str) -> None:
    """Raises NoColumn for the first column that the file lacks."""
    for column in wanted:
        if column not in there:
            shown = (" ".join(name.split())[:LONGEST_NAME] for name in there[:MOST_NAMES])  # a name may span lines
            names = ", ".join(shown) + ", …" * (len(there) > MOST_NAMES)
            has = f"its columns are {names}" if there else "it has no rows"
            raise NoColumn(column, f"{file} has no column {column!r}; {has}; {advice}")


def _csv(stream, file: TextFile) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    first = stream.readline(LONGEST_FIELD)
    if "\0" in first or not is_unicode(first):
        raise NotText(f"{file} is not UTF-8 text (is it a spreadsheet?); save it as CSV in UTF-8")
    delimiter = "\t" if file.kind == ".tsv" else max(",;\t", key=first.count)
    # strict, or a stray quote would hide rows
    reader = csv.reader(chain([first], lines(stream, file)), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise NotText(f"{file}: its header has a quote too few or too many ({error})") from None
    if twice := next((name for name in columns if name and columns.count(name) > 1), ""):
        raise ValueError(f"{file} has two columns named {twice!r}; rename one")
    while True:
        line = reader.line_num + 1
        problem = ""
        try:
            fields = next(reader, None)
        except csv.Error as error:
            fields, problem = [""], f"a quote is missing or too many ({error})"
        if fields is None:
            return
        if not fields:
            continue
        if not problem and len(fields) != len(columns):
            problem = f"{len(fields)} fields, but the header has {len(columns)}; is a quote missing?"
        elif not is_unicode("".join(fields)):
            problem = NOT_UTF8
        yield Row(line, {} if problem else dict(zip(columns, fields)), problem, reader.line_num + 1 - line)


def _parquet(file: TextFile, columns: Sequence[str], progress: Callable[[int], object]) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{file} needs pyarrow: pip install 'minisobert[tables]'") from None
    try:
        with _seekable(file) as stream:
            size = stream.seek(0, 2)
            # otherwise it would read a column of a whole row group at once, which may be gigabytes
            table = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
            total, read = table.metadata.num_rows, 0
            wanted = list(columns) if columns and set(columns) <= set(table.schema_arrow.names) else None
            for batch in table.iter_batches(1_024, columns=wanted):
                for number, each in enumerate(_dicts(batch), read + 1):
                    yield Row(number, {}, NOT_UTF8) if each is None else Row(number, each)
                progress(size * (read + len(batch)) // total - size * read // total)
                read += len(batch)
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise NotText(f"{file} cannot be read as .parquet ({error})") from None


def _dicts(batch) -> Iterator[dict | None]:
    """The rows of a pyarrow.RecordBatch; None for one with bytes that are not UTF-8, which pyarrow does not check."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(len(batch)):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


@contextmanager
def _seekable(file: TextFile) -> Iterator[BinaryIO]:
    """Opens a file on disk as it is, and any other as a temporary file with its unpacked bytes."""
    with file.binary() as stream:
        if isinstance(stream, io.BufferedReader) and stream.seekable() and not file.member:
            yield stream
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)
            yield copy


def _json(stream, file: TextFile) -> Iterator[Row]:
    """Reads arrays of objects, objects one after another, or one per line. Of those, a damaged one affects no other.

    An array is never in memory as a whole. If it is damaged, its next object cannot be found: that is a ValueError.
    """
    buffer = stream.readline(LONGEST)
    while buffer.isspace():
        buffer = stream.readline(LONGEST)
    if buffer.lstrip("\ufeff \t").startswith("{") and isinstance(_value(buffer), dict):
        yield from _jsonl(chain([buffer], lines(stream, file)), file)
        return
    read, number, at, in_array, ended = json.JSONDecoder().raw_decode, 0, 0, False, False
    while True:
        at = _BETWEEN.match(buffer, at).end()
        if buffer[at : at + 1] == ("]" if in_array else "["):
            at, in_array = at + 1, not in_array
            continue
        problem = ""
        try:
            value, end = read(buffer, at)
        except (ValueError, RecursionError) as error:
            problem, end = getattr(error, "msg", "nested too deeply"), len(buffer)
        if end == len(buffer) and not ended:  # more of the value may be to come
            more = stream.read(max(HEAD, len(buffer) - at))
            buffer, at, ended = buffer[at:] + more, 0, not more
            if len(buffer) > LONGEST + HEAD:
                raise ValueError(f"{file}: value {number + 1:,} is not JSON, or has more than {LONGEST:,} characters")
            continue
        if at == len(buffer):
            if in_array:
                raise ValueError(f"{file} is truncated: its array never ends")
            return
        number += 1
        if problem:
            raise ValueError(f"{file}: value {number:,} is not JSON ({problem}), or the file is truncated")
        at = end
        yield Row(number, value) if isinstance(value, dict) else Row(number, {}, "no JSON object")


def _value(line: str) -> object:
    try:
        return json.loads(line.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return None


def _jsonl(found: Iterable[str], file: TextFile) -> Iterator[Row]:
    for number, line in enumerate(found, 1):
        line = line.lstrip("\ufeff")  # concatenated files have one inside
        if not line.strip():
            continue
        value = _value(line)
        if not is_unicode(line):
            yield Row(number, {}, NOT_UTF8)
        elif isinstance(value, dict):
            yield Row(number, value)
        else:
            yield Row(number, {}, "no JSON object")


def _lines(found: Iterable[str], file: TextFile) -> Iterator[Row]:
    for number, line in enumerate(found, 1):
        line = line.lstrip("\ufeff").rstrip("\r\n")
        yield Row(number, {"text": line}) if is_unicode(line) else Row(number, {}, NOT_UTF8)


def is_unicode(text: str) -> bool:
    """Whether a text has no bytes that were not UTF-8, which Python keeps as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
