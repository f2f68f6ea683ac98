"""A disk that loses what was not flushed when its power is cut: `Disk` records what was flushed, and `states` gives
what may be left. Also a disk that is full from some moment on."""

from __future__ import annotations

import builtins
import errno
import os
import random
import resource
import shutil
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

State = dict[str, bytes | None]  # path → content of the file; None for a folder


class Disk:
    """The part of a folder that has reached the disk: the contents of files and the names in folders, as last
    flushed. Files and folders are identified by their inodes, which stay the same when they are renamed."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.files, self.folders, self.moments, self.pins = root, {}, {}, [], []
        for path in (root, *root.rglob("*")):  # these have long been on the disk
            descriptor = os.open(path, os.O_RDONLY)
            self._flush(descriptor)
            os.close(descriptor)
        for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._noting(name, getattr(os, name)))

    def _noting(self, name: str, operation):
        def noted(*args, **kwargs):
            done = operation(*args, **kwargs)
            if name == "fsync":
                self._flush(*args)
            self._note()
            return done

        return noted

    def _flush(self, descriptor: int) -> None:
        self.pins.append(os.dup(descriptor))  # so that its inode is not used again while this object lives
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            self.folders[found.st_ino] = {each.name: (each.inode(), each.is_dir()) for each in os.scandir(descriptor)}
        else:
            self.files[found.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _note(self) -> None:
        """Records what is there now, and what of it is on the disk."""
        files, folders = {}, {}
        for path in [self.root, *self.root.rglob("*")]:
            inode = path.stat().st_ino
            if path.is_dir():
                folders[inode] = {each.name: (each.inode(), each.is_dir()) for each in os.scandir(path)}
            else:
                files[inode] = path.read_bytes()
        self.moments.append((files, folders, dict(self.files), dict(self.folders)))

    def close(self) -> None:
        for descriptor in self.pins:
            os.close(descriptor)


def after_a_cut(moment, root: int, lucky_file, lucky_folder) -> State:
    """The files and folders (None) that are there when the power is back. Changes to an inode since it was last flushed
    are lost, unless it is lucky: for a file, 0 means that all of them are lost, 1 that half are, and 2 that none are.
    """
    files, folders, flushed_files, flushed_folders = moment
    found = {}

    def visit(path: str, inode: int) -> None:
        names = folders if inode in folders and lucky_folder(inode) else flushed_folders
        for name, (child, is_folder) in names.get(inode, {}).items():
            if is_folder:
                found[path + name] = None
                visit(f"{path}{name}/", child)
            else:
                flushed = flushed_files.get(child, b"")
                now = files.get(child, flushed)
                part = now[: (len(flushed) + len(now)) // 2]
                found[path + name] = flushed if now == flushed else (flushed, part, now)[lucky_file(child)]

    visit("", root)
    return found


def states(disk: Disk, known: Callable[[set[str]], Any] = lambda names: None) -> Iterator[tuple[State, Any]]:
    """Yields each possible state of the disk after a cut, once, and what is `known` from the names flushed by then."""
    seen, draw, root = set(), random.Random(0), disk.root.stat().st_ino
    for moment in disk.moments:
        certain = after_a_cut(moment, root, lambda _: 0, lambda _: False)
        names = known({name for of_folder in moment[3].values() for name in of_folder})
        others = [after_a_cut(moment, root, lambda _: 0, lambda _: True)]
        for _ in range(2):
            of_file, of_folder = defaultdict(partial(draw.randrange, 3)), defaultdict(partial(draw.randrange, 2))
            others.append(after_a_cut(moment, root, of_file.__getitem__, of_folder.__getitem__))
        for state in (certain, *others):
            if (key := (names, *sorted((name, hash(data)) for name, data in state.items()))) not in seen:
                seen.add(key)
                yield state, names


def restore(root: Path, state: State) -> None:
    """Makes the folder what it is after a cut."""
    shutil.rmtree(root)
    for name, data in {"": None, **state}.items():
        (root / name).mkdir() if data is None else (root / name).write_bytes(data)


class FullDisk:
    """From the n-th write on, no file can grow beyond its first `room` bytes, and no name can be given. Counts the
    writes."""

    def __init__(self, n: float, room: int, folder: Path, monkeypatch, before: Callable[[], object] = lambda: None):
        """before: called when the disk gets full."""
        self.n, self.room, self.folder, self.before, self.kinds = n, room, folder, before, []
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        for module, name in ((builtins, "open"), (os, "pwrite"), (os, "mkdir"), (os, "replace")):
            monkeypatch.setattr(module, name, self._counting(name, getattr(module, name)))

    def _counting(self, name: str, operation):
        def counted(*args, **kwargs):
            here = name == "pwrite" or str(args[0]).startswith(str(self.folder))
            if not here or (name == "open" and args[1:] in ((), ("rb",))):
                return operation(*args, **kwargs)
            self.kinds.append(name)
            if len(self.kinds) == self.n:
                self.before()
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, self.limits[1]))
            if len(self.kinds) >= self.n and name in ("mkdir", "replace"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
            return operation(*args, **kwargs)

        return counted

    def make_room(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
