"""Opens files of text as people have them: plain or packed, a member of a .zip or .7z, or standard input; in UTF-8, or
in UTF-16 or UTF-32 with their mark; with any line ends."""

from __future__ import annotations

import codecs
import io
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from minisobert.corpus.archives import open_member
from minisobert.files import COMPRESSED, open_binary

HEAD = 1 << 16  # bytes from which the encoding and the line ends of a file are detected
LONGEST = 1 << 26  # characters of a line, an object or a document; bounds the memory that any file can take
STDIN = Path("-")

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",  # first: UTF-16's mark is the beginning of the next
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_BINARY = {
    b"PAR1": "a .parquet file", b"PK\x03\x04": "a .zip, or a file of an office program", b"\x1f\x8b": "a .gz file",
    b"\x28\xb5\x2f\xfd": "a .zst file", b"\xfd7zXZ": "a .xz file", b"BZh": "a .bz2 file", b"7z\xbc\xaf": "a .7z file",
    b"%PDF": "a PDF", b"SQLite format": "an SQLite database",
}  # fmt: skip


class NotText(ValueError):
    """A file that is not text, or whose encoding is not known."""


@dataclass(frozen=True)
class TextFile:
    """A text file. kind: its suffix in lower case, without a packer's. member: of the .zip or .7z at `path`."""

    path: Path
    kind: str
    member: str = ""

    def __str__(self) -> str:
        if self.path == STDIN:
            return "standard input"
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        """The name without folders."""
        return str(self) if self.path == STDIN else PurePosixPath(self.member).name or self.path.name

    @contextmanager
    def binary(self) -> Iterator[BinaryIO]:
        """The unpacked bytes. Raises ValueError, with the file's name, if anything is wrong with the packing."""
        if self.path == STDIN:
            yield sys.stdin.buffer
        elif not self.member:
            with open_binary(self.path) as stream:
                yield stream
        elif self.path.suffix.lower() == ".zip":
            with _in_zip(self.path, self.member) as stream:
                yield stream
        else:
            with open_member(self.path, [self.member]) as stream:
                yield stream

    @contextmanager
    def text(
        self, newline: str, errors: str = "strict", progress: Callable[[int], object] = lambda size: None
    ) -> Iterator[io.TextIOBase]:
        """The decoded file. newline: as for `open`; if all lines of a file end with \\r alone, "\\n" takes those for
        \\n. errors: what to do with bytes that are not UTF-8, as for `open`. progress: called with the number of
        unpacked bytes read since its last call. Raises NotText for a binary file, ValueError for bytes that cannot be
        decoded."""
        encoding = "utf-8-sig"
        try:
            with self.binary() as stream:
                head = stream.read(HEAD)
                encoding = encoding_of(head)
                if encoding == "utf-8-sig" and b"\0" in head[:8_000]:  # as git recognises binary files
                    raise NotText(f"{self} is not UTF-8 text: {_what(head)}")
                if encoding != "utf-8-sig" and errors == "surrogateescape":
                    errors = "surrogatepass"  # UTF-16 has no bytes to escape, but lone surrogates
                start = head.decode(encoding, "ignore")
                if newline == "\n" and "\r" in start and "\n" not in start:
                    newline = None
                raw = io.BufferedReader(_Rejoined(head, stream, progress), HEAD)
                yield io.TextIOWrapper(raw, encoding, errors, newline)
        except UnicodeDecodeError as error:
            name = encoding.removesuffix("-sig").upper()
            raise ValueError(
                f"{self} is not {name} ({error.reason}: {error.object[error.start : error.start + 1]!r}); "
                "convert it, e.g. with iconv"
            ) from None


def encoding_of(head: bytes) -> str:
    """The encoding of a file that begins so, by its mark; UTF-8 without one."""
    return next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), "utf-8-sig")


def _what(head: bytes) -> str:
    """What a file with NUL bytes seems to be, by its beginning, and what to do."""
    if kind := next((kind for magic, kind in _BINARY.items() if head.startswith(magic)), ""):
        return f"it is {kind}; name it so, or export it as text"
    return "it holds NUL bytes; if it is UTF-16, convert it (iconv -f UTF-16LE -t UTF-8)"


class _Rejoined(io.RawIOBase):
    """A stream whose beginning, `head`, was read already. Reports to `progress` how much is read."""

    def __init__(self, head: bytes, stream: BinaryIO, progress: Callable[[int], object]):
        self.head, self.stream, self.progress = head, stream, progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.head[: len(buffer)] or self.stream.read(len(buffer))
        self.head = self.head[len(buffer) :]
        buffer[: len(data)] = data
        self.progress(len(data))
        return len(data)


def lines(stream: io.TextIOBase, file: TextFile) -> Iterator[str]:
    """The lines of a stream. Raises ValueError if one is longer than LONGEST."""
    while line := stream.readline(LONGEST):
        if len(line) == LONGEST:
            raise ValueError(f"{file} has a line of more than {LONGEST:,} characters; break it up")
        yield line


def kind_of(name: str) -> str:
    """The suffix in lower case, without that of a packer: ".csv" for "A.CSV.gz"."""
    path = PurePosixPath(name.lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def zip_contents(path: Path) -> dict[str, int | None]:
    """The unpacked size in bytes of each file of a .zip, by its name there; None for a symlink, whose content is a path
    and not text. Raises ValueError if the .zip cannot be read."""
    sizes: dict[str, int | None] = {}
    for item in _zip(path).infolist():
        if item.filename in sizes:
            raise ValueError(f"{path} holds {item.filename} twice")
        if not item.is_dir():
            sizes[item.filename] = None if stat.S_ISLNK(item.external_attr >> 16) else item.file_size
    return sizes


@lru_cache(1)  # its table of contents may be long, and is the same for all members
def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is truncated or not a .zip archive ({error})") from None


@contextmanager
def _in_zip(path: Path, member: str) -> Iterator[BinaryIO]:
    archive = _zip(path)
    if archive.getinfo(member).flag_bits & 1:
        raise ValueError(f"{path}: {member} is encrypted; unpack it and give the folder")
    try:
        opened = archive.open(member)
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ValueError(f"{path}: {member} cannot be read ({error}); unpack it and give the folder") from None
    try:
        with opened, open_binary(Path(member), opened) as stream:
            yield stream
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path}: {member} is truncated or damaged ({error})") from None
