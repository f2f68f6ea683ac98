"""Models of ours for Hugging Face's libraries: `python -m minisobert.hub export RUN --out DIR`."""

from __future__ import annotations

from minisobert.cli import Parser, command
from minisobert.hub.export import export
from minisobert.hub.weights import FORMATS


@command("minisobert.hub", "nothing was written")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="minisobert.hub", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_export(commands)
    options = parser.parse_args(argv)
    options.run(options)


def _add_export(commands) -> None:
    text = "write a trained model as a folder that transformers and sentence-transformers load"
    parser = commands.add_parser("export", help=text, description=text, allow_abbrev=False)
    parser.add_argument("source", metavar="RUN", help="folder of a train.py run, or of a finetune.py that trained one")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must not exist")
    parser.add_argument(
        "--as", dest="format", default="", choices=FORMATS,
        help="their architecture (default modernbert, and xlm-roberta-xl for the paper's, which is megatron-bert too)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", default="", metavar="NAME",
        help="of a run: last (default), best (the lowest held-out loss) or step-N",
    )  # fmt: skip
    parser.set_defaults(run=_export)


def _export(options) -> None:
    format = export(options.source, options.out, options.format, options.checkpoint)
    print(f"{options.out}: a {format}, with its tokenizer and a model card")


if __name__ == "__main__":
    main()
