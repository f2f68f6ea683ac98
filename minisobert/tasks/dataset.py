"""What is special about a downstream task, and what it hands to training: labelled examples in three splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Option(NamedTuple):
    """A flag of finetune.py that `Task.read` takes by the same name. default: False for a switch; "" for one value, ()
    for several, which are columns of a file."""

    help: str
    default: bool | str | tuple[str, ...] = False


@dataclass(frozen=True)
class Task:
    """The record at the end of `tasks/NAME.py`. Command lines, reports, `data.tasks`, chat models and the table of
    results take from it what they need to know of a task."""

    name: str
    read: Callable[..., Dataset]  # of (paths, seed, **options); ValueError for whatever is wrong with the files
    instruction: str  # what a chat model is told to do; "" for a task that none is asked for
    kind: str = "sequence"  # a class for each text; "token", a BIO tag for each word; "pair", two texts and no class
    figures: tuple[str, ...] = ("accuracy", "macro_f1")  # those of metrics.json that tables show, the main one last
    options: Mapping[str, Option] = field(default_factory=dict)  # what `read` takes besides
    cleaning: Mapping[str, Callable[[str], str]] = field(default_factory=dict)  # Dataset.cleaning → its function
    derive: Callable[..., list[dict[str, str]]] | None = None  # rows of a set from (dump, seed, notes), if there can be
    columns: tuple[str, ...] = ()  # of these rows; the last one is the class
    classes: tuple[str, ...] = ()  # all of which such a set must hold
    own_classes: bool = False  # they are those of the files: results on other files are of another task
    published: tuple[tuple[str, str, str], ...] = ()  # (model, source, figures in percent), docs/published-results.md


@dataclass(frozen=True)
class Example:
    """A post with a class, a sentence with a class for each word, or two texts that belong together."""

    id: str
    text: str = ""  # of a sequence task
    label: int = 0  # of a sequence task: index into Dataset.labels
    value: float = 0.0  # of a sequence task whose answer is a number
    words: tuple[str, ...] = ()  # of a token task
    tags: tuple[int, ...] = ()  # of a token task: for each word an index into Dataset.labels; or a text's several ones
    other: str = ""  # of a pair task: what `text`, the query, is to find


@dataclass(frozen=True)
class Dataset:
    """labels: classes, or BIO tags with "O" first. cleaning: the key in Task.cleaning of what the files' texts went
    through, "" if nothing. columns: of a table, those that make up a text. several: whether a text has any number of
    classes, its `tags`, and not one, its `label`. number: whether it has a number instead, its `value`; `labels` then
    holds the name of that number alone."""

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
