"""The spool of data.prepare: a file with the text of all documents, an index of them, and the choice of those to keep.

It takes at most 30 bytes of memory per document, and 43 when near duplicates are looked for.
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
SPOOL = "spool"  # the names of the files begin with it
# span: begin and end in the file of texts; comments: how many the post has, -1 for what is not a post.
_DOCUMENT = np.dtype([("source", "i4"), ("comments", "i4"), ("thread", "i8"), ("span", "i8", 2), ("digest", "u8")])
_CHUNK = 1 << 16  # documents whose records are in memory at a time


class Spool:
    """The files `texts` and `index`, which `write` makes."""

    def __init__(self, folder: Path):
        self.texts, self.index = folder / SPOOL, folder / f"{SPOOL}-index"

    def write(self, found: Iterable[tuple[int, int, int, bytes, int]], start: Sequence[int] = (0, 0)) -> None:
        """found: (source, comments, thread, text, digest) for each document. start: the sizes that `flush` returned, to
        continue the files from there."""
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
        """Brings both files to the disk, and returns their sizes."""
        self._write_records()
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return [file.seek(0, os.SEEK_END) for file in self._files]

    def __len__(self) -> int:
        return self.index.stat().st_size // _DOCUMENT.itemsize

    def chunks(self, which: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Yields the records of the documents in order, a chunk at a time. which: (D,) bool, the documents to include
        (default: all)."""
        with open(self.index, "rb") as file:
            for begin in range(0, len(self), _CHUNK):
                chunk = np.frombuffer(file.read(_CHUNK * _DOCUMENT.itemsize), _DOCUMENT)
                yield chunk if which is None else chunk[which[begin : begin + _CHUNK]]

    def column(self, name: str, which: np.ndarray) -> np.ndarray:
        """A field of the records of some documents. which: (D,) bool."""
        found, at = np.empty(int(which.sum()), _DOCUMENT[name]), 0
        for chunk in self.chunks(which):
            found[at : at + len(chunk)] = chunk[name]
            at += len(chunk)
        return found

    def counts(self, which: np.ndarray, sources: int) -> tuple[int, int, np.ndarray]:
        """How many posts and comments are among some documents, and (sources,) how many documents are from each source.
        which: (D,) bool."""
        posts, comments, of_source = 0, 0, np.zeros(sources, np.int64)
        for chunk in self.chunks(which):
            posts += int((chunk["comments"] >= 0).sum())
            comments += int(chunk["comments"].clip(0).sum())
            of_source += np.bincount(chunk["source"], minlength=sources)[:sources]
        return posts, comments, of_source

    def parts(self, which: np.ndarray, batch: int) -> Iterator[np.ndarray]:
        """Yields the spans of some documents in order, as arrays (n, 2) of about `batch` bytes of text each."""
        for chunk in self.chunks(which):
            yield from cut(chunk["span"], batch)


def remove(folder: Path) -> None:
    """Deletes the files of a spool."""
    for path in folder.glob(f"{SPOOL}*"):
        path.unlink()


def texts_of(texts: Path, spans: np.ndarray) -> Iterator[str]:
    with open(texts, "rb") as file:
        for start, end in spans.tolist():
            file.seek(start)
            yield file.read(end - start).decode()


def size_of(spans: np.ndarray) -> int:
    """The size of all spans together, in bytes."""
    return int((spans[:, 1] - spans[:, 0]).sum())


def cut(spans: np.ndarray, batch: int) -> list[np.ndarray]:
    """The spans in order, in arrays of about `batch` bytes of text each."""
    if not len(spans):
        return []
    sizes = np.cumsum(spans[:, 1] - spans[:, 0])
    cuts = np.searchsorted(sizes, np.arange(batch, sizes[-1], batch))
    return [part for part in np.split(spans, np.unique(cuts)) if len(part)]


def sides(
    spool: Spool, seed: int, keep: bool, threshold: float | None, dropped: Counter, run: duplicates.Run, batch: int
) -> np.ndarray:
    """(D,) int8: whether each document is LEFT_OUT, for TRAINING or HELD_OUT.

    No text is both in training and held out. The first of several equal documents stays; with a threshold, the first
    of several similar ones does. keep: leave out only documents that would be on both sides. Training loses them, so
    that the held-out threads stay whole and are a fair sample of all threads.

    run: see `duplicates.near`; batch: bytes of text that a process gets at a time.
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
    """(D,) bool: which of the documents that stay are held out."""
    there = side > 0
    found = np.zeros(len(side), bool)
    found[there] = held_out(spool.column("source", there), spool.column("thread", there), seed)
    return found
