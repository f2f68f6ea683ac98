"""Draws the pages' pictures: `python docs/pictures/draw.py [FOLDER]` writes them beside this file or to FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from blocks import blocks
from ideas import embeddings, layer_norm, muon, rotary, tiles
from packing import packing
from parallel import data_parallel, tensor_parallel
from system import system
from timelines import checkpoint, step

DRAW = (
    blocks, checkpoint, data_parallel, embeddings, layer_norm, muon,
    packing, rotary, step, system, tensor_parallel, tiles,
)  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for draw in DRAW:
        path = folder / f"{draw.__name__.replace('_', '-')}.svg"
        path.write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
