"""What can be chosen in fine-tuning: a frozen dataclass whose fields are the options of finetune.py."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

from minisobert.cli import check_options, flag, option, words
from minisobert.config import MOST_TOKENS
from minisobert.tasks import TASKS
from minisobert.tasks.dataset import Option

_task = partial(option, group="task and model")
_recipe = partial(option, group="recipe")


@dataclass(frozen=True)
class FineTuneConfig:
    """A fine-tuning run, or with `predict` the use of what one has made."""

    task: str = _task("", "task to learn", choices=TASKS)
    model: str = _task(
        "",
        "model to start from: folder of a train.py run, random:RUN for one of the same size from random weights, "
        "random:PRESET, hf:NAME_OR_PATH or tfidf; with --predict, the --out of a fine-tuning",
        metavar="MODEL",
    )
    data: tuple[str, ...] = _task((), "files or folders of the task, as they are published")
    out: str = _task("", "folder of the results; a new one. With --predict a new .jsonl or .csv")
    tokenizer: str = _task("", "for --model random:PRESET, the run or tokenizer.model whose tokenizer to use")
    seeds: int = _recipe(1, "number of trainings, with the seeds 1 to N and always the same split", least=1)
    epochs: int = _recipe(
        10, "epochs of one training, at most; it ends when dev gets no better, and the best epoch is kept", least=1
    )
    learning_rate: float = _recipe(
        5e-5, "peak learning rate, reached after a tenth of the steps; 5e-4 suits the preset tiny", above=0,
        below=math.inf,
    )  # fmt: skip
    tokens_per_batch: int = _recipe(
        4_096, "tokens of a batch, at most; it holds whole documents, and a longer one is a batch by itself", least=1,
        most=MOST_TOKENS,
    )  # fmt: skip
    pairs_per_batch: int = _recipe(
        128, "number of pairs in a batch of --task pairs, where each text is told from those of all others", least=2
    )  # fmt: skip
    pair_tokens: int = _recipe(
        256, "tokens of a text that training on pairs reads, from its beginning; a search reads all of it", least=8
    )  # fmt: skip
    dropout: float = _recipe(0.1, "dropout rate, as in pre-training and before the classifier", least=0, below=1)
    pooling: str = _recipe(
        "cls", "what is classified of a document: the state of its first token, or of modern models the mean of all",
        choices=("cls", "mean"),
    )  # fmt: skip
    long: str = _recipe(
        "cut", "what becomes of texts longer than the model reads: they are cut at their end, or read in overlapping "
        "windows, whose mean decides; a word is tagged in the window where it is furthest from an edge",
        choices=("cut", "windows"),
    )  # fmt: skip
    class_weights: bool = _recipe(False, "weight each class by the inverse of its frequency")
    tensorboard: bool = option(
        False, "write the figures of each epoch for TensorBoard too, to OUT/tensorboard/seed-N", group="results"
    )
    predict: str = option(
        "",
        "classify the texts of a file (.csv, .tsv, .jsonl, .parquet or a text a line) or of - (stdin); prints, or "
        "writes --out, a new .jsonl or .csv",
        metavar="FILE",
        group="prediction",
    )

    def __post_init__(self):
        needed = ("model",) if self.predict else ("task", "model", "data", "out")
        if self.predict and (self.task or self.data):
            raise ValueError("--predict applies what is trained; give it --model, and no --task or --data")
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if f.name in needed and not value:
                advice = f"choose {words(choices)}" if choices else f"give the {f.metadata['help'].split(';')[0]}"
                raise ValueError(f"{flag(f.name)} is missing; {advice}")
        check_options(self)
        if self.task and TASKS[self.task].kind == "pair" and (self.class_weights or self.pooling != "cls"):
            raise ValueError(f"--task {self.task} has no classes, and takes the mean; no --class-weights or --pooling")
        for name in task_options():
            of = [task.name for task in TASKS.values() if name in task.options]
            if getattr(self, name, False) and self.task not in of and not (self.predict and name == "text"):
                raise ValueError(f"{flag(name)} is for --task {words(of)}, given is {self.task or 'none'}")


def task_options() -> dict[str, Option]:
    """Each option that is for some tasks alone."""
    return {name: each for task in TASKS.values() for name, each in task.options.items()}


_TYPES = {bool: bool, str: str, tuple: tuple[str, ...]}


def config_class() -> type[FineTuneConfig]:
    """FineTuneConfig, with a field for each of `task_options` as well."""
    group = "options of single tasks"
    fields = [
        (name, _TYPES[type(each.default)], option(each.default, each.help, group=group, metavar="COLUMN"))
        for name, each in task_options().items()
    ]
    return dataclasses.make_dataclass("FineTuneConfig", fields, bases=(FineTuneConfig,), frozen=True)
