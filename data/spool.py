"""The spool of data.prepare: the text of all documents in one file, and which of them stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minisobert.corpus import duplicates
from minisobert.corpus.shards import held_out

# What is kept in memory of a document, 40 bytes. span: from where to where in the spool; comments: -1 if it is no post.
DOCUMENT = np.dtype([("source", "i4"), ("comments", "i4"), ("thread", "i8"), ("span", "i8", 2), ("digest", "u8")])


def texts_of(spool: Path, spans: np.ndarray) -> Iterator[str]:
    with open(spool, "rb") as file:
        for start, end in spans.tolist():
            file.seek(start)
            yield file.read(end - start).decode()


def size_of(spans: np.ndarray) -> int:
    """In bytes."""
    return int((spans[:, 1] - spans[:, 0]).sum())


def parts(spans: np.ndarray, batch: int) -> list[np.ndarray]:
    """The spans in order, cut into tasks of about `batch` bytes."""
    sizes = np.cumsum(spans[:, 1] - spans[:, 0])
    cuts = np.searchsorted(sizes, np.arange(batch, sizes[-1], batch))
    return [part for part in np.split(spans, np.unique(cuts)) if len(part)]


def unique(
    index: np.ndarray,
    spool: Path,
    seed: int,
    keep: bool,
    threshold: float | None,
    dropped: Counter,
    run: duplicates.Run,
    batch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(index, last): the documents that stay, (D,) DOCUMENT, and which of them are held out, (D,) bool.

    No held-out text is in training either. Of equal documents, and with a threshold of near ones, the first stays.
    keep: leave out only what would be on both sides. It is training that loses it, so that the held-out threads stay
    whole and are a fair sample of all threads.

    run: see `duplicates.near`; batch: bytes of a task.
    """

    def without(which: np.ndarray, reason: str) -> np.ndarray:
        dropped[reason] += int(which.sum())
        dropped["comments of dropped posts"] += int(index["comments"][which].clip(0).sum())
        return index[~which] if which.any() else index  # a copy that a corpus without duplicates need not pay for

    if keep:
        last = held_out(index["source"], index["thread"], seed)
        both = ~last & np.isin(index["digest"], index["digest"][last])
        if last.any() and (last | both).all():
            raise ValueError("every document is equal to a held-out one; leave --keep-duplicates out")
        return without(both, "in training, equal to a held-out document"), last[~both]
    index = without(duplicates.repeated(index["digest"]), "duplicates")
    if threshold is not None:
        spans = index["span"]
        with tqdm(total=size_of(spans), unit="B", unit_scale=True, desc="compare") as bar:
            read, done = partial(texts_of, spool), lambda part: bar.update(size_of(part))
            near = duplicates.near(read, spans, parts(spans, batch), threshold, spool.parent, run, done)
        index = without(near, "near duplicates")
    return index, held_out(index["source"], index["thread"], seed)
