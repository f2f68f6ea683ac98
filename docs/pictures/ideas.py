"""Draws pictures of one idea each: tiles of attention, rotary positions, Muon, layer norm, retrieval."""

from __future__ import annotations

from math import cos, radians, sin

from svg import SMALL, Picture

LENGTHS, HELD, VISITED, WINDOW = (21, 12, 15), 8, 4, 6  # tokens per document, tile of queries, tile of keys


def _bounds(token: int, window: int | None) -> tuple[int, int]:
    """The range [begin, end) of tokens that a token sees."""
    start = 0
    for length in LENGTHS:
        if token < start + length:
            break
        start += length
    if window is None:
        return start, start + length
    return max(start, token - window), min(start + length, token + window + 1)


def tiles() -> Picture:
    p = Picture(546, "Which tiles of keys a tile of queries visits")
    size, n, top = 8, sum(LENGTHS), 74
    for left, window, title in ((80, None, "whole documents"), (494, WINDOW, f"a window of {WINDOW}")):
        p.text(left, 26, f"Attention in {title}", "bold", anchor="start")
        p.text(left + size * n / 2, top - 14, "keys →", "muted", SMALL)
        p.rect(left, top, size * n, size * n, "panel", 0)
        for first in range(0, n, HELD):
            sees = [_bounds(query, window) for query in range(first, min(first + HELD, n))]
            begin, end = sees[0][0], sees[-1][1]
            for key in range(begin, end, VISITED):
                stop = min(key + VISITED, end)
                x, y, w, h = left + size * key, top + size * first, size * (stop - key), size * len(sees)
                whole = stop - key == VISITED and all(lo <= key and stop <= hi for lo, hi in sees)
                p.rect(x, y, w, h, "document3" if whole else "op", 0)
                for row, (lo, hi) in enumerate(() if whole else sees):
                    a, b = max(lo, key), min(hi, stop)
                    if a < b:
                        p.rect(left + size * a, y + size * row, size * (b - a), size, "document-area", 0)
                p.rect(x, y, w, h, "document hollow", 0)
        p.rect(left - 2, top + size * HELD * 2 - 1, size * n + 4, size * HELD + 2, "picked")
    p.lines(70, top + 20, "queries", "↓", look="muted", size=SMALL, anchor="end")
    legend = (("document3", "seen by all queries: no mask"), ("document", "seen, in a tile that is masked"),
              ("op", "visited in vain"), ("panel", "not visited"))  # fmt: skip
    for x, (look, words) in zip((80, 322, 572, 744), legend):
        p.rect(x, 482, 18, 16, look, 0)
        p.text(x + 26, 490, words, "muted", SMALL, "start")
    told = "The framed queries are of two documents: each tile of keys that they visit is masked."
    p.text(80, 522, told, "muted", SMALL, "start")
    return p


def rotary() -> Picture:
    p = Picture(324, "Turning by position makes a product depend on the distance alone")
    speed, radius, y = 22, 92, 156  # degrees per token, pixels
    query, key = 75, 20  # angles before the rotation, in degrees
    for x, at_q, at_k, title in (
        (150, 0, 0, "not turned"),
        (450, 5, 2, "query at 5, key at 2"),
        (750, 11, 8, "query at 11, key at 8"),
    ):

        def at(direction: float, distance: float, x: float = x) -> tuple[float, float]:
            return x + distance * cos(radians(direction)), y - distance * sin(radians(direction))

        p.text(x, 26, title, "bold")
        turned = f"q turned by {at_q} s, k by {at_k} s" if at_q else "one pair of features of q and k"
        p.text(x, 278, turned, "muted", SMALL)
        p.text(x, 300, "the angle is φ" + (f" + {at_q - at_k} s" if at_q else ""))
        p.parts.append(f'<circle class="panel" cx="{x}" cy="{y}" r="{radius}"/>')
        q, k = query + speed * at_q, key + speed * at_k
        for before in (query, key) if at_q else ():
            p.line((x, y), at(before, radius), look="op dashed")
        (x0, y0), (x1, y1) = at(k, 36), at(q, 36)
        p.curve(f"M{x0:.1f} {y0:.1f}A36 36 0 0 0 {x1:.1f} {y1:.1f}", "ink")
        for name, direction in (("q", q), ("k", k)):
            p.line((x, y), at(direction, radius), look="document thick")
            p.text(*at(direction, radius + 15), name, "document-ink bold")
    return p


