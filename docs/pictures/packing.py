"""Draws a packed row: the document and position of each token, and the attention that follows from them."""

from __future__ import annotations

from svg import SMALL, Picture

TEXTS = ("CLS how to sort a list ? SEP", "CLS why use git ? SEP", "CLS try tox SEP", "PAD PAD")
DOCUMENTS = [text.split() for text in TEXTS]
LOOKS = ("document", "document2", "document3", "op")
PLACES = [(d, i) for d, words in enumerate(DOCUMENTS) for i in range(len(words))]  # (document, position) of each token
BOUNDS = [(PLACES.index((d, 0)), PLACES.index((d, 0)) + len(words)) for d, words in enumerate(DOCUMENTS)]
QUERY, WINDOW = 10, 2


def sees(query: int, key: int, window: int | None) -> bool:
    start, stop = BOUNDS[PLACES[query][0]]
    return start <= key < stop and (window is None or abs(query - key) <= window)


def packing() -> Picture:
    p = Picture(696, "Three documents packed into one row, and the attention that each token has")
    cell, left, top = 38, 112, 74
    n = len(PLACES)

    p.text(20, 26, "Three documents and padding in a row of 20 tokens", "bold", anchor="start")
    for d, (start, stop) in enumerate(BOUNDS):
        name = f"document {d + 1}" if d < 3 else "padding"
        p.text(left + cell * (start + stop) / 2, top - 20, name, "muted", SMALL)
    for at, (d, i) in enumerate(PLACES):
        x = left + cell * at
        p.rect(x, top, cell, 34, LOOKS[d], 0)
        p.text(x + cell / 2, top + 17, DOCUMENTS[d][i], size=SMALL)
        start, stop = BOUNDS[d]
        for row, number in enumerate((at, i, start, stop)):
            p.text(x + cell / 2, top + 52 + 24 * row, str(number), "" if at == QUERY else "muted", SMALL)
    for row, name in enumerate(("token", "place", "position", "start", "stop")):
        p.text(left - 14, top + (28 + 24 * row if row else 17), name, size=SMALL, anchor="end")
    p.rect(left + cell * QUERY - 1, top - 6, cell + 2, 146, "picked")

    start, stop = BOUNDS[PLACES[QUERY][0]]
    y = top + 158
    for x in (left + cell * start, left + cell * stop):
        p.line((x, y - 6), (x, y + 6), look="document")
    p.line((left + cell * start, y), (left + cell * stop, y), look="document")
    told = f"The query at place {QUERY} sees the keys from its start, {start}, up to its stop, {stop}."
    p.text(left + cell * (start + stop) / 2, y + 18, told, size=SMALL)

    size, top = 17, 322
    titles = ("a global layer", f"a layer with a window of {WINDOW}")
    for panel, (window, title) in enumerate(zip((None, WINDOW), titles)):
        x0 = 68 + panel * 430
        p.text(x0 + size * n / 2, top - 30, f"Attention in {title}", "bold")
        p.text(x0 + size * n / 2, top - 10, "keys →", "muted", SMALL)
        p.text(x0 - 10, top + 12, "queries", "muted", SMALL, "end")
        p.text(x0 - 10, top + 30, "↓", "muted", SMALL, "end")
        p.rect(x0, top, size * n, size * n, "panel", 0)
        total = 0
        for query in range(n):
            for key in range(n):
                if sees(query, key, window):
                    total += 1
                    p.rect(x0 + size * key, top + size * query, size, size, LOOKS[PLACES[query][0]], 0)
        p.rect(x0 - 1, top + size * QUERY - 1, size * n + 2, size + 2, "picked")
        p.text(x0 - 10, top + size * (QUERY + 0.5), str(QUERY), size=SMALL, anchor="end")
        saved = f"{total} of {n} × {n} = {n * n} scores are computed"
        p.text(x0 + size * n / 2, top + size * n + 18, saved, "muted", SMALL)
    return p
