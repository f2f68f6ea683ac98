"""Vectors of texts, for search and clustering: `python -m minisobert.embed RUN posts.jsonl --out vectors.npy`."""

from __future__ import annotations

import numpy as np

from minisobert.cli import Parser, command
from minisobert.files import new_file
from minisobert.finetuning.apply import read
from minisobert.inference import load


@command("minisobert.embed", "nothing was written")
def main(argv: list[str] | None = None) -> None:
    about = "The vectors serve search and clustering. To search well, a model needs finetune.py --task pairs first."
    parser = Parser("minisobert.embed", about, "python -m minisobert.embed runs/base posts.jsonl --out vectors.npy")
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a train.py run, of a finetune.py result, or of a Hugging Face model"
    )
    parser.add_argument(
        "file", metavar="FILE",
        help="texts: a .jsonl or a table with a column `text`, or a text on each line; - is standard input",
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="new .npy file, with a row of numbers for each text"
    )
    options = parser.parse_args(argv)
    with new_file(options.out, (".npy",)) as beside:
        vectors = load(options.model).embed(read(options.file))
        with open(beside, "wb") as file:
            np.save(file, vectors)
    print(f"{options.out}: {len(vectors):,} texts, {vectors.shape[1]:,} numbers each")


if __name__ == "__main__":
    main()
