"""The comments of a site, joined to their posts on disk.

A dump orders comments by their own ids, and the largest site has 90 million of them. As they are read, they are written
to runs: files of about RUN bytes of text, each in the order of its posts. Posts are read in the order of their ids, so
a few hundred consecutive posts find their comments of each run in one place. Memory is bounded by a run, and many
processes can read at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from minisobert.files import flush

RUN = 1 << 26  # bytes of text
_EACH = 1_024  # comments; the post of one in so many is kept in memory


class Runs:
    """Writes the runs of a folder. `runs`, `comments`: how many there are so far, those of earlier objects included."""

    def __init__(self, folder: Path, runs: int = 0, comments: int = 0):
        self.folder, self.runs, self.comments = folder, runs, comments
        self._parts: list[tuple[np.ndarray, np.ndarray, bytes]] = []
        self._size = 0

    def add(self, posts: np.ndarray, sizes: np.ndarray, text: bytes) -> None:
        """Adds comments, in the dump's order. posts, sizes: (C,) int64, the post of each and its number of bytes in
        `text`, which holds them one after another."""
        self._parts.append((posts, sizes, text))
        self._size += len(text)
        self.comments += len(posts)
        if self._size >= RUN:
            self.flush()

    @property
    def waiting(self) -> bool:
        """Whether some comments are not on the disk yet."""
        return self._size > 0

    def flush(self) -> None:
        if not self._size:
            return
        posts, sizes = (np.concatenate(column) for column in list(zip(*self._parts))[:2])
        text = memoryview(b"".join(text for _, _, text in self._parts))
        self._parts, self._size = [], 0
        ends = np.cumsum(sizes)
        order = np.argsort(posts, kind="stable")  # the comments of one post stay in the dump's order
        name = str(self.folder / str(self.runs))
        with open(f"{name}.text", "wb") as file:
            file.writelines(text[end - size : end] for end, size in zip(ends[order].tolist(), sizes[order].tolist()))
            file.flush()
            os.fsync(file.fileno())
        with open(f"{name}.index", "wb") as file:  # (C, 2) int64: the post of each comment, and where its text ends
            file.write(np.stack([posts[order], np.cumsum(sizes[order])], axis=1).tobytes())
            file.flush()
            os.fsync(file.fileno())
        flush(self.folder)
        self.runs += 1


def comments_of(folder: Path, posts: Sequence[int]) -> dict[int, list[str]]:
    """The comments, in the dump's order, of each of these posts that has any."""
    wanted = np.unique(np.array(posts, np.int64))
    found: dict[int, list[str]] = {}
    samples = _samples(folder, folder.stat().st_mtime_ns) if len(wanted) else []
    for run, sample in enumerate(samples):
        index, before = _slice(folder / f"{run}.index", sample, int(wanted[0]), int(wanted[-1]))
        begin = np.searchsorted(index[:, 0], wanted)
        stop = np.searchsorted(index[:, 0], wanted, "right")
        there = np.flatnonzero(stop > begin)
        if not len(there):
            continue
        ends = np.concatenate([[before], index[:, 1]])
        with open(folder / f"{run}.text", "rb") as file:
            for post, a, b in zip(wanted[there].tolist(), begin[there].tolist(), stop[there].tolist()):
                bounds = ends[a : b + 1].tolist()
                text = os.pread(file.fileno(), bounds[-1] - bounds[0], bounds[0])
                texts = [text[x - bounds[0] : y - bounds[0]].decode() for x, y in pairwise(bounds)]
                found.setdefault(post, []).extend(texts)
    return found


def _slice(path: Path, sample: np.ndarray, first: int, last: int) -> tuple[np.ndarray, int]:
    """((C, 2), where the text of the first begins): the part of a run's index for posts from `first` to `last`, perhaps
    with some before and after."""
    begin = max(int(np.searchsorted(sample, first)) - 1, 0) * _EACH
    stop = int(np.searchsorted(sample, last, "right")) * _EACH
    with open(path, "rb") as file:
        file.seek(max(begin - 1, 0) * 16)
        index = np.frombuffer(file.read((stop - max(begin - 1, 0)) * 16), np.int64).reshape(-1, 2)
    return (index[1:], int(index[0, 1])) if begin else (index, 0)


@lru_cache(1)
def _samples(folder: Path, modified: int) -> list[np.ndarray]:
    """For each run, the post of every _EACH-th comment. modified: tells one site's folder from another's."""
    runs = sorted(int(path.stem) for path in folder.glob("*.index"))
    return [np.memmap(folder / f"{run}.index", np.int64, "r").reshape(-1, 2)[::_EACH, 0].copy() for run in runs]
