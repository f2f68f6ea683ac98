"""A command with all of its processes: the time, memory and disk that it takes, and what a kill leaves of it.

Memory is the largest sum, over all processes, of the proportional set size: a page that several of them share counts
once, and the page cache does not count. Disk is the largest sum of what lies in the place of the result, work files
included, and of files that are open but have no name any more, as SQLite's temporary ones. Linux only.
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
_BAR = re.compile(rb"(?:^|[\r\n])(\w+): +[\d.]+\w*(?:%\|| \[)")  # as tqdm writes one, of a known total or not


class Run(NamedTuple):
    """One run of data.prepare. cpu: seconds of all of its processes; memory, disk, elsewhere: the most at any time, in
    bytes; elsewhere: of the disk, what lies neither beside --out nor below it; stages: seconds of each bar."""

    code: int
    seconds: float
    cpu: float
    memory: int
    disk: int
    elsewhere: int
    stages: dict[str, float]
    message: str


class Session:
    """A command in a session of its own, so that its processes are known whoever their parent is by now.

    place: the folder that its result and work files go to. It has a temporary folder of its own beside that.
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
            os.sched_setaffinity(self.process.pid, cores)  # the processes that it starts inherit it
        self.bars: dict[str, tuple[float, float]] = {}  # when each was first and last seen
        self._errors = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()  # where this process is interrupted
        self.process.wait()

    def _read(self) -> None:
        while block := os.read(self.process.stderr.fileno(), 1 << 16):
            now = time.perf_counter() - self.start
            for name in _BAR.findall(block):
                self.bars[name.decode()] = self.bars.get(name.decode(), (now, now))[0], now
            self._errors = (self._errors + block)[-2_000:]

    def processes(self) -> list[int]:
        """The ids of those that live."""
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
        """Of these processes now, in bytes."""
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
        """(in the place, elsewhere), in bytes that are allocated now."""
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
        """Wait for its end. look: at memory and disk meanwhile, which takes a tenth of a core."""
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
        """Its last line on standard error, once it has ended."""
        self._reader.join(END)
        return self._errors.decode(errors="replace").strip().rpartition("\n")[2].rpartition("\r")[2]

    def outliving(self) -> int:
        """How many processes are left some seconds after their parent was killed; these are then killed too."""
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
