"""What `data.prepare` can read: one stream of documents out of any mixture of dumps and text files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from minisobert.corpus.dump import Site, is_dump, sites
from minisobert.corpus.posts import Post, posts
from minisobert.corpus.texts import format_of, texts


def check(inputs: Sequence[Path]) -> tuple[list[Site | Path], int | None, list[str]]:
    """(sources, bytes, notes): the sites and text files to read, in order; their bytes, unpacked, None where a text
    file is packed; and lines on what is missing or not read.

    Raises ValueError for a missing file, an unknown kind, an archive that cannot be read, comments without their posts,
    an input without posts, and for what is there twice.
    """
    for path in inputs:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if not (is_dump(path) or format_of(path)):
            raise ValueError(
                f"{path} is of no known kind: .7z, a folder with Posts.xml or .7z archives, .jsonl or .txt (.gz, .xz)"
            )
    dumps = [path for path in inputs if is_dump(path)]
    found, notes = sites(dumps) if dumps else ([], [])
    sources: list[Site | Path] = []
    for path in inputs:
        if is_dump(path):
            sources += [site for site in found if site.source == path]
        elif path.resolve() in {source.resolve() for source in sources if isinstance(source, Path)}:
            raise ValueError(f"{path} is given twice")
        else:
            sources.append(path)
    return sources, _size(sources), notes


def _size(sources: list[Site | Path]) -> int | None:
    size = 0
    for source in sources:
        if isinstance(source, Site):
            size += source.posts.size + (source.comments.size if source.comments else 0)
        elif format_of(source) == source.suffix:
            size += source.stat().st_size
        else:
            return None
    return size


def documents(
    sources: Sequence[Site | Path],
    work: Path,
    dropped: Counter,
    *,
    kind: str,
    min_score: int | None,
    progress: Callable[[int], object],
) -> Iterator[tuple[int, int, Post | str]]:
    """(source, thread, document) of every document: an index into `sources`, because two sites have the same ids; the
    id of a question, or a line's number.

    work, dropped, kind, min_score, progress: see `posts`.
    """
    for number, source in enumerate(sources):
        if isinstance(source, Site):
            for post in posts(source, work, dropped, kind=kind, min_score=min_score, progress=progress):
                yield number, post.thread, post
        else:
            for line, text in texts(source, dropped, progress):
                yield number, line, text
