"""How long a function takes on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

FEWEST, MOST = 3, 50  # calls
SECONDS = 0.3  # of one measurement, about
FLUSH_BYTES = 1 << 30  # many times any L2; clearing it also gives the host time to queue what is timed


def seconds(function: Callable[[], object], device: torch.device, flush: bool = True) -> float:
    """The median over several calls, by the device's own clock. flush: what is read first is not left in its caches.

    Everything is queued before anything is waited for, so that launches cost what they cost a busy device. On a CPU:
    one call, by the wall clock.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        function()
        return time.perf_counter() - began
    for _ in range(2):  # the first compiles and chooses; the second says how many calls there is time for
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
    calls = min(max(int(SECONDS / (time.perf_counter() - began)), FEWEST), MOST)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    much = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if flush else None
    for start, stop in events:
        if flush:
            much.zero_()
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Of two results, the root mean square of the difference over that of the first."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / ours.norm())


class Disagreement(Exception):
    """Two implementations of the same thing gave different results: one of them is wrong, and may be ours."""


def check(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> float:
    """The largest difference of the pairs. Raises Disagreement where it is more than tolerance, or not a number."""
    worst = max((difference(*pair) for pair in zip(ours, theirs)), key=lambda x: (x != x, x))
    if not worst <= tolerance:
        raise Disagreement(f"differs from minisobert by {worst:.2g} (relative, rms), more than {tolerance}")
    return worst
