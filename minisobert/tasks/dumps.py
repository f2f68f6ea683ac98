"""Reads questions and answers from a dump, for the tasks that are derived from one."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from minisobert.corpus.archives import contents
from minisobert.corpus.dump import Member, Site, files, sites
from minisobert.corpus.html import html_to_text
from minisobert.corpus.posts import genuine
from minisobert.corpus.rows import xml_rows
from minisobert.hashing import key

PER_CLASS = 20_000  # as in the published sets of quality and closed titles
NOTICES = "notices of closing removed from questions"
_TITLE_NOTICE = re.compile(r"\[(?:closed|duplicate|on hold|migrated)\]\Z", re.I)
_BODY_NOTICE = re.compile(  # in HTML and in Markdown
    r"\s*<blockquote>\s*<p>\s*<strong>Possible Duplicate:?</strong>.*?</blockquote>"
    r"|\s*>\s*\*\*Possible Duplicate:?\*\*[^\n]*(?:\n>[^\n]*)*", re.I | re.S,
)  # fmt: skip


class NothingToDerive(ValueError):
    """The dump can be read, but holds nothing for this task."""


def site_of(dump: Path) -> Site:
    """The one site in a dump. With an archive of posts, the archive of comments beside it is read too. Raises
    ValueError if there are several sites."""
    comments = dump.with_name(re.sub(r"posts(?=\.7z$)", "Comments", dump.name, flags=re.I))
    found, _ = sites([dump, comments] if comments != dump and comments.exists() else [dump])
    if len(found) > 1:
        names = ", ".join(site.name for site in found)
        raise ValueError(f"{dump} holds {len(found)} sites ({names}); give one of them")
    return found[0]


def links(dump: Path) -> Member | None:
    """PostLinks.xml, the table of links between questions, in the dump or beside an archive of posts; None if there is
    none."""
    tables = list(files(Member(dump)))
    beside = dump.with_name(re.sub(r"posts(?=\.7z$)", "PostLinks", dump.name, flags=re.I))
    if beside != dump and beside.exists():
        tables += [Member(beside, (name,), size) for name, size in contents(beside).items()]
    return next((table for table in tables if table.name.lower() == "postlinks.xml"), None)


def posts(dump: Path, notes: list[str]) -> Iterator[dict[str, str]]:
    """The attributes of every question and answer that has an id and a body. notes: see `note`."""
    dropped: Counter = Counter()
    table = site_of(dump).posts
    with table.open() as stream:
        for row in genuine(xml_rows(stream, str(table), "posts", dropped), dropped):
            if row.get("PostTypeId") not in ("1", "2"):
                continue
            if number(row, "Id") and row.get("Body", "").strip():
                yield row
            else:
                dropped["posts without id or body left out"] += 1
    note(dump, dropped, notes)


def questions(dump: Path, notes: list[str]) -> Iterator[dict[str, str]]:
    """The questions, without the notices that closing once wrote into title and body, since these tell the class."""
    removed = 0
    for row in posts(dump, notes):
        if row["PostTypeId"] == "1":
            title, body = without_notices(row.get("Title", ""), row["Body"])
            removed_here = (title, body) != (row.get("Title", ""), row["Body"])
            row |= {"Title": title, "Body": body}
            if text(title, body):
                removed += removed_here
                yield row
    note(dump, Counter({NOTICES: removed}), notes)


def without_notices(title: str, body: str) -> tuple[str, str]:
    """Title and body (HTML or Markdown) without what closing once wrote into them."""
    if notice := _TITLE_NOTICE.search(stripped := title.rstrip()):
        title = stripped[: notice.start()].rstrip()
    notice = _BODY_NOTICE.match(body)
    return title, body[notice.end() :] if notice else body


def sample(labelled: Iterator[tuple[str, int, dict]], dump: Path, seed: int, notes: list[str]) -> list[dict]:
    """Draws rows from (class, id, row): at most PER_CLASS of each class, those with the smallest hashes of (seed, id).
    They are returned in the order of their ids. No more than these rows are in memory, however large the dump is.
    """
    heaps: dict[str, list] = {}
    seen: Counter = Counter()
    for label, post, row in labelled:
        seen[label] += 1
        heap = heaps.setdefault(label, [])
        # the count decides between equal ids, so that rows are never compared
        entry = (-key(seed, "sample", post), -post, seen[label], row)
        keep(heap, entry, PER_CLASS)
    note(dump, Counter({f"{label} left out by chance": seen[label] - len(heaps[label]) for label in heaps}), notes)
    kept = sorted(((-post, i, row) for heap in heaps.values() for _, post, i, row in heap), key=lambda entry: entry[:2])
    return [row for *_, row in kept]


def keep(heap: list, entry: tuple, most: int) -> None:
    """Adds an entry to a heap that keeps the `most` largest. Entries begin with a negated hash, so that the smallest
    hashes stay."""
    (heapq.heappush if len(heap) < most else heapq.heappushpop)(heap, entry)


def text(title: str, body: str) -> str:
    """Title and body (HTML) as plain text, with a blank line between them."""
    return "\n\n".join(filter(None, (title.strip(), html_to_text(body))))


def number(row: dict[str, str], name: str) -> int | None:
    value = row.get(name, "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else None


def note(dump: Path, counts: Counter, notes: list[str]) -> None:
    """Adds a line to the notes for each count that is not 0."""
    notes += [f"{dump.name}: {count:,} {what}" for what, count in counts.items() if count]
