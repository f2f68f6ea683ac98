"""Posts with their comments from a Stack Exchange data dump, streamed.

Comments are ordered by their own id, not by post, so they are read first and written to disk (comments.py). Then the
posts are read in order, each with its comments. Both passes are cut into parts that any process can parse, and a
`Tally` counts, in order, what is left out. Memory is bounded by a run of comments, apart from a bit or two for each
post.
"""

from __future__ import annotations

import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minisobert.corpus.comments import Runs, comments_of
from minisobert.corpus.dump import Member, Site
from minisobert.corpus.html import comment_to_text, html_to_text
from minisobert.corpus.rows import Rows, blocks, check_ended, rows_of

KINDS = {"all": ("1", "2"), "questions": ("1",), "answers": ("2",)}
PART = 1 << 20  # about so many bytes of XML are given to a process at a time
COMMENTS = "comments"  # the folder that holds them meanwhile
FABRICATED = 1_000_000_000  # the Ids of invented posts begin here; see `genuine`
MALFORMED, OF_DROPPED = "malformed rows", "comments of dropped posts"  # reasons
_BITS = 4_096  # ids in one entry of `_Ids`
_COUNTS = ("_ended", "_rows", "_before", "_taken")  # fields of a `Tally`


class Post(NamedTuple):
    """One question or answer as the dump has it. `thread` is the id of its question."""

    thread: int
    title: str
    body: str  # HTML
    comments: list[str]  # Markdown, in the dump's order

    def text(self, links: bool = False) -> str:
        """Title, body and every comment as plain text, separated by blank lines; "" if all are empty. links: see
        `html_to_text`."""
        comments = [comment_to_text(comment, links) for comment in self.comments]
        parts = [self.title.strip(), html_to_text(self.body, links), *comments]
        return "\n\n".join(filter(None, parts))


class Part(NamedTuple):
    """Some rows of a table, in blocks. first: whether the table begins here."""

    blocks: list[bytes]
    table: str  # "posts" or "comments"
    name: str  # of the file, for messages
    first: bool

    @property
    def size(self) -> int:
        return sum(map(len, self.blocks))


def parts(member: Member, table: str, begin: int = 0) -> Iterator[Part]:
    """A table of a site, cut into parts. begin: bytes in the parts before; the rest is cut in the same way."""
    with member.open() as stream:
        if stream.seekable():
            stream.seek(begin)
        else:  # an archive has to be unpacked again up to there
            at = 0
            while at < begin and (passed := stream.read(min(begin - at, PART))):
                at += len(passed)
        gathered, size, first = [], 0, begin == 0
        for block in blocks(stream):
            gathered.append(block)
            size += len(block)
            if size >= PART:
                yield Part(gathered, table, str(member), first)
                gathered, size, first = [], 0, False
        if gathered:
            yield Part(gathered, table, str(member), first)


def _rows(part: Part) -> Rows:
    read = Rows()
    for number, block in enumerate(part.blocks):
        more = rows_of(block, part.table, part.name, part.first and number == 0)
        read.found += more.found
        read.ended = read.ended if more.ended is None else more.ended
        read.dropped.update(more.dropped)
        read.lost += more.lost
    return read


class Comments(NamedTuple):
    """The content of a part of `Comments.xml`; see `Runs.add`."""

    posts: np.ndarray
    sizes: np.ndarray
    text: bytes
    ended: bool | None
    dropped: Counter


def comments_in(part: Part) -> Comments:
    read = _rows(part)
    posts, texts = array("q"), []
    for row in read.found:
        try:
            post = id_of(row["PostId"])
        except (KeyError, ValueError):
            read.dropped[MALFORMED] += 1
            continue
        if text := row.get("Text", ""):
            posts.append(post)
            texts.append(text.encode())
        else:
            read.dropped["empty comments"] += 1
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    return Comments(np.frombuffer(posts, np.int64), sizes, b"".join(texts), read.ended, read.dropped)


class Entry(NamedTuple):
    """A row of `Posts.xml`. post: None if it is left out. invented: whether it may be fabricated; see `genuine`."""

    number: int  # the Id; -1 if it cannot be read
    comments: int
    reason: str  # why it is left out, or ""
    post: Post | None
    invented: bool


