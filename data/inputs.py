"""Reads the input of `data.prepare`: any mixture of dumps and text files, as one stream of documents."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from minisobert.cli import number
from minisobert.corpus.dump import Site, is_dump, sites, some
from minisobert.corpus.posts import KINDS as POSTS
from minisobert.corpus.sources import STDIN, TextFile, encoding_of, kind_of, zip_contents
from minisobert.corpus.texts import DOCUMENTS, KINDS, PLAIN, Reading, texts
from minisobert.files import COMPRESSED

MOST_WEIGHT = 1_000  # every copy costs memory when rows are packed


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", nargs="+", required=True, dest="inputs", metavar="PATH[=WEIGHT]",
        help="what to read. Stack Exchange dumps: .7z archives of sites or tables, folders with such archives or with "
        f"Posts.xml and Comments.xml. Your own texts: {', '.join(KINDS)}, also compressed ({', '.join(COMPRESSED)}), "
        "in a .zip or in a folder; - is standard input. A weight says how often an epoch of training holds a document: "
        "so.7z=2 wiki.jsonl=0.5 means each of so.7z twice, and half of those of wiki.jsonl",
    )  # fmt: skip
    texts = parser.add_argument_group("your own texts")
    texts.add_argument(
        "--text-key", nargs="+", default=("text",), metavar="KEY",
        help="columns or keys that make up a text; they are joined by a blank line",
    )  # fmt: skip
    texts.add_argument(
        "--document", choices=DOCUMENTS, default="",
        help=f"what is one document in a {' or '.join(PLAIN)}: the whole file, a line, or a paragraph, which ends at a "
        "blank line (default: a line of a .txt, the whole of a .md)",
    )  # fmt: skip
    texts.add_argument(
        "--skip-unreadable", action="store_true",
        help="accept files of which more than one line in a hundred cannot be read, and leave out files that cannot be "
        "read at all; without it, either is an error",
    )  # fmt: skip
    dump = parser.add_argument_group("dumps")
    which = "which posts to read, each with its comments: all, questions or answers"
    dump.add_argument("--posts", choices=POSTS, default="all", dest="kind", help=which)
    dump.add_argument("--min-score", type=int, metavar="N", help="leave out posts with a score below N")
    what = "drop the targets of links, or keep them as Markdown does: [text](target)"
    dump.add_argument("--links", choices=("drop", "keep"), default="drop", help=what)


class Input(NamedTuple):
    """A path given to --input. sources: the number of sites and text files that it holds; they are consecutive in the
    list of all sources."""

    path: Path
    weight: float
    sources: int = 0

    @property
    def name(self) -> str:
        return self.path.resolve().name


def weighted(given: Iterable[str | Path]) -> list[Input]:
    """Reads PATH=WEIGHT: `so.7z=2` is so.7z with a weight of 2. If a file with that whole name exists, it is the path.

    Raises ValueError for a weight that is not a number above 0 and at most MOST_WEIGHT.
    """
    found = []
    for text in map(str, given):
        before, _, weight = text.rpartition("=")
        if not before or Path(text).exists():
            found.append(Input(Path(text), 1.0))
            continue
        try:
            value = number(weight)
        except ValueError:
            value = math.nan
        if not 0 < value <= MOST_WEIGHT:
            raise ValueError(
                f"{text} does not exist, and {weight!r} is not a weight for {before}; give a number above 0 and at "
                f"most {MOST_WEIGHT:,}, as in {before}=0.5"
            )
        found.append(Input(Path(before), value))
    return found


def with_sources(inputs: Sequence[Input], sources: Sequence[Site | TextFile]) -> list[Input]:
    """The inputs, each with the number of its sources. sources: what `check` returns for these inputs.

    Raises ValueError for a weight of an input without documents, such as an archive of comments.
    """
    paths = {one.path for one in inputs}
    of: Counter = Counter()
    for source in sources:
        path = source.source if isinstance(source, Site) else source.path
        of[next(place for place in (path, *path.parents) if place in paths)] += 1
    for one in inputs:
        if one.weight != 1 and not of[one.path]:
            raise ValueError(f"{one.path} has a weight, but no posts or texts; give the weight to the posts instead")
    return [one._replace(sources=of[one.path]) for one in inputs]


def weights_of(inputs: Sequence[Input], source: np.ndarray, lengths: np.ndarray) -> dict:
    """The entry of meta.json about weights; {} if all are 1, so that meta.json is then the same as without weights.

    source: (T,) for each training document, in order, the index of its source; lengths: (T or more,) lengths in tokens.
    """
    if all(one.weight == 1 for one in inputs):
        return {}
    ends = np.searchsorted(source, np.cumsum([one.sources for one in inputs])).tolist()
    ranges = [*pairwise([0, *ends])]
    return {
        "weights": [
            {"input": one.name, "weight": one.weight, "documents": [a, b], "tokens": int(lengths[a:b].sum())}
            for one, (a, b) in zip(inputs, ranges)
            if one.sources
        ]
    }


def check(
    inputs: Sequence[Path], document: str = "", dropped: Counter | None = None
) -> tuple[list[Site | TextFile], int | None, list[str]]:
    """Returns (sources, bytes, notes): the sites and text files to read, in order; their unpacked size, or None if it
    is not known, as for compressed files; and lines about what is missing or is not read.

    document: see `Reading`; if it is given, standard input is read as plain text, never as .jsonl. dropped: counts the
    files in a folder or .zip that are not read. Raises ValueError for a missing file, an unknown kind of file, an
    archive that cannot be read, comments without their posts, an input without posts, and anything given twice.
    """
    found: dict[Path, list[tuple[TextFile, int | None]]] = {}
    notes = []
    for path in inputs:
        if path != STDIN and not path.exists():
            raise ValueError(f"{path} does not exist")
        if path in found:
            raise ValueError(f"{path} is given twice")
        found[path], others = _files(path, document)
        if others and found[path]:
            notes.append(f"left out of {path}, because their kind is not known: {some(others)}")
            if dropped is not None:
                dropped["files of no known kind"] += len(others)
        elif not found[path] and (others or not is_dump(path)):
            held = f"holds {some(others)}, which is" if others else "is"
            raise ValueError(
                f"{path} {held} of an unknown kind; give a .7z, a folder with Posts.xml or .7z archives, "
                f"{', '.join(KINDS)} ({', '.join(COMPRESSED)}), a .zip or folder of such files"
            )
    dumps = [path for path, files in found.items() if not files]
    of_dumps, notes_on_dumps = sites(dumps) if dumps else ([], [])
    sources: list[Site | TextFile] = []
    sizes: list[int | None] = []
    known: set[tuple[Path, str]] = set()
    for path, files in found.items():
        for site in of_dumps:
            if site.source == path:
                sources.append(site)
                sizes.append(site.posts.size + (site.comments.size if site.comments else 0))
        for file, size in files:
            if (place := (file.path.resolve(), file.member)) in known:
                raise ValueError(f"{file} is given twice")
            known.add(place)
            sources.append(file)
            sizes.append(size)
    return sources, None if None in sizes else sum(sizes), notes_on_dumps + notes


def _files(path: Path, document: str) -> tuple[list[tuple[TextFile, int | None]], list[str]]:
    """The text files at a path, with their sizes where known, and the names of all other files in a folder or .zip.
    Both are empty for a dump."""
    if path == STDIN:
        head = sys.stdin.buffer.peek(1)  # waits until there is something to read
        start = head.decode(encoding_of(head), "ignore").lstrip()
        return [(TextFile(path, ".jsonl" if start.startswith("{") and not document else ".txt"), None)], []
    if path.is_dir():
        inside = [Path(at, name) for at, folders, names in os.walk(path) for name in (*names, *_links(at, folders))]
        if any(is_dump(file) for file in inside if not file.is_dir()):
            return [], []
        inside.sort()
        chosen = [file for file in inside if not file.is_dir() and _is_text(str(file.relative_to(path)))]
        taken = {*chosen}
        files = [(TextFile(file, kind_of(file.name)), _size(file)) for file in chosen]
        return files, [str(file.relative_to(path)) for file in inside if file not in taken]
    if path.suffix.lower() == ".zip":
        members = zip_contents(path)
        if dump := next((name for name in members if is_dump(Path(PurePosixPath(name).name))), ""):
            raise ValueError(f"{path} holds {dump}; a dump is read from a folder or .7z: unpack it and give the folder")
        chosen = [name for name in sorted(members) if _is_text(name) and members[name] is not None]
        taken = {*chosen}
        files = [(TextFile(path, kind_of(name), name), None if _is_packed(name) else members[name]) for name in chosen]
        return files, [name for name in sorted(members) if name not in taken]
    return ([(TextFile(path, kind_of(path.name)), _size(path))] if kind_of(path.name) in KINDS else []), []


def _links(folder: str, folders: list[str]) -> list[str]:
    """Links to folders. They are not followed, since they may form a cycle."""
    return [name for name in folders if os.path.islink(os.path.join(folder, name))]


def _is_text(name: str) -> bool:
    """Whether to read a file in a folder or .zip: not if it is hidden, or one of those that macOS adds to a .zip."""
    parts = PurePosixPath(name).parts
    return kind_of(name) in KINDS and not any(part.startswith((".", "__MACOSX")) for part in parts)


def _is_packed(name: str) -> bool:
    return PurePosixPath(name.lower()).suffix in COMPRESSED


def _size(file: Path) -> int | None:
    return None if _is_packed(file.name) else file.stat().st_size


def documents(
    files: Iterable[tuple[int, TextFile]], dropped: Counter, progress: Callable[[int], object], reading: Reading
) -> Iterator[tuple[int, int, str]]:
    """Yields (number of the file, number of the line or row, text) for every document in some text files.

    dropped, progress, reading: see `texts`."""
    for place, file in files:
        for line, text in texts(file, dropped, progress, reading):
            yield place, line, text
