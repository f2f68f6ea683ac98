"""Tables as people have them, a row at a time: .csv (comma, semicolon or tab), .tsv, .jsonl, .parquet (extra [tables]),
and lines of .txt.

A row that cannot be read costs itself alone: it comes with the reason, so that whoever reads can count it or name it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from minisobert.tasks.files import LONGEST_FIELD, File

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
KINDS = (*TABLES, ".txt")
MOST_NAMES, LONGEST_NAME = 30, 40  # of columns in a message; a file without a header has texts there
NOT_UTF8 = "not UTF-8; convert the file, e.g. with iconv"


class NoColumn(ValueError):
    def __init__(self, column: str, message: str):
        super().__init__(message)
        self.column = column


class Row(NamedTuple):
    line: int  # on which it begins, from 1; of a .parquet its number
    fields: dict  # column → value: text, or of a .jsonl whatever JSON has
    problem: str = ""  # why it cannot be read; then it has no fields


def rows(file: File) -> Iterator[Row]:
    """file: of one of KINDS; a .txt has the column "text". Empty lines are left out, but not of a .txt. Raises
    ValueError where the file has no header, or is no text at all."""
    if file.kind == ".parquet":
        yield from _parquet(file)
        return
    read = {".jsonl": _jsonl, ".txt": _lines}.get(file.kind, _csv)
    with file.text(newline="" if read is _csv else "\n", errors="surrogateescape") as stream:
        yield from read(stream, file)


def text_of(fields: dict, columns: Sequence[str]) -> str:
    """The columns that are not empty, with a blank line between them. Raises ValueError for a value that is no text."""
    for column in columns:
        if isinstance(fields.get(column), (bool, int, float)):
            raise ValueError(f"{column} is a number, not text")
    return "\n\n".join(text for column in columns if (text := plain(fields, column).strip("\n")).strip())


def plain(fields: dict, column: str) -> str:
    """A value as text, line ends as \\n; "" where there is none. Raises ValueError for one that is no text."""
    value = fields.get(column)
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if not isinstance(value, str | None):
        raise ValueError(f"{column} is a {'list' if isinstance(value, list) else 'JSON object'}, not text")
    text = (value or "").replace("\r\n", "\n").replace("\r", "\n")
    if not _is_unicode(text):  # JSON can hold half of a surrogate pair
        raise ValueError(f"{column} holds half of a surrogate pair")
    return text


def check_columns(file: File, wanted: Sequence[str], there: Sequence[str], advice: str) -> None:
    """Raises NoColumn for the first one that the file lacks."""
    for column in wanted:
        if column not in there:
            names = ", ".join(name[:LONGEST_NAME] for name in there[:MOST_NAMES]) + ", …" * (len(there) > MOST_NAMES)
            has = f"its columns are {names}" if there else "it has no rows"
            raise NoColumn(column, f"{file} has no column {column!r}; {has}; {advice}")


def _csv(stream, file: File) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    first = stream.readline()
    if "\0" in first or not _is_unicode(first):
        raise ValueError(f"{file} is no text in UTF-8 (UTF-16, or a spreadsheet?); save it as CSV in UTF-8")
    delimiter = "\t" if file.kind == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(chain([first], stream), delimiter=delimiter, strict=True)  # strict: or a stray quote hides rows
    columns = [name.strip() for name in next(reader, [])]
    if twice := next((name for name in columns if name and columns.count(name) > 1), ""):
        raise ValueError(f"{file} has two columns named {twice!r}; rename one")
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield Row(line, {}, f"a quote is missing or too many ({error})")
            continue
        if fields is None:
            return
        if fields and len(fields) != len(columns):
            yield Row(line, {}, f"{len(fields)} fields, the header has {len(columns)}; is a quote missing?")
        elif not _is_unicode("".join(fields)):
            yield Row(line, {}, NOT_UTF8)
        elif fields:
            yield Row(line, dict(zip(columns, fields)))


def _parquet(file: File) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{file} needs pyarrow: pip install 'minisobert[tables]'") from None
    try:
        batches = parquet.ParquetFile(file.path).iter_batches(1_024)
        fields = (each for batch in batches for each in batch.to_pylist())
        yield from (Row(number, each) for number, each in enumerate(fields, 1))
    except ArrowException as error:
        raise ValueError(f"{file} is no readable .parquet file ({error})") from None


def _jsonl(stream, file: File) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        line = line.lstrip("\ufeff")  # files that were put together have one inside
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not _is_unicode(line):
            yield Row(number, {}, NOT_UTF8)
        elif isinstance(value, dict):
            yield Row(number, value)
        else:
            yield Row(number, {}, "no JSON object")


def _lines(stream, file: File) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        line = line.lstrip("\ufeff").rstrip("\r\n")
        yield Row(number, {"text": line}) if _is_unicode(line) else Row(number, {}, NOT_UTF8)


def _is_unicode(text: str) -> bool:
    """Whether it has no bytes that were not UTF-8, which Python keeps as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
