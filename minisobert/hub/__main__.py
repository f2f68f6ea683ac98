"""Converts models to and from Hugging Face's format: `python -m minisobert.hub export` and `import`."""

from __future__ import annotations

from minisobert.cli import Parser, command
from minisobert.commands import sentence
from minisobert.hub.export import export
from minisobert.hub.importing import import_run
from minisobert.hub.weights import FORMATS

EXPORT = "python -m minisobert.hub export runs/base --out runs/base-hf"
IMPORT = "python -m minisobert.hub import ModernBERT-base --out runs/modernbert"


@command("minisobert.hub", "nothing was written")
def main(argv: list[str] | None = None) -> None:
    about = "Exchange models with Hugging Face. Each command has its own --help."
    parser = Parser("minisobert.hub", about, f"{EXPORT}\n{IMPORT}", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    _add_export(commands)
    _add_import(commands)
    options = parser.parse_args(argv)
    options.run(options)


def _add_export(commands) -> None:
    about = "The folder holds weights, a tokenizer and a model card. sentence-transformers loads it too."
    parser = commands.add_parser(
        "export", help=sentence("minisobert.hub export"), description=about, examples=EXPORT, allow_abbrev=False
    )
    parser.add_argument("source", metavar="RUN", help="folder of a train.py run, or of the result of a finetune.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must not exist yet")
    parser.add_argument(
        "--as", dest="format", default="", choices=FORMATS,
        help="architecture in transformers: modernbert for models of modern presets, and xlm-roberta-xl or "
        "megatron-bert for the others (default: modernbert or xlm-roberta-xl)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", default="", metavar="NAME",
        help="checkpoint of the run: last, best (which has the lowest held-out loss) or step-N (default: last)",
    )  # fmt: skip
    parser.set_defaults(run=_export)


def _add_import(commands) -> None:
    about = "Give the run to train.py as --init, or to any other command that takes a run."
    parser = commands.add_parser(
        "import", help=sentence("minisobert.hub import"), description=about, examples=IMPORT, allow_abbrev=False
    )
    parser.add_argument(
        "source", metavar="DIR", help="downloaded folder of a ModernBERT, MegatronBERT or XLM-RoBERTa-XL model"
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="folder to write; it must not exist yet")
    parser.set_defaults(run=_import)


def _import(options) -> None:
    import_run(options.source, options.out)
    print(f"{options.out}: continue it with train.py --init, on data that data.prepare made with it as --tokenizer")


def _export(options) -> None:
    format = export(options.source, options.out, options.format, options.checkpoint)
    print(f"{options.out}: a {format}, with its tokenizer and a model card")


if __name__ == "__main__":
    main()
