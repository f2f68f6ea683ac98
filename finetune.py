"""Fine-tune a model on one task and report how good it is: data → model → loop → report.

The folder --out holds report.md, metrics.json, predictions.csv, plots, and the model of the best seed. It appears only
when it is complete.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback after Ctrl-C during the imports below

import sys
from contextlib import closing
from functools import partial
from pathlib import Path

from minisobert.cli import command, parse, printable
from minisobert.files import new_folder
from minisobert.finetuning import apply, evaluation, report
from minisobert.finetuning.config import FineTuneConfig, config_class
from minisobert.finetuning.loop import Outcome
from minisobert.finetuning.start import read_data, starting_point
from minisobert.plot import pyplot
from minisobert.tasks.dataset import Dataset
from minisobert.training import events

ABOUT = "The results are a report with figures and plots, predictions, and the model of the best seed."
EXAMPLES = """\
python finetune.py --task ner --model runs/base --data ner.7z --out results/ner-base --seeds 5
python finetune.py --task ner --model random:runs/base --data ner.7z --out results/ner-random
python finetune.py --task quality --model tfidf --data train.csv test.csv --out results/tfidf
python finetune.py --task labels --data tickets.csv --text title body --label team \\
    --model runs/base --out results/team
python finetune.py --task pairs --data site.7z --model runs/base --out results/search
python finetune.py --predict posts.jsonl --model results/team
"""


@command("finetune.py", "nothing was written")
def main(argv: list[str] | None = None) -> int:
    """Returns 0. A user's mistake prints one line on standard error and exits with 2; Ctrl-C exits with 130."""
    config = parse(
        config_class(), argv, prog="finetune.py", description=ABOUT, examples=EXAMPLES,
        usages=[
            "--task NAME --model MODEL --data PATH … --out DIR [options]", "--predict FILE --model RESULT [options]",
        ],
    )  # fmt: skip
    if config.predict:
        apply.apply(config.model, config.predict, config.out, config.text)
        return 0
    with new_folder(config.out) as folder:
        pyplot()  # raises now, and not after the training, if matplotlib is missing
        if config.tensorboard:
            events.check()
        start = starting_point(config)
        data = read_data(config)
        say(data)
        outcomes = train(start, data, config, folder)
        report.write(folder, config, data, outcomes)
    print(printable(f"{config.out}/report.md: {report.headline(data, outcomes)}"))
    return 0


def say(data: Dataset) -> None:
    """Prints on standard error, before training begins, what will be learnt and what was left out."""
    counts = ", ".join(f"{len(getattr(data, split)):,} in {split}" for split in ("train", "dev", "test"))
    what = {"sequence": "; {:,} classes", "token": "; {:,} tags", "pair": ""}[data.kind].format(len(data.labels))
    what = f"; numbers, {data.labels[0]}" if data.number else what
    print(printable("\n  ".join([f"{counts}{what}", *data.notes])), file=sys.stderr)


def train(start, data: Dataset, config: FineTuneConfig, folder: Path) -> list[Outcome]:
    """Trains once with each seed and returns the outcomes. Only the one that is best on dev keeps its network."""
    outcomes: list[Outcome] = []
    for seed in range(1, config.seeds + 1):
        outcomes.append(start.train(data, seed, partial(evaluation.dev_score, data)))
        if config.tensorboard and outcomes[-1].epochs:  # TF-IDF has none
            with closing(events.Events(folder / "tensorboard" / f"seed-{seed}")) as board:
                for line in outcomes[-1].epochs:
                    board.add({name: value for name, value in line.items() if name != "epoch"}, line["epoch"])
        best = evaluation.best(outcomes)
        for outcome in outcomes:
            outcome.network = outcome.network if outcome is best else None
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
