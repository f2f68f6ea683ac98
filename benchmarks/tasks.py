"""All models on all tasks: `python -m benchmarks.tasks RESULT_FOLDER …`, a table from the folders' metrics.json.

The folders are those of finetune.py and benchmarks.chat. Figures are percentages of test: the mean ± the standard
deviation over the seeds, with the number of test examples. Below them stand the figures of docs/published-results.md,
and by how much the model that is named first on a task is better than the others.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from benchmarks import table
from minisobert.cli import Parser, fail, words
from minisobert.config import TASK_OPTIONS

PUBLISHED = Path(__file__).parents[1] / "docs/published-results.md"
COLUMNS = ["model", "task", "accuracy", "macro-F1", "F1", "source"]  # of its table
FIGURES = {  # of each task, under their names in metrics.json and on that page
    "quality": {"accuracy": "accuracy", "macro_f1": "macro-F1"},
    "closed": {"accuracy": "accuracy", "macro_f1": "macro-F1"},
    "ner": {"f1": "F1"},
    "obsoletion": {"accuracy": "accuracy", "macro_f1": "macro-F1"},
}
MARK = "†"  # of a model whose figures were published elsewhere


def main(argv: list[str] | None = None) -> int:
    """Returns 0. A user's mistake ends in one line and exit status 2."""
    parser = Parser(prog="benchmarks.tasks", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RESULT_FOLDER")
    folders = parser.parse_args(argv).folders
    try:
        print("\n".join(lines(folders, PUBLISHED)))
    except ValueError as error:
        fail(f"benchmarks.tasks: {error}")
    return 0


def lines(folders: list[Path], page: Path) -> list[str]:
    """The table in Markdown and what has to be said about it. Raises ValueError where a folder or the page can't be
    read, and where two folders hold results of the same model on the same task."""
    of_task: dict[str, list[Result]] = defaultdict(list)
    ours: dict[str, dict[str, str]] = defaultdict(dict)  # model → task → cell
    for found in map(result, folders):
        for other in of_task[found.task]:
            if other.model == found.model:
                raise ValueError(
                    f"{other.folder} and {found.folder} both hold {found.model} on {found.task}; name one of them"
                )
        of_task[found.task].append(found)
        ours[found.model][found.task] = found.cell
    theirs: dict[str, dict[str, str]] = defaultdict(dict)
    for row in published(page):
        cell = " / ".join(row[name] for name in FIGURES[row["task"]].values())
        theirs[f"{row['model']} {MARK} ({row['source']})"][row["task"]] = cell
    columns = [f"{task}: {' / '.join(figures.values())}" for task, figures in FIGURES.items()]
    rows = [[model, *(cells.get(task, "") for task in FIGURES)] for model, cells in [*ours.items(), *theirs.items()]]
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
        f"{MARK} Published elsewhere, on other splits: {page.parent.name}/{page.name}.",
        *notes,
    ]


class Result(NamedTuple):
    folder: Path
    task: str
    model: str
    size: int  # of test
    seeds: int
    mean: dict[str, float]
    std: dict[str, float]  # over the seeds; empty for a single one

    @property
    def cell(self) -> str:
        spread = {name: f" ± {100 * self.std[name]:.1f}" if self.std else "" for name in FIGURES[self.task]}
        figures = " / ".join(f"{100 * self.mean[name]:.1f}{spread[name]}" for name in spread)
        return f"{figures} (n {self.size:,}{f', {self.seeds} seeds' if self.seeds > 1 else ''})"


def result(folder: Path) -> Result:
    """What a folder holds."""
    path = folder / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        task, seeds = found["task"], len(found["seeds"])
        std = found["std"] if seeds > 1 else {}
        options = [f"--{name.replace('_', '-')}" for name in TASK_OPTIONS.values() if found["settings"].get(name)]
        model = " ".join([found["model"], *options])
        mean, std = ({name: float(of[name]) for name in FIGURES[task] if of} for of in (found["mean"], std))
        return Result(folder, task, model, found["counts"]["test"], seeds, mean, std)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the --out of finetune.py or benchmarks.chat") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not what finetune.py or benchmarks.chat writes; make the results again") from None


def difference(one: Result, other: Result) -> list[str]:
    """A row: the main figure of one less that of the other; the standard error of a difference of means is that of
    independent samples, sqrt(s₁²/n₁ + s₂²/n₂), which needs several seeds of both."""
    name, shown = list(FIGURES[one.task].items())[-1]
    less = one.mean[name] - other.mean[name]
    row = [f"{one.task}, {shown}", one.model, other.model]
    if not (one.std and other.std):
        return [*row, f"{100 * less:+.2f}", ""]
    error = (one.std[name] ** 2 / one.seeds + other.std[name] ** 2 / other.seeds) ** 0.5
    times = f"{less / error:.1f} standard errors" if error else ""
    return [*row, f"{100 * less:+.2f} ± {100 * error:.2f}", times]


def published(page: Path) -> list[dict[str, str]]:
    """The rows of the page's table. Raises ValueError for one whose figures are not those of its task."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{page}: {error.strerror}") from None
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    if cells[:1] != [COLUMNS]:
        raise ValueError(f"{page}: its table must have the columns {words(COLUMNS, 'and')}")
    rows = []
    for row in cells[2:]:
        found = dict(zip(COLUMNS, row))
        given = {name for name in COLUMNS[2:5] if found.get(name)}
        if len(row) != len(COLUMNS) or given != set(FIGURES.get(found["task"], {}).values()):
            raise ValueError(f"{page}: | {' | '.join(row)} | must have a task and the figures of it alone")
        rows.append(found)
    return rows


if __name__ == "__main__":
    sys.exit(main())
