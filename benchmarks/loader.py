"""Loading on one core: `python -m benchmarks.loader --data SHARDS`, tokens per second of packed, masked micro-batches.

All that training asks of a loader: gather from the memory map, specials, positions, document bounds, masks, tensors.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import JAVA_DUMP, machine, write_result
from data.prepare import prepare
from minisobert.cli import Parser, fail
from minisobert.config import TrainConfig
from minisobert.corpus.loader import Rows, prefetch, spans
from minisobert.corpus.shards import open_shards


def main() -> None:
    parser = Parser(prog="benchmarks.loader", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="shards (default: made from the java dump)")
    parser.add_argument("--micro-batch-rows", type=int, default=8, metavar="N")
    parser.add_argument("--tokens", type=int, default=40_000_000, metavar="N", help="to load (default 40,000,000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            if not JAVA_DUMP.exists():
                fail(f"benchmarks.loader: {JAVA_DUMP} is not there; give --data, a folder of data.prepare")
            prepare([JAVA_DUMP], Path(folder) / "shards", vocab_size=8_000)
        shards = open_shards(options.data or Path(folder) / "shards")
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        rows = Rows(shards, shards.training_documents, 0, TrainConfig.row_tokens)
        rows.micro_batch(0, 1)  # the shuffle of the first epoch
        wanted = spans(0, options.tokens // TrainConfig.row_tokens, options.micro_batch_rows, 0, 1)
        began = time.perf_counter()
        real = masked = 0
        for batch in prefetch(rows, wanted, torch.device("cpu")):
            real, masked = real + batch.real_tokens, masked + len(batch.masked)
        seconds = time.perf_counter() - began
    write_result(
        [
            "# Loading on one core",
            "",
            f"`python -m benchmarks.loader`: {real:,} real tokens of {shards.meta['documents']:,} documents "
            f"({', '.join(shards.meta['sources'])}), {masked / real:.2%} masked, "
            f"{options.micro_batch_rows} rows at a time.",
            machine("torch", "numpy") + ".",
            "",
            "| real tokens/s | seconds |",
            "|---|---|",
            f"| {real / seconds:,.0f} | {seconds:.1f} |",
        ],
        "loader",
    )


if __name__ == "__main__":
    main()
