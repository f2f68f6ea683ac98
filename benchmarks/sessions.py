"""Runs a command and measures all its processes: the time, memory and disk they take, and what is left after a kill.

Memory is the largest sum of the proportional set sizes of all processes: a page that several of them share counts once,
and the page cache does not count. Disk is the largest sum of the files in the place of the result, work files included,
and of open files that have no name any more, such as SQLite's temporary ones. Linux only.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAUSE = 0.1  # seconds between two looks at the processes
END = 10  # seconds that processes have to end after their parent was killed
_BAR = re.compile(rb"(?:^|[\r\n])(\w+): +[\d.]+\w*(?:%\|| \[)")  # a bar of tqdm, whether its total is known or not


class Run(NamedTuple):
    """One run of data.prepare. cpu: seconds of all its processes; memory, disk, elsewhere: the most at any time, in
    bytes; elsewhere: the part of the disk that is neither in --out nor beside it; stages: seconds of each bar."""

    code: int
    seconds: float
    cpu: float
    memory: int
    disk: int
    elsewhere: int
    stages: dict[str, float]
    message: str


class Session:
    """A command in a session of its own, by which its processes are found even if their parents have ended.

    place: the folder of its result and work files. It also gets a temporary folder of its own beside that.
    """

    def __init__(self, command: Sequence[str], place: Path, cores: Sequence[int] = ()):
        self.place, self.temporary = place, place.with_name(f"{place.name}.tmp")
        self.temporary.mkdir(exist_ok=True)
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )  # fmt: skip
        if cores:
            os.sched_setaffinity(self.process.pid, cores)  # the processes that it starts inherit them
        self.bars: dict[str, tuple[float, float]] = {}  # seconds at which each bar was first and last seen
        self._errors = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()  # if this process was interrupted
        self.process.wait()

    def _read(self) -> None:
        while block := os.read(self.process.stderr.fileno(), 1 << 16):
            now = time.perf_counter() - self.start
            for name in _BAR.findall(block):
                self.bars[name.decode()] = self.bars.get(name.decode(), (now, now))[0], now
            self._errors = (self._errors + block)[-2_000:]

    def processes(self) -> list[int]:
        """The ids of the living processes."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat") as file:
                    state, _, _, session = file.read().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(session) == self.process.pid and state not in "ZX":
                found.append(int(name))
        return found

    def memory(self, processes: Sequence[int]) -> int:
        """The memory of these processes now, in bytes."""
        total = 0
        for process in processes:
            try:
                with open(f"/proc/{process}/smaps_rollup") as file:
                    text = file.read()
            except (FileNotFoundError, ProcessLookupError):
                continue
            total += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
        return total

    def disk(self, processes: Sequence[int]) -> tuple[int, int]:
        """The bytes allocated now (in the place, elsewhere)."""
        sizes: dict[bool, dict] = {True: {}, False: {}}
        for here, folder in ((True, self.place), (False, self.temporary)):
            for at, _, names in os.walk(folder):
                for name in names:
                    _add(sizes[here], os.path.join(at, name))
        for process in processes:
            for link in Path(f"/proc/{process}/fd").glob("*"):
                try:
                    target = os.readlink(link)
                except OSError:
                    continue
                if target.endswith(" (deleted)") and not target.startswith(("/memfd:", "/dev/shm/", "/dev/zero")):
                    _add(sizes[target.startswith(f"{self.place}/")], link)
        return sum(sizes[True].values()), sum(sizes[False].values())

    def measure(self, look: bool = True) -> Run:
        """Waits for the end of the command. look: watch memory and disk meanwhile, which takes a tenth of a core."""
        memory = disk = elsewhere = 0
        while True:
            if look:
                processes = self.processes()
                memory = max(memory, self.memory(processes))
                here, there = self.disk(processes)
                disk, elsewhere = max(disk, here + there), max(elsewhere, there)
            process, status, usage = os.wait4(self.process.pid, os.WNOHANG if look else 0)
            if process:
                break
            time.sleep(PAUSE)
        seconds = time.perf_counter() - self.start
        self.process.returncode = os.waitstatus_to_exitcode(status)
        cpu, message = usage.ru_utime + usage.ru_stime, self.message()
        stages = {name: last - first for name, (first, last) in self.bars.items()}
        return Run(self.process.returncode, seconds, cpu, memory, disk, elsewhere, stages, message)

    def message(self) -> str:
        """The command's last line on standard error, once it has ended."""
        self._reader.join(END)
        return self._errors.decode(errors="replace").strip().rpartition("\n")[2].rpartition("\r")[2]

    def outliving(self) -> int:
        """How many processes are left END seconds after their parent was killed; these are then killed too."""
        until = time.perf_counter() + END
        while (left := self.processes()) and time.perf_counter() < until:
            time.sleep(0.02)
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return len(left)


def _add(sizes: dict, path: str | Path) -> None:
    try:
        found = os.stat(path)
    except OSError:  # it is gone already
        return
    if stat.S_ISREG(found.st_mode):
        sizes[found.st_dev, found.st_ino] = found.st_blocks * 512
