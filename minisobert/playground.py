"""Try a model on a sentence: `python -m minisobert.playground RUN "for i in [MASK](10):"` prints its guesses."""

from __future__ import annotations

from minisobert.cli import Parser, command
from minisobert.inference import load


@command("minisobert.playground")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="minisobert.playground", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run of train.py, or folder in Hugging Face's format")
    parser.add_argument("text", nargs="+", metavar="TEXT", help="text with one or more [MASK]")
    parser.add_argument("--best", type=int, default=5, metavar="N", help="guesses to show for each [MASK] (default 5)")
    options = parser.parse_args(argv)
    model = load(options.run)
    for text in options.text:
        print(text)
        for guesses in model.fill_mask(text, options.best):
            print("   ", "   ".join(f"{piece!r} {p:.1%}" for piece, p in guesses))


if __name__ == "__main__":
    main()
