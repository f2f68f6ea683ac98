"""Sets of labelled examples from your own dump: `python -m data.tasks --input site.7z --out data/tasks-of-site`.

Writes quality.csv, closed.csv and obsoletion.csv by the rules at the head of `minisobert/tasks/NAME.py`; the folder is
what `finetune.py --data` takes. A set that would lack a class is not written, and the table says so.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends in no traceback

import csv
import sys
from collections import Counter
from pathlib import Path

from data.inputs import check
from minisobert.cli import Parser, command
from minisobert.files import new_folder
from minisobert.tasks import closed, obsoletion, quality

SETS = {  # task → its module and its classes; the last column of a row is its class
    "quality": (quality, quality.LABELS),
    "closed": (closed, closed.CLASSES["bodies"]),
    "obsoletion": (obsoletion, obsoletion.LABELS),
}


def derive(dump: str | Path, out: str | Path, *, seed: int = 0) -> list[str]:
    """Write the folder `out` and return what was done, line by line.

    Raises ValueError, in one line, for what is wrong with the dump, or where no set has all its classes; `out` appears
    only when it is complete.
    """
    dump = Path(dump)
    if not (dump.is_dir() or dump.suffix == ".7z"):
        raise ValueError(f"{dump} is no dump: a .7z of a site, or a folder with Posts.xml")
    report, written = [], 0
    with new_folder(out) as work:
        check([dump])
        for task, (module, classes) in SETS.items():
            notes: list[str] = []
            try:
                rows = module.derive(dump, seed, notes)
            except obsoletion.NothingToDerive as error:
                report.append(f"{task}: not written: {error}")
                continue
            count = Counter(row[module.COLUMNS[-1]] for row in rows)
            counts = ", ".join(f"{count[name]:,} {name}" for name in classes)
            if all(count[name] for name in classes):
                _write(work / f"{task}.csv", module.COLUMNS, rows)
                report.append(f"{task}: {counts}")
                written += 1
            else:
                report.append(f"{task}: not written: a class has no example ({counts})")
            report += [f"  {note}" for note in notes]
        if not written:
            raise ValueError(f"nothing can be derived from {dump}: " + "; ".join(x for x in report if x[0] != " "))
    return report


def _write(path: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="data.tasks", description="Derive the quality, closed and obsoletion sets from a dump.")
    parser.add_argument("--input", required=True, metavar="DUMP", help=".7z of a site, or a folder with Posts.xml")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses what is drawn by chance")
    options = parser.parse_args(arguments)
    with command("data.tasks"):
        report = derive(options.input, options.out, seed=options.seed)
    print("\n".join([*report, f"written to {options.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
