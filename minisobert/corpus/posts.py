"""Posts with their comments from a Stack Exchange data dump, streamed.

`Posts.xml` and `Comments.xml` hold one `<row …/>` per line, everything in its attributes. Comments are ordered by their
own id, not by post, and the largest site has 90 million of them, so they first go into a temporary SQLite table on
disk, indexed by post; then the posts are read in order and each asks for its own. Memory is bounded by the largest row.

The XML is untrusted: no entity is expanded and no file that it names is opened.
"""

from __future__ import annotations

import errno
import re
import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple
from xml.parsers import expat

from minisobert.corpus.dump import Site
from minisobert.corpus.html import comment_to_text, html_to_text

KINDS = {"all": ("1", "2"), "questions": ("1",), "answers": ("2",)}
LONGEST_ROW = 1 << 26  # bytes; a post has at most 30,000 characters
BLOCK = 1 << 16  # bytes that are parsed at a time; a few rows are parsed again where one of them is damaged
FABRICATED = 1_000_000_000  # the Ids of invented posts begin here; see `genuine`
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # XML 1.0, section 2.2
_REFERENCE = re.compile(r"&#(?:([xX])([0-9a-fA-F]+)|([0-9]+));")
_ID = re.compile(rb"(?<![A-Za-z])Id\s*=\s*[\"']([0-9]{1,18})[\"']")


class Post(NamedTuple):
    """One question or answer as the dump has it. `thread` is the id of its question."""

    thread: int
    title: str
    body: str  # HTML
    comments: list[str]  # Markdown, in the dump's order

    def text(self, links: bool = False) -> str:
        """Title, body and every comment as plain text, a blank line between them; "" where none of them has any. links:
        see `html_to_text`."""
        comments = [comment_to_text(comment, links) for comment in self.comments]
        parts = [self.title.strip(), html_to_text(self.body, links), *comments]
        return "\n\n".join(filter(None, parts))


