"""Makes a Dataset of labelled examples: splits them, removes duplicates, and checks what every task needs."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from minisobert.hashing import key
from minisobert.tasks.dataset import Dataset, Example, Task
from minisobert.tasks.metrics import MANY

SHARE = 0.1  # of the questions, for dev and for test each, if no file is named so


class Labelled(NamedTuple):
    """An example before the split. thread: its question, which must not be in two splits. group: its class in the
    files; dev and test are drawn in equal shares from each."""

    thread: str
    split: str | None  # that in the name of its file; None if there is none
    example: Example
    group: int = 0


def dataset(
    task: Task, labels: Sequence[str], items: list[Labelled], seed: int, notes: list[str], cleaning: str = "",
    unit: str = "question", columns: tuple[str, ...] = (),
) -> Dataset:  # fmt: skip
    """Splits the examples as the names of their files say. Missing splits are taken from train: whole threads, class by
    class, those with the smallest hashes of (seed, question).

    Duplicates are removed, also if they differ in case and white space, except among the sentences of a published task
    whose files name the splits, since some are repeated there. A question that is in several splits stays in the first
    of test, dev and train.

    notes: what was done is appended. cleaning, columns: see Dataset. unit: what a thread is called. Raises ValueError
    for an empty split and, if the task defines the classes, for a class that train lacks.
    """
    own = {item.split for item in items}
    if None in own and len(own) > 1:
        names = ", ".join(sorted(own - {None}))
        raise ValueError(
            f"{task.name}: the names of some files say which split they are ({names}), and others do not; name all or "
            "none"
        )
    if own <= {"dev", "test"}:
        raise ValueError(f"{task.name}: nothing to train on: {' and '.join(sorted(own)) or 'no example'} was given")
    missing = [split for split in ("test", "dev") if split not in own]
    carved = _carve([item for item in items if item.split in (None, "train")], missing, seed)
    parts: dict[str, list[Labelled]] = {"test": [], "dev": [], "train": []}
    for item in items:
        parts[carved.get(item.thread, "train") if item.split in (None, "train") else item.split].append(item)
    if missing:
        notes.append(
            f"{' and '.join(missing)}: {SHARE:.0%} of the {unit}s each, taken from train by {unit}, seed {seed}"
        )
    if task.kind != "token" or task.own_classes or own == {None}:
        parts = _unique(parts, notes, unit)
    examples = {split: [item.example for item in part] for split, part in parts.items()}
    _check(task, labels, examples)
    return Dataset(task, tuple(labels), examples["train"], examples["dev"], examples["test"], notes, cleaning, columns)


def _carve(items: list[Labelled], missing: list[str], seed: int) -> dict[str, str]:
    """thread → split, for the threads that leave train."""
    threads: dict[str, int] = {}  # thread → the highest group that it holds
    for item in items:
        threads[item.thread] = max(item.group, threads.get(item.thread, 0))
    of_group: dict[int, list[str]] = {}
    for thread, group in threads.items():
        of_group.setdefault(group, []).append(thread)
    splits, due = {}, 0.0
    for drawn in of_group.values():
        drawn.sort(key=lambda thread: (key(seed, "split", zlib.crc32(thread.encode())), thread))
        most = (len(drawn) - 1) // max(len(missing), 1)
        count = min(most, max(1, round(SHARE * len(drawn))))
        if len(of_group) > MANY:  # one of each class could be most examples, so small classes take turns to give one
            due += SHARE * len(drawn)
            count, due = min(most, int(due + 1e-9)), due - int(due + 1e-9)
        for i, split in enumerate(missing):
            splits.update(dict.fromkeys(drawn[i * count : (i + 1) * count], split))
    return splits


def _unique(parts: dict[str, list[Labelled]], notes: list[str], unit: str) -> dict[str, list[Labelled]]:
    split_of: dict[str, str] = {}
    seen: dict[str, tuple] = {}  # text → class and number, or the classes of its words
    left_out: Counter = Counter()
    kept: dict[str, list[Labelled]] = {}
    for split, part in parts.items():
        kept[split] = []
        for item in part:
            text = fingerprint(item.example.text or " ".join(item.example.words))
            text += "\0" + fingerprint(item.example.other)
            label = item.example.tags or (item.example.label, item.example.value)
            if split_of.setdefault(item.thread, split) != split:
                left_out[f"of {split}, since their {unit} is in {split_of[item.thread]} too"] += 1
            elif text in seen:
                same = "the same" if seen[text] == label else "another"
                left_out[f"of {split}, a duplicate with {same} label"] += 1
            else:
                seen[text] = label
                kept[split].append(item)
    notes += [f"{count:,} left out {reason}" for reason, count in left_out.items()]
    return kept


def fingerprint(text: str) -> str:
    """A string that is equal for texts that differ only in case and white space."""
    return " ".join(text.split()).casefold()


def _check(task: Task, labels: Sequence[str], examples: dict[str, list[Example]]) -> None:
    for split, part in examples.items():
        if not part:
            raise ValueError(f"{task.name}: {split} is empty; there are too few examples, or all were left out")
    if task.own_classes:
        return
    there = Counter(tag for example in examples["train"] for tag in example.tags or (example.label,))
    absent = [name for i, name in enumerate(labels) if not there[i] and not name.startswith("I-")]
    if absent:
        found = ", ".join(f"{there[i]:,} {name}" for i, name in enumerate(labels) if there[i])
        raise ValueError(
            f"{task.name}: train holds no {', no '.join(absent)} (it holds {found}); add examples of every class"
        )