def muon() -> Picture:
    p = Picture(292, "Five Newton-Schulz iterations bring singular values near 1")
    a, b, c = 3.4445, -4.7750, 2.0315
    sigmas = [0.9 * 0.75**i for i in range(16)]  # a few large ones and many small ones
    length = sum(sigma**2 for sigma in sigmas) ** 0.5
    sigmas = [sigma / length for sigma in sigmas]
    floor, unit, bar = 236, 150, 10  # pixels: the height of 0, the length of 1, from bar to bar
    titles = {0: "the momentum", 1: "after 1 iteration", 3: "after 3 iterations", 5: "after 5: the step"}
    for iteration in range(6):
        if iteration in titles:
            left = 60 + 212 * list(titles).index(iteration)
            p.text(left + 8 * bar, 28, titles[iteration], "bold", SMALL)
            p.rect(left - 8, floor - 1.2 * unit, 16 * bar + 16, 0.5 * unit, "panel", 0)
            for i, sigma in enumerate(sigmas):
                p.rect(left + bar * i, floor - unit * sigma, bar - 3, unit * sigma, "gradient", 1)
            p.line((left - 8, floor), (left + 16 * bar + 8, floor))
        sigmas = [a * sigma + b * sigma**3 + c * sigma**5 for sigma in sigmas]
    p.text(60 + 8 * bar, floor + 18, "its 16 singular values", "muted", 12)
    for value in (0, 0.7, 1.2):
        p.text(46, floor - unit * value, f"{value:g}", "muted", 12, "end")
    return p


def layer_norm() -> Picture:
    p = Picture(372, "What add_norm reads and writes, forward and backward")
    high, row = 44, 404  # pixels: the height of a (T, h) array and the width of the box

    def array(x: float, y: float, name: str, look: str, shape: str = "T × h") -> None:
        """An array with its name above it. One number per token makes it narrow, one per feature makes it low."""
        w, h = {"T × h": (64, high), "T": (8, high), "h": (64, 8)}[shape]
        p.rect(x - w / 2, y + (high - h) / 2, w, h, look, 1)
        p.text(x, y - 12, name, size=SMALL)

    def half(left: float, title: str, reads: tuple, does: tuple[str, ...], writes: tuple) -> None:
        p.text(left, 26, title, "bold", 16, "start")
        p.text(left + row, 26, "read from memory", "muted", SMALL, "end")
        for arrays, y in ((reads, 62), (writes, 290)):
            for x, name, *kind in arrays:
                array(left + x, y, name, *kind)
                p.arrow(*((left + x, at) for at in ((112, 136) if y < 136 else (236, 260))))
        p.rect(left, 138, row, 96, "panel")
        p.text(left + 10, 152, "one row of h features at a time, in registers", "muted", 12, "start")
        p.lines(left + row / 2, 198, *does, size=SMALL)
        p.text(left + row, 360, "written to memory", "muted", SMALL, "end")

    half(
        24, "forward",
        ((60, "branch", "document"), (170, "residual", "document"), (290, "bias, w, c", "weight", "h")),
        ("x = dropout (branch + bias)", "r′ = residual + x", "μ, ρ and n of each row of r′"),
        ((60, "r′", "document"), (140, "μ", "document", "T"), (180, "ρ", "document", "T"), (290, "n", "document")),
    )  # fmt: skip
    half(
        472, "backward",
        ((44, "dn", "gradient"), (130, "dr′", "gradient"), (216, "r′", "document"), (274, "μ", "document", "T"),
         (308, "ρ", "document", "T"), (362, "w", "weight", "h")),
        ("u = (r′ − μ) ρ", "g = dn ∘ w, and the means of g and g ∘ u", "dr = dr′ + ρ (g − mean g − u mean (g ∘ u))"),
        ((44, "dr", "gradient"), (150, "d branch", "gradient dashed"), (300, "sums: dw, dc, d bias", "gradient", "h")),
    )  # fmt: skip
    p.line((24 + 28, 340), (24 + 28, 346), (24 + 190, 346), (24 + 190, 340))
    p.text(24, 360, "kept for the backward", "muted", SMALL, "start")
    p.text(472, 360, "d branch: with dropout only", "muted", SMALL, "start")
    return p


