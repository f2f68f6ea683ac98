"""Shards: a tokenised corpus on disk, in one folder of four files (the format is described in data/README.md).

    tokens.bin       the ids of all documents, one after the other, little-endian uint16 (uint32 past 65,536 pieces)
    documents.npy    (D+1,) int64, the offset in tokens at which each document starts; the last is the total
    tokenizer.model  the SentencePiece model that made the ids; or the tokenizer.json of another model
    meta.json        counts, vocabulary, seed, sources, the held-out documents, size and checksum of the other three;
                     its last line but one is the checksum of the file without that line

Held-out documents come last, so that training and validation are two ranges.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from minisobert.cli import printable
from minisobert.corpus.tokenizer import (
    TOKENIZER_FILES,
    Tokenizer,
    Vocabulary,
    open_tokenizer,
    our_vocabulary,
    token_dtype,
)
from minisobert.files import sha256
from minisobert.hashing import key, mix

FORMAT = 1
FILES = ("tokens.bin", "documents.npy")  # and one of TOKENIZER_FILES
HELD_OUT, MOST_HELD_OUT = 0.05, 10_000  # of the question threads, as a share and a number
_SCAN = 1 << 24  # tokens scanned at a time
_CHECKSUM = ',\n "sha256": "{}"\n}}\n'  # how meta.json ends, in place of "\n}\n"


@dataclass(frozen=True)
class Shards:
    """An opened corpus. `tokens[offsets[i]:offsets[i + 1]]` is document i, without [CLS] and [SEP]."""

    folder: Path
    meta: dict
    tokens: np.ndarray  # (tokens,) a read-only memory map
    offsets: np.ndarray  # (documents + 1,) int64

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    @property
    def vocabulary(self) -> Vocabulary:
        """It is in meta.json if the tokenizer is another model's."""
        theirs = self.meta.get("vocabulary")
        return Vocabulary(**theirs) if theirs else our_vocabulary(self.vocab_size)

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / _tokenizer_file(self.meta)

    @property
    def training_documents(self) -> range:
        return range(self.meta["validation_documents"][0])

    @property
    def validation_documents(self) -> range:
        return range(*self.meta["validation_documents"])

    @property
    def weights(self) -> list[tuple[range, float]]:
        """(training documents, weight) of each input, in order; empty if all weights are 1."""
        return [(range(*one["documents"]), one["weight"]) for one in self.meta.get("weights", ())]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the corpus that a checkpoint was made on: it changes with any byte of the three files and with the
        weights, and with nothing else."""
        checksums = "".join(self.meta["files"][name]["sha256"] for name in (*FILES, self.tokenizer_file.name))
        weights = "".join(f" {r.start} {r.stop} {float(weight)!r}" for r, weight in self.weights)
        return hashlib.sha256((checksums + weights).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.tokenizer_file)


def open_shards(folder: str | Path, verify: bool = False) -> Shards:
    """Opens and checks a corpus: sizes of files, offsets, that every id is in the vocabulary, the tokenizer's checksum.

    verify: also computes every checksum, that of meta.json included; if an older version wrote none there, a line on
    standard error says so. Raises ValueError, in one line, for the first thing that is wrong.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file; --data takes a folder that data.prepare makes of it: "
            f"python -m data.prepare --input {folder} --out data/prepared"
        )
    if not (folder / "meta.json").is_file():
        raise ValueError(
            f"{folder} holds no prepared data (no meta.json); make it with: "
            f"python -m data.prepare --input path/to/site.7z --out {folder}"
        )
    meta = read_meta(folder / "meta.json")
    if verify:
        _verify_meta(folder / "meta.json", meta)
    tokenizer_file = _tokenizer_file(meta)
    for name in (*FILES, tokenizer_file):
        path, expected = folder / name, meta["files"][name]
        if not path.is_file():
            raise ValueError(f"{path} is missing; prepare the data again")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise ValueError(f"{path} has {size:,} bytes, meta.json says {expected['bytes']:,}; prepare the data again")
        if (verify or name == tokenizer_file) and sha256(path) != expected["sha256"]:
            raise ValueError(f"{path} is not the file that meta.json describes (checksum); prepare the data again")

    dtype, tokens_bytes = token_dtype(meta["vocab_size"]), meta["files"]["tokens.bin"]["bytes"]
    if tokens_bytes != meta["tokens"] * dtype.itemsize:
        raise ValueError(
            f"{folder / 'tokens.bin'} has {tokens_bytes:,} bytes, {meta['tokens']:,} tokens of {dtype} need "
            f"{meta['tokens'] * dtype.itemsize:,}; prepare the data again"
        )
    try:
        offsets = np.load(folder / "documents.npy", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{folder / 'documents.npy'} cannot be read ({error}); prepare the data again") from None
    if offsets.dtype != np.int64 or offsets.shape != (meta["documents"] + 1,):
        raise ValueError(
            f"{folder / 'documents.npy'} holds {offsets.dtype} {offsets.shape}, expected int64 "
            f"({meta['documents'] + 1},); prepare the data again"
        )
    if offsets[0] != 0 or offsets[-1] != meta["tokens"] or (np.diff(offsets) <= 0).any():
        raise ValueError(
            f"{folder / 'documents.npy'}: offsets do not increase from 0 to {meta['tokens']:,}; prepare the data again"
        )
    tokens = np.memmap(folder / "tokens.bin", dtype, mode="r")
    for start in range(0, len(tokens), _SCAN):
        if (largest := int(tokens[start : start + _SCAN].max())) >= meta["vocab_size"]:
            raise ValueError(
                f"{folder / 'tokens.bin'} holds the id {largest}, the vocabulary has {meta['vocab_size']}; "
                "prepare the data again"
            )
    shards = Shards(folder, meta, tokens, offsets)
    tokenizer = shards.tokenizer()
    if (pieces := tokenizer.vocab_size) != meta["vocab_size"]:
        raise ValueError(
            f"{shards.tokenizer_file} has {pieces} pieces, meta.json says {meta['vocab_size']}; prepare the data again"
        )
    if tokenizer.vocabulary != shards.vocabulary:
        raise ValueError(f"{shards.tokenizer_file} has other special ids than meta.json says; prepare the data again")
    return shards


def read_meta(path: Path) -> dict:
    """The content of meta.json, with what `open_shards` relies on checked. Raises ValueError if it is damaged."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"{path} has format {meta['format']}, this version reads {FORMAT}; prepare the data again")
        counts = [meta["documents"], meta["tokens"], meta["vocab_size"], *meta["validation_documents"]]
        counts += Vocabulary(**meta.get("vocabulary", our_vocabulary(0)._asdict()))
        files = [meta["files"][name] for name in (*FILES, _tokenizer_file(meta))]
        counts += [file["bytes"] for file in files]
        checksums = [file["sha256"] for file in files]
        sound = _are_sound(meta["weights"], meta["validation_documents"][0]) if "weights" in meta else True
    except (KeyError, IndexError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the data again") from None
    first, last = meta["validation_documents"]
    sound &= all(type(n) is int and n >= 0 for n in counts) and all(type(sha) is str for sha in checksums)
    if not (sound and meta["tokens"] > 0 and first <= last == meta["documents"]):
        raise ValueError(f"{path} is damaged: its counts contradict each other; prepare the data again")
    return meta


def _are_sound(weights: list[dict], training: int) -> bool:
    """Whether the inputs' documents follow one another up to the last one for training, and weights are valid."""
    end = 0
    for one in weights:
        start, stop, weight = one["documents"][0], one["documents"][1], one["weight"]
        whole = all(type(n) is int for n in (start, stop, one["tokens"])) and type(one["input"]) is str
        if not (whole and start == end <= stop and 0 < weight < math.inf):
            return False
        end = stop
    return end == training


def _verify_meta(path: Path, meta: dict) -> None:
    """Raises ValueError if meta.json is not as it was written, to the byte."""
    if list(meta)[-1] == "files":  # no checksum follows; a damaged letter in the checksum's name cannot look like this
        if int(os.environ.get("RANK", 0)) == 0:
            what = "was made by an earlier version and has no checksum of its own"
            print(printable(f"{path} {what}: --verify has checked the other files against it"), file=sys.stderr)
        return
    content = path.read_bytes()
    found = content[: -len(_CHECKSUM.format("0" * 64))] + b"\n}\n"
    if content != found[:-3] + _CHECKSUM.format(hashlib.sha256(found).hexdigest()).encode():
        raise ValueError(f"{path} is not as it was written (checksum); prepare the data again")


def _tokenizer_file(meta: dict) -> str:
    return next((name for name in TOKENIZER_FILES if name in meta["files"]), TOKENIZER_FILES[0])


def held_out(source: np.ndarray, thread: np.ndarray, seed: int) -> np.ndarray:
    """(D,) bool: the documents of the held-out threads, those with the smallest hashes of (seed, source, thread).

    source, thread: (D,) integers; equal in both means the same thread. If there is only one thread, nothing is held
    out. Takes at most 30 bytes of memory a document if `source` increases, as it does for documents in the order of
    their sources.
    """
    if (source[1:] < source[:-1]).any():
        order = np.argsort(source, kind="stable")
        found = np.zeros(len(source), bool)
        found[order] = held_out(source[order], thread[order], seed)
        return found
    bounds = [0, *(np.flatnonzero(source[1:] != source[:-1]) + 1).tolist(), len(source)]
    smallest = np.zeros(0, [("hash", "u4"), ("source", "i8"), ("thread", "i8")])
    count = 0
    for begin, stop in pairwise(bounds):
        threads = np.sort(thread[begin:stop])
        threads = threads[np.append(True, threads[1:] != threads[:-1])]
        count += len(threads)
        for at in range(0, len(threads), _SCAN >> 4):  # a million at a time
            some = threads[at : at + (_SCAN >> 4)].astype(np.int64)
            more = np.zeros(len(some), smallest.dtype)
            more["source"], more["thread"] = source[begin], some
            more["hash"] = mix(key(seed, "validation"), more["source"], some, some >> 32)
            smallest = np.concatenate([smallest, more])
            smallest = smallest[np.argsort(smallest["hash"], kind="stable")[:MOST_HELD_OUT]]
    smallest = smallest[: min(max(1, round(HELD_OUT * count)), MOST_HELD_OUT, count - 1)]
    found = np.zeros(len(source), bool)
    for begin, stop in pairwise(bounds):
        chosen = np.sort(smallest["thread"][smallest["source"] == source[begin]])
        for at in range(begin, stop if len(chosen) else begin, _SCAN >> 4):
            some = thread[at : min(at + (_SCAN >> 4), stop)]
            place = np.searchsorted(chosen, some).clip(max=len(chosen) - 1)
            found[at : at + len(some)] = chosen[place] == some
    return found


def write_meta(folder: Path, **meta) -> None:
    """Writes meta.json for the other three files, which must be in place. The keywords go in as they are."""
    files = {}
    for name in (*FILES, *(name for name in TOKENIZER_FILES if (folder / name).exists())):
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    text = json.dumps({"format": FORMAT, **meta, "files": files}, indent=1, ensure_ascii=False) + "\n"
    checksum = hashlib.sha256(text.encode()).hexdigest()
    text = text.removesuffix("\n}\n") + _CHECKSUM.format(checksum)
    (folder / "meta.json").write_bytes(text.encode())
