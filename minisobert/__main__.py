"""`python -m minisobert` lists the commands."""

from __future__ import annotations

from minisobert.cli import Parser, command
from minisobert.commands import COMMANDS, typed

CLOSING = """\
Each explains its options with --help. Run train.py, finetune.py, demo.py, data.* and benchmarks.*
in the folder of the repository.

example: from a file of your own texts, one on each line, to a model and its guesses
  python -m data.prepare --input texts.txt --out data/mine
  python train.py --data data/mine --preset modern-small --train-tokens 1e9 --out runs/mine
  python -m minisobert.playground runs/mine "How do I [MASK] a list?"
"""


@command("minisobert")
def main(argv: list[str] | None = None) -> None:
    Parser("minisobert", "List the commands.", "python -m minisobert").parse_args(argv)
    width = max(len(typed(name)) for commands in COMMANDS.values() for name in commands)
    for heading, commands in COMMANDS.items():
        print(f"{heading}:")
        for name, sentence in commands.items():
            print(f"  {typed(name):{width}}  {sentence}")
        print()
    print(CLOSING, end="")


if __name__ == "__main__":
    main()
