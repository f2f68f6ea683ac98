"""Kills runs at every moment, and counts what that costs: `python -m benchmarks.faults --data SHARDS`.

A run of `tiny` with evaluations and checkpoints is killed (SIGKILL) and started again by the same command until it
ends. Then its folder must hold what that of an undisturbed run holds, bit for bit, and nothing else. Half of the kills
come at a random time. The others come at a random file operation of one phase, since a rename is too short for a clock
to hit it: just before the operation, or in the middle of a write to a file of a checkpoint.

A fifth of the kills hit a job of two data-parallel processes: either both, or one of them, whereupon the other gets
SIGTERM as from torchrun. Processes are forked from one that has imported torch, so that they need not import it. In
each process, some functions of training and `os` are wrapped, so that they record what they are doing in a file that
survives the process.
"""

from __future__ import annotations

import functools
import json
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist

import train
from benchmarks import machine, parser, shards, show
from minisobert.cli import table
from minisobert.config import TrainConfig
from minisobert.files import sha256
from minisobert.training import checkpoint, loop

PHASES = ("start", "step", "evaluation", "checkpoint", "publishing", "removal", "end")
# without "step", which random times hit often enough
AIMED = [*2 * ("start", "evaluation", "checkpoint", "publishing", "removal"), "end"]
CELL = struct.Struct(f"BB2x{len(PHASES)}I")  # phases of the two threads (the second's + 1); operations in each phase
TIMED = {"tokens_per_second", "dollars"}
PATIENCE = 30  # seconds that torchrun waits between SIGTERM and SIGKILL
LONG = 300  # seconds; no start takes as long
COUNTED = ("results that differ", "checkpoints lost", "checkpoints damaged", "starts that failed", "files left over",
           "processes left over", "processes that did not end")  # fmt: skip
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}  # names for sys.audit

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train", "torch._dynamo"])  # the first step imports the latter, in 2 seconds
HOW = """\
A phase is what the process was doing when it was killed: what its background thread was doing, which writes checkpoints
while training goes on, or else its main one. *Checkpoint* is making its files and writing them, *publishing* its
checksums, `state.json` and the renaming, *removal* that of older checkpoints and of what earlier kills left, *end*
whatever comes after the last save. Half of the kills come by the clock, the others just before a file operation chosen
at random, in the middle of a write, or in a millisecond of an evaluation.

The processes are forked from one that has imported torch, and call `train.main` with the same words each time. Of two
processes the first, the second or both are killed; the benchmark then does to the other what torchrun does: SIGTERM,
and SIGKILL after 30 seconds. After every kill all checkpoints are verified, and none that was there may be missing
unless a later one is there. When a run has ended, every file of its folder is compared with that of an undisturbed run:
checkpoints, metrics, config and tokenizer, bit for bit, but for the seconds that steps took."""


