"""Packing millions of documents on one core: `python -m benchmarks.packing` measures time, memory and fill of the rows.

The lengths are drawn from those of a prepared corpus (--data), or from a log-normal that resembles posts. For
comparison, documents are also packed in the order they come: each row is filled until the next one does not fit.
"""

from __future__ import annotations

import os
import resource
import time

import numpy as np

from benchmarks import machine, parser, shards, show
from minisobert.cli import table
from minisobert.config import TrainConfig
from minisobert.corpus.packing import SPECIALS, Packing
from minisobert.corpus.shards import Shards

ROW_TOKENS = TrainConfig.row_tokens


def lengths_like_posts(count: int, data: Shards | None) -> np.ndarray:
    draw = np.random.default_rng(0)
    if data is not None:
        return draw.choice(np.diff(data.offsets), count)
    return np.clip(draw.lognormal(5.8, 1.0, count), 1, 30_000).astype(np.int64)


def rows_in_order(lengths: np.ndarray) -> int:
    rows, space = 0, 0
    for places in (lengths + SPECIALS).tolist():
        if places > space:
            rows, space = rows + 1, ROW_TOKENS
        space -= places
    return rows


def main() -> None:
    command = parser("packing", "--documents 1e6")
    command.add_argument("--documents", type=int, default=15_000_000, metavar="N", help="number of documents to pack")
    command.add_argument(
        "--data", type=shards, metavar="SHARDS", help="take the lengths of this corpus (default: those of posts)"
    )
    options = command.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    offsets = np.concatenate([[0], np.cumsum(lengths_like_posts(options.documents, options.data))])

    began = time.perf_counter()
    packing = Packing(offsets, range(options.documents), 0, ROW_TOKENS)
    packed = time.perf_counter()
    epoch = packing.epoch(0)
    drawn = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    chunks, counts = packing.chunks(epoch, np.arange(len(packing)))
    if not np.array_equal(np.sort(chunks), np.arange(len(packing.chunk_length))):
        raise SystemExit("benchmarks.packing: an epoch does not hold each chunk once")
    places = np.add.reduceat(packing.chunk_length[chunks] + SPECIALS, np.cumsum(counts) - counts)
    if places.max() > ROW_TOKENS:
        raise SystemExit("benchmarks.packing: a row is too full")
    full = packing.tokens / (len(packing) * ROW_TOKENS)
    in_order = rows_in_order(np.random.default_rng(1).permutation(packing.chunk_length))
    show(
        [
            "# Packing on one core",
            "",
            f"`python -m benchmarks.packing`: {options.documents:,} documents, {packing.tokens:,} tokens, lengths "
            + (f"drawn from {options.data.folder.name}." if options.data else "log-normal."),
            machine("numpy") + ".",
            "",
            *table(
                ["", ""],
                [
                    ["histogram packing", f"{packed - began:.1f} s"],
                    ["the shuffles of an epoch", f"{drawn - packed:.1f} s"],
                    ["peak memory of the process", f"{peak:.2f} GB"],
                    ["rows", f"{len(packing):,}"],
                    ["real tokens in them", f"{full:.3%}"],
                    ["the same documents in a random order, next fit", f"{packing.tokens / in_order / ROW_TOKENS:.3%}"],
                ],
            ),
        ],
        "packing",
        options.write,
    )


if __name__ == "__main__":
    main()
