"""Members of .7z archives, also of nested ones, as streams of bytes; nothing is unpacked to disk.

`inside` names a member: one name for a member of the archive at `path`, or several, of which all but the last are
nested archives. Names are never used as paths, so that an archive cannot write anywhere.
"""

from __future__ import annotations

import io
import queue
import re
import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_UNSUPPORTED = {  # methods that py7zr does not read, by their ids in the format
    b"\x03\x03\x01\x1b": "BCJ2", b"\x0a": "ARM64", b"\x0b": "RISCV",
    b"\x04\xf7\x11\x04": "LZ4", b"\x04\xf7\x11\x05": "LZ5", b"\x04\xf7\x11\x06": "Lizard",
}  # fmt: skip
BOMB, RATIO = 1 << 30, 200  # unpacked bytes, and times the packed bytes: the XML of dumps packs to a fifth or a tenth
_TAIL = 1 << 20  # bytes; holds the table of contents of an archive with some thousands of members


class Unreadable(ValueError):
    """An archive that cannot be read, in one line that says why."""


def contents(path: Path, inside: Sequence[str] = ()) -> dict[str, int]:
    """The unpacked size in bytes of each file in an archive, by its name there. inside: names a nested archive.

    Raises ValueError if the archive cannot be read, or holds a path outside itself, a name twice, a symlink in place of
    a table, or more than BOMB bytes and RATIO times the size of the file on disk. A method of compression that py7zr
    cannot read is found here for files that may be part of a dump, and for others when they are read.
    """
    sizes: dict[str, int] = {}
    where = ": ".join([str(path), *inside])
    with _archive(path, inside, threading.Event()) as (archive, _):
        for item in archive.files:
            if item.is_directory:
                continue
            name = item.filename
            if ".." in re.split(r"[\\/]", name) or re.match("[A-Za-z]:", name):
                raise Unreadable(f"{where} holds {name}, a path outside of it; {unpacking(path)}")
            if name in sizes:
                raise Unreadable(f"{where} holds {name} twice")
            of_dump = name.lower().endswith((".xml", ".7z"))
            if of_dump and item.is_symlink:
                raise Unreadable(f"{where} holds {name} as a symlink, which is not followed; {unpacking(path)}")
            if item.folder and of_dump:
                item.folder.get_decompressor(item.compressed)
            sizes[name] = item.uncompressed
    if (total := sum(sizes.values())) > max(BOMB, RATIO * path.stat().st_size):
        raise Unreadable(
            f"{where} says that it unpacks to {total:,} bytes, over {RATIO} times its size, which no dump does; if it "
            f"is sound, {unpacking(path)}"
        )
    return sizes


@contextmanager
def open_member(path: Path, inside: Sequence[str]) -> Iterator[BinaryIO]:
    """The bytes of one member, decompressed by a thread that keeps a little ahead of the reader."""
    stream = _Stream(path, inside)
    try:
        yield io.BufferedReader(stream, 1 << 20)
    finally:
        stream.stop()


class _End(Exception):
    """In the queue: the member was read to its end. In the thread: the reader is gone."""


class _Stream(io.RawIOBase):
    """One member of an archive. An error in the thread is raised by the read that reaches it."""

    def __init__(self, path: Path, inside: Sequence[str]):
        self.path, self.inside = path, inside
        self.blocks: queue.Queue[bytes | BaseException] = queue.Queue(1)  # py7zr makes blocks of up to 128 MB
        self.block = memoryview(b"")  # what is left of the block being read
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._decompress, daemon=True)
        self.thread.start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.block:
            block = self.blocks.get()
            if not isinstance(block, bytes):
                self.blocks.put(block)  # keeps the end, or the error, for the next read
                if isinstance(block, _End):
                    return 0
                raise block
            self.block = memoryview(block)
        size = min(len(buffer), len(self.block))
        buffer[:size] = self.block[:size]
        self.block = self.block[size:]
        return size

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()

    def _put(self, block: bytes | BaseException) -> None:
        while not self.stopped.is_set():
            try:
                return self.blocks.put(block, timeout=0.1)
            except queue.Full:
                pass  # the reader is slower, or gone
        raise _End

    def _decompress(self) -> None:
        put, end = self._put, _End()
        try:
            with _archive(self.path, self.inside[:-1], self.stopped) as (archive, py7zr):

                class Writer(py7zr.Py7zIO):
                    def write(self, data):
                        put(bytes(data))
                        return len(data)

                    def read(self, size=None):
                        return b""

                    def seek(self, offset, whence=0):
                        return 0

                    def flush(self):
                        pass

                    def size(self):
                        return 0

                class Factory(py7zr.WriterFactory):
                    def create(self, filename):
                        return Writer()

                archive.extract(targets=[self.inside[-1]], factory=Factory())
        except BaseException as error:
            end = error
        with suppress(_End):
            put(end)