class Posts(NamedTuple):
    entries: list[Entry]
    ended: bool | None
    dropped: Counter
    lost: list[str]


def posts_in(part: Part, folder: Path, kind: str, min_score: int | None) -> Posts:
    """The content of a part of `Posts.xml`. folder: that of the comments; see `comments_of`."""
    read = _rows(part)
    comments = comments_of(folder, [number for row in read.found if (number := _number(row)) >= 0])
    entries = []
    for row in read.found:
        number, invented = _number(row), _is_invented(row)
        own = comments.get(number, [])
        try:
            id_of(row["Id"])
            row_kind = str(int(row["PostTypeId"]))
            thread = id_of(row["ParentId"]) if row_kind == "2" and "ParentId" in row else number
            score = int(row.get("Score") or 0)
        except (KeyError, ValueError):
            entries.append(Entry(number, len(own), MALFORMED, None, invented))
            continue
        reason = _reason_to_drop(row_kind, kind, score, min_score) or ""
        post = None if reason else Post(thread, row.get("Title", ""), row.get("Body", ""), own)
        entries.append(Entry(number, len(own), reason, post, invented))
    return Posts(entries, read.ended, read.dropped, read.lost)


@dataclass
class Tally:
    """Counts in `dropped`, by reason, what is left out of a site: part after part, in the dump's order."""

    site: Site
    folder: Path  # of its comments
    dropped: Counter
    runs: Runs = field(init=False)
    _ended: bool | None = None
    _rows: int = 0
    _before: int = 0  # the Id of the last row that was not invented
    _taken: int = 0  # comments that have a post

    def __post_init__(self):
        self.runs, self._with_comments, self._lost = Runs(self.folder), _Ids(), array("q")

    def state(self) -> dict:
        """Everything but `dropped`, as values that JSON has. Only to be called between two runs of comments."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        ids = {number: bits.hex() for number, bits in self._with_comments.bits.items()}
        return {**counts, "runs": [self.runs.runs, self.runs.comments], "ids": ids, "lost": self._lost.tolist()}

    def restore(self, state: dict) -> None:
        for name in _COUNTS:
            setattr(self, name, state[name])
        self.runs = Runs(self.folder, *state["runs"])
        self._with_comments.bits = {int(number): bytearray.fromhex(bits) for number, bits in state["ids"].items()}
        self._lost = array("q", state["lost"])

    def add(self, read: Comments) -> None:
        self.dropped.update(read.dropped)
        self._ended = self._ended if read.ended is None else read.ended
        self.runs.add(read.posts, read.sizes, read.text)

    def end_comments(self) -> None:
        """Raises ValueError if the table is truncated."""
        check_ended(self._ended, str(self.site.comments), "comments")
        self.runs.flush()
        self._ended = None

    def kept(self, read: Posts) -> Iterator[Entry]:
        """The entries of a part that are not left out."""
        self.dropped.update(read.dropped)
        self._ended = self._ended if read.ended is None else read.ended
        for number in read.lost:
            self._lose(number)
        for entry in read.entries:
            if entry.invented and self._before < FABRICATED // 2:
                self.dropped["fabricated rows"] += 1
                self._lose(str(entry.number))
                self._rows += 1
                continue
            self._before, self._rows = entry.number, self._rows + 1
            if entry.reason == MALFORMED:  # another row with the same Id may be sound
                self.dropped[MALFORMED] += 1
                self._lose(str(entry.number))
                continue
            new = entry.comments if entry.comments and self._with_comments.add(entry.number) else 0
            self._taken += new
            if entry.reason:
                self.dropped[entry.reason] += 1
                self.dropped[OF_DROPPED] += new
            else:
                yield entry

    def end(self) -> None:
        """Raises ValueError if the table is truncated or has no rows."""
        check_ended(self._ended, str(self.site.posts), "posts")
        if not self._rows:
            raise ValueError(f"{self.site.posts} holds no posts")
        for number, comments in comments_of(self.folder, self._lost).items():
            if self._with_comments.add(number):
                self.dropped[OF_DROPPED] += len(comments)
                self._taken += len(comments)
        self.dropped["comments without their post"] += self.runs.comments - self._taken

    def _lose(self, number: str) -> None:
        with suppress(ValueError):
            self._lost.append(id_of(number))


class _Ids:
    """A set of ids. Ids that are close together take a bit or two each."""

    def __init__(self):
        self.bits: dict[int, bytearray] = {}

    def add(self, number: int) -> bool:
        """Adds an id and returns whether it is new."""
        bits = self.bits.setdefault(number // _BITS, bytearray(_BITS // 8))
        byte, bit = number % _BITS // 8, 1 << number % 8
        new = not bits[byte] & bit
        bits[byte] |= bit
        return new


def posts(
    site: Site,
    work: Path,
    dropped: Counter,
    *,
    kind: str = "all",
    min_score: int | None = None,
    run: Callable[[Callable, Iterable], Iterator[tuple]] = lambda function, items: ((i, function(i)) for i in items),
    progress: Callable[[int], object] = lambda size: None,
    find: Callable = posts_in,
    mark: Callable[[Callable[[], dict]], object] = lambda state: None,
    start: dict | None = None,
    ended: Callable[[], object] = lambda: None,
) -> Iterator[Entry]:
    """Every post of a site that is not left out, in the dump's order, with its comments.

    work: a folder for the comments, which are removed at the end, but not after a signal. dropped: counts, by reason,
    what is left out. run: yields (item, function(item)) in order, perhaps computed in other processes. progress: called
    with the number of bytes of XML read since its last call. find: `posts_in`, or a function that calls it and does
    more with the posts. mark: called now and then, when all entries so far have been taken, with a function that
    returns the state; start: such a state to resume from, with `dropped` as it was then. ended: called when everything
    is read, before the comments are removed: afterwards no state of this site can be resumed from.

    Raises ValueError for a dump that is empty, truncated or declares entities.
    """
    folder = Path(work) / COMMENTS
    if not start:
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
        folder.mkdir()
    tally = Tally(site, folder, dropped)
    table, at = "comments" if site.comments else "posts", 0
    if start:
        table, at = start["table"], start["at"]
        tally.restore(start["tally"])
    progress(at + (site.comments.size if site.comments and table == "posts" else 0))

    def state() -> dict:
        return {"table": table, "at": at, "tally": tally.state()}

    try:
        if site.comments and table == "comments":
            for part, read in run(comments_in, parts(site.comments, "comments", at)):
                progress(part.size)
                tally.add(read)
                at += part.size
                if not tally.runs.waiting:
                    mark(state)
            tally.end_comments()
            table, at = "posts", 0
        find = partial(find, folder=folder, kind=kind, min_score=min_score)
        for part, read in run(find, parts(site.posts, "posts", at)):
            progress(part.size)
            yield from tally.kept(read)
            at += part.size
            mark(state)
        tally.end()
        ended()
    except Exception:  # not after a signal: a later call may resume with `start`
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def genuine(found: Iterable[dict[str, str]], dropped: Counter) -> Iterator[dict[str, str]]:
    """The rows of `Posts.xml` without those that were fabricated for the dump and are on no site
    (meta.stackexchange.com, question 412018).

    Ids count up from 1, and the largest site is at 80 million. The fabricated rows, a question and an answer in the
    dump of 2025-06-30, have Ids from a billion on and belong to the Community user (-1). That user owns genuine posts
    too, and one day a genuine Id may be as large. So a row is left out only if both are true, and if it follows a gap
    of half a billion Ids or more.
    """
    before = 0
    for row in found:
        if _is_invented(row) and before < FABRICATED // 2:
            dropped["fabricated rows"] += 1
            continue
        before = _number(row)
        yield row


def _is_invented(row: dict[str, str]) -> bool:
    return row.get("OwnerUserId") == "-1" and _number(row) >= FABRICATED


def _number(row: dict[str, str]) -> int:
    try:
        return id_of(row["Id"])
    except (KeyError, ValueError):
        return -1


def id_of(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError("an id is a positive integer of at most 18 digits")  # it fits into 64 bits
    return int(text)


def _reason_to_drop(row_kind: str, kind: str, score: int, min_score: int | None) -> str | None:
    if row_kind not in KINDS["all"]:
        return "neither question nor answer"
    if row_kind not in KINDS[kind]:
        return f"not among the {kind}"
    if min_score is not None and score < min_score:
        return f"score below {min_score}"
    return None
