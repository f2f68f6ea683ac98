"""The first pass of data.prepare: writes the text of all documents into the spool, and counts what is left out."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby, islice
from typing import NamedTuple

from data.decontamination import Texts
from data.inputs import documents
from data.journal import Journal
from data.spool import Spool
from minisobert.corpus.dump import Site
from minisobert.corpus.duplicates import digest
from minisobert.corpus.posts import COMMENTS, Part, Posts, posts, posts_in
from minisobert.corpus.texts import Reading

BATCH = 1_000_000  # characters of text that a process gets at a time


def look_for(texts: Texts) -> None:
    global _unwanted  # set once in each process, since it is too large to be sent with every batch
    _unwanted = texts


class Rendered(NamedTuple):
    """The text of a document; b"" if it contains a dev or test text of a task."""

    thread: int
    comments: int
    text: bytes
    task: str | None
    digest: int


def read(
    sources, spool: Spool, dropped: Counter, reading: Reading, links: bool, done: Journal, *, run, progress, **chosen
) -> None:
    """Writes every document into the spool, beginning where the journal says. run, progress: see `posts`."""
    start = done.state.get("read", {"source": 0, "spool": [0, 0]})
    if "dropped" in start:
        dropped.clear()
        dropped.update(start["dropped"])
    find = partial(_render_posts, links=links)

    def mark(source: int, inside: Callable[[], object]) -> None:
        done.now_and_then("read", lambda: state(source, inside()))

    def pass_by(source: int) -> None:
        done.enter("read", state(source + 1, None))

    def state(source: int, inside: object) -> dict:
        return {"source": source, "inside": inside, "spool": spool.flush(), "dropped": dict(dropped)}

    def found() -> Iterator[tuple[int, Rendered]]:
        for is_site, group in groupby(enumerate(sources), lambda item: isinstance(item[1], Site)):
            group = [(number, source) for number, source in group if number >= start["source"]]
            if is_site:
                for number, site in group:
                    entries = posts(
                        site, spool.texts.parent, dropped, run=run, progress=progress, find=find,
                        mark=partial(mark, number), start=_inside(start, number), ended=partial(pass_by, number),
                        **chosen,
                    )  # fmt: skip
                    for entry in entries:
                        yield number, entry.post
            elif group:
                first, last = group[0][0], group[-1][0]
                at = _inside(start, first) or 0
                counts: Counter = Counter()  # a resumed run reads the group again, and counts it again
                batches = _batches(islice(documents(group, counts, progress, reading), at, None))
                for batch, rendered in run(_render, batches):
                    yield from zip((source for source, *_ in batch), rendered)
                    at += len(batch)
                    mark(first, lambda at=at: at)
                dropped.update(counts)
                pass_by(last)

    if start["source"] < len(sources):
        spool.write(_sound(found(), dropped), start["spool"])
    shutil.rmtree(spool.texts.parent / COMMENTS, ignore_errors=True)  # there if a killed run got no further


def _inside(start: dict, source: int):
    return start.get("inside") if start["source"] == source else None


def _batches(found: Iterator[tuple[int, int, str]]) -> Iterator[list[tuple[int, int, str]]]:
    batch, size = [], 0
    for item in found:
        batch.append(item)
        size += len(item[2])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _render_posts(part: Part, links: bool, **settings) -> Posts:
    """In a worker: reads a part of `Posts.xml` and turns each post into text."""
    read = posts_in(part, **settings)
    found = [(0, entry.post.thread, entry.post.text(links)) for entry in read.entries if entry.post]
    counts = (entry.comments for entry in read.entries if entry.post)
    rendered = iter([each._replace(comments=n) for each, n in zip(_render(found), counts)])
    return read._replace(entries=[e._replace(post=next(rendered)) if e.post else e for e in read.entries])


def _render(batch: list[tuple[int, int, str]]) -> list[Rendered]:
    """In a worker: the documents, searched for texts of tasks, with their digests."""
    found = []
    for _, thread, text in batch:
        task = _unwanted.task_of(text)
        text = "" if task else text
        found.append(Rendered(thread, -1, text.encode(), task, digest(text)))
    return found


def _sound(found: Iterator[tuple[int, Rendered]], dropped: Counter) -> Iterator[tuple[int, int, int, bytes, int]]:
    """Yields what goes into the spool, and counts the documents that do not."""
    for source, (thread, comments, text, task, number) in found:
        if text:
            yield source, comments, thread, text, number
        else:
            dropped[f"with a text of {task}'s dev or test" if task else "empty"] += 1
            dropped["comments of dropped posts"] += max(comments, 0)
