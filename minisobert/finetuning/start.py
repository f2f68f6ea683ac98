"""Loads what fine-tuning begins with: the examples of the task, and the model that will learn them."""

from __future__ import annotations

from pathlib import Path

from minisobert.finetuning import baselines, encoder, huggingface, retrieval
from minisobert.finetuning.config import FineTuneConfig
from minisobert.tasks import SPLIT_SEED, TASKS
from minisobert.tasks.dataset import Dataset


def read_data(config: FineTuneConfig) -> Dataset:
    """The examples of the task. Raises ValueError if anything is wrong with the files."""
    task = TASKS[config.task]
    options = {name: getattr(config, name) for name in task.options}
    data = task.read([Path(path) for path in config.data], SPLIT_SEED, **options)
    if (data.several or data.number) and config.class_weights:
        what = "several" if data.several else "number"
        raise ValueError(f"--class-weights is for texts of one class; with --{what} leave it out")
    return data


def starting_point(config: FineTuneConfig) -> baselines.TfIdf | huggingface.Start | encoder.Start | retrieval.Start:
    """An object with train(data, seed, score). Raises ValueError if there is no such model, or if it cannot do what the
    options ask for."""
    if config.pooling == "mean" and (config.model == "tfidf" or config.model.startswith("hf:")):
        raise ValueError(
            f"--pooling mean is for modern models of minisobert, and --model is {config.model}; leave it out"
        )
    if config.long == "windows" and config.model.startswith("hf:"):
        raise ValueError(f"--long windows is for models of minisobert, and --model is {config.model}; leave it out")
    if config.long == "windows" and TASKS[config.task].kind == "pair":
        raise ValueError(f"--long windows is for classes, tags and numbers; with --task {config.task} leave it out")
    if config.model == "tfidf":
        return baselines.TfIdf(config)
    if TASKS[config.task].kind == "pair":
        if config.model.startswith("hf:"):
            raise ValueError(
                f"--task {config.task} trains models of minisobert, and --model is {config.model}; turn it into a run "
                "with minisobert.hub import, which takes ModernBERT and some other kinds"
            )
        return retrieval.Start(config)
    return (huggingface if config.model.startswith("hf:") else encoder).Start(config)
