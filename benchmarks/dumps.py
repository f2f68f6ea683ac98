"""Synthetic Stack Exchange dumps of any size, with real lengths: `write_dump(folder, posts=100_000, seed=0)`.

The lengths of posts are drawn from benchmarks/post_lengths.json, and a post has 1.5 comments on average. As in a real
dump, Posts.xml is ordered by the ids of the posts and Comments.xml by those of the comments, that is by time: most
comments are on a recent post, one in seven is on a much older one. The texts have words by Zipf's law, paragraphs,
code, entities and HTML tags. Identifiers in code are several words run together, so that the vocabulary keeps growing,
as in real posts.

A text is a sequence of pieces from one table of bytes, so that NumPy can copy hundreds of posts at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import lengths

BATCH = 300  # posts that are made at a time; more would not fit in the processor's cache
WORDS = 50_000
COMMENTS = 1.5  # per post
COMMENT_WORDS = 28  # per comment, about 180 characters
CHARACTERS_PER_TOKEN, CHARACTERS_PER_WORD = 3.5, 6.4
TEXT, CODE = 60, 50  # words of text before code follows, and of code before text follows
QUESTIONS = 0.42  # share of the posts
# The share of comments that come at any later time; posts that are written, on average, before another comment comes
OLD, RECENT = 0.15, 1_000

_PARAGRAPH, _BLOCK = ("<p>", "</p>\n"), ("<pre><code>", "\n</code></pre>\n")
_AFTER_WORD = {  # how often, in a hundred, a separator comes after a word; the rest are spaces
    "text": {", ": 6, ". ": 6, "</p>\n\n<p>": 2, " &amp; ": 1, " <strong>not</strong> ": 1, " <code>null</code> ": 1,
             "? ": 1, "'s ": 1, ' (see <a href="https://example.com/questions/1234">here</a>) ': 1, "é ": 1},
    "code": {"": 16, "_": 6, ".": 12, "(": 8, ");\n    ": 9, " = ": 7, ", ": 8, " {\n        ": 3, ";\n": 5, "\n": 4,
             '"': 3, " &lt; ": 2, " -&gt; ": 1, "[0] ": 2, "\n    }\n": 2},
    "comment": {", ": 6, ". ": 6, " `null` ": 1, "? ": 1, " & ": 1, " -> ": 1, "'s ": 1},
}  # fmt: skip


class _Pieces(NamedTuple):
    """All pieces, escaped for an attribute of XML, and their numbers: of words, of separators and of tags."""

    content: np.ndarray  # (bytes,) uint8
    start: np.ndarray  # (pieces,) int32
    length: np.ndarray  # (pieces,) int32
    words: np.ndarray  # (65536,) int32: each word as often as Zipf's law says
    after: dict[str, np.ndarray]  # kind of text → (100,) int32, each separator as often as it comes
    tag: dict[str, int]


def _pieces(seed: int) -> _Pieces:
    generator = np.random.default_rng(seed)
    syllables = [a + b for a in ("st", "tr", "th", *"bcdfghjklmnprstvw") for b in "aeiou"]
    words: dict[str, None] = {}
    for many, until in enumerate((40, 2_000, 20_000, WORDS), 1):  # frequent words are short
        while len(words) < until:
            drawn = generator.integers(0, len(syllables), (until - len(words), many))
            words.update(dict.fromkeys("".join(syllables[i] for i in row) for row in drawn.tolist()))
    found = list(words)
    shares = 1 / np.arange(2, WORDS + 2)
    edges = np.cumsum(shares / shares.sum())
    table = np.searchsorted(edges, (np.arange(1 << 16) + generator.random(1 << 16)) / (1 << 16))
    after, tag = {}, {}
    for kind, counts in _AFTER_WORD.items():
        names = [piece for piece, n in counts.items() for _ in range(n)]
        after[kind] = np.arange(len(found), len(found) + 100, dtype=np.int32)
        found += [*names, *[" "] * (100 - len(names))]
    between = (_PARAGRAPH[1] + _BLOCK[0], _BLOCK[1] + _PARAGRAPH[0])
    for name, piece in zip(("<p>", "</p>", "<pre>", "</pre>", "to code", "to text", ""),
                           (*_PARAGRAPH, *_BLOCK, *between, "")):  # fmt: skip
        tag[name] = len(found)
        found.append(piece)
    encoded = [_attribute(piece) for piece in found]
    length = np.array([len(piece) for piece in encoded], np.int32)
    start = (np.cumsum(length) - length).astype(np.int32)
    return _Pieces(np.frombuffer(b"".join(encoded), np.uint8), start, length, table.astype(np.int32), after, tag)


def _attribute(text: str) -> bytes:
    return escape(text).replace("&#x27;", "'").replace("\n", "&#xA;").encode()


def _texts(pieces: _Pieces, words: np.ndarray, generator: np.random.Generator, html: bool) -> list[bytes]:
    """A text for each number of words, which must be at least 1."""
    ends = np.cumsum(words)
    total = int(ends[-1])
    word = pieces.words[generator.integers(0, 1 << 16, total, np.uint16)]
    before = np.full(total, pieces.tag[""], np.int32)
    draw = generator.integers(0, 100, total, np.uint8)
    if html:
        turns = generator.geometric(1 / np.resize([TEXT, CODE], 2 + 3 * total // (TEXT + CODE)))
        turns[-1] += total  # so that there are enough, whatever was drawn
        code = np.repeat(np.arange(len(turns)) % 2 == 1, np.minimum(turns, total))[:total]
        after = np.where(code, pieces.after["code"][draw], pieces.after["text"][draw])
        change = np.flatnonzero(code[1:] != code[:-1])
        after[change] = np.where(code[change], pieces.tag["to text"], pieces.tag["to code"])
        after[ends - 1] = np.where(code[ends - 1], pieces.tag["</pre>"], pieces.tag["</p>"])
        before[ends - words] = np.where(code[ends - words], pieces.tag["<pre>"], pieces.tag["<p>"])
    else:
        after = pieces.after["comment"][draw]
        after[ends - 1] = pieces.tag[""]
    order = np.stack([before, word, after], 1).ravel()
    length = pieces.length[order]
    stop = np.cumsum(length, dtype=np.int32)
    where = np.repeat(pieces.start[order] - (stop - length), length)
    where += np.arange(len(where), dtype=np.int32)
    content = pieces.content[where].tobytes()
    cuts = [0, *stop[3 * ends - 1].tolist()]
    return [content[a:b] for a, b in pairwise(cuts)]


def write_dump(folder: Path, posts: int, seed: int = 0) -> int:
    """Writes Posts.xml and Comments.xml into a new folder, and returns their size in bytes. The same seed gives the
    same dump. It takes about 30 bytes of memory per post and 20 per comment, besides a few MB.
    """
    folder.mkdir()
    pieces = _pieces(seed)
    generator = np.random.default_rng(seed + 1)
    gaps = generator.geometric(0.75, posts).astype(np.int32)  # the ids of deleted posts are missing
    ids = np.cumsum(gaps)
    comments = np.minimum(generator.geometric(1 / (1 + COMMENTS), posts) - 1, 100)
    with open(folder / "Posts.xml", "wb") as file:
        _table(file, "posts", _posts(pieces, ids, comments, generator, seed))
    with open(folder / "Comments.xml", "wb") as file:
        _table(file, "comments", _comments(pieces, ids, gaps, comments, generator))
    return sum(path.stat().st_size for path in folder.iterdir())


def _table(file, root: str, rows: Iterator[bytes]) -> None:
    file.write(b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-8"?>\n<%s>\n' % root.encode())
    file.writelines(rows)
    file.write(b"</%s>" % root.encode())


def _posts(pieces, ids, comments, generator, seed: int) -> Iterator[bytes]:
    is_question = generator.random(len(ids)) < QUESTIONS
    is_question[0] = True
    latest = np.maximum.accumulate(np.where(is_question, np.arange(len(ids)), 0))  # the question before each post
    drawn = lengths.draw(len(ids), seed)  # tokens in a post with its comments
    words = (drawn * CHARACTERS_PER_TOKEN / CHARACTERS_PER_WORD - comments * COMMENT_WORDS).clip(5).astype(np.int64)
    for first in range(0, len(ids), BATCH):
        here = slice(first, first + BATCH)
        bodies = _texts(pieces, words[here], generator, html=True)
        titles = _texts(pieces, generator.integers(4, 13, len(bodies)), generator, html=False)
        parents = ids[
            latest[np.maximum(np.arange(first, first + len(bodies)) - generator.geometric(0.02, len(bodies)), 0)]
        ]
        columns = ids[here], is_question[here], comments[here], parents, generator.integers(-3, 40, len(bodies))
        for number, question, count, parent, score, body, title in zip(*(c.tolist() for c in columns), bodies, titles):
            kind = b'1" AcceptedAnswerId="%d' % (number + 1) if question else b'2" ParentId="%d' % parent
            end = b'Title="%s" Tags="|java|xml|" AnswerCount="1" ' % title if question else b""
            yield (
                b'  <row Id="%d" PostTypeId="%s" CreationDate="2020-01-01T00:00:00.000" Score="%d" ViewCount="80" '
                b'Body="%s" OwnerUserId="%d" LastActivityDate="2020-01-01T00:00:00.000" %sCommentCount="%d" '
                b'ContentLicense="CC BY-SA 4.0" />\n' % (number, kind, score, body, number % 9_973, end, count)
            )


def _comments(pieces, ids, gaps, comments, generator) -> Iterator[bytes]:
    posts = np.repeat(np.arange(len(ids), dtype=np.int32), comments)
    delay = generator.exponential(RECENT, len(posts))
    old = generator.random(len(posts)) < OLD
    delay[old] = generator.random(int(old.sum())) * (len(ids) - posts[old])
    posts = posts[np.argsort(posts + delay, kind="stable")]
    del delay, old
    for first in range(0, len(posts), BATCH):
        on = posts[first : first + BATCH]
        deleted = (gaps[on] > 1) & (generator.random(len(on)) < 0.01)  # the dump keeps comments of deleted posts
        words = generator.integers(2, 2 * COMMENT_WORDS - 1, len(on))
        texts = _texts(pieces, words, generator, html=False)
        for number, (post, text) in enumerate(zip((ids[on] - deleted).tolist(), texts), first + 1):
            yield (
                b'  <row Id="%d" PostId="%d" Score="0" Text="%s" CreationDate="2020-01-01T00:00:00.000" UserId="%d" '
                b'ContentLicense="CC BY-SA 4.0" />\n' % (number, post, text, number % 9_973)
            )
