"""Records on disk how far data.prepare has come, so that after a kill the same command continues from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minisobert.cli import printable
from minisobert.files import flush, make_folder, write_json

NAME = "journal.json"
SECONDS = 10  # between two entries: a kill loses at most this much work. Each entry waits for the disk.


class Journal:
    """The entries of one run of data.prepare; `state` holds what they say so far.

    folder: either empty, or as a killed run left it. If that run had the same command, its work is continued;
    otherwise the folder is cleared."""

    def __init__(self, folder: Path, command: dict, fresh: bool):
        self.path, self._command = folder / NAME, json.loads(json.dumps(command))
        self.state: dict[str, Any] = {}
        self.folders = {folder}  # of the files that entries refer to
        self._last = time.monotonic()
        if not any(folder.iterdir()):
            return
        before = {}
        if self.path.exists() and not fresh:
            before = json.loads(self.path.read_bytes())
        if before.get("command") == self._command:
            self.state = before["state"]
            print(printable(f"continuing in {folder}, which an earlier run left unfinished"), file=sys.stderr)
            return
        self.start_over("which another run left unfinished")

    def start_over(self, reason: str) -> None:
        folder, self.state = self.path.parent, {}
        print(printable(f"starting over in {folder}, {reason}"), file=sys.stderr)
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def enter(self, name: str, state: Any) -> None:
        """Makes an entry. The contents of the files that `state` refers to must be on the disk already; their names are
        flushed here."""
        for folder in self.folders:
            flush(folder)
        self.state[name] = state
        write_json(self.path, {"command": self._command, "state": self.state})
        self._last = time.monotonic()

    def now_and_then(self, name: str, state: Callable[[], Any]) -> None:
        """Makes an entry if the last one is SECONDS old or older."""
        if time.monotonic() - self._last >= SECONDS:
            self.enter(name, state())


@contextmanager
def temporary(work: Path | None, out: Path, done: Journal) -> Iterator[Path]:
    """The folder for temporary files: that of the journal or, if `work` is given, one in `work` that is named after
    `out`. The latter is deleted at the end and after an error, but it stays after Ctrl-C and SIGTERM, as the folder of
    the journal does."""
    if work is None:
        yield done.path.parent
        return
    place = os.path.realpath(out)
    folder = work / f".{Path(place).name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}.unfinished"
    if done.state and not folder.exists() and "meta" not in done.state:
        done.start_over(f"whose temporary files are no longer in {work}")
    if not done.state:
        shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    done.folders.add(folder)
    try:
        yield folder
    except KeyboardInterrupt:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)
    flush(work)


def identity(path: str | Path) -> list:
    """A value that changes when the file, or any file in the folder, is written to."""
    files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
    stats = [(str(file), file.stat()) for file in files if file.is_file()]
    return [os.path.realpath(path), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
