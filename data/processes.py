"""The processes of data.prepare: how they start, give their results in order, and end with their parent."""

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

LOOK_AHEAD = 2 + 2 * (os.cpu_count() or 1)  # tasks that are being worked on, or wait
_PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def count(workers: int | None) -> int:
    """Of processes; by default one for each core that this process may use."""
    return workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextmanager
def pool(workers: int, begin: Callable, *arguments) -> Iterator[ProcessPoolExecutor | None]:
    """The processes; None for a single one, where everything runs in this process. begin(*arguments) is called in each
    of them first."""
    if workers == 1:
        begin(*arguments)
        yield None
        return
    executor = ProcessPoolExecutor(workers, _PROCESSES, _begin, (begin, *arguments))
    try:
        with _undisturbed():
            executor.submit(int)  # starts them all, before there are threads that a fork could catch in a wrong moment
        yield executor
    except BrokenProcessPool:
        raise ValueError("a worker process died, perhaps for lack of memory; try fewer --workers") from None
    finally:
        executor.shutdown(cancel_futures=True)


def in_order(executor: ProcessPoolExecutor | None, function: Callable, items: Iterable) -> Iterator[tuple]:
    """(item, function(item)) in order, computed by the processes a few items ahead: `items` may be endless."""
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
    """What function(*arguments) returns or raises, from a process of its own: one that is to take minutes in C++, in
    which this one could not be interrupted. died: what to say where the process ends without an answer."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_call_and_send, args=(sender, function, *arguments), daemon=True)
    with _undisturbed():
        process.start()
    sender.close()  # or the end of the process would not be the end of the pipe
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
    """Processes that start in this block get signals only when `_begin` has said what to do about them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(begin: Callable = lambda: None, *arguments) -> None:
    """In a new process: leaves Ctrl-C to the parent, and ends when the parent does, be it by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*arguments)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
