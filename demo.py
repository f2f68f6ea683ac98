"""The whole way in a few minutes on two cores: `make demo`, or `make demo DUMP=path/to/site.7z`.

text → data.prepare → train.py → loss.png and guesses for masked words, all in runs/demo/. Without a dump the text is
the Python standard library's own. An earlier runs/demo is kept, under the next free name, or its own if this one fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

import train
from data import prepare, stdlib
from data.inputs import check
from minisobert import playground
from minisobert.cli import command, fail
from minisobert.config import PRESETS, TrainConfig
from minisobert.corpus.loader import Rows
from minisobert.corpus.shards import Shards, open_shards
from minisobert.plot import plot, read_metrics
from minisobert.training.meter import attention_pairs, training_flops
from minisobert.training.run import open_run

OUT = Path("runs/demo")
VOCAB_SIZE = 4_000
FLOPS = 28e12  # what two cores manage in about three minutes; how many tokens that is depends on the documents


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        fail(f"demo.py: one dump at most, {len(arguments)} given; python -m data.prepare takes several")
    inputs = [Path(path) for path in arguments]
    with command("demo.py", "the next one starts anew"):
        check(inputs)
        with earlier_aside():
            demo(inputs)


@contextmanager
def earlier_aside() -> Iterator[None]:
    """Makes OUT. An earlier one takes the next free name, and comes back if the block fails: then this one takes it."""
    earlier = free_name() if OUT.exists() else None
    if earlier:
        OUT.replace(earlier)
        print(f"the earlier {OUT} is now {earlier}")
    OUT.mkdir(parents=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty
            OUT.rmdir()
        if earlier:
            if OUT.exists():
                failed = free_name()
                OUT.replace(failed)
                print(f"what was made of the new {OUT} is now {failed}")
            earlier.replace(OUT)
            print(f"{earlier} is {OUT} again")
        raise


def free_name() -> Path:
    return next(path for n in range(1, 1_000_000) if not (path := OUT.with_name(f"demo-{n}")).exists())


def demo(inputs: list[Path]) -> None:
    if not inputs:
        inputs = [OUT / "standard-library.jsonl"]
        stdlib.write(inputs[0])
    print(prepare.table(prepare.prepare(inputs, OUT / "data", vocab_size=VOCAB_SIZE)))
    shards = open_shards(OUT / "data")

    tokens = affordable_tokens(shards)
    status = train.main(
        [
            *("--data", str(OUT / "data"), "--out", str(OUT), "--preset", "tiny", "--train-tokens", str(tokens)),
            # a small model and few tokens: small batches for many steps, a high rate, and no dropout
            *("--tokens-per-batch", "2048", "--micro-batch-rows", "1", "--learning-rate", "1e-3", "--dropout", "0"),
            *("--warmup-fraction", "0.1", "--beta2", "0.98", "--eval-rows", "32"),
            *("--eval-every-tokens", str(tokens // 10), "--checkpoint-every-tokens", str(tokens // 2)),
        ]
    )
    if status:
        sys.exit(status)

    entropy = unigram_entropy(shards)
    held_out = read_metrics(OUT)[-1]["validation_loss"]
    plot([OUT], OUT / "loss.png", entropy)
    show_guesses(shards)
    print(f"loss on held-out text: {held_out:.2f} nats; unigram entropy of the corpus: {entropy:.2f}, ", end="")
    print(f"which is what knowing each piece's frequency gives; the model is {entropy - held_out:.2f} better")
    print(f"look at {OUT / 'loss.png'}, or ask: .venv/bin/python -m minisobert.playground {OUT} 'for i in [MASK](10):'")


def affordable_tokens(shards: Shards) -> int:
    """Row positions that FLOPS pay for, in whole rows."""
    rows = Rows(shards, shards.training_documents, 1, TrainConfig.row_tokens)
    lengths = rows.packing.chunk_length.astype(np.int64) + 2
    model = PRESETS["tiny"]
    per_epoch = training_flops(
        model, int(lengths.sum()), attention_pairs(model, lengths), masked=int(0.15 * lengths.sum())
    )
    return int(FLOPS / per_epoch * len(rows)) * TrainConfig.row_tokens


def unigram_entropy(shards: Shards) -> float:
    """In nats, of the corpus' pieces."""
    counts = np.bincount(shards.tokens, minlength=shards.vocab_size)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def show_guesses(shards: Shards, texts: int = 4, length: int = 40) -> None:
    """Beginnings of held-out documents, with every eighth piece masked, and what the model makes of them."""
    trained = open_run(OUT)
    tokenizer = trained.tokenizer
    long_enough = [i for i in shards.validation_documents if shards.offsets[i + 1] - shards.offsets[i] >= length]
    for i in long_enough[:: max(len(long_enough) // texts, 1)][:texts]:
        ids = shards.tokens[shards.offsets[i] : shards.offsets[i] + length].astype(np.int64)
        masked = list(range(6, length, 8))
        guesses = playground.guess(trained, ids, masked)
        hidden = ids.copy()
        hidden[masked] = playground.MASK
        print("\n" + "\n".join("  | " + line for line in tokenizer.decode(hidden).splitlines()))
        for place, best in zip(masked, guesses):
            shown = "  ".join(f"{piece!r} {probability:.0%}" for piece, probability in best)
            print(f"    {tokenizer.decode([ids[place]])!r:14} guessed: {shown}")
    print()


if __name__ == "__main__":
    main(sys.argv[1:])
