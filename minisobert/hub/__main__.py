"""To and from Hugging Face's format.

python -m minisobert.hub export runs/base --out exported
python -m minisobert.hub import ModernBERT-base --out runs/modernbert
"""

from __future__ import annotations

from minisobert.cli import Parser, command
from minisobert.hub.export import export
from minisobert.hub.importing import import_run
from minisobert.hub.weights import FORMATS


@command("minisobert.hub", "nothing was written")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="minisobert.hub", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_export(commands)
    _add_import(commands)
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


def _add_import(commands) -> None:
    text = "make a run of a released model: for train.py --init, fine-tuning, and whatever else takes a run"
    parser = commands.add_parser("import", help=text, description=text, allow_abbrev=False)
    parser.add_argument("source", metavar="DIR", help="folder with a ModernBERT, a MegatronBert or an XLM-RoBERTa-XL")
    parser.add_argument("--out", required=True, metavar="RUN", help="folder to write; it must not exist")
    parser.set_defaults(run=_import)


def _import(options) -> None:
    import_run(options.source, options.out)
    print(f"{options.out}: go on from it with train.py --init, on data that data.prepare made with it as --tokenizer")


def _export(options) -> None:
    format = export(options.source, options.out, options.format, options.checkpoint)
    print(f"{options.out}: a {format}, with its tokenizer and a model card")


if __name__ == "__main__":
    main()
