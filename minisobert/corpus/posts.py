"""Posts with their comments from a Stack Exchange data dump, streamed.

`Posts.xml` and `Comments.xml` hold one `<row …/>` per line, everything in its attributes. Comments are ordered by their
own id, not by post, and the largest site has 90 million of them, so they first go into a temporary SQLite table on
disk, indexed by post; then the posts are read in order and each asks for its own. Memory is bounded by the largest row.

The XML is untrusted: no entity is expanded and no file that it names is opened.
"""

from __future__ import annotations

import errno
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from xml.parsers import expat

from minisobert.corpus.dump import members, open_member
from minisobert.corpus.html import comment_to_text, html_to_text

KINDS = {"all": ("1", "2"), "questions": ("1",), "answers": ("2",)}
LONGEST_ROW = 1 << 26  # bytes; a post has at most 30,000 characters


class Post(NamedTuple):
    """One question or answer as the dump has it. `thread` is the id of its question."""

    thread: int
    title: str
    body: str  # HTML
    comments: list[str]  # Markdown, in the dump's order

    def text(self) -> str:
        """Title, body and every comment as plain text, a blank line between them; "" where none of them has any."""
        parts = [self.title.strip(), html_to_text(self.body), *map(comment_to_text, self.comments)]
        return "\n\n".join(filter(None, parts))