def embeddings() -> Picture:
    p = Picture(404, "The scores of a batch of pairs, and its two passes")
    size, n, left, top, same = 30, 8, 70, 84, (2, 5)
    p.text(24, 26, "The scores of a batch of 8 pairs", "bold", anchor="start")
    p.text(left + size * n / 2, top - 34, "texts to find →", "muted", SMALL)
    for i in range(n):
        p.text(left + size * (i + 0.5), top - 13, f"c{i + 1}", size=SMALL)
        p.text(left - 12, top + size * (i + 0.5), f"q{i + 1}", size=SMALL, anchor="end")
        for j in range(n):
            look = "document3" if i == j else "panel" if (i, j) in (same, same[::-1]) else "document2"
            p.rect(left + size * j, top + size * i, size, size, look, 0)
    p.rect(left - 1, top + size * 3 - 1, size * n + 2, size + 2, "picked")
    p.rect(left + size * 6 - 1, top - 1, size + 2, size * n + 2, "picked")
    same_text = f"c{same[0] + 1} and c{same[1] + 1} are the same text: two cells are left out."
    told = ("Each row, and each column, is a softmax that", "should pick its cell on the diagonal.", same_text)
    p.lines(24, 364, *told, look="muted", size=SMALL, anchor="start")

    x, encoder, vectors, loss = 446, 560, 672, 790
    p.text(x, 26, "Two passes, with one part in memory at a time", "bold", anchor="start")
    for y, name, parts, look in (
        (102, "1. without gradients", (0, 1, 2, 3), "document"),
        (252, "2. with gradients, for each part", (1,), "gradient"),
    ):
        p.text(x, y - 46, name, "muted", SMALL, "start")
        for part in range(4):
            p.rect(x, y - 32 + 17 * part, 76, 13, "document3" if part in parts else "document2", 2)
            for i in (2 * part, 2 * part + 1):
                p.rect(vectors + 10 * i, y - 20, 6, 40, look if part in parts else f"{look} hollow", 1)
        p.box(encoder, y - 25, 82, 50, "encoder", look="weight", size=SMALL)
        p.arrow((x + 82, y), (encoder, y))
    p.arrow((encoder + 82, 102), (vectors - 5, 102))
    p.arrow((vectors + 83, 102), (loss, 102))
    p.box(loss, 77, 86, 50, "loss of", "all pairs", size=SMALL)
    p.text(vectors + 38, 64, "vectors", "muted", SMALL)
    p.arrow((loss + 43, 127), (loss + 43, 252), (vectors + 83, 252), look="gradient")
    p.text(vectors + 38, 214, "their gradients", "muted", SMALL)
    p.arrow((vectors - 5, 252), (encoder + 82, 252), look="gradient")
    p.arrow((encoder + 41, 277), (encoder + 41, 306), look="gradient")
    p.box(encoder - 30, 308, 142, 34, "gradient of weights", look="gradient", size=SMALL)
    p.text(encoder + 126, 325, "added up over the parts", "muted", SMALL, "start")
    return p
