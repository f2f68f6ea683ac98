"""All models on all tasks: `python -m benchmarks.tasks RESULT_FOLDER …`, a table from the folders' metrics.json.

The folders are those of finetune.py and benchmarks.chat. Figures are percentages of test: the mean ± the standard
deviation over the seeds, with the number of test examples. Below them stand the figures of docs/published-results.md.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks import table
from minisobert.config import Parser, fail, words

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
    ours: dict[str, dict[str, str]] = defaultdict(dict)  # model → task → cell
    folder_of, sizes = {}, defaultdict(set)
    for folder in folders:
        task, model, size, cell = result(folder)
        if task in ours[model]:
            other = folder_of[task, model]
            raise ValueError(f"{other} and {folder} both hold {model} on {task}; name one of them")
        ours[model][task], folder_of[task, model] = cell, folder
        sizes[task].add(size)
    theirs: dict[str, dict[str, str]] = defaultdict(dict)
    for row in published(page):
        cell = " / ".join(row[name] for name in FIGURES[row["task"]].values())
        theirs[f"{row['model']} {MARK} ({row['source']})"][row["task"]] = cell
    columns = [f"{task}: {' / '.join(figures.values())}" for task, figures in FIGURES.items()]
    rows = [[model, *(cells.get(task, "") for task in FIGURES)] for model, cells in [*ours.items(), *theirs.items()]]
    notes = [
        f"{task}: the results are of {words([f'{n:,}' for n in sorted(of_task)], 'and')} test examples, not of the "
        "same ones; compare them with care."
        for task, of_task in sizes.items()
        if len(of_task) > 1
    ]
    return [
        *table(["model", *columns], rows),
        "",
        "Percentages of test, mean ± standard deviation over the seeds; n: test examples.",
        f"{MARK} Published elsewhere, on other splits: {page.parent.name}/{page.name}.",
        *notes,
    ]


def result(folder: Path) -> tuple[str, str, int, str]:
    """(task, model, number of test examples, cell) of a folder of results."""
    path = folder / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        task, model, seeds = found["task"], found["model"], len(found["seeds"])
        size, mean, std = found["counts"]["test"], found["mean"], found.get("std", {})
        figures = [
            f"{100 * mean[name]:.1f}" + (f" ± {100 * std[name]:.1f}" if seeds > 1 else "") for name in FIGURES[task]
        ]
        options = [f"--{name.replace('_', '-')}" for name in ("keep_leak", "binary") if found["settings"].get(name)]
        cell = f"{' / '.join(figures)} (n {size:,}{f', {seeds} seeds' if seeds > 1 else ''})"
        return task, " ".join([model, *options]), size, cell
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the --out of finetune.py or benchmarks.chat") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not what finetune.py or benchmarks.chat writes; make the results again") from None


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