class _File(io.FileIO):
    """An archive on disk. A thread whose reader is gone ends here, however much it still has to skip."""

    stopped: threading.Event

    def readinto(self, buffer) -> int | None:
        if self.stopped.is_set():
            raise _End
        return super().readinto(buffer)


class _Inner(io.RawIOBase):
    """A nested archive as the seekable file that py7zr needs, without a copy of it on disk.

    Seeking back means decompressing the outer archive again from its beginning. py7zr reads the table of contents at
    the end of the file, and then the members from the front. Since the tail is kept, that takes two passes.
    """

    def __init__(self, path: Path, inside: Sequence[str], stopped: threading.Event):
        self.path, self.inside, self.stopped = path, inside, stopped
        self.size = contents(path, inside[:-1])[inside[-1]]
        self.position = 0
        self.stream: _Stream | None = None
        self.reached = 0  # where in the file the stream is
        self.tail = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer) -> int:
        begin = max(0, self.size - _TAIL)
        if self.position < begin:
            data = self._read(self.position, min(len(buffer), begin - self.position))
        else:
            self.tail = self.tail or self._read(begin, self.size - begin)
            data = self.tail[self.position - begin :][: len(buffer)]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        if self.stream:
            self.stream.stop()
        super().close()

    def _read(self, position: int, size: int) -> bytes:
        if self.stream and position < self.reached:
            self.stream.stop()
            self.stream = None
        if not self.stream:
            self.stream, self.reached = _Stream(self.path, self.inside), 0
            self.buffered = io.BufferedReader(self.stream, 1 << 20)
        while passed := self.buffered.read(min(position - self.reached, _TAIL)):
            self.reached += len(passed)
            if self.stopped.is_set():
                raise _End
        data = self.buffered.read(size)
        self.reached += len(data)
        return data


@contextmanager
def _archive(path: Path, inside: Sequence[str], stopped: threading.Event):
    """Yields (an open archive, the py7zr package). Whatever is wrong with the archive raises an `Unreadable` that names
    it. stopped: set when the reader is gone."""
    try:
        import py7zr
        from py7zr.exceptions import PasswordRequired, UnsupportedCompressionMethodError
    except ImportError:
        raise ValueError(f"{path}: reading .7z archives needs py7zr: pip install minisobert[dump]") from None
    name = ": ".join([str(path), *inside])
    raw = _Inner(path, inside, stopped) if inside else _File(path)
    raw.stopped = stopped
    try:
        # passed as a file, not by name, or py7zr would start threads of its own
        with io.BufferedReader(raw, 1 << 20) as file, py7zr.SevenZipFile(file) as archive:
            yield archive, py7zr
    except (_End, Unreadable):
        raise
    except PasswordRequired:
        raise Unreadable(f"{name} is encrypted; {unpacking(path)}") from None
    except UnsupportedCompressionMethodError as error:
        method = _UNSUPPORTED.get(error.data) if isinstance(error.data, bytes) else None
        method = f"the method {method}" if method else f"a method ({_short(error.message)})"
        raise Unreadable(f"{name} uses {method}, which py7zr cannot read; {unpacking(path)}") from None
    except MemoryError:
        raise Unreadable(f"{name} takes more memory to unpack than there is; {unpacking(path)}") from None
    except Exception as error:  # py7zr lets the errors of eight decompressors through
        if isinstance(error, OSError) and error.errno:
            raise  # an error of the disk, not of the archive
        reason = f"{type(error).__name__}: {_short(error)}"
        raise Unreadable(f"{name} is truncated or not a .7z archive ({reason})") from None


def unpacking(archive: Path) -> str:
    """What to do with an archive that cannot be read here, as the end of a message."""
    folder = archive.with_name(re.sub(r"\.7z(\.\d+)?$", "", archive.name, flags=re.I))
    return f"unpack it (7z x {shlex.quote(str(archive))} -o{shlex.quote(str(folder))}) and give the folder"


def _short(error: object) -> str:
    """The message of a py7zr error, cut, because some hold a page of bytes."""
    return " ".join(str(error).split())[:80]
