"""The files of a Stack Exchange dump as streams: from a folder, or out of a .7z archive without unpacking it.

Nothing of an archive is written to disk, whatever its members are called: the largest has 100 GB of XML.
"""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def contents(archive: Path) -> dict[str, int]:
    """The size in bytes of each file of an archive, by its name without folders."""
    with _archive(archive) as (opened, _):
        return {Path(item.filename).name: item.uncompressed for item in opened.list() if not item.is_directory}


def members(dump: Path) -> dict[str, int]:
    """The size in bytes of `Posts.xml` and `Comments.xml`, as far as a dump holds them."""
    if Path(dump).is_dir():
        sizes = {path.name: path.stat().st_size for path in Path(dump).iterdir() if path.is_file()}
    else:
        sizes = contents(dump)
    return {name: sizes[name] for name in ("Posts.xml", "Comments.xml") if name in sizes}


@contextmanager
def open_member(dump: Path, name: str) -> Iterator[BinaryIO]:
    """One file of a dump, as a stream of bytes. From an archive it is decompressed by a thread, a little ahead."""
    if Path(dump).is_dir():
        with open(Path(dump) / name, "rb") as stream:
            yield stream
        return
    member = _Member(Path(dump), name)
    try:
        yield io.BufferedReader(member, 1 << 20)
    finally:
        member.stop()


class _Member(io.RawIOBase):
    """One member of an archive. What goes wrong in the thread is raised by the read that runs into it."""

    def __init__(self, dump: Path, name: str):
        self.dump, self.member = dump, name
        self.blocks: queue.Queue[bytes | BaseException] = queue.Queue(1)  # py7zr makes blocks of up to 128 MB
        self.block = memoryview(b"")  # what is left of the one being read
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._decompress, daemon=True)
        self.thread.start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.block:
            block = self.blocks.get()
            if not isinstance(block, bytes):
                self.blocks.put(block)  # the end, or the failure, is there for the next read too
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
            with _archive(self.dump) as (archive, py7zr):

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

                path = next(item.filename for item in archive.list() if Path(item.filename).name == self.member)
                archive.extract(targets=[path], factory=Factory())
        except BaseException as error:
            end = error
        with suppress(_End):
            put(end)


class _End(Exception):
    """In the queue: the member was read to its end. In the thread: nobody reads any more."""


@contextmanager
def _archive(dump: Path):
    """(an open archive, the py7zr package). Whatever goes wrong inside is a ValueError that names the archive."""
    try:
        import py7zr
    except ImportError:
        raise ValueError(f"{dump}: reading .7z archives needs py7zr: pip install minisobert[dump]") from None
    try:
        # opened here and not by name: py7zr would start threads of its own
        with open(dump, "rb") as file, py7zr.SevenZipFile(file) as archive:
            yield archive, py7zr
    except (_End, FileNotFoundError, ValueError):
        raise
    except Exception as error:  # py7zr lets the errors of eight decompressors through
        raise ValueError(f"{dump} is truncated or no .7z archive ({type(error).__name__}: {error})") from None
