"""Vectors of texts, for search and clustering: `python -m minisobert.embed RUN posts.jsonl --out vectors.npy`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minisobert.cli import Parser, command
from minisobert.finetuning.apply import read
from minisobert.inference import load


@command("minisobert.embed", "nothing was written")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="minisobert.embed", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="run, --out of a finetune.py, or Hugging Face folder")
    parser.add_argument("file", metavar="FILE", help="text of each line of a .jsonl, or each line itself; - is stdin")
    parser.add_argument("--out", required=True, metavar="PATH", help="new .npy: a row for each text, in fp32")
    options = parser.parse_args(argv)
    out = Path(options.out)
    if out.suffix != ".npy" or out.exists():
        raise ValueError(f"--out is {out}; choose a new file whose name ends in .npy")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: {out.absolute().parent} is no folder; make it first")
    vectors = load(options.model).embed(read(options.file))
    beside = out.with_name(f".{out.name}.unfinished")
    with open(beside, "wb") as file:
        np.save(file, vectors)
    beside.replace(out)
    print(f"{out}: {len(vectors):,} texts, {vectors.shape[1]:,} numbers each")


if __name__ == "__main__":
    main()
