"""Draws a block of each architecture, as minisobert/model.py computes it."""

from __future__ import annotations

from itertools import pairwise

from svg import SMALL, Picture

STEP, HIGH = 50, 32  # pixels from one operation to the next, and the height of each
# (operation, what it does, look, whether it also takes the residual stream), or None for an empty place
BERT = (
    ("embeddings", "word + position + token type, dropout", "weight", True),
    ("attention_norm", "layer norm", "weight", False),
    ("qkv", "h → 3h, bias", "weight", False),
    None,
    ("attention", "in the whole document", "op", False),
    ("attention_output", "h → h", "weight", False),
    ("add_norm", "+ bias, dropout, + residual, layer norm", "weight", True),
    ("ffn_input", "h → f", "weight", False),
    ("bias_gelu", "GELU (x + bias)", "weight", False),
    ("ffn_output", "f → h", "weight", False),
    ("add_norm", "+ bias, dropout, + residual, next layer norm", "weight", True),
)
MODERN = (
    ("embeddings", "word, layer norm, dropout", "weight", True),
    None,
    ("qkv", "h → 3h", "weight", False),
    ("rotary", "turns q and k", "op", False),
    ("attention", "|i − j| ≤ window, or global", "op", False),
    ("attention_output", "h → h", "weight", False),
    ("add_norm", "dropout, + residual, layer norm", "weight", True),
    ("gated_ffn_input", "h → 2f", "weight", False),
    ("gated_gelu", "GELU (a) ∘ b", "op", False),
    ("ffn_output", "f → h", "weight", False),
    ("add_norm", "dropout, + residual, next layer norm", "weight", True),
)


def block(p: Picture, left: float, top: float, title: str, subtitle: str, rows: tuple) -> None:
    rail, x, wide = left + 30, left + 98, 408
    middle, end = (x + left + wide) / 2, left + wide
    at = [top + STEP * i for i in range(len(rows) + 1)]
    p.text(left, top - 50, title, "bold", 16, "start")
    p.text(left, top - 27, subtitle, "muted", SMALL, "start")
    p.rect(left - 10, at[2] - 12, wide + 20, at[10] - at[2] + HIGH + 24, "panel dashed", 8)
    p.text(left + 65, at[2] + HIGH / 2, "block", "muted", SMALL)
    p.text(left + 65, at[8] + HIGH / 2, "residual", "muted", SMALL)

    for start, stop in pairwise((at[0], at[6], at[10], at[11] + 24)):
        p.arrow((rail, start + HIGH), (rail, stop), look="document thick", head=11)
    present = [y for row, y in zip(rows, at) if row][1:]
    for start, stop in pairwise([*present, at[11] + 24]):
        p.arrow((middle, start + HIGH), (middle, stop), look="document")
    norm = at[1] + HIGH / 2
    if rows[1]:
        p.arrow((rail, norm), (x, norm), look="document")
    else:  # the first block gets a stream that is already normalised
        p.arrow((rail, norm), (middle, norm), (middle, at[2]), look="document")
    for row, y in zip(rows, at):
        if row:
            name, does, look, both = row
            p.rect(left if both else x, y, wide if both else end - x, HIGH, look)
            p.text((left if both else x) + 12, y + HIGH / 2, name, "code", SMALL, "start")
            p.text(end - 12, y + HIGH / 2, does, "", SMALL, "end")
    p.text(rail + 14, at[11] + 8, "residual", "muted", SMALL, "start")
    p.text(middle + 12, at[11] + 8, "normed", "muted", SMALL, "start")


def blocks() -> Picture:
    p = Picture(738, "One block of megatron-bert beside one block of modernbert")
    block(p, 24, 88, "megatron-bert", "a table of positions, biases everywhere", BERT)
    block(p, 468, 88, "modernbert", "rotary positions, gated GELU, no biases", MODERN)
    legend = (("weight", "has weights"), ("op", "has none"))
    for i, (look, words) in enumerate(legend):
        p.rect(24 + 130 * i, 703, 22, 16, look)
        p.text(54 + 130 * i, 711, words, "muted", SMALL, "start")
    p.text(876, 711, "After the last block, residual ends and normed goes to the head.", "muted", SMALL, "end")
    return p
