"""The roll call: when a collective times out, which process is to blame?

A process that has died and one that hangs look the same to those that wait for them. So the first process to give up
starts a roll call through torchrun's store. A background thread in each process answers with the number of per-step
exchanges ("meetings") that its process has completed. A rank that does not answer is dead or stopped; one that answers,
but has completed fewer than the others, hangs.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time

import torch.distributed as dist

from minisobert.cli import words

ROLL_CALL = 4.0  # seconds in which who is alive has to answer


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
            raise RuntimeError(f"{_ranks(missing)} did not come within --timeout {timeout:g} seconds")
        for r in missing:
            if store.check([f"here/{r}"]):
                store.set(f"attempt/{r}/{store.get(f'here/{r}').decode()}", attempt)
        time.sleep(0.02)
    return dist.PrefixStore(attempt, store)


class RollCall(threading.Thread):
    """Answers a roll call for this process, whose main thread may be stuck in a collective, then ends the process."""

    def __init__(self, store: dist.Store, rank: int, world: int):
        super().__init__(daemon=True, name="roll-call")
        self.store, self.rank, self.world = store, rank, world
        self.meetings, self.stop = 0, threading.Event()

    def run(self) -> None:
        try:
            while not self.stop.wait(0.5):
                if self.store.check(["roll-call"]):
                    self.answer()
                    if not self.stop.wait(ROLL_CALL + 1):
                        os._exit(1)
        except (RuntimeError, OSError):  # the store is gone, as at the end of every job
            return

    def answer(self) -> None:
        self.store.set(f"alive/{self.rank}", str(self.meetings))

    def give_up(self, error: RuntimeError) -> None:
        """Ends the process. The first one to get here calls the roll and prints which rank is to blame."""
        who, first = "torchrun's store does not answer", True
        try:
            first = self.store.add("roll-call", 1) == 1
            self.answer()
            time.sleep(ROLL_CALL)
            came = {r: int(self.store.get(f"alive/{r}")) for r in range(self.world) if self.store.check([f"alive/{r}"])}
            missing = [rank for rank in range(self.world) if rank not in came]
            late = [rank for rank, meetings in came.items() if meetings < max(came.values())]
            who = (
                f"{_ranks(missing)} did not answer" if missing
                else f"{_ranks(late)} answered, but hung" if late
                else "all processes answered, but lost their connections"
            )  # fmt: skip
        except (RuntimeError, OSError):
            pass
        if first:
            reason = " ".join(str(error).split())[:200]
            print(
                f"{who}; rank {self.rank} on {socket.gethostname()} gave up waiting ({reason}). Repeat the command to "
                "resume from the last checkpoint",
                file=sys.stderr,
            )
        sys.stdout.flush()
        sys.stderr.flush()
        if self.rank == 0:
            time.sleep(2)  # it may keep the store, in which others still look
        os._exit(1)  # threads and other processes that hang must not hold this one


def lost_contact(error: RuntimeError) -> bool:
    """Whether the error is a collective's: gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {words(ranks, 'and')}"
