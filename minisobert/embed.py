"""Vectors of texts, for search and clustering: `python -m minisobert.embed RUN posts.jsonl --out vectors.npy`."""

from __future__ import annotations

import numpy as np

from minisobert.cli import Parser, command
from minisobert.files import new_file
from minisobert.finetuning.apply import read
from minisobert.inference import load


@command("minisobert.embed", "nothing was written")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="minisobert.embed", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="run, --out of a finetune.py, or Hugging Face folder")
    parser.add_argument("file", metavar="FILE", help="text of each line of a .jsonl, or each line itself; - is stdin")
    parser.add_argument("--out", required=True, metavar="PATH", help="new .npy: a row for each text, in fp32")
    options = parser.parse_args(argv)
    with new_file(options.out, (".npy",)) as beside:
        vectors = load(options.model).embed(read(options.file))
        with open(beside, "wb") as file:
            np.save(file, vectors)
    print(f"{options.out}: {len(vectors):,} texts, {vectors.shape[1]:,} numbers each")


if __name__ == "__main__":
    main()
