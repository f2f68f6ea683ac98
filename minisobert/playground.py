"""Try a model on a sentence: `python -m minisobert.playground RUN "for i in [MASK](10):"` prints its guesses."""

from __future__ import annotations

import numpy as np
import torch

from minisobert.cli import Parser, command
from minisobert.corpus.packing import SPECIALS
from minisobert.ops import Documents
from minisobert.training.run import Trained, open_run


@torch.no_grad()
def guess(trained: Trained, ids: np.ndarray, masked: list[int], best: int = 3) -> list[list[tuple[str, float]]]:
    """ids: (n,) of a text, without specials; masked: the places in it that the model must not see.

    Returns for each of those the `best` likeliest pieces, with their probabilities.
    """
    positions = trained.model.config.positions
    if len(ids) > positions - SPECIALS:
        raise ValueError(f"the text has {len(ids):,} tokens; the model reads up to {positions - SPECIALS:,}")
    if not 1 <= best <= trained.tokenizer.vocab_size:
        raise ValueError(f"--best is {best:,}; it must be from 1 to {trained.tokenizer.vocab_size:,}, the vocabulary")
    special = trained.tokenizer.vocabulary
    tokens = torch.tensor([special.cls, *ids.tolist(), special.sep])
    places = torch.tensor(masked) + 1
    tokens[places] = special.mask
    logits = trained.model(tokens, torch.arange(len(tokens)), Documents.from_bounds([0, len(tokens)]), places)
    # rows beyond the vocabulary are padding of the matrix: no text has them
    probabilities, pieces = logits[:, : trained.tokenizer.vocab_size].softmax(1).topk(best)
    return [
        [(trained.tokenizer.decode([piece]), p) for piece, p in zip(*row)]
        for row in zip(pieces.tolist(), probabilities.tolist())
    ]


def with_masks(trained: Trained, text: str) -> tuple[np.ndarray, list[int]]:
    """The ids of a text in which [MASK] stands for one piece each, and their places. ValueError where none stands.

    A piece begins with the space before it, so " [MASK]" is one: a space of its own before a word is nothing that a
    model has seen."""
    parts = text.replace(" [MASK]", "[MASK]").split("[MASK]")
    if len(parts) == 1:
        raise ValueError('the text has no [MASK]; write one where the model shall guess, as in "for i in [MASK](10):"')
    ids, places = [trained.tokenizer.encode(parts[0])], []
    for part in parts[1:]:
        places.append(sum(map(len, ids)))
        ids += [np.array([trained.tokenizer.vocabulary.mask]), trained.tokenizer.encode(part)]
    return np.concatenate(ids).astype(np.int64), places


@command("minisobert.playground")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="minisobert.playground", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a train.py run")
    parser.add_argument("text", nargs="+", metavar="TEXT", help="text with one or more [MASK]")
    parser.add_argument("--best", type=int, default=5, metavar="N", help="guesses to show for each [MASK] (default 5)")
    options = parser.parse_args(argv)
    trained = open_run(options.run)
    for text in options.text:
        print(text)
        for guesses in guess(trained, *with_masks(trained, text), best=options.best):
            print("   ", "   ".join(f"{piece!r} {p:.1%}" for piece, p in guesses))


if __name__ == "__main__":
    main()
