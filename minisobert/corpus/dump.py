"""The files of a Stack Exchange dump as streams: from a folder, or out of a .7z archive without unpacking it.

Nothing of an archive is written to disk, whatever its members are called: the largest has 100 GB of XML.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def members(dump: Path) -> dict[str, int]:
    """The size in bytes of `Posts.xml` and `Comments.xml`, as far as a dump holds them."""
    if Path(dump).is_dir():
        sizes = {path.name: path.stat().st_size for path in Path(dump).iterdir() if path.is_file()}
    else:
        with _archive(dump) as (archive, _):
            sizes = {Path(member.filename).name: member.uncompressed for member in archive.list()}
    return {name: sizes[name] for name in ("Posts.xml", "Comments.xml") if name in sizes}


@contextmanager
def open_member(dump: Path, name: str) -> Iterator[BinaryIO]:
    """One file of a dump, as a stream of bytes. From an archive it is decompressed by a thread, through a pipe."""
    if Path(dump).is_dir():
        with open(Path(dump) / name, "rb") as stream:
            yield stream
        return
    read_end, write_end = os.pipe()
    failure: list[BaseException] = []
    thread = threading.Thread(target=_decompress, args=(dump, name, write_end, failure), daemon=True)
    thread.start()
    stream = os.fdopen(read_end, "rb", buffering=1 << 20)
    try:
        yield _Decompressed(stream, thread, failure)
    finally:
        stream.close()  # a thread that still writes gets a broken pipe, and ends
        thread.join()


class _Decompressed:
    """The reading end of the pipe; at its end, what went wrong in the thread is raised here."""

    def __init__(self, stream: BinaryIO, thread: threading.Thread, failure: list[BaseException]):
        self.stream, self.thread, self.failure = stream, thread, failure

    def readline(self, limit: int = -1) -> bytes:
        line = self.stream.readline(limit)
        if not line:
            self.thread.join()
            if self.failure:
                raise self.failure[0]
        return line


def _decompress(dump: Path, name: str, write_end: int, failure: list[BaseException]) -> None:
    """The thread: one member of the archive into the pipe. Any failure goes into the list."""
    try:
        with open(write_end, "wb", buffering=0) as pipe, _archive(dump) as (archive, py7zr):

            class Pipe(py7zr.Py7zIO):
                def write(self, data):
                    view = memoryview(data)
                    while view:
                        view = view[pipe.write(view) :]
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
                    return Pipe()

            (member,) = [m.filename for m in archive.list() if Path(m.filename).name == name][:1]
            archive.extract(targets=[member], factory=Factory())
    except BrokenPipeError:
        pass  # the reader has stopped
    except BaseException as error:
        failure.append(error)


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
    except (BrokenPipeError, FileNotFoundError, ValueError):
        raise
    except Exception as error:  # py7zr lets the errors of eight decompressors through
        raise ValueError(f"{dump} is truncated or no .7z archive ({type(error).__name__}: {error})") from None
