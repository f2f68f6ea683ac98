"""The record of a downstream task, and what a task gives to training: labelled examples in three splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Option(NamedTuple):
    """A flag of finetune.py, passed to `Task.read` by the same name. default: False for a switch, "" for the name of a
    column, () for those of several columns."""

    help: str
    default: bool | str | tuple[str, ...] = False


@dataclass(frozen=True)
class Task:
    """The record at the end of `tasks/NAME.py`, with all that command lines, reports, `data.tasks`, chat models and the
    table of results need to know about the task."""

    name: str
    read: Callable[..., Dataset]  # takes (paths, seed, **options); ValueError if anything is wrong with the files
    instruction: str  # what a chat model is told to do; "" if no chat model is asked about this task
    kind: str = "sequence"  # a class for each text; "token", a BIO tag for each word; "pair", two texts and no class
    figures: tuple[str, ...] = ("accuracy", "macro_f1")  # those of metrics.json that tables show, the main one last
    options: Mapping[str, Option] = field(default_factory=dict)  # the other arguments of `read`
    cleaning: Mapping[str, Callable[[str], str]] = field(default_factory=dict)  # Dataset.cleaning → its function
    derive: Callable[..., list[dict[str, str]]] | None = None  # (dump, seed, notes) → rows of a set, if a dump has any
    columns: tuple[str, ...] = ()  # of these rows; the last one is the class
    classes: tuple[str, ...] = ()  # such a set must have examples of all of them
    own_classes: bool = False  # the files define the classes, so results on other files are those of another task
    published: tuple[tuple[str, str, str], ...] = ()  # (model, source, figures in percent), docs/published-results.md


@dataclass(frozen=True)
class Example:
    """A post with a class, a sentence with a class for each word, or two texts that belong together."""

    id: str
    text: str = ""  # sequence task
    label: int = 0  # sequence task: an index into Dataset.labels
    value: float = 0.0  # sequence task whose answer is a number
    words: tuple[str, ...] = ()  # token task
    tags: tuple[int, ...] = ()  # token task: for each word an index into Dataset.labels; or all classes of a text
    other: str = ""  # pair task: the text that `text`, the query, should find


@dataclass(frozen=True)
class Dataset:
    """The examples of a task in three splits.

    labels: the classes, or BIO tags with "O" first. cleaning: the key in Task.cleaning of the function that cleaned the
    texts, or "". columns: the columns of a table that make up a text. several: a text has any number of classes, its
    `tags`, instead of one, its `label`. number: a text has a number, its `value`, instead of a class; then `labels`
    holds only the name of that number."""

    task: Task
    labels: tuple[str, ...]
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    notes: list[str] = field(default_factory=list)  # what was normalised, removed or repaired, one line each
    cleaning: str = ""
    columns: tuple[str, ...] = ()
    several: bool = False
    number: bool = False

    @property
    def kind(self) -> str:
        return self.task.kind
