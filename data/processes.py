"""The processes of data.prepare: how they start, return results in order, and end when their parent does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection

LOOK_AHEAD = 2 + 2 * (os.cpu_count() or 1)  # tasks that are being worked on or are waiting
_PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def count(workers: int | None) -> int:
    """The number of processes: `workers` or, if it is None, one for each core that this process may use."""
    return workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextmanager
def pool(workers: int, begin: Callable, *arguments) -> Iterator[ProcessPoolExecutor | None]:
    """Starts the processes; each calls begin(*arguments) first. With one worker everything runs in this process, and
    the pool is None. Raises ValueError if a process dies."""
    if workers == 1:
        begin(*arguments)
        yield None
        return
    executor = ProcessPoolExecutor(workers, _PROCESSES, _begin, (begin, *arguments))
    try:
        with _undisturbed():
            executor.submit(int)  # starts all of them now: a fork while other threads run could copy a held lock
        yield executor
    except BrokenProcessPool:
        raise ValueError("a worker process died, perhaps for lack of memory; try fewer --workers") from None
    finally:
        executor.shutdown(cancel_futures=True)


def in_order(executor: ProcessPoolExecutor | None, function: Callable, items: Iterable) -> Iterator[tuple]:
    """Yields (item, function(item)) in order. The processes are only a few items ahead, so `items` may be endless."""
    if executor is None:
        for item in items:
            yield item, function(item)
        return
    waiting: deque = deque()
    for item in items:
        waiting.append((item, executor.submit(function, item)))
        if len(waiting) > LOOK_AHEAD:
            item, future = waiting.popleft()
            yield item, future.result()
    for item, future in waiting:
        yield item, future.result()


def call(function: Callable, *arguments, died: str):
    """Calls function(*arguments) in a process of its own, and returns or raises what it does. It is for a function that
    spends minutes in C++, during which Ctrl-C could not interrupt this process. died: the message of the ValueError if
    the process ends without an answer."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_call_and_send, args=(sender, function, *arguments), daemon=True)
    with _undisturbed():
        process.start()
    sender.close()  # otherwise the pipe would stay open when the process ends
    try:
        answer = receiver.recv()
    except EOFError:
        raise ValueError(died) from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _call_and_send(sender: Connection, function: Callable, *arguments) -> None:
    _begin()
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send(error)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Processes that start in this block receive signals only after `_begin` has set up their handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(begin: Callable = lambda: None, *arguments) -> None:
    """In a new process: leaves Ctrl-C to the parent, and ends when the parent does, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*arguments)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
