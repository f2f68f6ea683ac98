"""Draws tensor and data parallelism on two ranks."""

from __future__ import annotations

from svg import SMALL, Picture

# Half a block: its column layer, the operation in between, its row layer, and the parts of rank 0 and rank 1
HALVES = (
    ("qkv", "attention", "attention_output", ("heads 0 … H/2−1", "heads H/2 … H−1")),
    ("ffn_input", "GELU", "ffn_output", ("features 0 … f/2−1", "features f/2 … f−1")),
)
# The flat buffer of `base` on eight ranks, in millions of elements: the layers in it, and its buckets
LAYERS = (
    ("head", 0.64),
    *((str(i), 7.09) for i in reversed(range(12))),
    ("positions", 1.57),
    ("word embeddings", 38.44),
)
BUCKETS = (17.18, 17.13, 18.31, 17.13, 17.52, 38.44)
GLYPH = 30
# The collectives in the forward (down) and backward (up) pass: before a column layer, and after a row layer
PLAIN = (("", "all-reduce"), ("all-reduce", ""))
BY_TOKENS = (("all-gather", "all-gather again, reduce-scatter"), ("reduce-scatter", "all-gather"))


def _part(p: Picture, x: float, y: float, rank: int, look: str, down: float = 1, across: float = 1) -> None:
    """A square around (x, y) for a matrix, and in it the rank's share of its rows (down) and columns (across)."""
    x, y = x - GLYPH / 2, y - GLYPH / 2
    p.rect(x, y, GLYPH, GLYPH, "op", 0)
    w, h = GLYPH * across, GLYPH * down
    p.rect(x + rank * (GLYPH - w), y + rank * (GLYPH - h), w, h, look, 0)


def _weight(p: Picture, x: float, y: float, rank: int, name: str, cut: str, part: str) -> None:
    p.rect(x - 96, y - 21, 192, 42, "panel", 4)
    _part(p, x - 75, y, rank, "weight", *((0.5, 1) if cut == "column" else (1, 0.5)))
    p.text(x - 52, y - 9, name, "code", 12, "start")
    p.text(x - 52, y + 9, part, "muted", 12, "start")


def _collective(p: Picture, left: float, y: float, forward: str, backward: str) -> None:
    p.rect(left, y - 12, 404, 24, "communication" if forward else "communication dashed", 12)
    if forward:
        p.text(left + 14, y, f"↓ {forward}", size=SMALL, anchor="start")
    if backward:
        p.text(left + 390, y, f"↑ {backward}", size=SMALL, anchor="end")


def _split_block(
    p: Picture, left: float, title: str, subtitle: str, before: tuple, behind: tuple, tokens: float
) -> None:
    """tokens: the share of the tokens that a rank has between the layers."""
    lanes = (left + 98, left + 306)
    p.text(left, 30, title, "code bold", SMALL, "start")
    p.text(left, 54, subtitle, "muted", SMALL, "start")
    for rank, x in enumerate(lanes):
        p.text(x, 84, f"rank {rank}", "bold", SMALL)
        p.arrow((x, 112), (x, 112 + 2 * 340 - GLYPH / 2))
        _part(p, x, 112, rank, "document", tokens)
    for half, (column, between, row, parts) in enumerate(HALVES):
        y = 112 + 340 * half
        _collective(p, left, y + 38, *before)
        _collective(p, left, y + 252, *behind)
        for rank, x in enumerate(lanes):
            _weight(p, x, y + 82, rank, column, "column", parts[rank])
            p.box(x - 44, y + 114, 88, 28, between, size=SMALL)
            _part(p, x, y + 166, rank, "document", 1, 0.5)
            _weight(p, x, y + 210, rank, row, "row", parts[rank])
            p.box(x - 96, y + 278, 192, 28, "add_norm", look="weight", size=SMALL)
            _part(p, x, y + 340, rank, "document", tokens)


