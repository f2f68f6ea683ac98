"""The whole pipeline in a few minutes on two cores: `make demo`, or `make demo DUMP=path/to/site.7z`.

text → data.prepare → train.py → loss.png and guesses for masked words, all in runs/demo/. Without a dump the text is
the Python standard library's own. An earlier runs/demo takes the next free name, and its old one if this demo fails.
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
from minisobert import inference
from minisobert.cli import Parser, command, fail
from minisobert.config import PRESETS, RECIPES, TrainConfig
from minisobert.corpus.loader import Rows
from minisobert.corpus.shards import Shards, open_shards
from minisobert.plot import plot, read_metrics
from minisobert.training.meter import attention_pairs, training_flops
from minisobert.training.run import open_run

OUT = Path("runs/demo")
VOCAB_SIZE = 4_000
PRESET = "modern-tiny"
FLOPS = 42e12  # what two cores compute in about three minutes; how many tokens that buys depends on the documents
EXAMPLES = """\
python demo.py
python demo.py android.stackexchange.com.7z
"""
GREEN, RED, END = "\033[32m", "\033[31m", "\033[0m"


def main(argv: list[str] | None = None) -> None:
    about = f"Everything that it makes is in {OUT}. An earlier demo is kept, under another name."
    parser = Parser("demo.py", about, EXAMPLES, usages=["[DUMP]"])
    parser.add_argument(
        "dump", nargs="*", type=Path, metavar="DUMP",
        help="text to train on: a Stack Exchange dump, or any other input of data.prepare (default: the Python "
        "standard library)",
    )  # fmt: skip
    inputs = parser.parse_args(argv).dump
    if len(inputs) > 1:
        fail(f"demo.py: one dump at most, {len(inputs)} given; python -m data.prepare takes several")
    with command("demo.py", "the next one starts anew"):
        check(inputs)
        with earlier_aside():
            demo(inputs)


@contextmanager
def earlier_aside() -> Iterator[None]:
    """Creates OUT. An earlier OUT is moved to the next free name. If the block fails, it is moved back, and what the
    block made takes the next free name instead."""
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
            *("--data", str(OUT / "data"), "--out", str(OUT), "--preset", PRESET, "--train-tokens", str(tokens)),
            # one row per step: with so few tokens, the number of steps matters most
            *("--tokens-per-batch", "2048", "--micro-batch-rows", "1", "--eval-rows", "32"),
            *("--eval-every-tokens", str(tokens // 10), "--checkpoint-every-tokens", str(tokens // 2)),
        ]
    )
    if status:
        sys.exit(status)

    entropy = unigram_entropy(shards)
    last = read_metrics(OUT)[-1]
    held_out = last["validation_loss"]
    plot([OUT], OUT / "loss.png", entropy)
    show_guesses(shards)
    print(f"loss on held-out text: {held_out:.2f} nats; unigram entropy of the corpus: {entropy:.2f}, ", end="")
    print(f"which is what knowing each piece's frequency gives; the model is {entropy - held_out:.2f} better")
    print(f"of all pieces hidden in held-out text, its first guess is right for {last['validation_accuracy']:.0%}")
    print(f"look at {OUT / 'loss.png'}, or ask: .venv/bin/python -m minisobert.playground {OUT} 'for i in [MASK](10):'")


def affordable_tokens(shards: Shards) -> int:
    """The row positions that FLOPS are enough for, in whole rows."""
    rows = Rows(shards, shards.training_documents, 1, TrainConfig.row_tokens)
    lengths = rows.packing.chunk_length.astype(np.int64) + 2
    model = PRESETS[PRESET]
    per_epoch = training_flops(
        model,
        int(lengths.sum()),
        attention_pairs(model, lengths),
        masked=int(RECIPES[PRESET]["mask_rate"] * lengths.sum()),
    )
    return int(FLOPS / per_epoch * len(rows)) * TrainConfig.row_tokens


def unigram_entropy(shards: Shards) -> float:
    """The entropy of the corpus' pieces, in nats."""
    counts = np.bincount(shards.tokens, minlength=shards.vocab_size)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def show_guesses(shards: Shards, texts: int = 4, length: int = 40) -> None:
    """Prints the beginnings of some held-out documents, with the model's guess in place of every eighth piece."""
    trained = open_run(OUT)
    tokenizer, colour = trained.tokenizer, sys.stdout.isatty()
    long_enough = [i for i in shards.validation_documents if shards.offsets[i + 1] - shards.offsets[i] >= length]
    right = hidden = 0
    print(
        "\nHeld-out text. The model reads it with the bracketed pieces hidden, and its guesses stand in their places:"
    )
    print(f"{mark('right', True, 'right', colour)}, or {mark('wrong', False, 'right', colour)} with what was hidden.")
    for i in long_enough[:: max(len(long_enough) // texts, 1)][:texts]:
        ids = shards.tokens[shards.offsets[i] : shards.offsets[i] + length].astype(np.int64)
        masked = list(range(6, length, 8))
        text, start = "", 0
        for place, ((guess, _), *_) in zip(masked, inference.guess(trained, ids, masked, best=1)):
            truth = tokenizer.decode(ids[[place]])
            text += tokenizer.decode(ids[start:place]) + mark(guess, guess == truth, truth, colour)
            right, hidden, start = right + (guess == truth), hidden + 1, place + 1
        text += tokenizer.decode(ids[start:])
        print("\n" + "\n".join("    " + line for line in text.splitlines()))
    print(f"\n{right} of these {hidden} guesses are right.")


def mark(guess: str, right: bool, truth: str, colour: bool) -> str:
    """`[guess]`, or `[guess|truth]` if the guess is wrong; green and red on a terminal. Line breaks are shown as ⏎."""
    space = " " if truth.startswith(" ") else ""
    guess, truth = (piece.removeprefix(" ").replace("\n", "⏎") for piece in (guess, truth))
    inside = guess if right else f"{guess}|{truth}"
    return f"{space}{GREEN if right else RED}[{inside}]{END}" if colour else f"{space}[{inside}]"


if __name__ == "__main__":
    main()
