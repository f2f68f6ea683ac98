"""Shows the entities in a text to people."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from minisobert.tasks import metrics

COLOURS = 31, 32, 33, 34, 35, 36


def mark(text: str, spans: Sequence[tuple[int, int]], tags: Sequence[str], colour: bool) -> str:
    """The text, with each entity as `[entity](Type)`, or in a colour for its type and with the type after it.

    spans: (begin, end) of each word; tags: the words' BIO tags.
    """
    parts, at = [], 0
    for kind, first, stop in sorted(metrics.entities(tags), key=lambda entity: entity[1]):
        begin, end = spans[first][0], spans[stop - 1][1]
        found = text[begin:end]
        shade = COLOURS[zlib.crc32(kind.encode()) % len(COLOURS)]
        shown = f"\x1b[1;{shade}m{found}\x1b[0;{shade}m {kind}\x1b[0m" if colour else f"[{found}]({kind})"
        parts += [text[at:begin], shown]
        at = end
    return "".join([*parts, text[at:]])


def mark_words(sentence: Sequence[str], tags: Sequence[str]) -> str:
    """The same for words that are joined by spaces, without colours."""
    spans, at = [], 0
    for word in sentence:
        spans.append((at, at + len(word)))
        at += len(word) + 1
    return mark(" ".join(sentence), spans, tags, colour=False)