def tensor_parallel() -> Picture:
    p = Picture(880, "A block split over two ranks, without and with sequence parallelism")
    _split_block(p, 24, "--tensor-parallel 2", "Between the layers each rank has all tokens.", *PLAIN, 1)
    both = "--tensor-parallel 2 --sequence-parallel"
    _split_block(p, 472, both, "Between the layers each rank has half of the tokens.", *BY_TOKENS, 0.5)
    for x, look, words in (
        (24, "document", "states: tokens down, features across"),
        (336, "weight", "a weight: outputs down, inputs across"),
        (652, "communication", "↓ forward, ↑ backward"),
    ):
        p.rect(x, 844, 18, 16, look, 8 if look == "communication" else 0)
        p.text(x + 25, 852, words, "muted", 12, "start")
    return p


def _overlap(p: Picture) -> None:
    p.text(24, 28, "The gradients of base, in the order in which the backward pass makes them", "bold", anchor="start")
    left, scale = 76, 800 / sum(BUCKETS)
    x = left
    for name, size in LAYERS:
        p.rect(x, 64, scale * size, 28, "gradient", 0)
        inside = size > 2
        p.text(x + scale * size / 2, 78 if inside else 52, name, "" if inside else "muted", 12)
        x += scale * size
    x = left
    for i, size in enumerate(BUCKETS):
        p.box(x + 2, 98, scale * size - 4, 24, f"{i}: {size:.1f} M", look="communication", size=12)
        x += scale * size
    p.text(68, 78, "block", "muted", 12, "end")
    p.text(68, 110, "bucket", "muted", 12, "end")

    for name, y in (("backward", 169), ("sums", 207)):
        p.text(98, y, name, size=SMALL, anchor="end")
    p.text(98, 241, "time →", "muted", SMALL, "end")
    begin, step = 110, 98
    end = begin + 5 * step + 24  # the end of the backward pass, whose last part is a look-up and short
    free = 0.0  # when the network has sent the buckets before this one
    for i, size in enumerate(BUCKETS):
        start, stop = begin + step * i, min(begin + step * (i + 1), end)
        p.box(start, 154, stop - start, 30, str(i), look="gradient", size=SMALL)
        at = max(stop, free)
        free = at + 3.9 * size
        p.box(at, 192, free - at, 30, str(i), look="communication", size=SMALL)
        if i < 5:
            p.line((stop, 184), (stop, 192), look="communication")
    p.box(free + 8, 173, 876 - free - 8, 30, "step", size=SMALL)
    p.line((end, 146), (end, 232), look="op dashed")
    p.text(end - 8, 241, "hidden behind the backward", "muted", SMALL, "end")
    p.text(end + 8, 241, "waited for", "muted", SMALL, "start")


def _sharded(p: Picture) -> None:
    p.text(24, 298, "One bucket with --shard-optimizer, on two ranks", "bold", anchor="start")
    wide, high, tops = 150, 34, (342, 390)
    stages = (  # x, the colour, what each rank has in each half, words below
        (92, "gradient", (("g₀", "g₀"), ("g₁", "g₁")), ("gradients of", "its own rows")),
        (300, "gradient", (("g₀ + g₁", ""), ("", "g₀ + g₁")), ("the sum of", "its own share")),
        (490, "weight", (("stepped", ""), ("", "stepped")), ("moments and masters", "of its own share")),
        (698, "weight", (("new", "new"), ("new", "new")), ("all weights", "")),
    )
    for rank, y in enumerate(tops):
        p.text(78, y + high / 2, f"rank {rank}", size=SMALL, anchor="end")
    for x, look, has, words in stages:
        for y, halves in zip(tops, has):
            p.rect(x, y, wide, high, "panel", 0)
            for half, inside in enumerate(halves):
                if inside:
                    p.rect(x + half * wide / 2, y, wide / 2, high, look, 0)
                    p.text(x + (half + 0.5) * wide / 2, y + high / 2, inside, size=SMALL)
        p.lines(x + wide / 2, 450, *filter(None, words), look="muted", size=SMALL)
    for x, name in ((258, "reduce-scatter"), (656, "all-gather")):
        p.rect(x, 334, 26, 98, "communication", 13)
        p.text(x + 13, 322, name, "communication-ink", SMALL)
    for y in tops:
        p.arrow((454, y + high / 2), (486, y + high / 2))
    p.text(470, 322, "step", "muted", SMALL)


def data_parallel() -> Picture:
    p = Picture(484, "Buckets of gradients that are summed during the backward pass, and the sharded optimizer")
    _overlap(p)
    _sharded(p)
    return p
