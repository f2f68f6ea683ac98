"""How long posts are: `python -m benchmarks.lengths --data SHARDS`; --write stores the result as post_lengths.json.

The other benchmarks draw from that file. It counts the chunks that packing makes: with [CLS] and [SEP], and with posts
that are longer than a row cut into several. Lengths up to 64 are counted one by one, longer ones in buckets that are
3 % wide.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks import parser, shards
from minisobert.config import TrainConfig
from minisobert.corpus.packing import SPECIALS, Packing

ROW_TOKENS = TrainConfig.row_tokens

HISTOGRAM = Path(__file__).parent / "post_lengths.json"
EXACT, WIDTH = 64, 1.03


def bucket_edges() -> np.ndarray:
    """The first length of each bucket, and one past the last length."""
    edges = list(range(SPECIALS + 1, EXACT + 2))
    while edges[-1] <= ROW_TOKENS:
        edges.append(max(edges[-1] + 1, int(edges[-1] * WIDTH)))
    full_row = [ROW_TOKENS, ROW_TOKENS + 1]  # a bucket of its own, for all chunks of long posts but the last
    return np.array([edge for edge in edges if edge < ROW_TOKENS] + full_row)


def histogram(lengths: np.ndarray) -> list[list[int]]:
    """[first length, last length, chunks] for each bucket that is not empty. lengths: with special tokens."""
    edges = bucket_edges()
    counts, _ = np.histogram(lengths, edges)  # NumPy's last bucket includes its upper edge
    return [[int(a), int(b) - 1, int(n)] for a, b, n in zip(edges, edges[1:], counts) if n]


def draw(count: int, seed: int) -> np.ndarray:
    """(count,) int64 lengths with special tokens, drawn from the committed histogram; uniform within a bucket."""
    first, last, counts = np.array(json.loads(HISTOGRAM.read_text())["buckets"]).T
    generator = np.random.default_rng(seed)
    bucket = generator.choice(len(counts), count, p=counts / counts.sum())
    return generator.integers(first[bucket], last[bucket] + 1)


def main() -> None:
    command = parser("lengths", "--data data/prepared", writes="benchmarks/post_lengths.json")
    command.add_argument("--data", type=shards, required=True, metavar="SHARDS", help="folder that data.prepare wrote")
    options = command.parse_args()
    corpus = options.data
    packing = Packing(corpus.offsets, range(corpus.meta["documents"]), 0, ROW_TOKENS)
    lengths = packing.chunk_length + SPECIALS
    p50, p95 = np.percentile(lengths, (50, 95), method="lower").tolist()
    about = {
        "about": "lengths in tokens of posts as packing cuts them, [CLS] and [SEP] included: [first, last, pieces]",
        "made_by": "python -m benchmarks.lengths",
        "sources": corpus.meta["sources"],
        "vocabulary": corpus.vocab_size,
        "documents": corpus.meta["documents"],
        "pieces": len(lengths),
        "mean": round(float(lengths.mean()), 1),
        "p50": p50,
        "p95": p95,
        "mean_square": round(float((lengths.astype(np.float64) ** 2).mean()), 1),
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in about.items()]
    buckets = ",\n    ".join(json.dumps(bucket) for bucket in histogram(lengths))
    print("\n".join(lines))
    if options.write:
        HISTOGRAM.write_text("\n".join(["{", *lines, '  "buckets": [', f"    {buckets}", "  ]", "}"]) + "\n")


if __name__ == "__main__":
    main()
