"""Fine-tune a model on one task and report how good it is: data → model → loop → report.

    python finetune.py --task ner --model runs/base --data ner.7z --out results/ner-base --seeds 5
    python finetune.py --task ner --model random:base --tokenizer runs/base --data ner.7z --out results/ner-random
    python finetune.py --task quality --model tfidf --data train.csv test.csv --out results/quality-tfidf
    python finetune.py --predict posts.jsonl --model results/ner-base

The folder --out holds report.md, metrics.json, predictions.csv, plots, and the model of the best seed (of TF-IDF none).
It appears when all of it is there.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends in no traceback

import os
import sys
from functools import partial
from pathlib import Path

from minisobert import tasks
from minisobert.cli import command, parse
from minisobert.config import TASK_OPTIONS, FineTuneConfig
from minisobert.files import new_folder
from minisobert.finetuning import apply, baselines, encoder, evaluation, report
from minisobert.finetuning.loop import Outcome
from minisobert.plot import pyplot
from minisobert.tasks.dataset import Dataset


def main(argv: list[str] | None = None) -> int:
    """Returns 0. A user's mistake ends in one line on standard error and exit status 2, Ctrl-C in 130."""
    config = parse(FineTuneConfig, argv, prog="finetune.py", description=__doc__.splitlines()[0])
    with command("finetune.py"):
        if config.predict:
            try:
                apply.apply(config.model, config.predict)
                sys.stdout.flush()
            except BrokenPipeError:  # who reads the predictions has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        with new_folder(config.out) as folder:
            pyplot()  # is there, or training would be in vain
            start = starting_point(config)
            data = load(config)
            outcomes = train(start, data, config)
            report.write(folder, config, data, outcomes)
    print(f"{config.out}/report.md: {report.headline(data, outcomes)}")
    return 0


def starting_point(config: FineTuneConfig):
    """What training begins from: something with train(data, seed, score)."""
    if config.model == "tfidf":
        return baselines.TfIdf(config)
    return baselines.HuggingFace(config) if config.model.startswith("hf:") else encoder.Start(config)


def load(config: FineTuneConfig) -> Dataset:
    option = TASK_OPTIONS.get(config.task)
    options = {option: getattr(config, option)} if option else {}
    return tasks.TASKS[config.task]([Path(path) for path in config.data], tasks.SPLIT_SEED, **options)


def train(start, data: Dataset, config: FineTuneConfig) -> list[Outcome]:
    """One outcome for each seed. Only the one that is best on dev keeps its network."""
    outcomes: list[Outcome] = []
    for seed in range(1, config.seeds + 1):
        outcomes.append(start.train(data, seed, partial(evaluation.dev_score, data)))
        best = evaluation.best(outcomes)
        for outcome in outcomes:
            outcome.network = outcome.network if outcome is best else None
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
