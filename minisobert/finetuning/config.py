"""The options of finetune.py: a frozen dataclass with a field for each."""

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
_output = partial(option, group="output")
_recipe = partial(option, group="training")


@dataclass(frozen=True)
class FineTuneConfig:
    """A fine-tuning or, with `predict`, the use of its result."""

    task: str = _task("", "task to learn", choices=TASKS)
    model: str = _task(
        "",
        "model to start from: a run of train.py or an imported model, random:RUN (the same model with random weights), "
        "random:PRESET, hf:NAME_OR_PATH (any encoder of Hugging Face) or tfidf; with --predict, the result of a "
        "fine-tuning",
        metavar="MODEL",
    )
    data: tuple[str, ...] = _task((), "files or folders of the task; data/README.md describes their formats")
    out: str = _output("", "folder for the results; it must not exist yet. With --predict, a new .jsonl or .csv file")
    tokenizer: str = _task("", "for --model random:PRESET: run or tokenizer.model whose tokenizer to use")
    seeds: int = _recipe(1, "number of trainings, with the seeds 1 to N and the same split of the data", least=1)
    epochs: int = _recipe(
        10, "epochs of a training, at most; it ends when dev no longer improves, and the best epoch is kept", least=1
    )
    learning_rate: float = _recipe(
        5e-5, "peak learning rate, reached after a tenth of the steps; 5e-4 suits the preset tiny", above=0,
        below=math.inf,
    )  # fmt: skip
    tokens_per_batch: int = _recipe(
        4_096, "tokens in a batch, at most; a batch holds whole documents, and a longer document has a batch to itself",
        least=1, most=MOST_TOKENS,
    )  # fmt: skip
    pairs_per_batch: int = _recipe(
        128, "for --task pairs: pairs in a batch, in which a text has to be told from those of all other pairs", least=2
    )  # fmt: skip
    pair_tokens: int = _recipe(
        256, "for --task pairs: tokens at the beginning of a text that training reads; a search reads all", least=8
    )  # fmt: skip
    dropout: float = _recipe(0.1, "dropout rate of the encoder, and before the classifier", least=0, below=1)
    pooling: str = _recipe(
        "cls", "what represents a document: the state of its first token (cls), or the mean of all states (mean, "
        "for modern models)", choices=("cls", "mean"),
    )  # fmt: skip
    long: str = _recipe(
        "cut", "what to do with texts longer than the model can read: cut off their end, or read them in overlapping "
        "windows and take the mean (for words, the window where a word is furthest from an edge)",
        choices=("cut", "windows"),
    )  # fmt: skip
    class_weights: bool = _recipe(False, "weight each class by the inverse of its frequency")
    tensorboard: bool = _output(
        False, "also write the figures of each epoch for TensorBoard, to OUT/tensorboard/seed-N"
    )
    predict: str = option(
        "",
        "apply the fine-tuned --model to the texts of this file (.csv, .tsv, .jsonl, .parquet, or one text a line), or "
        "of standard input (-), and print what it predicts, or write it to --out",
        metavar="FILE",
        group="prediction",
    )

    def __post_init__(self):
        needed = ("model",) if self.predict else ("task", "model", "data", "out")
        if self.predict and (self.task or self.data):
            raise ValueError("--predict applies a trained model; give --model, and no --task or --data")
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if f.name in needed and not value:
                advice = f"choose {words(choices)}" if choices else f"give the {f.metadata['help'].split(';')[0]}"
                raise ValueError(f"{flag(f.name)} is missing; {advice}")
        check_options(self)
        if self.task and TASKS[self.task].kind == "pair" and (self.class_weights or self.pooling != "cls"):
            raise ValueError(
                f"--task {self.task} has no classes and always takes the mean; leave out --class-weights and --pooling"
            )
        for name in task_options():
            of = [task.name for task in TASKS.values() if name in task.options]
            if getattr(self, name, False) and self.task not in of and not (self.predict and name == "text"):
                raise ValueError(
                    f"{flag(name)} is for --task {words(of)}, and --task is {self.task or 'none'}; leave it out"
                )


def task_options() -> dict[str, Option]:
    """The options that only some tasks have, by name."""
    return {name: each for task in TASKS.values() for name, each in task.options.items()}


_TYPES = {bool: bool, str: str, tuple: tuple[str, ...]}


def config_class() -> type[FineTuneConfig]:
    """FineTuneConfig with an additional field for each of `task_options`."""
    group = "options of single tasks"
    fields = [
        (name, _TYPES[type(each.default)], option(each.default, each.help, group=group, metavar="COLUMN"))
        for name, each in task_options().items()
    ]
    return dataclasses.make_dataclass("FineTuneConfig", fields, bases=(FineTuneConfig,), frozen=True)
