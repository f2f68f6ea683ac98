"""Makes one table of all models on all tasks: `python -m minisobert.finetuning.compare RESULT_FOLDER …`.

It reads the metrics.json of folders that finetune.py and finetuning.chat wrote. Figures are percentages on test: the
mean ± the standard deviation over the seeds, with the number of test examples. Figures that were published elsewhere
follow, and then the differences between the model that is named first on a task and the others.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from minisobert.cli import Parser, command, flag, printable, table, words
from minisobert.finetuning.config import task_options
from minisobert.finetuning.evaluation import OF_NUMBERS
from minisobert.tasks import TASKS

NAME = "minisobert.finetuning.compare"
MARK = "†"  # marks a model whose figures were published elsewhere


@command(NAME)
def main(argv: list[str] | None = None) -> int:
    """Returns 0. A user's mistake prints one line and exits with 2."""
    about = "Published figures of the same tasks stand beside them, marked as such."
    example = "python -m minisobert.finetuning.compare results/ner-base results/ner-random"
    parser = Parser(NAME, about, example, allow_abbrev=False)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RESULTS", help="folder that finetune.py or finetuning.chat wrote"
    )
    print(printable("\n".join(lines(parser.parse_args(argv).folders))))
    return 0


def lines(folders: list[Path]) -> list[str]:
    """The table in Markdown, and notes about it. Raises ValueError if a folder cannot be read, or if two folders hold
    results of the same model on the same task."""
    of_task: dict[str, list[Result]] = defaultdict(list)
    ours: dict[str, dict[str, str]] = defaultdict(dict)  # model → task → cell
    for found in map(result, folders):
        for other in of_task[found.on]:
            if other.model == found.model:
                raise ValueError(
                    f"{other.folder} and {found.folder} both hold results of {found.model} on {found.on}; give one of "
                    "them"
                )
        of_task[found.on].append(found)
        ours[found.model][found.on] = found.cell
    theirs: dict[str, dict[str, str]] = defaultdict(dict)
    for task in TASKS.values():
        for model, source, cell in task.published:
            theirs[f"{model} {MARK} ({source})"][task.name] = cell
    own = {on: results[0].figures for on, results in of_task.items() if on not in TASKS}
    tasks = {**{task.name: task.figures for task in TASKS.values() if not task.own_classes}, **own}
    columns = [f"{on}: {' / '.join(map(shown, figures))}" for on, figures in tasks.items()]
    rows = [[model, *(cells.get(on, "") for on in tasks)] for model, cells in [*ours.items(), *theirs.items()]]
    notes = [
        f"{task}: the results are of {words([f'{n:,}' for n in sorted(sizes)], 'and')} test examples, not of the "
        "same ones; compare them with care."
        for task, results in of_task.items()
        if len(sizes := {found.size for found in results}) > 1
    ]
    better = [
        difference(first, other) for first, *others in of_task.values() for other in others if other.size == first.size
    ]
    if better:
        notes += ["", *table(["task, figure", "model", "beside", "difference ± its standard error", ""], better)]
    return [
        *table(["model", *columns], rows),
        "",
        "Percentages of test, mean ± standard deviation over the seeds; n: test examples.",
        f"{MARK} Published elsewhere, on other splits: docs/published-results.md.",
        *notes,
    ]


class Result(NamedTuple):
    folder: Path
    task: str
    on: str  # the task's name; if the classes are those of the files, with the column and the files
    model: str
    size: int  # number of test examples
    seeds: int
    mean: dict[str, float]
    std: dict[str, float]  # over the seeds; empty for a single one
    figures: tuple[str, ...]  # those that are shown, the main one last

    @property
    def cell(self) -> str:
        spread = {name: f" ± {100 * self.std[name]:.1f}" if self.std else "" for name in self.figures}
        figures = " / ".join(f"{100 * self.mean[name]:.1f}{spread[name]}" for name in spread)
        return f"{figures} (n {self.size:,}{f', {self.seeds} seeds' if self.seeds > 1 else ''})"


def result(folder: Path) -> Result:
    """The result that a folder holds. Raises ValueError if it cannot be read."""
    path = folder / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        on = task = found["task"]
        seeds = len(found["seeds"])
        std = found["std"] if seeds > 1 else {}
        figures = TASKS[task].figures
        given = {name: value for name in task_options() if (value := found["settings"].get(name))}
        if TASKS[task].own_classes:
            column = f"{given.pop('label')} " if "label" in given else ""
            what = "number " if given.pop("number", False) else ""
            on = f"{task} {what}{column}of {', '.join(Path(path).name for path in found['settings']['data'])}"
            figures = OF_NUMBERS[2:] if what else figures  # the others are not shares
        values = {
            name: value if isinstance(value, list) else [] if value is True else [value]
            for name, value in given.items()
        }
        options = [word for name, value in values.items() for word in (flag(name), *value)]
        model = " ".join([found["model"], *options])
        mean, std = ({name: float(of[name]) for name in figures if of} for of in (found["mean"], std))
        return Result(folder, task, on, model, found["counts"]["test"], seeds, mean, std, figures)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the --out of finetune.py or finetuning.chat") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not what finetune.py or finetuning.chat writes; make the results again") from None


def difference(one: Result, other: Result) -> list[str]:
    """A row of the table of differences: the main figure of one result minus that of the other. Its standard error is
    that of the difference of two means of independent samples, sqrt(s₁²/n₁ + s₂²/n₂); it needs several seeds of both.
    """
    name = one.figures[-1]
    less = one.mean[name] - other.mean[name]
    row = [f"{one.on}, {shown(name)}", one.model, other.model]
    if not (one.std and other.std):
        return [*row, f"{100 * less:+.2f}", ""]
    error = (one.std[name] ** 2 / one.seeds + other.std[name] ** 2 / other.seeds) ** 0.5
    times = f"{less / error:.1f} standard errors" if error else ""
    return [*row, f"{100 * less:+.2f} ± {100 * error:.2f}", times]


def shown(figure: str) -> str:
    """The name that tables show for a figure in metrics.json, such as macro-F1."""
    return figure.replace("_", "-").replace("f1", "F1")


if __name__ == "__main__":
    sys.exit(main())
