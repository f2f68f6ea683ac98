"""What `data.prepare` can read: one stream of documents out of any mixture of dumps and text files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from minisobert.corpus import dump
from minisobert.corpus.posts import Post, posts
from minisobert.corpus.texts import format_of, texts


def check(inputs: list[Path]) -> int | None:
    """The bytes there are to read, unpacked; None where a text file is packed. Raises ValueError for a missing file,
    an unknown kind, a damaged archive, or a dump without posts."""
    sizes: list[int | None] = []
    for path in inputs:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if _is_dump(path):
            members = dump.members(path)
            if not members.get("Posts.xml"):
                raise ValueError(f"{path} holds no Posts.xml, or an empty one")
            sizes.append(sum(members.values()))
        elif format_of(path):
            sizes.append(path.stat().st_size if format_of(path) == path.suffix else None)
        else:
            raise ValueError(f"{path} is of no known kind: .7z, a folder with Posts.xml, .jsonl or .txt (.gz, .xz)")
    return None if None in sizes else sum(sizes)


def documents(
    inputs: list[Path],
    work: Path,
    dropped: Counter,
    *,
    kind: str,
    min_score: int | None,
    progress: Callable[[int], object],
) -> Iterator[tuple[int, int, Post | str]]:
    """(source, thread, document) of every document: an index into `inputs`; the id of a question, or a line's number.

    work, dropped, kind, min_score, progress: see `posts`.
    """
    for source, path in enumerate(inputs):
        if _is_dump(path):
            for post in posts(path, work, dropped, kind=kind, min_score=min_score, progress=progress):
                yield source, post.thread, post
        else:
            for number, text in texts(path, dropped, progress):
                yield source, number, text


def _is_dump(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".7z"
