"""The rows of one table of a Stack Exchange data dump: `Posts.xml`, `Comments.xml` and others hold one `<row …/>` per
line, with everything in its attributes.

The file is cut into blocks of whole rows, each of which can be parsed by itself, in any process. The XML is untrusted:
no entity is expanded and no file that it names is opened.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import BinaryIO, NamedTuple
from xml.parsers import expat

LONGEST_ROW = 1 << 26  # bytes; a post has at most 30,000 characters
BLOCK = 1 << 16  # bytes that are parsed at a time; if one is damaged, its rows are parsed again one by one
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # XML 1.0, section 2.2
_REFERENCE = re.compile(r"&#(?:([xX])([0-9a-fA-F]+)|([0-9]+));")
_ID = re.compile(rb"(?<![A-Za-z])Id\s*=\s*[\"']([0-9]{1,18})[\"']")


@dataclass
class Rows:
    """The content of a block. ended: whether the table ends in it; None if the block does not tell."""

    found: list[dict[str, str]] = field(default_factory=list)
    ended: bool | None = None
    dropped: Counter = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)  # the Ids of rows that cannot be read, as far as they can be made out


def xml_rows(
    stream: BinaryIO,
    name: str,
    root: str,
    dropped: Counter,
    progress: Callable[[int], object] = lambda size: None,
) -> Iterator[dict[str, str]]:
    """The attributes of every `<row>` of one XML file whose root element is `root`.

    A character that XML forbids is left out, and so is a row that is not well-formed otherwise: both are counted in
    `dropped`. Raises ValueError for a file that is no such dump, ends before its closing tag, or declares an entity.
    """
    ended, first = None, True
    for block in blocks(stream):
        progress(len(block))
        read = rows_of(block, root, name, first)
        dropped.update(read.dropped)
        yield from read.found
        ended, first = ended if read.ended is None else read.ended, False
    check_ended(ended, name, root)


def check_ended(ended: bool | None, name: str, root: str) -> None:
    if not ended:
        raise ValueError(f"{name} is truncated: it ends before </{root}>")


def rows_of(block: bytes, root: str, name: str, first: bool) -> Rows:
    """The rows of one block of a file. first: whether it is the first block, which has what comes before the rows."""
    read = Rows()
    opening = f"<{root}>".encode()
    # A `<` cannot be part of an attribute: where one of these begins, the previous row is over, whatever is wrong with
    # it.
    boundary = re.compile(rb"<row(?=[\s/>])|</%s\s*>" % root.encode())
    if first:
        begin = boundary.search(block)
        head, block = (block[: begin.start()], block[begin.start() :]) if begin else (block, b"")
        parsed = _parse(head, b"", root, name)
        if not parsed.started:
            empty = "no element" in parsed.error
            raise ValueError(f"{name} is empty" if empty else f"{name} is not an XML dump: {parsed.error}")
        read.ended = parsed.ended
        if parsed.error:
            _count_malformed(head, read)
    parsed = _parse(block, opening, root, name)
    if parsed.error or len(parsed.found) != block.count(b"<row"):  # a comment may hide sound rows
        cuts = [0, *(match.start() for match in boundary.finditer(block)), len(block)]
        parts = [_mended(block[a:b], opening, root, name, read) for a, b in pairwise(cuts)]
    else:
        parts = [parsed]
    for part in parts:
        read.found += part.found
        if part.found or part.ended:
            read.ended = part.ended
    return read


def blocks(stream: BinaryIO) -> Iterator[bytes]:
    """The file in blocks, each of which begins with a row, except for the first."""
    block = b""
    while more := stream.read(min(max(BLOCK, len(block)), LONGEST_ROW)):  # twice as much while a row goes on
        block += more
        cut = block.rfind(b"<row")
        if cut < 1 and len(block) > LONGEST_ROW:
            cut = len(block)  # no row: give up on it rather than fill the memory
        if cut > 0:
            yield block[:cut]
            block = block[cut:]
    yield block


class _Parsed(NamedTuple):
    """The content of a piece of a file. error: the first thing that is neither a whole row nor space, or ""."""

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


def _mended(piece: bytes, opening: bytes, root: str, name: str, read: Rows) -> _Parsed:
    """Parses a piece with at most one row. Counts what cannot be read, and the characters that are left out."""
    parsed = _parse(piece, opening, root, name)
    if parsed.error:
        cleaned, removed = _without_forbidden(piece)
        if removed and (again := _parse(cleaned, opening, root, name)).found:
            read.dropped.update(removed)
            parsed = again
    if parsed.error:
        _count_malformed(piece[piece.find(b"/>") + 2 :] if parsed.found else piece, read)
    return parsed


def _count_malformed(text: bytes, read: Rows) -> None:
    """Counts at least one row, and several if several lines have an Id, although none begins as a row does."""
    ids = [match[1].decode() for line in text.split(b"\n") if (match := _ID.search(line))]
    read.dropped["malformed rows"] += max(1, len(ids))
    read.lost.extend(ids)


def _without_forbidden(piece: bytes) -> tuple[bytes, Counter]:
    """A piece without the characters that XML forbids, literal ones and references, and how many of them there were.

    Genuine dumps hold references such as `&#x1F;`. `&amp;#x1F;` is not one: it belongs to the HTML in the attribute.
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
