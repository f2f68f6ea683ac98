"""Makes sets of labelled examples from your own dump: `python -m data.tasks --input site.7z --out data/tasks-of-site`.

It writes TASK.csv for each task that can be derived from a dump, by the rules at the head of
`minisobert/tasks/TASK.py`. `finetune.py --data` takes the folder. A set in which a class would have no example is not
written, and the printed report says so.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback after Ctrl-C during the imports below

import csv
import sys
from collections import Counter
from pathlib import Path

from minisobert.cli import Parser, command, printable, words
from minisobert.corpus.dump import is_dump
from minisobert.files import new_folder
from minisobert.tasks import TASKS
from minisobert.tasks.dumps import NothingToDerive, site_of


def derive(dump: str | Path, out: str | Path, *, seed: int = 0) -> list[str]:
    """Writes the folder `out` and returns a report, line by line.

    Raises ValueError, with a message of one line, if something is wrong with the dump or if no set has examples of all
    its classes. `out` appears only when it is complete.
    """
    dump = Path(dump)
    if not is_dump(dump):
        raise ValueError(f"{dump} is not a dump; give the .7z of a site, or a folder with Posts.xml")
    report, written = [], 0
    with new_folder(out) as work:
        site_of(dump)
        for task in TASKS.values():
            if task.derive is None:
                continue
            notes: list[str] = []
            try:
                rows = task.derive(dump, seed, notes)
            except NothingToDerive as error:
                report.append(f"{task.name}: not written: {error}")
                continue
            count = Counter(row[task.columns[-1]] for row in rows)
            counts = ", ".join(f"{count[name]:,} {name}" for name in task.classes)
            if all(count[name] for name in task.classes):
                _write(work / f"{task.name}.csv", task.columns, rows)
                report.append(f"{task.name}: {counts}")
                written += 1
            else:
                report.append(f"{task.name}: not written: a class has no example ({counts})")
            report += [f"  {note}" for note in notes]
        if not written:
            raise ValueError(f"nothing can be derived from {dump}: " + "; ".join(x for x in report if x[0] != " "))
    return report


def _write(path: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@command("data.tasks", "nothing was written")
def main(arguments: list[str] | None = None) -> int:
    sets = words((task.name for task in TASKS.values() if task.derive), "and")
    parser = Parser(
        "data.tasks", f"The tasks are {sets}; each becomes one .csv file for --data of finetune.py.",
        "python -m data.tasks --input android.stackexchange.com.7z --out data/tasks",
    )  # fmt: skip
    parser.add_argument("--input", required=True, metavar="DUMP", help=".7z of a site, or folder with its Posts.xml")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must not exist yet")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the examples that are chosen")
    options = parser.parse_args(arguments)
    report = derive(options.input, options.out, seed=options.seed)
    print(printable("\n".join([*report, f"written to {options.out}"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
