"""Loading on one core: `python -m benchmarks.loader --data SHARDS` measures tokens per second.

It does all that training needs of a loader: gathers packed rows from the memory map, adds special tokens, positions,
document bounds and masks, and makes tensors.
"""

from __future__ import annotations

import os
import time

import torch

from benchmarks import machine, parser, shards, show
from minisobert.cli import table
from minisobert.config import TrainConfig
from minisobert.corpus.loader import Rows, prefetch, spans


def main() -> None:
    command = parser("loader", "--data data/prepared")
    command.add_argument("--data", type=shards, required=True, metavar="SHARDS", help="folder that data.prepare wrote")
    command.add_argument("--micro-batch-rows", type=int, default=8, metavar="N", help="rows in a micro-batch")
    command.add_argument("--tokens", type=int, default=40_000_000, metavar="N", help="number of tokens to load")
    options = command.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    rows = Rows(options.data, options.data.training_documents, 0, TrainConfig.row_tokens)
    rows.micro_batch(0, 1)  # shuffles the first epoch before the clock starts
    wanted = spans(0, options.tokens // TrainConfig.row_tokens, options.micro_batch_rows, 0, 1)
    began = time.perf_counter()
    real = masked = 0
    for batch in prefetch(rows, wanted, torch.device("cpu")):
        real, masked = real + batch.real_tokens, masked + len(batch.masked)
    seconds = time.perf_counter() - began
    show(
        [
            "# Loading on one core",
            "",
            f"`python -m benchmarks.loader`: {real:,} real tokens of {options.data.meta['documents']:,} documents "
            f"({', '.join(options.data.meta['sources'])}), {masked / real:.2%} masked, "
            f"{options.micro_batch_rows} rows at a time.",
            machine("torch", "numpy") + ".",
            "",
            *table(["real tokens/s", "seconds"], [[f"{real / seconds:,.0f}", f"{seconds:.1f}"]]),
        ],
        "loader",
        options.write,
    )


if __name__ == "__main__":
    main()
