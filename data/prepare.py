"""From a dump, or from text, to a tokenizer and shards: `python -m data.prepare --input site.7z --out data/prepared`.

Two passes, each in a few processes. The first reads the documents and writes their text into one spool file, on which
the tokenizer is trained; the second encodes the spool. The result is the same, bit for bit, for any number of
processes.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends in no traceback

import multiprocessing
import os
import sys
import threading
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from data import decontamination
from data.decontamination import Texts
from data.inputs import check, documents
from minisobert.cli import Parser, command, printable
from minisobert.corpus.posts import KINDS, Post
from minisobert.corpus.shards import held_out, write_meta
from minisobert.corpus.tokenizer import FIRST_ORDINARY_ID, Tokenizer, open_tokenizer, train
from minisobert.files import new_folder
from minisobert.hashing import key, permutation_keys

TRAINING_TEXT = 100_000_000  # bytes of text, drawn from all documents, that the tokenizer is trained on
BATCH = 1_000_000  # characters (first pass) or bytes (second) that a process is given at a time
LOOK_AHEAD = 2 + 2 * (os.cpu_count() or 1)  # batches that are being worked on, or wait
_PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    links: str = "drop",
) -> dict:
    """Write the folder `out` and return the content of its meta.json.

    vocab_size: of the tokenizer that is trained; default 50,000. workers: processes; default: one for each core that
    this process may use. kind: all, questions or answers. tokenizer: of a run, an imported model or a file, to use in
    place of training one. decontaminate: TASK=PATH, each a task's files
    whose dev and test texts the corpus must not hold. links: "keep" for where those of posts lead, or "drop".
    Raises ValueError, in one line, for whatever is wrong with the
    input or the settings; `out` appears only when it is complete.
    """
    inputs = [Path(path) for path in inputs]
    if tokenizer is not None and vocab_size is not None:
        raise ValueError("--tokenizer has a vocabulary of its own; leave --vocab-size out")
    vocab_size = 50_000 if vocab_size is None else vocab_size
    _check_settings(vocab_size, workers)
    with ExitStack() as stack:
        work = stack.enter_context(new_folder(out))  # before anything is read: it may be refused
        sources, total_bytes, notes = check(inputs)
        for note in notes:
            print(printable(f"note: {' '.join(note.split())}"), file=sys.stderr)
        given = None if tokenizer is None else open_tokenizer(tokenizer)
        texts = decontamination.read(decontaminate)
        pool = stack.enter_context(_pool(workers, texts))
        spool = work / "spool"
        dropped: Counter = Counter()
        with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="read") as bar:
            found = documents(sources, work, dropped, kind=kind, min_score=min_score, progress=bar.update)
            index, counts = _write_spool(spool, _batches(found), dropped, pool, links == "keep")
        if not len(index):
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)
            raise ValueError(f"no document in {', '.join(map(str, inputs))} (dropped: {reasons or 'nothing'})")
        ends = index[:, 2]
        spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)  # (D, 2): from where to where in the spool
        last = held_out(index[:, 0], index[:, 1], seed)
        if given is None:
            sample = _sample(spans[~last], seed)
            size = int((sample[:, 1] - sample[:, 0]).sum())
            print(f"training the tokenizer on {size / 1e6:,.1f} MB of text …", file=sys.stderr)
            tokenizer = Tokenizer(_train(spool, sample, vocab_size))
        else:
            tokenizer = given
        model = work / tokenizer.file_name
        model.write_bytes(tokenizer.content)

        spans = np.concatenate([spans[~last], spans[last]])
        lengths = _encode(spool, spans, model, work / "tokens.bin", pool)
        spool.unlink()
        with open(work / "documents.npy", "wb") as file:  # numpy's own writing does not tell that a disk is full
            np.save(SimpleNamespace(write=file.write), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        meta = {
            **counts,
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "vocab_size": tokenizer.vocab_size,
            "vocab_size_asked": tokenizer.vocab_size if given else vocab_size,
            **({} if isinstance(tokenizer, Tokenizer) else {"vocabulary": tokenizer.vocabulary._asdict()}),
            "dtype": tokenizer.dtype.name,
            "validation_documents": [len(lengths) - int(last.sum()), len(lengths)],
            "dropped": {reason: n for reason, n in dropped.items() if n},
            "length_percentiles": {
                str(q): int(np.percentile(lengths, q, method="lower")) for q in (0, 5, 25, 50, 75, 95, 99, 100)
            },
            "seed": seed,
            "kind": kind,
            "min_score": min_score,
            **({"links": links} if links != "drop" else {}),
            "decontaminated": dict(texts.counts),
            "sources": [path.resolve().name for path in inputs],
            "notes": notes,
        }
        write_meta(work, **meta)
    return meta


def _check_settings(vocab_size: int, workers: int | None) -> None:
    least = FIRST_ORDINARY_ID + 256 + 1
    if vocab_size < least:
        raise ValueError(f"a vocabulary of {vocab_size} pieces is too small: the bytes alone need at least {least}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: at least one process is needed")


@contextmanager
def _pool(workers: int | None, texts: Texts) -> Iterator[ProcessPoolExecutor | None]:
    """The processes; None for a single one, where everything runs in this process. texts: not to be in a document."""
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers == 1:
        _look_for(texts)
        yield None
        return
    pool = ProcessPoolExecutor(workers, _PROCESSES, _begin_worker, (texts,))
    try:
        with _undisturbed():
            pool.submit(int)  # starts them all, before there are threads that a fork could catch in the wrong moment
        yield pool
    except BrokenProcessPool:
        raise ValueError("a worker process died, perhaps for lack of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Processes that start in this block get signals only when `_begin_process` has said what to do about them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_process() -> None:
    """In a new process: leaves Ctrl-C to the parent, and ends when the parent does, be it by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _begin_worker(texts: Texts) -> None:
    _begin_process()
    _look_for(texts)


