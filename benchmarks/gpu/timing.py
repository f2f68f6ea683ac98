"""Measures how long functions take on the device, and checks that two of them compute the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

FEWEST, MOST = 3, 50  # calls
SECONDS = 0.3  # that one measurement takes, about
FLUSH_BYTES = 1 << 30  # many times any L2; clearing it also gives the host time to queue the timed calls
# bf16 has 8 significant bits, so rounding is off by up to 2**-9; a few roundings in different orders differ by 0.3 %
TOLERANCE = 0.01


def seconds(function: Callable[[], object], device: torch.device, flush: bool = True) -> float:
    """The median over several calls, by the device's own clock. flush: empty the L2 cache before each call.

    All calls are queued before the host waits, so that launches cost as much as on a busy device. On a CPU it is one
    call, by the wall clock.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        function()
        return time.perf_counter() - began
    for _ in range(2):  # the first call compiles; the second shows how many calls there is time for
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


class Disagreement(Exception):
    """Two implementations of one operation gave different results. One of them is wrong, and it may be ours."""


def check(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference between the tensors of a pair: its root mean square, relative to that of ours.

    Raises Disagreement if it is more than TOLERANCE or not a number.
    """
    pairs = [(x.detach().float(), y.detach().float()) for x, y in zip(ours, theirs, strict=True)]
    worst = max((float((x - y).norm() / x.norm()) for x, y in pairs), key=lambda x: (x != x, x))
    if not worst <= TOLERANCE:
        raise Disagreement(f"differs from minisobert by {worst:.2g} (relative, rms), more than {TOLERANCE}")
    return worst


def both_ways(function: Callable, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The results of function(*inputs) and the gradients of the inputs, from `gradients`, those of the results."""
    results = function(*inputs)
    results = list(results) if isinstance(results, tuple) else [results]
    return [*results, *torch.autograd.grad(results, inputs, gradients)]


def measure(function, ours, inputs: list[Tensor], together: bool = False) -> dict:
    """Times forward and backward of function(*inputs), after a check of its results and gradients against those of
    `ours`, unless that is None. together: time the backward pass together with its forward pass."""
    device, result = inputs[0].device, {}
    outputs = function(*inputs)
    gradients = [torch.randn_like(each) for each in (outputs if isinstance(outputs, tuple) else [outputs])]

    def backward():
        if together:
            both_ways(function, inputs, gradients)
        else:
            torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)

    if ours:
        result["difference"] = check(both_ways(ours, inputs, gradients), both_ways(function, inputs, gradients))
    return result | {
        "forward_seconds": seconds(lambda: function(*inputs), device),
        "backward_seconds": seconds(backward, device),
    }
