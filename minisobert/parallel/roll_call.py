"""The roll call: which process is to blame when a collective times out, and how the processes of a failed job end.

A dead process and one that hangs look the same to those that wait for them. So the first process to give up starts a
roll call through torchrun's store. A background thread in each process answers with the number of per-step exchanges
("meetings") that its process has completed. A rank that does not answer is dead or stopped; one that answers, but has
completed fewer than the others, hangs. The line that says so appears within --timeout, so processes wait for each other
for somewhat less (`patience`).

The processes that answered exit, and torchrun then sends SIGTERM to the others. A stopped process does not react to it,
and torchrun would send SIGKILL only after 30 seconds. So the processes on the same machine kill it at once (`kill`). If
torchrun itself dies, its processes save and exit by themselves (`ParentWatch`).
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

ROLL_CALL = 4.0  # seconds to answer a roll call; fewer if --timeout is short
POLL = 0.5  # seconds between two checks for a roll call, or for the end of torchrun


def store_of_this_attempt(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """The part of torchrun's store that only this attempt of the job uses.

    torchrun restarts a failed job with the same store, which still holds the addresses of the dead processes, and the
    agents on several machines may count attempts differently. So rank 0 makes up a name for the attempt and gives it
    to each rank that is here now. An example, in which rank 1 died once before:

        here/1 = "old"                     left over: rank 0 may answer it, but no rank reads the answer
        here/1 = "n1"                      the new rank 1 says that it is here
        attempt/1/n1 = "a0"                rank 0 gives it the name "a0"
        seen/1/a0                          rank 1 has the name. When all have, they use the keys a0/…
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
    """The process of a rank, and its machine."""

    host: str  # the machine's name
    machine: str  # boot id of the kernel and namespace of pids; "" on a system without /proc
    pid: int
    started: str  # when; a pid can be reused by another process

    @classmethod
    def own(cls) -> Process:
        machine = ""
        with suppress(OSError):
            machine = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
        return cls(socket.gethostname(), machine, os.getpid(), _started(os.getpid()))


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did; "" if no process has the pid, or without /proc."""
    with suppress(OSError):
        # proc(5): the start is field 22. The name before ")" may hold spaces; field 3 is the first after it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[22 - 3]
    return ""


def kill(process: Process) -> None:
    """Sends SIGKILL to a process on this machine, if it still exists."""
    with suppress(OSError):  # it has ended, or this system has no such handles
        # a handle stays with its process even if the pid is reused, so no other process gets the signal
        handle = os.pidfd_open(process.pid)
        if _started(process.pid) == process.started:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


def seconds_to_answer(timeout: float) -> float:
    return min(ROLL_CALL, max(timeout / 3, 2 * POLL))


def patience(timeout: float) -> float:
    """Seconds that a process waits for others, short enough that the roll call ends within `timeout`."""
    return max(timeout - seconds_to_answer(timeout) - 2 * POLL, timeout / 2)


class ParentWatch(threading.Thread):
    """Ends this process within `timeout` seconds after the torchrun that started it has died.

    Without torchrun the processes could continue to train, but nobody would see or stop them, and the same command
    given again would find the run's folder in use. So this process sends itself the SIGTERM that torchrun should have
    sent. The run saves after its step and all processes exit, also those on machines whose torchrun is alive.
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
        self.processes: list[Process] = []  # of all ranks, once they have been exchanged
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
        """The ranks that have answered, with the number of meetings that each has completed."""
        return {r: int(self.store.get(f"alive/{r}")) for r in ranks if self.store.check([f"alive/{r}"])}

    def neighbours(self) -> list[int]:
        """The ranks on this machine, as far as known."""
        own = Process.own().machine
        return [rank for rank, process in enumerate(self.processes) if own and process.machine == own]

    def kill_missing(self, came: dict[int, int]) -> None:
        for rank in self.neighbours():
            if rank not in came:
                kill(self.processes[rank])

    def give_up(self, error: RuntimeError) -> None:
        """Ends the process. The first process to get here calls the roll and prints which rank is to blame."""
        # in a thread, since a request to a store on an unreachable machine blocks for many minutes
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
            time.sleep(2)  # it may host the store, which others still read
        os._exit(1)  # threads and other processes that hang must not delay this exit

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
    """Calls the roll and, after a while, collects the answers."""

    def __init__(self, roll_call: RollCall):
        super().__init__(daemon=True)
        self.roll_call = roll_call
        self.first, self.came = True, None  # until the store has answered

    def run(self) -> None:
        with suppress(RuntimeError, OSError):  # the store is gone
            self.first = self.roll_call.store.add("roll-call", 1) == 1
            self.roll_call.answer()
            time.sleep(self.roll_call.seconds)
            # if each of many processes asked for all ranks, the store would be busy for seconds
            self.came = self.roll_call.came(range(self.roll_call.world) if self.first else self.roll_call.neighbours())


def _say(line: str) -> None:
    with suppress(OSError):  # the reader of standard error is gone
        print("\n" + line, file=sys.stderr, flush=True)  # below the progress bar


def lost_contact(error: RuntimeError) -> bool:
    """Whether a collective raised the error; gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {words(ranks, 'and')}"
