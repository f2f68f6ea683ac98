"""The compile gate: every kernel, as it ships, compiles for three chips that this machine need not have."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import product

import pytest

from benchmarks.compiled import (
    CHIPS,
    JOBS,
    MATRIX_INSTRUCTION,
    SHARED_LIMIT,
    Compiled,
    _no_interpreter,
    _without_launching,
    add_norm,
    compile_all,
    result,
)

# Bytes. Tiles were chosen with Triton 3.9. With older versions, of which setup.cfg allows 3.6 and later, some kernels
# spill a few registers (docs/kernels.md says which); this costs little time and changes no result.
SPILLED = 0 if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) else 48


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    compiled = compile_all()
    print("\n".join(result(compiled)))
    return compiled


@pytest.mark.slow
def test_no_kernel_spills_registers_or_asks_for_more_shared_memory_than_the_chip_has(compiled):
    assert len(compiled) > 2 * len(JOBS)
    assert {c.chip for c in compiled} == set(CHIPS)
    assert {c.kernel for c in compiled} >= {
        "add norm backward", "add norm backward, last block", "cross entropy parts", "add norm forward, no biases",
        "add norm backward, last block, no biases", "bias gelu backward, tanh, no biases", "rotary",
        "rotary back", "gated gelu forward", "gated gelu backward, tanh",
    }  # fmt: skip
    assert [c for c in compiled if c.spilled > SPILLED] == []
    assert [c for c in compiled if c.shared > SHARED_LIMIT[c.chip]] == []
    assert all(16 <= c.registers <= 255 for c in compiled)


@pytest.mark.slow
def test_attention_in_half_precision_uses_each_chips_matrix_instructions(compiled):
    matrix = {"attention forward", "attention query gradient", "attention key gradient"}
    modern = {  # the forward does not know of rotary positions
        "attention forward, window", "attention query gradient, rotary", "attention query gradient, rotary, window",
        "attention key gradient, rotary", "attention key gradient, rotary, window",
    }  # fmt: skip
    half = [c for c in compiled if c.kernel in matrix | modern and c.dtype != "float32"]
    expected = {*product(matrix, CHIPS, (32, 64, 96, 128)), *product(modern, CHIPS, (64,))}
    assert {(c.kernel, c.chip, c.width) for c in half} == expected
    assert [c for c in half if c.matrix != (MATRIX_INSTRUCTION[c.chip],)] == []


def _compiled_for(sizes) -> dict[str, int]:
    """Kernel → how many versions were compiled for these numbers of rows."""
    import torch

    from minisobert.ops.kernels.cross_entropy import cross_entropy

    found: dict[str, set[str]] = {}
    for rows in sizes:
        with _without_launching(90) as compiled:
            add_norm("bfloat16", 768, 0.1, rows)
            x = torch.zeros(rows, 3_072, dtype=torch.bfloat16, requires_grad=True)
            cross_entropy(x * 1, torch.zeros(rows, dtype=torch.int64)).sum().backward()
        for kernel in compiled:
            found.setdefault(f"{kernel.src.fn.__module__} {kernel.metadata.name}", set()).add(kernel.hash)
    return {name: len(hashes) for name, hashes in found.items()}


def test_no_kernel_is_compiled_again_for_another_number_of_rows():
    """Arrays of T or M numbers that share a buffer begin at addresses that depend on these numbers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _no_interpreter) as pool:
        found = pool.submit(_compiled_for, range(101, 105)).result()
    assert len(found) == 4 and set(found.values()) == {1, 2}, found
