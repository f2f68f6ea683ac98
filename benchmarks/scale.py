"""How much time, memory and disk data.prepare takes as a dump grows: `python -m benchmarks.scale --folder EMPTY`.

Synthetic dumps (benchmarks/dumps.py) of growing size are prepared by `python -m data.prepare --tokenizer …`, as a user
would; benchmarks/sessions.py says what is measured. A least-squares line through the sizes estimates what the largest
site takes. Then one dump is prepared in turn by one worker on one core and by two workers on two, and the bytes of the
results are compared. Finally, `--kills N` sends SIGKILL to the main process at random moments, and repeats the command
until it ends.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from benchmarks import machine, parser, show
from benchmarks.dumps import COMMENTS, write_dump
from benchmarks.sessions import Run, Session
from minisobert.cli import table
from minisobert.corpus.comments import RUN
from minisobert.files import sha256

WHOLE, WHOLE_COMMENTS = 60_000_000, 90_000_000  # stackoverflow.com
VOCABULARY, TRAINING_POSTS = 30_000, 5_000  # pieces of the tokenizer that all runs use, and posts it is trained on
SMALL = 3_000  # posts in the dump with which data.prepare is killed
FOUND = ("results", "wrong results", "left-over files", "left-over processes", "failed runs")
COMMENT_BYTES = 180  # in the text of a comment, about
ENTRY = 0.1  # seconds between two entries of the journal in runs that are killed, since these runs are short
MOST_FAILED = 10  # after this many runs have failed, no more are killed


def digests(folder: Path) -> dict[str, str]:
    """File name → checksum; empty if the folder does not exist."""
    return {path.name: sha256(path) for path in sorted(folder.glob("*"))}


def command(dump: Path, place: Path, tokenizer: Path | None, workers: int, entry: float | None = None) -> list[str]:
    """The command that prepares a dump. entry: seconds between two entries of the journal, if not the default."""
    often = f"import sys; from data import journal, prepare; journal.SECONDS = {entry}; sys.exit(prepare.main())"
    program = ["-m", "data.prepare"] if entry is None else ["-c", often]
    how = ["--vocab-size", str(VOCABULARY)] if tokenizer is None else ["--tokenizer", str(tokenizer)]
    out = ["--input", str(dump), "--out", str(place / "out"), "--workers", str(workers)]
    return [sys.executable, *program, *out, *how]


def measure(words: Sequence[str], place: Path, cores: Sequence[int] = (), look: bool = True) -> Run:
    """Measures a run, which must succeed."""
    place.mkdir(exist_ok=True)
    with Session(words, place, cores) as session:
        run = session.measure(look)
    print(run, file=sys.stderr)
    if run.code:
        raise SystemExit(f"benchmarks.scale: data.prepare ended with {run.code}: {run.message}")
    return run


def fit(posts: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """(slope per post, intercept) of the least-squares line through the points."""
    slope, intercept = np.polyfit(posts, values, 1)
    return float(slope), float(intercept)


def growth(sizes: Sequence[int], folder: Path, tokenizer: Path, workers: int) -> list[str]:
    runs, xml = {}, []
    for posts in sizes:
        dump, place = folder / "dump", folder / "place"
        xml.append(write_dump(dump, posts))
        runs[posts] = measure(command(dump, place, tokenizer, workers), place)
        shutil.rmtree(dump)
        shutil.rmtree(place)
    bars = list(dict.fromkeys(name for run in runs.values() for name in run.stages))
    rows = []
    for (posts, run), size in zip(runs.items(), xml):
        seconds = [run.seconds, *(run.stages.get(name, 0) for name in bars), run.cpu]
        taken = [f"{bytes_ / 1e6:,.0f}" for bytes_ in (run.memory, run.disk, run.elsewhere)]
        rows.append([f"{posts:,}", f"{size / 1e6:,.0f}", *(f"{n:,.1f}" for n in seconds), *taken])
    lines = [
        "## Posts",
        "",
        f"{workers} worker{'s' * (workers > 1)}; a run each; the largest memory and disk at any time of the run.",
        "",
        *table(["posts", "MB of XML", "seconds", *(f"of them “{name}”" for name in bars), "CPU seconds", "memory, MB",
                "disk, MB", "of it elsewhere, MB"], rows),
        "",
    ]  # fmt: skip
    if len(runs) < 2:
        return lines
    each = {
        "XML": ("GB", 1e9, xml),
        "memory": ("GB", 1e9, [run.memory for run in runs.values()]),
        "disk, beside the XML": ("GB", 1e9, [run.disk for run in runs.values()]),
        "time": ("hours", 3_600, [run.seconds for run in runs.values()]),
        "CPU time": ("hours", 3_600, [run.cpu for run in runs.values()]),
    }
    # comments are sorted in memory one run at a time; until they fill a run, memory grows with that run
    full = [posts for posts in runs if posts * COMMENTS * COMMENT_BYTES >= RUN]
    steady = len(full) if len(full) > 1 else len(runs)
    rows = []
    for name, (unit, divisor, values) in each.items():
        points = steady if name == "memory" else len(runs)
        slope, intercept = fit(list(runs)[-points:], values[-points:])
        small, size = ("µs", 1e6) if unit == "hours" else ("bytes", 1)
        base = f"{intercept:,.1f} s" if unit == "hours" else f"{intercept / 1e6:,.0f} MB"
        whole = (intercept + slope * WHOLE) / divisor
        rows.append([name, f"{slope * size:,.0f} {small}", base, f"{whole:,.1f} {unit}"])
    return [
        *lines,
        f"The line through these by least squares, and what it says of {WHOLE / 1e6:.0f} million posts with "
        f"{WHOLE_COMMENTS / 1e6:.0f} million comments. That for memory begins at "
        f"{list(runs)[-steady]:,} posts: {RUN / 1e6:.0f} MB of comments are sorted in memory at a time, and a smaller "
        "dump does not fill them.",
        "",
        *table(["", "a post", "without any", "the whole dump"], rows),
        "",
    ]


def scaling(posts: int, folder: Path, tokenizer: Path, repeats: int) -> list[str]:
    """One worker on one core against two on two, in turn. The fastest run of each counts, as the least disturbed."""
    dump = folder / "dump"
    size = write_dump(dump, posts)
    cores = sorted(os.sched_getaffinity(0))
    runs: dict[int, list[Run]] = {1: [], 2: []}
    results = []
    for _ in range(repeats):
        for workers, found in runs.items():
            place = folder / "place"
            found.append(measure(command(dump, place, tokenizer, workers), place, cores[:workers], look=False))
            results.append(digests(place / "out"))
            shutil.rmtree(place)
    shutil.rmtree(dump)
    if any(result != results[0] for result in results):
        raise SystemExit("benchmarks.scale: the shards depend on the number of workers")
    rows = []
    for name in ["whole run", *runs[1][0].stages]:
        one, two = (
            min(run.seconds if name == "whole run" else run.stages.get(name, 0) for run in found)
            for found in runs.values()
        )
        ratio = f"{one / two:.2f}" if two else "–"
        rows.append([name, f"{one:,.1f}", f"{two:,.1f}", ratio, f"{size / one / 1e6:,.1f}" if one else "–"])
    return [
        "## Workers",
        "",
        f"{posts:,} posts, {size / 1e6:,.0f} MB of XML; best of {repeats} alternating runs. The files of the results "
        "are the same, byte for byte.",
        "",
        *table(["", "1 worker on 1 core, s", "2 workers on 2 cores, s", "ratio", "MB of XML/s of 1 worker"], rows),
        "",
    ]


def kill(words: Sequence[str], place: Path, kills: int, seed: int = 0) -> tuple[Run, Counter, Counter]:
    """Kills a command that writes place/out at random moments and repeats it until it ends, until there were enough
    kills. Returns (the undisturbed run, what was found, kills by the last bar on the screen).

    It counts the results, wrong results, files left beside a result, processes that outlive their parent, and runs that
    end with an error.
    """
    undisturbed = measure(words, place)
    right = digests(place / "out")
    shutil.rmtree(place / "out")
    moments = random.Random(seed)
    found: Counter = Counter({name: 0 for name in FOUND})
    bars: Counter = Counter()
    while (bars.total() < kills or any(place.iterdir())) and found["failed runs"] < MOST_FAILED:
        patience = moments.uniform(0, 1.2 * undisturbed.seconds) if bars.total() < kills else None
        with Session(words, place) as run, suppress(subprocess.TimeoutExpired):
            run.process.wait(patience)  # a sixth or more of them run to their end
        code = run.process.returncode
        if code == -signal.SIGKILL:
            bars[list(run.bars)[-1] if run.bars else "before the first bar"] += 1
        found["left-over processes"] += run.outliving()
        if (place / "out").exists():  # a killed run has it too if the kill came after the final rename
            found["results"] += 1
            found["wrong results"] += digests(place / "out") != right
            shutil.rmtree(place / "out")
        if code == 0:
            left = [*place.iterdir(), *run.temporary.iterdir()]
            found["left-over files"] += len(left)
        elif code > 0:
            found["failed runs"] += 1
            print(f"benchmarks.scale: ended with {code}: {run.message()}", file=sys.stderr)
            left = [*place.iterdir(), *run.temporary.iterdir()]
        else:
            continue
        for path in left:  # so that it is not counted again
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return undisturbed, found, bars


def killing(posts: int, folder: Path, tokenizer: Path, workers: int, kills: int) -> list[str]:
    dump, place = folder / "dump", folder / "place"
    write_dump(dump, posts)
    undisturbed, found, bars = kill(command(dump, place, tokenizer, workers, ENTRY), place, kills)
    shutil.rmtree(dump)
    return [
        "## Kills",
        "",
        f"{bars.total()} times SIGKILL to the main process of a run over {posts:,} posts with {workers} workers, which "
        f"takes {undisturbed.seconds:.1f} s undisturbed, at moments drawn evenly; then the same command again. The "
        f"journal has an entry every {ENTRY:g} s, which is every 10 s otherwise. By the "
        f"last bar on the screen: {', '.join(f'{n} {name}' for name, n in bars.items())}.",
        "",
        *table([*found], [[f"{n:,}" for n in found.values()]]),
        "",
    ]


def main() -> None:
    made = parser("scale", "--folder /tmp/scale --posts 100000 --kills 20")
    made.add_argument(
        "--folder", type=Path, required=True, metavar="DIR", help="folder for synthetic dumps and results"
    )
    made.add_argument(
        "--posts", type=int, nargs="+", default=[100_000, 300_000, 1_000_000, 3_000_000],
        metavar="N", help="sizes of the dumps in posts; a million posts take 6.2 GB of disk",
    )  # fmt: skip
    made.add_argument("--workers", type=int, default=2, metavar="N", help="processes that prepare the growing dumps")
    made.add_argument("--repeats", type=int, default=3, metavar="N", help="number of runs with 1 and with 2 processes")
    made.add_argument("--kills", type=int, default=200, metavar="N", help="number of SIGKILLs on a small dump")
    options = made.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        made.error("the memory of processes is read from Linux's /proc/*/smaps_rollup, which is not there")
    lines = [
        "# Preparing a dump as it grows",
        "",
        f"`python -m benchmarks.scale`: synthetic dumps, a tokenizer of {VOCABULARY:,} pieces that is given. Posts "
        "are as long as those of benchmarks/post_lengths.json, which makes more XML than the largest site's 130 GB.",
        machine("sentencepiece", "numpy") + ".",
        "",
    ]
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scale-", dir=options.folder.resolve()) as folder:
        folder = Path(folder)
        write_dump(folder / "dump", min(TRAINING_POSTS, *options.posts), seed=1)
        measure(command(folder / "dump", folder / "trained", None, options.workers), folder / "trained")
        shutil.rmtree(folder / "dump")
        tokenizer = folder / "trained" / "out"
        lines += growth(sorted(options.posts), folder, tokenizer, options.workers)
        if options.repeats:
            lines += scaling(min(options.posts), folder, tokenizer, options.repeats)
        if options.kills:
            lines += killing(min(SMALL, *options.posts), folder, tokenizer, options.workers, options.kills)
    show(lines[:-1], "scale", options.write)


if __name__ == "__main__":
    main()
