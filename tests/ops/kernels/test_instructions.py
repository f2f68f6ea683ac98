"""What `benchmarks.compiled --count` counts: tiles as the kernels visit them, and loops in machine code."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.instructions import loops, visits

DOCUMENTS = np.array([0, 1, 64, 128, 193, 322, 622, 1_600])


@pytest.mark.parametrize("window", [None, 1, 5, 64, 300])
@pytest.mark.parametrize(("held", "visited"), [(16, 16), (64, 64), (128, 64), (64, 128), (128, 128)])
def test_visits_are_those_of_a_whole_matrix(held, visited, window):
    tokens = DOCUMENTS[-1]
    of = np.repeat(np.arange(len(DOCUMENTS) - 1), np.diff(DOCUMENTS))
    at = np.arange(tokens)
    sees = (of[:, None] == of) & (abs(at[:, None] - at) <= (tokens if window is None else window))
    expected = {"whole": 0, "masked": 0, "in reach": 0, "seen": int(sees.sum())}
    for first in range(0, tokens, held):
        rows = sees[first : first + held]
        lo, hi = np.flatnonzero(rows.any(0))[[0, -1]] + (0, 1)
        steps = [rows[:, n : n + visited] for n in range(lo, hi, visited)]
        # only whole steps can go without the mask, and only if the tile holds one document
        whole = sum(step.all() and step.shape[1] == visited for step in steps)
        expected["whole"] += whole * held * visited
        expected["masked"] += (len(steps) - whole) * held * visited
        expected["in reach"] += (hi - lo) * len(rows)
    assert visits(DOCUMENTS, held, visited, window) == expected


def test_a_tile_of_128_in_a_window_of_64_visits_little_beyond_its_reach():
    found = visits(np.arange(0, 20 * 700, 700), 128, 64, 64)
    assert (found["whole"] + found["masked"]) / found["in reach"] < 1.35


def test_the_innermost_loops_are_found_and_a_program_that_waits_at_its_end_is_none():
    code = [(0, "MOV"), (16, "outer"), (32, "inner"), (48, "@P0 BRA 0x20"), (64, "@!P1 BRA 0x10"), (80, "EXIT"),
            (96, "BRA 0x60")]  # fmt: skip
    assert loops(code) == [["inner", "@P0 BRA 0x20"]]
