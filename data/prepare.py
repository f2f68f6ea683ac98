"""Turns dumps and texts into a tokenizer and shards: `python -m data.prepare --input site.7z --out data/prepared`.

The work is done in two passes, each by several processes. The first reads the documents and writes their text into one
spool file; the tokenizer is trained on a sample of it. The second encodes the spool. The result is the same, bit for
bit, for any number of processes.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback after Ctrl-C during the imports below

import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import decontamination, journal, processes, reading
from data.inputs import add_options, check, weighted, weights_of, with_sources
from data.journal import Journal
from data.processes import in_order
from data.spool import HELD_OUT, LEFT_OUT, SPOOL, TRAINING, Spool, remove, sides, size_of, texts_of
from minisobert.cli import Parser, command, printable
from minisobert.corpus import duplicates
from minisobert.corpus.dump import Site
from minisobert.corpus.packing import copies_in_epoch
from minisobert.corpus.shards import write_meta
from minisobert.corpus.sources import STDIN
from minisobert.corpus.texts import FEW, Reading
from minisobert.corpus.tokenizer import FIRST_ORDINARY_ID, Tokenizer, open_tokenizer, train
from minisobert.files import flush, new_folder
from minisobert.hashing import key, permutation_keys

TRAINING_TEXT = 100_000_000  # bytes of text, drawn from all documents, on which the tokenizer is trained
ABOUT = """\
It learns a tokenizer, encodes the documents with it, and holds some documents out to measure the loss on. Repeat the \
command to continue after an interruption."""
EXAMPLES = """\
python -m data.prepare --input texts.jsonl --text-key title body --out data/prepared
python -m data.prepare --input android.stackexchange.com.7z --min-score 1 --out data/android
python -m data.prepare --input texts.txt --tokenizer runs/base --out data/more
"""
BATCH = 1_000_000  # bytes of text that a process gets at a time


def prepare(
    inputs: list[str | Path],
    out: str | Path,
    *,
    vocab_size: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    min_score: int | None = None,
    kind: str = "all",
    tokenizer: str | Path | None = None,
    decontaminate: Sequence[str] = (),
    text_key: Sequence[str] = ("text",),
    document: str = "",
    skip_unreadable: bool = False,
    keep_duplicates: bool = False,
    near_duplicates: float | None = None,
    links: str = "drop",
    work: str | Path | None = None,
    fresh: bool = False,
) -> dict:
    """Writes the folder `out` and returns the content of its meta.json. `out` appears only when it is complete.

    inputs: paths; PATH=WEIGHT gives the documents of a path a weight, see `weighted`.
    vocab_size: number of pieces of the tokenizer to train (default: 50,000).
    workers: number of processes (default: one for each core that this process may use).
    kind: which posts of dumps to read: all, questions or answers.
    tokenizer: run, imported model or file whose tokenizer to use instead of training one.
    decontaminate: TASK=PATH; documents that contain a dev or test text of these files are left out.
    text_key, document, skip_unreadable: how to read text files, see `Reading`.
    keep_duplicates: leave out only those duplicates that are equal to held-out documents.
    near_duplicates: leave out documents that have at least this similarity to an earlier one.
    links: "keep" or "drop" the targets of links in posts.
    work: folder for temporary files (default: beside `out`).
    fresh: do not continue what a killed run of the same command left.

    Raises ValueError, with a message of one line, if anything is wrong with the input or the settings.
    """
    weighted_inputs = weighted(inputs)
    inputs = [one.path for one in weighted_inputs]
    if tokenizer is not None and vocab_size is not None:
        raise ValueError("--tokenizer has a vocabulary of its own; leave --vocab-size out")
    vocab_size = 50_000 if vocab_size is None else vocab_size
    _check_settings(vocab_size, workers, keep_duplicates, near_duplicates)
    with ExitStack() as stack:
        unfinished = stack.enter_context(new_folder(out, journal.NAME))  # before reading: it may be refused
        dropped: Counter = Counter()
        how_read = Reading(tuple(text_key), document, 1.0 if skip_unreadable else FEW)
        sources, total_bytes, notes = check(inputs, document, dropped)
        weighted_inputs = with_sources(weighted_inputs, sources)
        for note in notes:
            print(printable(f"note: {' '.join(note.split())}"), file=sys.stderr)
        given = None if tokenizer is None else open_tokenizer(tokenizer)
        texts = decontamination.read(decontaminate)
        asked = [vocab_size, seed, min_score, kind, decontaminate, text_key, document, skip_unreadable, keep_duplicates]
        files = [*inputs, *([tokenizer] if given else []), *(text.split("=", 1)[-1] for text in decontaminate)]
        weights = [one.weight for one in weighted_inputs]
        options = [*map(str, (*asked, near_duplicates, links, work, weights))]
        command = {"options": options, "files": [*map(journal.identity, files)]}
        done = Journal(unfinished, command, fresh or STDIN in inputs)
        temporary = stack.enter_context(journal.temporary(work and Path(work), Path(out), done))
        if "meta" in done.state:  # killed just before its end
            remove(temporary)
            return done.state["meta"]
        workers = processes.count(workers)
        if total_bytes is not None and not done.state:
            _expect(sources, total_bytes, workers, temporary, unfinished)
        pool = stack.enter_context(processes.pool(workers, reading.look_for, texts))
        run = partial(in_order, pool)
        spool = Spool(temporary)
        with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="read") as bar:
            how = {"kind": kind, "min_score": min_score, "run": run, "progress": bar.update}
            reading.read(sources, spool, dropped, how_read, links == "keep", done, **how)
        if not len(spool):
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)
            raise ValueError(f"no document in {', '.join(map(str, inputs))} (dropped: {reasons or 'nothing'})")
        side = _sides(spool, done, dropped, seed, keep_duplicates, near_duplicates, run)
        duplicates_of: Counter = Counter()
        for source, n in zip(sources, spool.counts(side == LEFT_OUT, len(sources))[2].tolist()):
            duplicates_of[source.name] += n
        if given is None and "tokenizer" not in done.state:
            sample = _sample(spool, side == TRAINING, seed)
            print(f"training the tokenizer on {size_of(sample) / 1e6:,.1f} MB of text …", file=sys.stderr)
            died = "the process that trains the tokenizer died, perhaps for lack of memory"
            tokenizer = Tokenizer(processes.call(_train, spool.texts, sample, vocab_size, died=died))
        else:
            tokenizer = given or open_tokenizer(unfinished)
        model = unfinished / tokenizer.file_name
        if "tokenizer" not in done.state:
            model.write_bytes(tokenizer.content)
            flush(model)
            done.enter("tokenizer", tokenizer.file_name)

        lengths, characters = _encode(spool, side, model, unfinished, run, done)
        n_posts, comments, _ = spool.counts(side != LEFT_OUT, len(sources))
        of_training = spool.column("source", side == TRAINING)
        meta = {
            "posts": n_posts,
            "comments": comments,
            "characters": characters,
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "vocab_size": tokenizer.vocab_size,
            "vocab_size_asked": tokenizer.vocab_size if given else vocab_size,
            **({} if isinstance(tokenizer, Tokenizer) else {"vocabulary": tokenizer.vocabulary._asdict()}),
            "dtype": tokenizer.dtype.name,
            "validation_documents": [int((side == TRAINING).sum()), len(lengths)],
            "dropped": {reason: n for reason, n in dropped.items() if n},
            "length_percentiles": {
                str(q): int(np.percentile(lengths, q, method="lower")) for q in (0, 5, 25, 50, 75, 95, 99, 100)
            },
            "seed": seed,
            "kind": kind,
            "min_score": min_score,
            **({"links": links} if links != "drop" else {}),
            **({"reading": how_read._asdict()} if how_read != Reading() else {}),
            "decontaminated": dict(texts.counts),
            "sources": [path.resolve().name for path in inputs],
            **weights_of(weighted_inputs, of_training, lengths),
            "notes": notes,
            **({"near_duplicates": near_duplicates} if near_duplicates is not None else {}),
            **({"duplicates": dict(+duplicates_of)} if +duplicates_of else {}),
        }
        write_meta(unfinished, **meta)
        flush(unfinished / "meta.json")
        done.enter("meta", meta)
        remove(temporary)
    return meta


def _check_settings(vocab_size: int, workers: int | None, keep: bool, threshold: float | None) -> None:
    least = FIRST_ORDINARY_ID + 256 + 1
    if vocab_size < least:
        raise ValueError(f"a vocabulary of {vocab_size} pieces is too small: the bytes alone need at least {least}")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1")
    if threshold is not None:
        if keep:
            raise ValueError("--keep-duplicates and --near-duplicates contradict each other; leave one of them out")
        duplicates.shape(threshold)  # raises ValueError for a threshold that cannot be used


def _expect(sources, total: int, workers: int, temporary: Path, out: Path) -> None:
    """Prints how much disk, memory and time the work will take. Raises ValueError if a disk has too little room.

    total: unpacked bytes. The ratios are those of real sites (benchmarks/results/scale.md; real code has fewer bytes
    per token than made-up words): 100 bytes of XML become 65 of temporary text and up to 45 of tokens.
    """
    tables = (table for site in sources if isinstance(site, Site) for table in (site.posts, site.comments))
    xml = sum(table.size for table in tables if table)
    going, staying = 0.65 * total + 0.35 * (total - xml), 0.45 * total + 0.2 * (total - xml)
    needs = [(temporary, going), (out, staying)]
    if os.stat(temporary).st_dev == os.stat(out).st_dev:
        needs = [(out, going + staying)]
    for folder, size in needs:
        if size > (free := shutil.disk_usage(folder).free):
            raise ValueError(
                f"about {_bytes(size)} of disk will be needed in {folder.parent}, which has {_bytes(free)} free; "
                "make room there or choose another --work or --out"
            )
    memory, minutes = 150e6 * (1 + workers) + total / 2_900 * 40, max(1, round(total / 5e6 / workers / 60))
    time = f"{minutes / 60:,.0f} hours" if minutes > 120 else f"{minutes} minute{'s' * (minutes > 1)}"
    print(
        f"{_bytes(total)} to read: expect about {_bytes(going + staying)} of disk, {_bytes(memory)} of memory and "
        f"{time} with {workers} process{'es' * (workers > 1)}",
        file=sys.stderr,
    )


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{max(1, round(number / 1e6))} MB"


def _sides(spool: Spool, done: Journal, dropped: Counter, *how) -> np.ndarray:
    """The result of `sides`, which is read from disk if the journal says that it is there."""
    path = spool.texts.with_name(f"{SPOOL}-sides")
    if "sides" not in done.state:
        side = sides(spool, *how[:-1], dropped, how[-1], BATCH)
        path.write_bytes(side.tobytes())
        flush(path)
        done.enter("sides", dict(dropped))
    dropped.clear()
    dropped.update(done.state["sides"])
    return np.fromfile(path, np.int8)


def _sample(spool: Spool, training: np.ndarray, seed: int) -> np.ndarray:
    """The spans of the documents to train the tokenizer on, in order: at most about TRAINING_TEXT bytes."""
    share = TRAINING_TEXT / sum(size_of(chunk["span"]) for chunk in spool.chunks(training))
    if share < 1:
        drawn = permutation_keys(int(training.sum()), key(seed, "tokenizer")) < share * 2**32
        training = training.copy()
        training[training] = drawn
    return spool.column("span", training)


def _train(texts: Path, sample: np.ndarray, vocab_size: int) -> bytes:
    return train(texts_of(texts, sample), vocab_size)


# The second pass: text → ids


def _encode(spool: Spool, side: np.ndarray, model: Path, out: Path, run, done: Journal) -> tuple[np.ndarray, int]:
    """Writes the ids of the documents and where each begins. Returns the length of each in tokens, (D,) int64, and the
    number of all characters. Held-out documents come last."""
    start = done.state.get("encode", {"parts": 0, "tokens": 0, "end": 0, "characters": 0})
    number, end, characters = start["parts"], start["end"], start["characters"]
    count = int((side != LEFT_OUT).sum())
    parts = (part for which in (TRAINING, HELD_OUT) for part in spool.parts(side == which, BATCH))
    total = sum(size_of(chunk["span"]) for chunk in spool.chunks(side != LEFT_OUT))
    # written by hand, since numpy does not report a full disk when it writes an array
    with open(out / "tokens.bin", "ab") as tokens, open(out / "documents.npy", "ab") as offsets:
        tokens.truncate(start["tokens"])
        offsets.truncate(start.get("offsets", 0))
        if not number:
            header = {"descr": "<i8", "fortran_order": False, "shape": (count + 1,)}
            np.lib.format.write_array_header_1_0(offsets, header)
            offsets.write(np.zeros(1, np.int64).tobytes())

        def state() -> dict:
            for file in (tokens, offsets):
                file.flush()
                os.fsync(file.fileno())
            sizes = {"tokens": tokens.seek(0, os.SEEK_END), "offsets": offsets.seek(0, os.SEEK_END)}
            return {"parts": number, "end": end, "characters": characters, **sizes}

        with tqdm(total=total, unit="B", unit_scale=True, desc="encode") as bar:
            bar.update(sum(map(size_of, islice(parts, number))))
            for (_, part, _), (content, counts, more) in run(_encode_part, ((spool.texts, x, model) for x in parts)):
                tokens.write(content)
                offsets.write((np.cumsum(counts, dtype=np.int64) + end).tobytes())
                number, end, characters = number + 1, end + sum(counts), characters + more
                bar.update(size_of(part))
                done.now_and_then("encode", state)
        done.enter("encode", state())
    _opened.cache_clear()
    return np.diff(np.load(out / "documents.npy")), characters


def _encode_part(task) -> tuple[bytes, list[int], int]:
    """In a worker: the ids of some documents, concatenated; the number of ids of each; the number of all characters."""
    file, spans, model = task
    tokenizer = _opened(model)
    texts = list(texts_of(file, spans))
    encoded = [tokenizer.encode_bytes(text) for text in texts]
    return b"".join(encoded), [len(ids) // tokenizer.dtype.itemsize for ids in encoded], sum(map(len, texts))


_opened = lru_cache(1)(open_tokenizer)


def table(meta: dict) -> str:
    """What was prepared, as a table for people."""
    counted = ("posts", "comments") if meta["posts"] else ()  # texts that are no dump have neither
    lines = [(name, f"{meta[name]:,}") for name in (*counted, "documents")]
    lines += [(f"dropped: {reason}", f"{n:,}") for reason, n in meta["dropped"].items()]
    lines += [(f"duplicates in {name}", f"{n:,}") for name, n in meta.get("duplicates", {}).items()]
    asked = meta["vocab_size_asked"]
    fewer = f" (of {asked:,} asked for: the text has no more to merge)" if meta["vocab_size"] < asked else ""
    first, last = meta["validation_documents"]
    lines += [
        ("characters", f"{meta['characters']:,}"),
        ("tokens", f"{meta['tokens']:,}"),
        ("characters per token", f"{meta['characters'] / meta['tokens']:.2f}"),
        ("vocabulary", f"{meta['vocab_size']:,}{fewer}"),
        ("tokens per document", ", ".join(f"{q} %: {n:,}" for q, n in meta["length_percentiles"].items())),
        ("validation documents", f"{last - first:,}"),
    ]
    for one in meta.get("weights", ()):
        there = one["documents"][1] - one["documents"][0]
        held = copies_in_epoch(there, one["weight"])
        lines.append((f"an epoch of {one['input']}", f"{held:,} documents: {there:,} of weight {one['weight']:g}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


@command("data.prepare", "repeat the command to continue, or give --fresh to start over")
def main(arguments: list[str] | None = None) -> int:
    parser = Parser("data.prepare", ABOUT, EXAMPLES)
    add_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must not exist yet")
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--vocab-size", type=int, metavar="N",
        help="number of pieces in the vocabulary that the tokenizer learns (default: 50,000)",
    )  # fmt: skip
    group.add_argument(
        "--tokenizer", metavar="PATH",
        help="use this tokenizer instead of learning one: a tokenizer.model or tokenizer.json, or the folder of a run, "
        "of prepared data or of an imported model",
    )  # fmt: skip
    group = parser.add_argument_group("documents to leave out")
    group.add_argument(
        "--decontaminate", nargs="+", default=[], metavar="TASK=PATH",
        help="leave out documents that contain a dev or test text of these files; TASK is one of finetune.py's tasks",
    )  # fmt: skip
    group.add_argument(
        "--near-duplicates", type=float, metavar="SHARE",
        help="leave out documents that have at least this share of their five-word runs in common with an earlier one, "
        "from 0.5 to 1 (default: leave out only documents that are equal except for white space)",
    )  # fmt: skip
    group.add_argument(
        "--keep-duplicates", action="store_true",
        help="keep equal documents; training still loses its copies of held-out ones",
    )  # fmt: skip
    group = parser.add_argument_group("how to run")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="random seed that picks the held-out documents")
    group.add_argument("--workers", type=int, metavar="N", help="number of processes (default: one per core)")
    group.add_argument(
        "--work", metavar="DIR",
        help="folder for temporary files, which take as much space as all the text (default: beside --out)",
    )  # fmt: skip
    group.add_argument(
        "--fresh", action="store_true", help="start over instead of continuing an interrupted run of this command"
    )
    options = parser.parse_args(arguments)
    meta = prepare(**vars(options))
    print(printable(f"{table(meta)}\nwritten to {options.out}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
