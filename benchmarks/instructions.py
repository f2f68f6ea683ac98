"""Counts instructions in the loops of compiled kernels, for `python -m benchmarks.compiled --count`.

A multiprocessor issues 128 thread instructions per clock, whatever they do. So unless a kernel waits for memory, its
instructions per score of attention, or per element of a tensor, limit its speed. The count takes all instructions in
the innermost loops of the machine code, times the threads of a program, divided by the scores or elements that one
iteration computes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
PRODUCT = re.compile(r"\b(HGMMA|HMMA|UTCHMMA)\b")


def tool(name: str, cubin: bytes, *options: str) -> str:
    """The output for a compiled kernel of one of the CUDA tools that come with Triton."""
    import triton.backends.nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [str(Path(triton.backends.nvidia.__file__).parent / "bin" / name), *options, file.name]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """(address, text) of each instruction, in order."""
    return [(int(at, 16), text) for at, text in INSTRUCTION.findall(tool("cuobjdump", cubin, "-sass"))]


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions of the innermost loops, from the target of a backward jump to the jump itself."""
    jumps = [(int(found[1], 16), at) for at, text in code if (found := BRANCH.search(text))]
    jumps = sorted((to, at) for to, at in jumps if to < at)
    inner = [(a, b) for a, b in jumps if not any((c, d) != (a, b) and a <= c and d <= b for c, d in jumps)]
    return [[text for at, text in code if a <= at <= b] for a, b in inner]


def per_score(cubin: bytes, threads: int, scores: int) -> list[float]:
    """Instructions per score in attention's loops, the fewest first: for whole tiles, then for masked ones."""
    bodies = [body for body in loops(instructions(cubin)) if any(map(PRODUCT.search, body))]
    return sorted(len(body) * threads / scores for body in bodies)


def per_element(cubin: bytes, threads: int, elements: int) -> float:
    """Instructions per element of a kernel that works on tiles of `elements` elements, in a loop or once."""
    code = instructions(cubin)
    bodies = loops(code) or [[text for _, text in code if not text.startswith("NOP")]]
    return max(map(len, bodies)) * threads / elements


class Loop(NamedTuple):
    """Instructions per score: in tiles that all their rows see whole, and in masked tiles."""

    whole: float
    masked: float


def read_loops(page: str) -> dict[tuple[str, int, float], Loop]:
    """Attention's loops by kernel, head width and dropout, from the page that `benchmarks.compiled --count` writes."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| att")]
    return {(name, int(width), float(p)): Loop(float(whole), float(masked))
            for name, width, p, _, _, whole, masked, *_ in rows}  # fmt: skip


def visits(bounds: np.ndarray, held: int, visited: int, window: int | None = None) -> dict[str, int]:
    """Numbers of scores of one head over the documents.

        whole, masked    computed in tiles that all rows see whole, and in masked tiles, as the kernels visit them
        in reach         the rows of each tile times the tokens that any of them sees
        seen             of pairs that see each other

    bounds: (D+1,); held, visited: rows that a program holds and tokens that it visits at a time.
    """
    tokens = int(bounds[-1])
    far = tokens if window is None else window
    start, stop = (np.repeat(side, np.diff(bounds)) for side in (bounds[:-1], bounds[1:]))
    at = np.arange(tokens)
    pairs = np.minimum(stop, at + far + 1) - np.maximum(start, at - far)
    first = np.arange(0, tokens, held)
    last = np.minimum(first + held, tokens) - 1
    one = start[last] == start[first]
    begin, end = np.maximum(start[first], last - far), np.minimum(stop[last], first + far + 1)  # which all rows see
    lo, hi = np.maximum(start[first], first - far), np.minimum(stop[last], last + far + 1)
    full = lo + -(-(begin - lo) // visited) * visited
    whole = np.where(one, np.maximum(end - full, 0) // visited, 0)
    full = np.where(whole > 0, full, hi)  # without a whole tile, all tiles from lo on are masked
    masked = -(-(full - lo) // visited) + np.where(whole > 0, -(-(hi - full - whole * visited) // visited), 0)
    return {
        "whole": int(whole.sum()) * held * visited,
        "masked": int(masked.sum()) * held * visited,
        "in reach": int(((hi - lo) * (last + 1 - first)).sum()),
        "seen": int(pairs.sum()),
    }
