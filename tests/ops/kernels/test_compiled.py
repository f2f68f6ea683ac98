"""The compile gate: every kernel as it ships, for three chips that this machine need not have."""

from __future__ import annotations

import pytest

from benchmarks.compiled import CHIPS, JOBS, SHARED_LIMIT, Compiled, compile_all, table


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    compiled = compile_all()
    print("\n".join(table(compiled)))
    return compiled


@pytest.mark.slow
def test_no_kernel_spills_registers_or_asks_for_more_shared_memory_than_the_chip_has(compiled):
    assert len(compiled) > 2 * len(JOBS)
    assert {c.chip for c in compiled} == set(CHIPS)
    assert [c for c in compiled if c.spilled] == []
    assert [c for c in compiled if c.shared > SHARED_LIMIT[c.chip]] == []
    assert all(16 <= c.registers <= 255 for c in compiled)


@pytest.mark.slow
def test_attention_in_half_precision_uses_each_chips_matrix_instructions(compiled):
    matrix = {"attention forward", "attention query gradient", "attention key gradient"}
    half = [c for c in compiled if c.kernel in matrix and c.dtype != "float32"]
    assert {(c.kernel, c.chip, c.width) for c in half} == {(k, chip, d) for k in matrix for chip in CHIPS
                                                           for d in (32, 64, 96, 128)}  # fmt: skip
    assert [c for c in half if not c.matrix] == []