def posts(
    dump: Path,
    work: Path,
    dropped: Counter,
    *,
    kind: str = "all",
    min_score: int | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Iterator[Post]:
    """Every post of a dump, in the dump's order, with its comments.

    work: a folder for the temporary table, which is removed at the end. dropped: counts, by reason, what is left out.
    progress: called with the number of bytes of XML read since it was last called. Raises ValueError for a dump that
    is missing, empty, truncated or declares entities.
    """
    names = members(dump)
    if "Posts.xml" not in names:
        raise ValueError(f"{dump} holds no Posts.xml")
    table = Path(work) / "comments.sqlite"
    database = sqlite3.connect(table, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = OFF")  # a temporary table: after a crash there is nothing to save
        database.execute("PRAGMA synchronous = OFF")
        quoted = str(work).replace("'", "''")
        database.execute(f"PRAGMA temp_store_directory = '{quoted}'")  # the index is sorted there, not in /var/tmp
        database.set_progress_handler(lambda: None, 1_000_000)  # a chance for Ctrl-C in the minutes that an index takes
        database.execute("CREATE TABLE comments (post INTEGER, text TEXT)")
        if "Comments.xml" in names:
            database.execute("BEGIN")
            with open_member(dump, "Comments.xml") as stream:
                database.executemany("INSERT INTO comments VALUES (?, ?)", _comments(stream, dump, dropped, progress))
            database.execute("CREATE INDEX by_post ON comments (post)")  # in order of (post, rowid): the dump's own
            database.execute("COMMIT")
        left = database.execute("SELECT count(*) FROM comments").fetchone()[0]
        look_up = "SELECT text FROM comments WHERE post = ? ORDER BY rowid"
        seen = 0
        with open_member(dump, "Posts.xml") as stream:
            for row in rows(stream, f"{dump}: Posts.xml", "posts", dropped, progress):
                seen += 1
                try:
                    number = _id(row["Id"])
                    row_kind = str(int(row["PostTypeId"]))
                    thread = _id(row["ParentId"]) if row_kind == "2" and "ParentId" in row else number
                    score = int(row.get("Score") or 0)
                except (KeyError, ValueError):
                    dropped["malformed rows"] += 1
                    continue
                comments = [text for (text,) in database.execute(look_up, (number,))]
                left -= len(comments)
                if reason := _reason_to_drop(row_kind, kind, score, min_score):
                    dropped[reason] += 1
                    dropped["comments of dropped posts"] += len(comments)
                    continue
                yield Post(thread, row.get("Title", ""), row.get("Body", ""), comments)
        if not seen:
            raise ValueError(f"{dump}: Posts.xml holds no posts")
        dropped["comments without their post"] += left
    except sqlite3.OperationalError as error:
        if str(error) == "interrupted":
            raise KeyboardInterrupt from None
        raise OSError(errno.ENOSPC if "full" in str(error) else errno.EIO, str(error), str(table)) from None
    finally:
        database.close()
        table.unlink(missing_ok=True)


def _reason_to_drop(row_kind: str, kind: str, score: int, min_score: int | None) -> str | None:
    if row_kind not in KINDS["all"]:
        return "neither question nor answer"
    if row_kind not in KINDS[kind]:
        return f"not among the {kind}"
    if min_score is not None and score < min_score:
        return f"score below {min_score}"
    return None


def _comments(stream: BinaryIO, dump: Path, dropped: Counter, progress) -> Iterator[tuple[int, str]]:
    for row in rows(stream, f"{dump}: Comments.xml", "comments", dropped, progress):
        try:
            post = _id(row["PostId"])
        except (KeyError, ValueError):
            dropped["malformed rows"] += 1
            continue
        if text := row.get("Text", ""):
            yield post, text
        else:
            dropped["empty comments"] += 1


def _id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError("an id is a positive integer of at most 18 digits")  # SQLite's hold 64 bits
    return int(text)


def rows(stream: BinaryIO, name: str, root: str, dropped: Counter, progress=lambda size: None) -> Iterator[dict]:
    """The attributes of every `<row>` of one XML file whose root element is `root`.

    A row that is not well-formed (genuine dumps hold references to control characters) is counted in `dropped` and
    skipped: reading goes on, with a new parser, at the next line that begins with `<row`. Raises ValueError for a file
    that is not such a dump, ends too early, or declares an entity.
    """
    found: list[dict] = []
    opened: list[str] = []  # the names of the open elements
    started = False

    def start(tag, attributes):
        nonlocal started
        if not opened and tag != root:
            raise ValueError(f"{name}: the root element is <{tag}>, not <{root}>")
        started = True
        opened.append(tag)
        if tag == "row":
            found.append(attributes)

    def refuse_entity(*declaration):
        raise ValueError(f"{name} declares an XML entity, which no genuine dump does; it is not read any further")

    def new_parser():
        parser = expat.ParserCreate("utf-8")
        parser.StartElementHandler = start
        parser.EndElementHandler = lambda tag: opened.pop()
        parser.EntityDeclHandler = refuse_entity
        return parser

    parser, unfinished = new_parser(), False
    for piece in _pieces(stream, dropped):
        progress(len(piece))
        begins = piece.lstrip().startswith(b"<row")
        if begins and unfinished:  # a quote that was never closed: this row is no part of that one
            dropped["malformed rows"] += 1
            parser = None
        if parser is None:
            if not (begins or piece.lstrip().startswith(f"</{root}".encode())):
                continue
            opened.clear()
            parser = new_parser()
            parser.Parse(f"<{root}>")
        unfinished = False
        try:
            parser.Parse(piece)
            unfinished = begins and not found
        except expat.ExpatError as error:
            if not started:
                raise ValueError(f"{name} is no XML dump: {error}") from None
            dropped["malformed rows"] += 1
            parser = None
        yield from found
        found.clear()
    try:
        if parser:
            parser.Parse(b"", True)
    except expat.ExpatError as error:
        if not started and "no element" not in str(error):
            raise ValueError(f"{name} is no XML dump: {error}") from None
    if not started:
        raise ValueError(f"{name} is empty")
    if opened:
        raise ValueError(f"{name} is truncated: it ends before </{root}>")


def _pieces(stream: BinaryIO, dropped: Counter) -> Iterator[bytes]:
    """What to feed the parser at a time: a line, or the lines of one row, so that a bad row takes no other with it.

    A `<` cannot stand inside an attribute, so a line that begins with `<row` begins a row, whatever came before.
    """
    row: list[bytes] = []  # the lines of a row whose end has not come yet
    size, at_start = 0, True
    while line := stream.readline(LONGEST_ROW):
        begins = at_start and line.lstrip().startswith(b"<row")
        at_start = line.endswith(b"\n")
        if begins and row:
            dropped["malformed rows"] += 1
            row, size = [], 0
        if not (begins or row):
            yield line
            continue
        row.append(line)
        size += len(line)
        if line.rstrip().endswith(b">"):
            yield b"".join(row)
            row, size = [], 0
        elif size > LONGEST_ROW:
            dropped["malformed rows"] += 1
            row, size = [], 0
    if row:
        yield b"".join(row)