def posts(
    site: Site,
    work: Path,
    dropped: Counter,
    *,
    kind: str = "all",
    min_score: int | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Iterator[Post]:
    """Every post of a site, in the dump's order, with its comments.

    work: a folder for the temporary table, which is removed at the end. dropped: counts, by reason, what is left out.
    progress: called with the number of bytes of XML read since it was last called. Raises ValueError for a dump that
    is empty, truncated or declares entities.
    """
    table = Path(work) / "comments.sqlite"
    database = sqlite3.connect(table, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = OFF")  # a temporary table: after a crash there is nothing to save
        database.execute("PRAGMA synchronous = OFF")
        quoted = str(work).replace("'", "''")
        database.execute(f"PRAGMA temp_store_directory = '{quoted}'")  # the index is sorted there, not in /var/tmp
        database.set_progress_handler(lambda: None, 1_000_000)  # a chance for Ctrl-C in the minutes that an index takes
        database.execute("CREATE TABLE comments (post INTEGER, text TEXT)")
        if site.comments:
            database.execute("BEGIN")
            with site.comments.open() as stream:
                found = _comments(stream, str(site.comments), dropped, progress)
                database.executemany("INSERT INTO comments VALUES (?, ?)", found)
            database.execute("CREATE INDEX by_post ON comments (post)")  # in order of (post, rowid): the dump's own
            database.execute("COMMIT")
        left = database.execute("SELECT count(*) FROM comments").fetchone()[0]
        database.execute("CREATE TABLE taken (post INTEGER PRIMARY KEY)")  # on disk too: posts outnumber what fits
        database.execute("BEGIN")

        def comments_of(number: int) -> tuple[list[str], int]:
            """Those of a post, and how many of them no post of the same Id had before."""
            nonlocal left
            found = database.execute("SELECT text FROM comments WHERE post = ? ORDER BY rowid", (number,)).fetchall()
            new = 0
            if found and database.execute("INSERT OR IGNORE INTO taken VALUES (?)", (number,)).rowcount > 0:
                new = len(found)
            left -= new
            return [text for (text,) in found], new

        unread = array("q")  # the Ids of rows that are left out; another row with the same Id may be sound

        def lost(number: str) -> None:
            with suppress(ValueError):
                unread.append(_id(number))
                dropped["comments of dropped posts"] += 0  # it is listed where it was first due

        seen = 0
        with site.posts.open() as stream:
            for row in genuine(xml_rows(stream, str(site.posts), "posts", dropped, progress, lost), dropped, lost):
                seen += 1
                try:
                    number = _id(row["Id"])
                    row_kind = str(int(row["PostTypeId"]))
                    thread = _id(row["ParentId"]) if row_kind == "2" and "ParentId" in row else number
                    score = int(row.get("Score") or 0)
                except (KeyError, ValueError):
                    dropped["malformed rows"] += 1
                    lost(row.get("Id", ""))
                    continue
                comments, new = comments_of(number)
                if reason := _reason_to_drop(row_kind, kind, score, min_score):
                    dropped[reason] += 1
                    dropped["comments of dropped posts"] += new
                    continue
                yield Post(thread, row.get("Title", ""), row.get("Body", ""), comments)
        if not seen:
            raise ValueError(f"{site.posts} holds no posts")
        dropped["comments of dropped posts"] += sum(comments_of(number)[1] for number in unread)
        dropped["comments without their post"] += left
    except sqlite3.OperationalError as error:
        if str(error) == "interrupted":
            raise KeyboardInterrupt from None
        raise OSError(errno.ENOSPC if "full" in str(error) else errno.EIO, str(error), str(table)) from None
    finally:
        database.close()
        table.unlink(missing_ok=True)


def genuine(
    found: Iterable[dict[str, str]], dropped: Counter, lost: Callable[[str], object] = lambda number: None
) -> Iterator[dict[str, str]]:
    """The rows of `Posts.xml` without those that were invented for the dump and are on no site (meta.stackexchange.com,
    question 412018). `lost` is called with the Id of each that is left out.

    Ids count up from 1, and the largest site is at 80 million. The invented rows, a question and an answer in the dump
    of 2025-06-30, have Ids from a billion on, and the Community user (-1) owns them. That user owns genuine posts too,
    and one day a genuine Id may be as large. So both must be true, after a gap of half a billion Ids or more.
    """
    before: dict[str, str] = {}
    for row in found:
        if row.get("OwnerUserId") == "-1" and _number(row) >= FABRICATED and _number(before) < FABRICATED // 2:
            dropped["fabricated rows"] += 1
            lost(row["Id"])
            continue
        before = row
        yield row


def _number(row: dict[str, str]) -> int:
    try:
        return _id(row["Id"])
    except (KeyError, ValueError):
        return 0


def _reason_to_drop(row_kind: str, kind: str, score: int, min_score: int | None) -> str | None:
    if row_kind not in KINDS["all"]:
        return "neither question nor answer"
    if row_kind not in KINDS[kind]:
        return f"not among the {kind}"
    if min_score is not None and score < min_score:
        return f"score below {min_score}"
    return None


def _comments(stream: BinaryIO, name: str, dropped: Counter, progress) -> Iterator[tuple[int, str]]:
    for row in xml_rows(stream, name, "comments", dropped, progress):
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


def xml_rows(
    stream: BinaryIO,
    name: str,
    root: str,
    dropped: Counter,
    progress: Callable[[int], object] = lambda size: None,
    lost: Callable[[str], object] = lambda number: None,
) -> Iterator[dict[str, str]]:
    """The attributes of every `<row>` of one XML file whose root element is `root`.

    A character that XML forbids costs itself, anything else that is not well-formed costs its row: both are counted in
    `dropped`, and `lost` is called with the Id of such a row where one can still be made out. Raises ValueError for a
    file that is no such dump, ends before its closing tag, or declares an entity.
    """
    opening = f"<{root}>".encode()
    # A `<` cannot stand in an attribute: where one of these begins, the row before is over, whatever is wrong with it.
    boundary = re.compile(rb"<row(?=[\s/>])|</%s\s*>" % root.encode())
    started = ended = False
    for block in _blocks(stream):
        progress(len(block))
        if not started:
            first = boundary.search(block)
            head, block = (block[: first.start()], block[first.start() :]) if first else (block, b"")
            parsed = _parse(head, b"", root, name)
            if not parsed.started:
                empty = "no element" in parsed.error
                raise ValueError(f"{name} is empty" if empty else f"{name} is no XML dump: {parsed.error}")
            started, ended = True, parsed.ended
            if parsed.error:
                _count_malformed(head, dropped, lost)
        parsed = _parse(block, opening, root, name)
        if parsed.error or len(parsed.found) != block.count(b"<row"):  # a comment can swallow sound rows
            cuts = [0, *(match.start() for match in boundary.finditer(block)), len(block)]
            parts = [_mended(block[a:b], opening, root, name, dropped, lost) for a, b in pairwise(cuts)]
        else:
            parts = [parsed]
        for part in parts:
            yield from part.found
            if part.found or part.ended:
                ended = part.ended
    if not ended:
        raise ValueError(f"{name} is truncated: it ends before </{root}>")


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    """The file in pieces that, but for the first, begin where a row begins."""
    block = b""
    while more := stream.read(min(max(BLOCK, len(block)), LONGEST_ROW)):  # twice as much, where a row goes on for long
        block += more
        cut = block.rfind(b"<row")
        if cut < 1 and len(block) > LONGEST_ROW:
            cut = len(block)  # no row: give it up rather than fill the memory
        if cut > 0:
            yield block[:cut]
            block = block[cut:]
    yield block


class _Parsed(NamedTuple):
    """What a piece of a file holds. error: the first thing that is neither a whole row nor space; "" for none."""

    found: list[dict[str, str]]
    error: str
    started: bool  # the root element begins
    ended: bool  # it ends


def _parse(piece: bytes, opening: bytes, root: str, name: str) -> _Parsed:
    """opening: the tag of the root, for a piece from the middle of the file.

    Every piece has a parser of its own, so that no damage reaches beyond it.
    """
    found: list[dict[str, str]] = []
    opened: list[dict[str, str]] = []  # the attributes of the elements that are open
    started = ended = False
    error = ""

    def start(tag, attributes):
        nonlocal started, error
        if opened and tag != "row":
            error = error or f"an element <{tag}>"
        elif not opened and tag != root:
            raise ValueError(f"{name}: the root element is <{tag}>, not <{root}>")
        started = True
        opened.append(attributes)

    def end(tag):
        attributes = opened.pop()
        if len(opened) == 1 and tag == "row":
            found.append(attributes)

    def text(data):
        nonlocal error
        if not data.isspace():
            error = error or "text between the rows"

    def refuse_entity(*declaration):
        raise ValueError(f"{name} declares an XML entity, which no genuine dump does; it is not read any further")

    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.EntityDeclHandler = refuse_entity
    try:
        parser.Parse(opening)
        parser.Parse(piece)
        ended = started and not opened
        parser.Parse(b"</%s>" % root.encode() if opened else b"", True)
    except expat.ExpatError as problem:
        error = str(problem)
    return _Parsed(found, error, started, ended)


def _mended(piece: bytes, opening: bytes, root: str, name: str, dropped: Counter, lost) -> _Parsed:
    """A piece with at most one row. What cannot be read is counted, and so are the characters that are taken out."""
    parsed = _parse(piece, opening, root, name)
    if parsed.error:
        cleaned, removed = _without_forbidden(piece)
        if removed and (again := _parse(cleaned, opening, root, name)).found:
            dropped.update(removed)
            parsed = again
    if parsed.error:
        _count_malformed(piece[piece.find(b"/>") + 2 :] if parsed.found else piece, dropped, lost)
    return parsed


def _count_malformed(text: bytes, dropped: Counter, lost: Callable[[str], object]) -> None:
    """At least one row; several where lines with an Id stand behind one another, none of which begins as a row does."""
    ids = [match[1].decode() for line in text.split(b"\n") if (match := _ID.search(line))]
    dropped["malformed rows"] += max(1, len(ids))
    for number in ids:
        lost(number)


def _without_forbidden(piece: bytes) -> tuple[bytes, Counter]:
    """A piece without the characters that XML forbids, as they are or as references, and how many these were.

    Genuine dumps hold references such as `&#x1F;`. `&amp;#x1F;` is none: it belongs to the HTML in the attribute.
    """
    removed: Counter = Counter()

    def without(what: str):
        def count(match: re.Match) -> str:
            removed[what] += 1
            return ""

        return count

    def allowed(match: re.Match) -> str:
        digits = (match[2] or match[3]).lstrip("0") or "0"
        number = int(digits, 16 if match[1] else 10) if len(digits) < 8 else 1 << 32
        if number > 0x10FFFF or _FORBIDDEN.match(chr(number)):
            removed["control characters left out"] += 1
            return ""
        return f"&#{number};"

    text = piece.decode("utf-8", "surrogateescape")
    text = re.sub("[\udc80-\udcff]", without("bytes left out that are not UTF-8"), text)
    text = _FORBIDDEN.sub(without("control characters left out"), text)
    text = _REFERENCE.sub(allowed, text)
    return text.encode(), removed
