"""Preparing a dump, beside a plain pipeline: `python -m benchmarks.prepare --dump site.7z`.

The plain pipeline is what one would write first: ElementTree reads both files into memory, a dictionary joins the
comments, html.parser removes the tags, and SentencePiece encodes every document. Both sides read the same unpacked XML,
use the same trained tokenizer and write the ids to disk; neither trains. The sides alternate, and the fastest run of
each counts, as the least disturbed. The plain pipeline and a single worker are bound to one core, with all threads.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import sentencepiece

from benchmarks import machine, parser, show
from data.prepare import prepare
from minisobert.cli import table
from minisobert.corpus.dump import sites
from minisobert.corpus.posts import posts
from minisobert.corpus.tokenizer import train

BREAKS = {"p", "br", "div", "li", "ul", "ol", "pre", "blockquote", "h1", "h2", "h3", "tr"}


class _Text(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data):
        self.parts.append(data)

    def handle_starttag(self, tag, attributes):
        if tag in BREAKS:
            self.parts.append("\n")


def _plain_text(source: str) -> str:
    parser = _Text()
    parser.feed(source)
    parser.close()
    return "".join(parser.parts).strip()


def plain(dump: Path, out: Path, model: Path) -> int:
    """Runs the plain pipeline, and returns the number of documents."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    comments = defaultdict(list)
    if (dump / "Comments.xml").exists():
        for row in ElementTree.parse(dump / "Comments.xml").getroot():
            comments[row.get("PostId")].append(row.get("Text", ""))
    documents = []
    for row in ElementTree.parse(dump / "Posts.xml").getroot():
        if row.get("PostTypeId") in ("1", "2"):
            text = [row.get("Title", ""), _plain_text(row.get("Body", "")), *comments[row.get("Id")]]
            documents.append("\n\n".join(filter(None, text)))
    ids = [np.array(tokenizer.encode(document), np.uint16) for document in documents if document]
    np.concatenate(ids).tofile(out / "tokens.bin")
    np.save(out / "documents.npy", np.cumsum([len(part) for part in ids]))
    return len(ids)


def _unpack(dump: Path, folder: Path) -> Path:
    (site,), _ = sites([dump])
    for file_of_dump in filter(None, (site.posts, site.comments)):
        with file_of_dump.open() as stream, open(folder / file_of_dump.name, "wb") as file:
            while block := stream.read(1 << 20):
                file.write(block)
    return folder


def _timed(function) -> tuple[float, int]:
    start = time.perf_counter()
    documents = function()
    return time.perf_counter() - start, documents


def main() -> None:
    command = parser("prepare", "--dump android.stackexchange.com.7z")
    command.add_argument("--dump", type=Path, required=True, metavar="DUMP", help=".7z of a site, or its folder")
    command.add_argument(
        "--vocab-size", type=int, default=30_000, metavar="N", help="number of pieces in the vocabulary"
    )
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="number of runs of each side")
    options = command.parse_args()
    if not options.dump.exists():
        command.error(f"{options.dump} does not exist")
    cores = sorted(os.sched_getaffinity(0))
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  hides the bars of a dozen runs
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        (temporary / "xml").mkdir()
        dump = _unpack(options.dump, temporary / "xml") if options.dump.is_file() else options.dump
        (site,), _ = sites([dump])
        size = sum(table.size for table in (site.posts, site.comments) if table) / 1e6
        model = temporary / "tokenizer.model"
        texts = (entry.post.text() for entry in posts(site, temporary, Counter()))
        model.write_bytes(train(texts, options.vocab_size))

        def ours(workers: int, out: Path) -> int:
            return prepare([dump], out, workers=workers, tokenizer=model)["documents"]

        runs = {
            "plain, 1 core": (1, lambda out: (out.mkdir(), plain(dump, out, model))[1]),
            "data.prepare, 1 worker on 1 core": (1, lambda out: ours(1, out)),
            "data.prepare, 2 workers on 2 cores": (2, lambda out: ours(2, out)),
        }
        best, documents = dict.fromkeys(runs, float("inf")), {}
        for repeat in range(options.repeats):
            for number, (name, (count, run)) in enumerate(runs.items()):
                os.sched_setaffinity(0, cores[:count])
                seconds, documents[name] = _timed(lambda run=run, out=temporary / f"{repeat}-{number}": run(out))
                best[name] = min(best[name], seconds)
        os.sched_setaffinity(0, cores)
    if len(set(documents.values())) != 1:
        raise SystemExit(f"benchmarks.prepare: the two sides found different numbers of documents: {documents}")
    base = best["plain, 1 core"]
    lines = [
        "# Preparing a dump: read, join, HTML to text, encode, write",
        "",
        f"`python -m benchmarks.prepare`: {options.dump.name}, {size:.1f} MB of XML, {documents['plain, 1 core']:,} "
        f"documents, the same {options.vocab_size:,} pieces on both sides; best of {options.repeats} alternating runs.",
        machine("sentencepiece", "numpy") + ".",
        "",
        *table(
            ["", "seconds", "MB of XML/s", "ratio"],
            [[name, f"{s:.2f}", f"{size / s:.1f}", f"{base / s:.2f}"] for name, s in best.items()],
        ),
    ]
    show(lines, "prepare", options.write)


if __name__ == "__main__":
    main()
