"""The roll call: when a collective times out, which process is to blame? And how the processes of a failed job end.

A process that has died and one that hangs look the same to those that wait for them. So the first process to give up
starts a roll call through torchrun's store. A background thread in each process answers with the number of per-step
exchanges ("meetings") that its process has completed. A rank that does not answer is dead or stopped; one that answers,
but has completed fewer than the others, hangs. The line that says so appears within --timeout, so processes wait for
each other for somewhat less (`patience`).

Those that are left end, and torchrun then sends the others SIGTERM. A stopped process does not react to that, and
torchrun would wait 30 seconds before it sends SIGKILL. So the processes on the same machine kill it at once (`kill`).
Where it is torchrun that has died, its processes save and end by themselves (`ParentWatch`).
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from minisobert.cli import words

ROLL_CALL = 4.0  # seconds in which who is alive has to answer; fewer where --timeout is short
POLL = 0.5  # seconds between two looks whether the roll is called, or torchrun gone


def store_of_this_attempt(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """The part of torchrun's store that this attempt of the job uses alone.

    torchrun restarts a job whose process died, with the same store, in which the addresses of the dead processes still
    are; and the agents of several machines may count attempts differently. So the first rank makes up a name for the
    attempt and hands it to each rank that is here now. An example, in which rank 1 died once before:

        here/1 = "old"                     left over: rank 0 may answer it, and nobody reads that answer
        here/1 = "n1"                      the new rank 1 says that it is here
        attempt/1/n1 = "a0"                rank 0 gives it the name "a0"
        seen/1/a0                          rank 1 has it. When all have, everybody uses the keys a0/…
    """
    attempt = nonce = secrets.token_hex(8)
    store.set(f"here/{rank}", nonce)
    if rank:
        attempt = store.get(f"attempt/{rank}/{nonce}").decode()  # waits
        store.set(f"seen/{rank}/{attempt}", "")
        return dist.PrefixStore(attempt, store)
    until, missing = time.monotonic() + timeout, list(range(1, world))
    while missing := [r for r in missing if not store.check([f"seen/{r}/{attempt}"])]:
        if time.monotonic() > until:
            raise RuntimeError(f"{_ranks(missing)} did not join within --timeout {timeout:g} seconds")
        for r in missing:
            if store.check([f"here/{r}"]):
                store.set(f"attempt/{r}/{store.get(f'here/{r}').decode()}", attempt)
        time.sleep(0.02)
    return dist.PrefixStore(attempt, store)


class Process(NamedTuple):
    """Which process on which machine a rank is."""

    host: str  # as a person calls the machine
    machine: str  # the boot of its kernel and the namespace of its pids; "" where the system has no /proc
    pid: int
    started: str  # when; a pid that has become free is given to another process

    @classmethod
    def own(cls) -> Process:
        machine = ""
        with suppress(OSError):
            machine = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
        return cls(socket.gethostname(), machine, os.getpid(), _started(os.getpid()))


def _started(pid: int) -> str:
    """In ticks since the machine started; "" for a pid that no process has, and without /proc."""
    with suppress(OSError):
        # proc(5): the start is field 22. The name before ")" may hold spaces; field 3 is the first after it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[22 - 3]
    return ""


def kill(process: Process) -> None:
    """SIGKILL for a process of this machine, if it is still there."""
    with suppress(OSError):  # it has ended, or this system has no such handles
        # a handle stays with its process, whoever gets the pid later. So nobody else can take the signal
        handle = os.pidfd_open(process.pid)
        if _started(process.pid) == process.started:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


def seconds_to_answer(timeout: float) -> float:
    return min(ROLL_CALL, max(timeout / 3, 2 * POLL))


def patience(timeout: float) -> float:
    """Seconds that a process waits for others, so that the roll call ends within `timeout`."""
    return max(timeout - seconds_to_answer(timeout) - 2 * POLL, timeout / 2)


class ParentWatch(threading.Thread):
    """Ends this process within `timeout` seconds of a sudden end of the torchrun that started it.

    Without torchrun the processes could train on, but nobody would see or stop them, and the same command given again
    would find the run's folder in use. So this process sends itself the SIGTERM that torchrun should have sent: a run
    saves after its step, and all processes leave, also those on machines whose torchrun is alive.
    """

    def __init__(self, timeout: float):
        super().__init__(daemon=True, name="parent-watch")
        self.timeout, self.stop, self.parent = timeout, threading.Event(), os.getppid()

    def run(self) -> None:
        while os.getppid() == self.parent:
            if self.stop.wait(POLL):
                return
        if os.environ.get("LOCAL_RANK") == "0":
            _say(f"torchrun on {socket.gethostname()} (pid {self.parent}) is gone; its processes save and exit")
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.stop.wait(self.timeout - 2 * POLL):
            _say(f"rank {os.environ.get('RANK')} exited without saving: --timeout {self.timeout:g} seconds are over")
            os._exit(1)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *exception) -> None:
        self.stop.set()
        self.join()


class RollCall(threading.Thread):
    """Answers a roll call for this process, whose main thread may be stuck in a collective, then ends the process."""

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float):
        super().__init__(daemon=True, name="roll-call")
        self.store, self.rank, self.world, self.seconds = store, rank, world, seconds_to_answer(timeout)
        self.processes: list[Process] = []  # of all ranks, as soon as they have told each other
        self.meetings, self.stop = 0, threading.Event()

    def run(self) -> None:
        try:
            while not self.stop.wait(POLL):
                if self.store.check(["roll-call"]):
                    self.answer()
                    if not self.stop.wait(self.seconds + 2 * POLL):
                        with suppress(RuntimeError, OSError):
                            self.kill_missing(self.came(self.neighbours()))
                        os._exit(1)
        except (RuntimeError, OSError):  # the store is gone, as at the end of every job
            return

    def answer(self) -> None:
        self.store.set(f"alive/{self.rank}", str(self.meetings))

    def came(self, ranks: Iterable[int]) -> dict[int, int]:
        """Which of them have answered, and how many meetings each has completed."""
        return {r: int(self.store.get(f"alive/{r}")) for r in ranks if self.store.check([f"alive/{r}"])}

    def neighbours(self) -> list[int]:
        """The ranks on this machine, as far as that can be told."""
        own = Process.own().machine
        return [rank for rank, process in enumerate(self.processes) if own and process.machine == own]

    def kill_missing(self, came: dict[int, int]) -> None:
        for rank in self.neighbours():
            if rank not in came:
                kill(self.processes[rank])

    def give_up(self, error: RuntimeError) -> None:
        """Ends the process. The first one to get here calls the roll and prints which rank is to blame."""
        # in a thread, since a store on a machine that cannot be reached keeps who asks it for many minutes
        call = _Call(self)
        call.start()
        call.join(self.seconds + POLL)
        if call.first:
            reason = " ".join(str(error).split())[:200]
            _say(
                f"{self.verdict(call.came)}; rank {self.rank} on {socket.gethostname()} gave up waiting ({reason}). "
                "Repeat the command to resume from the last checkpoint"
            )
        sys.stdout.flush()
        if call.came is not None:
            self.kill_missing(call.came)
        if self.rank == 0:
            time.sleep(2)  # it may keep the store, in which others still look
        os._exit(1)  # threads and other processes that hang must not hold this one

    def verdict(self, came: dict[int, int] | None) -> str:
        if came is None:
            return f"torchrun's store on {os.environ.get('MASTER_ADDR')} does not answer"
        if missing := [rank for rank in range(self.world) if rank not in came]:
            return f"{self.named(missing)} did not answer"
        if late := [rank for rank, meetings in came.items() if meetings < max(came.values())]:
            return f"{self.named(late)} answered, but hung"
        return f"all processes{self.hosts(came)} answered, but lost their connections"

    def named(self, ranks: list[int]) -> str:
        """rank 3 (host node2), or: ranks 2 and 3 (host node2)"""
        return _ranks(ranks) + self.hosts(ranks)

    def hosts(self, ranks: Iterable[int]) -> str:
        hosts = dict.fromkeys(self.processes[rank].host for rank in ranks) if self.processes else {}
        return f" (host{'s' if len(hosts) > 1 else ''} {words(list(hosts), 'and')})" if hosts else ""


class _Call(threading.Thread):
    """Calls the roll, and asks after a while who came."""

    def __init__(self, roll_call: RollCall):
        super().__init__(daemon=True)
        self.roll_call = roll_call
        self.first, self.came = True, None  # as long as the store has not answered

    def run(self) -> None:
        with suppress(RuntimeError, OSError):  # the store is gone
            self.first = self.roll_call.store.add("roll-call", 1) == 1
            self.roll_call.answer()
            time.sleep(self.roll_call.seconds)
            # where each of many asked after all, the store would be busy for seconds
            self.came = self.roll_call.came(range(self.roll_call.world) if self.first else self.roll_call.neighbours())


def _say(line: str) -> None:
    with suppress(OSError):  # whoever read it is gone
        print("\n" + line, file=sys.stderr, flush=True)  # below the bar


def lost_contact(error: RuntimeError) -> bool:
    """Whether the error is a collective's: gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {words(ranks, 'and')}"