def _look_for(texts: Texts) -> None:
    global _unwanted  # in each process once: too large to go along with every batch
    _unwanted = texts


def _in_order(pool, function, items) -> Iterator:
    """(item, function(item)) in order, computed by the pool a few items ahead: `items` may be endless."""
    if pool is None:
        for item in items:
            yield item, function(item)
        return
    waiting: deque = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > LOOK_AHEAD:
            item, future = waiting.popleft()
            yield item, future.result()
    for item, future in waiting:
        yield item, future.result()


# The first pass: documents → text


def _batches(found: Iterator[tuple[int, int, Post | str]]) -> Iterator[list[tuple[int, int, Post | str]]]:
    batch, size = [], 0
    for item in found:
        batch.append(item)
        size += sum(map(len, _strings(item[2])))
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _strings(document: Post | str) -> list[str]:
    return [document] if isinstance(document, str) else [document.title, document.body, *document.comments]


def _render(batch, links: bool = False) -> tuple[bytes, list[int], list[str | None], int]:
    """In a worker: the texts in one piece, the bytes of each, the task of a text it holds, and all characters."""
    found = [document if isinstance(document, str) else document.text(links) for *_, document in batch]
    tasks = [_unwanted.task_of(text) for text in found]
    found = ["" if task else text for text, task in zip(found, tasks)]
    encoded = [text.encode() for text in found]
    return b"".join(encoded), [len(text) for text in encoded], tasks, sum(map(len, found))


def _write_spool(spool: Path, batches, dropped: Counter, pool, links: bool) -> tuple[np.ndarray, dict[str, int]]:
    """The text of all documents into one file. Returns (D, 3) int64, the source, thread and end of each; and counts."""
    index = array("q")
    counts = {"posts": 0, "comments": 0, "characters": 0}
    end = 0
    with open(spool, "wb") as file:
        for batch, (content, sizes, tasks, characters) in _in_order(
            pool, partial(_render, links=True) if links else _render, batches
        ):
            file.write(content)
            counts["characters"] += characters
            for (source, thread, document), size, task in zip(batch, sizes, tasks):
                comments = len(document.comments) if isinstance(document, Post) else 0
                if size == 0:
                    dropped[f"with a text of {task}'s dev or test" if task else "empty"] += 1
                    dropped["comments of dropped posts"] += comments
                    continue
                end += size
                index.extend((source, thread, end))
                counts["posts"] += isinstance(document, Post)
                counts["comments"] += comments
    return np.array(index, np.int64).reshape(-1, 3), counts


def _sample(spans: np.ndarray, seed: int) -> np.ndarray:
    """The spans of the documents to train the tokenizer on, in order, about TRAINING_TEXT bytes at most."""
    share = TRAINING_TEXT / int((spans[:, 1] - spans[:, 0]).sum())
    if share >= 1:
        return spans
    return spans[permutation_keys(len(spans), key(seed, "tokenizer")) < share * 2**32]


