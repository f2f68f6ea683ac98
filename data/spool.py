"""The spool of data.prepare: the text of all documents in one file, what is known of each in another, and which stay.

Nothing here takes more than 30 bytes of memory a document, but for near duplicates, which take 43.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minisobert.corpus import duplicates
from minisobert.corpus.shards import held_out

LEFT_OUT, TRAINING, HELD_OUT = 0, 1, 2  # sides
SPOOL = "spool"  # how the names of the files begin
# span: from where to where in the file of texts; comments: -1 if it is no post.
_DOCUMENT = np.dtype([("source", "i4"), ("comments", "i4"), ("thread", "i8"), ("span", "i8", 2), ("digest", "u8")])
_CHUNK = 1 << 16  # documents looked at at a time


class Spool:
    """`texts` and `index` are files, made by `write`."""

    def __init__(self, folder: Path):
        self.texts, self.index = folder / SPOOL, folder / f"{SPOOL}-index"

    def write(self, found: Iterable[tuple[int, int, int, bytes, int]], start: Sequence[int] = (0, 0)) -> None:
        """found: of each document its source, comments, thread, text and digest. start: what `flush` has returned, if
        the files are to go on from there."""
        with open(self.texts, "ab") as texts, open(self.index, "ab") as index:
            self._files, self._records = (texts, index), []
            for file, size in zip(self._files, start):
                file.truncate(size)
            end = start[0]
            for source, comments, thread, text, digest in found:
                texts.write(text)
                self._records.append((source, comments, thread, (end, end + len(text)), digest))
                end += len(text)
                if len(self._records) == _CHUNK >> 4:
                    self._write_records()
            self.flush()

    def _write_records(self) -> None:
        self._files[1].write(np.array(self._records, _DOCUMENT).tobytes())
        self._records.clear()

    def flush(self) -> list[int]:
        """The sizes of both files, which are on the disk now."""
        self._write_records()
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return [file.seek(0, os.SEEK_END) for file in self._files]

    def __len__(self) -> int:
        return self.index.stat().st_size // _DOCUMENT.itemsize

    def chunks(self, which: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """The documents in order, some at a time. which: (D,) bool, of them all if given."""
        with open(self.index, "rb") as file:
            for begin in range(0, len(self), _CHUNK):
                chunk = np.frombuffer(file.read(_CHUNK * _DOCUMENT.itemsize), _DOCUMENT)
                yield chunk if which is None else chunk[which[begin : begin + _CHUNK]]

    def column(self, name: str, which: np.ndarray) -> np.ndarray:
        """What is known of some documents. which: (D,) bool."""
        found, at = np.empty(int(which.sum()), _DOCUMENT[name]), 0
        for chunk in self.chunks(which):
            found[at : at + len(chunk)] = chunk[name]
            at += len(chunk)
        return found

    def counts(self, which: np.ndarray, sources: int) -> tuple[int, int, np.ndarray]:
        """(posts, comments, (sources,) documents of each) among some documents. which: (D,) bool."""
        posts, comments, of_source = 0, 0, np.zeros(sources, np.int64)
        for chunk in self.chunks(which):
            posts += int((chunk["comments"] >= 0).sum())
            comments += int(chunk["comments"].clip(0).sum())
            of_source += np.bincount(chunk["source"], minlength=sources)[:sources]
        return posts, comments, of_source

    def parts(self, which: np.ndarray, batch: int) -> Iterator[np.ndarray]:
        """The spans, rows of (from, to), of some documents in order, cut into tasks of about `batch` bytes."""
        for chunk in self.chunks(which):
            yield from cut(chunk["span"], batch)


def remove(folder: Path) -> None:
    """The files of a spool go."""
    for path in folder.glob(f"{SPOOL}*"):
        path.unlink()


def texts_of(texts: Path, spans: np.ndarray) -> Iterator[str]:
    with open(texts, "rb") as file:
        for start, end in spans.tolist():
            file.seek(start)
            yield file.read(end - start).decode()


def size_of(spans: np.ndarray) -> int:
    """In bytes."""
    return int((spans[:, 1] - spans[:, 0]).sum())


def cut(spans: np.ndarray, batch: int) -> list[np.ndarray]:
    """The spans in order, cut into tasks of about `batch` bytes."""
    if not len(spans):
        return []
    sizes = np.cumsum(spans[:, 1] - spans[:, 0])
    cuts = np.searchsorted(sizes, np.arange(batch, sizes[-1], batch))
    return [part for part in np.split(spans, np.unique(cuts)) if len(part)]


def sides(
    spool: Spool, seed: int, keep: bool, threshold: float | None, dropped: Counter, run: duplicates.Run, batch: int
) -> np.ndarray:
    """(D,) int8: whether each document is LEFT_OUT, for TRAINING or HELD_OUT.

    No held-out text is in training either. Of equal documents, and with a threshold of near ones, the first stays.
    keep: leave out only what would be on both sides. It is training that loses it, so that the held-out threads stay
    whole and are a fair sample of all threads.

    run: see `duplicates.near`; batch: bytes of a task.
    """
    side = np.full(len(spool), TRAINING, np.int8)

    def leave_out(which: np.ndarray, reason: str) -> None:
        side[which] = LEFT_OUT
        dropped[reason] += int(which.sum())
        dropped["comments of dropped posts"] += spool.counts(which, 0)[1] if which.any() else 0

    if keep:
        last = _held_out(spool, side, seed)
        ours = np.sort(spool.column("digest", last))
        both, at = np.zeros(len(side), bool), 0
        for chunk in spool.chunks():
            place = np.searchsorted(ours, chunk["digest"]).clip(max=len(ours) - 1)
            both[at : at + len(chunk)] = len(ours) and ours[place] == chunk["digest"]
            at += len(chunk)
        both &= ~last
        if last.any() and (last | both).all():
            raise ValueError("every document is equal to a held-out one; leave --keep-duplicates out")
        leave_out(both, "in training, equal to a held-out document")
        side[last] = HELD_OUT
        return side
    leave_out(duplicates.repeated(spool.column("digest", side > 0)), "duplicates")
    if threshold is not None:
        spans = spool.column("span", side > 0)
        with tqdm(total=size_of(spans), unit="B", unit_scale=True, desc="compare") as bar:
            read, done = partial(texts_of, spool.texts), lambda part: bar.update(size_of(part))
            near = duplicates.near(read, spans, cut(spans, batch), threshold, spool.texts.parent, run, done)
        del spans
        which = np.zeros(len(side), bool)
        which[side > 0] = near
        leave_out(which, "near duplicates")
    side[_held_out(spool, side, seed)] = HELD_OUT
    return side


def _held_out(spool: Spool, side: np.ndarray, seed: int) -> np.ndarray:
    """(D,) bool."""
    there = side > 0
    found = np.zeros(len(side), bool)
    found[there] = held_out(spool.column("source", there), spool.column("thread", there), seed)
    return found