class Watch:
    """In a process that is to be killed: keeps the process's cell up to date, and kills the process at the aim."""

    def __init__(self, cell: Path, aim: tuple[str, int] | None):
        """aim: a phase, and the number of the file operation in it before which the kill comes; for an evaluation, the
        number of milliseconds after which it comes."""
        with open(cell, "r+b") as file:
            self.cell = mmap.mmap(file.fileno(), CELL.size)
        self.aim = aim
        loop.train_step = self.during(loop.train_step, "step", "step")  # its line of figures still belongs to the step
        loop.evaluate = self.during(loop.evaluate, "evaluation", "step")
        train.train = self.during(train.train, "start", "end")
        for name, phase in (("_create", "checkpoint"), ("_write", "checkpoint"), ("_publish", "publishing")):
            setattr(checkpoint, name, self.during(getattr(checkpoint, name), phase, None))
        pwrite, fsync = os.pwrite, os.fsync
        os.pwrite = lambda to, data, at: (self.operation(lambda: pwrite(to, data[: len(data) // 2], at)),
                                          pwrite(to, data, at))[1]  # fmt: skip
        os.fsync = lambda to: (self.operation(), fsync(to))[1]
        sys.addaudithook(self.audit)

    @property
    def in_background(self) -> bool:
        return threading.current_thread().name.startswith("checkpoint")

    def set(self, phase: str | None) -> None:
        if self.in_background:
            self.cell[1] = 0 if phase is None else PHASES.index(phase) + 1
        else:
            self.cell[0] = PHASES.index(phase)
            if phase == "evaluation" and self.aim and self.aim[0] == phase:
                threading.Timer(self.aim[1] / 1_000, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def during(self, function, phase: str, then: str | None):
        @functools.wraps(function)
        def called(*args, **kwargs):
            self.set(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.set(then)

        return called

    def audit(self, event: str, arguments: tuple) -> None:
        if event not in EVENTS:
            return
        if self.in_background and self.cell[1]:
            source = os.path.basename(str(arguments[0]))
            if event == "shutil.rmtree" or (event == "os.rename" and source.startswith("step-")):
                self.set("removal")
            elif event == "os.mkdir":  # leftovers are gone by now
                self.set("checkpoint")
        self.operation()

    def operation(self, half=lambda: None) -> None:
        """Called just before a file operation. half: does a part of the operation."""
        at = self.cell[1] - 1 if self.in_background else self.cell[0]
        if at >= 0:
            place = 4 * (1 + at)
            (count,) = struct.unpack_from("I", self.cell, place)
            struct.pack_into("I", self.cell, place, count + 1)
            if self.aim == (PHASES[at], count + 1):
                half()
                os.kill(os.getpid(), signal.SIGKILL)


def _process(folder: Path, argv: list[str], environment: dict[str, str], cell: Path, aim) -> None:
    os.setsid()  # processes that it leaves behind are found by this session
    multiprocessing.set_start_method("fork", force=True)  # the default in a process that no forkserver has started
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ.update(environment)
    with open("log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    Watch(cell, aim)
    sys.exit(train.main(argv))


class Job:
    """One start of the command in a folder, by as many processes as it has ranks."""

    def __init__(self, folder: Path, argv: list[str], ranks: int, aim: tuple[str, int] | None = None, victim: int = 0):
        # like torchrun's agent, this process holds the store through which they find each other
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        self.cells, self.processes = [folder / f"cell-{rank}" for rank in range(ranks)], []
        for rank, cell in enumerate(self.cells):
            cell.write_bytes(bytes(CELL.size))
            environment = {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(ranks),
                "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True",
            } if self.store else {}  # fmt: skip
            of_rank = aim if rank == victim else None
            self.processes.append(PROCESSES.Process(target=_process, args=(folder, argv, environment, cell, of_rank)))
        for process in self.processes:
            process.start()

    def wait(self, seconds: float) -> bool:
        """Waits until one process has ended, at most so many seconds. Returns whether one has."""
        return bool(connection.wait([process.sentinel for process in self.processes], seconds))

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.processes[rank].kill()
        for rank in ranks:
            self.processes[rank].join()

    def end(self) -> Counter:
        """Ends a job of which one process has ended, as torchrun does. Counts the processes that had to be killed, and
        those that the job has left behind."""
        found = Counter()
        for process in self.processes:
            process.join(0.2 if self.failed() else PATIENCE)
            if process.is_alive():
                process.terminate()
        for process in self.processes:
            process.join(PATIENCE)
            if process.is_alive():
                found["processes that did not end"] += 1
                process.kill()
                process.join()
        found["processes left over"] = sum(len(_session(process.pid)) for process in self.processes)
        return found

    def met_its_aim(self) -> bool:
        return any(process.exitcode == -signal.SIGKILL for process in self.processes)

    def failed(self) -> bool:
        return any(process.exitcode not in (None, 0) for process in self.processes)

    def phase(self, rank: int) -> str:
        """What a rank was doing when it ended: the phase of its background thread, or else of its main thread."""
        main, background, *_ = CELL.unpack(self.cells[rank].read_bytes())
        return PHASES[background - 1 if background else main]

    def operations(self) -> dict[str, int]:
        return dict(zip(PHASES, CELL.unpack(self.cells[0].read_bytes())[2:]))


def _session(leader: int) -> list[str]:
    """The living processes of a session, except its leader."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # it has just ended
            continue
        if int(session) == leader and state != "Z" and int(process.name) != leader:
            found.append(process.name)
    return found


def content(run: Path) -> dict[str, object]:
    """The contents of a run's folder, by name, without times."""

    def of(path: Path) -> object:
        if path.name == "metrics.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]
        if path.name == "state.json":
            state = json.loads(path.read_text())
            return {**state, "checksum": "", "progress": {**state["progress"], "seconds": 0}}
        return sha256(path) if path.is_file() else ""

    return {str(path.relative_to(run)): of(path) for path in sorted(run.rglob("*"))}


class Trial:
    """Runs of `ranks` processes, which are killed until there have been `kills` kills."""

    def __init__(self, data: Path, folder: Path, ranks: int, kills: int, steps: int, seed: int):
        self.folder, self.ranks, self.kills, batch = folder, ranks, kills, ranks * TrainConfig.row_tokens
        self.draw, self.phases, self.found, self.saves = random.Random(seed), Counter(), Counter(), steps // 2
        self.argv = [
            "--data", str(data.resolve()), "--preset", "tiny", "--out", "run", "--train-tokens", str(steps * batch),
            "--tokens-per-batch", str(batch), "--micro-batch-rows", "1", "--learning-rate", "1e-3", "--eval-rows", "8",
            "--eval-every-tokens", str(3 * batch), "--checkpoint-every-tokens", str(2 * batch), "--timeout", "60",
        ]  # fmt: skip

    def __call__(self) -> Trial:
        self._disturb_none()
        while self.phases.total() < self.kills:
            folder = self._new_folder(f"run-{self.found['runs that ended'] + 1}")
            while phase := self._attempt(folder):
                self.phases[phase] += 1
                if self.phases.total() % 20 == 0:
                    print(f"{self.ranks} ranks: {dict(self.phases)}, {dict(+self.found)}", file=sys.stderr, flush=True)
            self._compare(folder)
        return self

    def _disturb_none(self) -> None:
        folder, began = self._new_folder("undisturbed"), time.perf_counter()
        job = Job(folder, self.argv, self.ranks)
        job.wait(LONG)
        if job.end().total() or job.failed():
            raise SystemExit(f"benchmarks.faults: the undisturbed run failed:\n{(folder / 'log').read_text()}")
        self.seconds, self.operations = time.perf_counter() - began, job.operations()
        self.expected = content(folder / "run")

    def _attempt(self, folder: Path) -> str:
        """Starts the command once. Returns the phase in which it was killed, or "" if it ended before."""
        saved = folder / "run" / "checkpoints"
        before = checkpoint.steps(saved)
        victims = self.draw.choice([[0]] if self.ranks == 1 else [[0], [1], [0, 1]])
        aim, delay = None, LONG
        if (
            self.phases.total() < self.kills
        ):  # soon: in the next quarter of the run, or before its next checkpoint is complete
            phase = self.draw.choice(AIMED)
            often = self.saves if phase in ("checkpoint", "publishing", "removal") else 1
            several = 100 if phase == "evaluation" else max(self.operations[phase] // often, 1)
            if self.draw.random() < 0.5:
                delay = self.draw.uniform(0, self.seconds / 4)
            else:
                aim = phase, self.draw.randint(1, several)
        job = Job(folder, self.argv, self.ranks, aim, victims[0])
        if not job.wait(delay) or job.met_its_aim():  # but not if it failed by itself
            job.kill(victims)
        self.found += job.end()
        killed = [rank for rank in victims if job.processes[rank].exitcode == -signal.SIGKILL]
        after = checkpoint.steps(saved)
        self.found["checkpoints lost"] += before[-1:] > after[-1:]
        for path in after:
            try:
                checkpoint.verify(path)
            except ValueError as error:
                print(error, file=sys.stderr)
                self.found["checkpoints damaged"] += 1
        if not killed and job.failed():
            self.found["starts that failed"] += 1
            print((folder / "log").read_text()[-2_000:], file=sys.stderr)
        return job.phase(killed[0]) if killed else ""

    def _compare(self, folder: Path) -> None:
        self.found["runs that ended"] += 1
        found = content(folder / "run")
        left_over = found.keys() - self.expected.keys()
        different = {name for name in self.expected if found.get(name) != self.expected[name]}
        self.found["files left over"] += len(left_over)
        self.found["results that differ"] += bool(different)
        if left_over or different:
            print(f"{folder}: left over {sorted(left_over)}, different {sorted(different)}", file=sys.stderr)
        shutil.rmtree(folder)

    def _new_folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder


def main() -> None:
    command = parser("faults", "--data data/prepared --kills 100")
    command.add_argument("--data", type=shards, required=True, metavar="SHARDS", help="folder that data.prepare wrote")
    command.add_argument("--kills", type=int, default=1_000, metavar="N", help="number of kills")
    command.add_argument("--steps", type=int, default=12, metavar="N", help="optimizer steps in each run")
    options = command.parse_args()
    of_two = options.kills // 5
    # two of each at the same time: while one waits for processes, another has the cores
    parts = [
        (1, (options.kills - of_two + 1) // 2),
        (1, (options.kills - of_two) // 2),
        (2, (of_two + 1) // 2),
        (2, of_two // 2),
    ]
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(len(parts), multiprocessing.get_context("spawn")) as pool,
    ):
        trials = [
            Trial(options.data.folder, Path(folder) / str(seed), ranks, kills, options.steps, seed)
            for seed, (ranks, kills) in enumerate(parts)
            if kills
        ]
        trials = [future.result() for future in [pool.submit(trial) for trial in trials]]
    minutes = (time.perf_counter() - began) / 60
    phases, found = (
        {n: sum((getattr(t, of) for t in trials if t.ranks == n), Counter()) for n in (1, 2)}
        for of in ("phases", "found")
    )
    rows = [[f"killed during {phase}", *(f"{phases[n][phase]:,}" for n in (1, 2))] for phase in PHASES]
    rows.append(["kills", *(f"{phases[n].total():,}" for n in (1, 2))])
    rows += [[name, *(f"{found[n][name]:,}" for n in (1, 2))] for name in ("runs that ended", *COUNTED)]
    lines = [
        "# Runs that are killed and started again",
        "",
        f"`python -m benchmarks.faults --kills {options.kills}`: runs of {options.steps} steps of `tiny` on rows of "
        f"2,048 tokens ({', '.join(options.data.meta['sources'])}), a checkpoint every 2 steps and an evaluation every "
        f"3; {minutes:.0f} minutes.",
        machine("torch") + ".",
        "",
        *table(["", "one process", "two processes"], rows),
        "",
        HOW,
    ]
    show(lines, "faults", options.write)
    if any(found[n][name] for n in (1, 2) for name in COUNTED):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
