"""What every downstream task hands to training: labelled examples in three splits, and what was left out of them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """A post with a class, or a sentence with a class for each word."""

    id: str
    text: str = ""  # of a sequence task
    label: int = 0  # of a sequence task: index into Dataset.labels
    words: tuple[str, ...] = ()  # of a token task
    tags: tuple[int, ...] = ()  # of a token task: for each word an index into Dataset.labels


@dataclass(frozen=True)
class Dataset:
    """kind: "sequence" (labels are classes) or "token" (labels are BIO tags, "O" first). cleaning: the key in
    `tasks.CLEANING` of what the files' texts went through."""

    task: str
    kind: str
    labels: tuple[str, ...]
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    notes: list[str] = field(default_factory=list)  # what was normalised, removed or repaired, one line each
    cleaning: str = ""