def _texts(spool: Path, spans: np.ndarray) -> Iterator[str]:
    with open(spool, "rb") as file:
        for start, end in spans.tolist():
            file.seek(start)
            yield file.read(end - start).decode()


def _train(spool: Path, sample: np.ndarray, vocab_size: int) -> bytes:
    """The tokenizer, from a process of its own: it takes minutes in C++, in which this one could not be interrupted."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_train_and_send, args=(sender, spool, sample, vocab_size), daemon=True)
    with _undisturbed():
        process.start()
    sender.close()  # or the end of the process would not be the end of the pipe
    try:
        trained = receiver.recv()
    except EOFError:
        raise ValueError("the process that trains the tokenizer died, perhaps for lack of memory") from None
    finally:
        process.kill()
        process.join()
    if isinstance(trained, Exception):
        raise trained
    return trained


def _train_and_send(sender: Connection, spool: Path, sample: np.ndarray, vocab_size: int) -> None:
    _begin_process()
    try:
        sender.send(train(_texts(spool, sample), vocab_size))
    except Exception as error:
        sender.send(error)


# The second pass: text → ids


def _encode(spool: Path, spans: np.ndarray, model: Path, out: Path, pool) -> np.ndarray:
    """Write the ids of these documents; returns the length of each in tokens, (D,) int64."""
    sizes = np.cumsum(spans[:, 1] - spans[:, 0])
    cuts = np.searchsorted(sizes, np.arange(BATCH, sizes[-1], BATCH))
    tasks = ((spool, part, model) for part in np.split(spans, np.unique(cuts)) if len(part))
    lengths = array("q")
    with open(out, "wb") as file, tqdm(total=int(sizes[-1]), unit="B", unit_scale=True, desc="encode") as bar:
        for (_, part, _), (content, counts) in _in_order(pool, _encode_part, tasks):
            file.write(content)
            lengths.extend(counts)
            bar.update(int((part[:, 1] - part[:, 0]).sum()))
    _opened.cache_clear()
    return np.frombuffer(lengths, np.int64)


def _encode_part(task) -> tuple[bytes, list[int]]:
    """In a worker: the ids of some documents in one piece, and how many each has."""
    spool, spans, model = task
    tokenizer = _opened(model)
    encoded = [tokenizer.encode_bytes(text) for text in _texts(spool, spans)]
    return b"".join(encoded), [len(ids) // tokenizer.dtype.itemsize for ids in encoded]


_opened = lru_cache(1)(open_tokenizer)


def table(meta: dict) -> str:
    """What was prepared, for a person."""
    lines = [(name, f"{meta[name]:,}") for name in ("posts", "comments", "documents")]
    lines += [(f"dropped: {reason}", f"{n:,}") for reason, n in meta["dropped"].items()]
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
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


@command("data.prepare", "nothing was written")
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="data.prepare", description="Make a tokenizer and shards from a dump or from text.")
    kinds = ".7z of sites or of tables, folder of these or with Posts.xml and Comments.xml, .jsonl, .txt (.gz, .xz)"
    parser.add_argument("--input", nargs="+", required=True, dest="inputs", metavar="PATH", help=kinds)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must not exist yet")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="size of the vocabulary that the tokenizer learns (default 50000)"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH",
        help="encode with this one in place of learning one: a tokenizer.model or tokenizer.json, or the folder of a "
        "run, of other shards or of an imported model",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="number of processes (default: one per core)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed that chooses the held-out threads")
    parser.add_argument("--min-score", type=int, metavar="N", help="leave out posts with a score below N")
    which = "which posts to read, each with its comments (default %(default)s)"
    parser.add_argument("--posts", choices=KINDS, default="all", dest="kind", help=which)
    what = "whether to write where the links of posts lead, as Markdown does: [text](target) (default %(default)s)"
    parser.add_argument("--links", choices=("drop", "keep"), default="drop", help=what)
    parser.add_argument(
        "--decontaminate", nargs="+", default=[], metavar="TASK=PATH",
        help="leave out documents with a dev or test text of these files of finetune.py's tasks",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    meta = prepare(**vars(options))
    print(printable(f"{table(meta)}\nwritten to {options.out}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
