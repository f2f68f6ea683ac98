"""Compiles every kernel, as it ships, for three chips, without having one: `python -m benchmarks.compiled`.

It takes ten minutes on two cores and lists each kernel's registers, spills and shared memory. `--count` takes half a
minute and counts the instructions in the loops of the kernels that an H100 runs in training.

The operations run as usual, on small CPU tensors. Only the launch is left out, and Triton is told that the chip is
there. So tiles, constants and divisibility are those of a real launch.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import product

from benchmarks import parser, show
from benchmarks.instructions import per_element, per_score, tool, visits
from minisobert.cli import table

CHIPS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per program (CUDA C++ guide, table 26)
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
DTYPES = ("bfloat16", "float16", "float32")
NORM_WIDTHS = (128, 256, 512, 768, 1_536, 3_000, 4_096, 5_000, 8_191, 8_192)  # all tiles, and some unaligned rows
MODERN = {768: 1_152, 1_024: 2_624}  # hidden → FFN width: modern-base, modern-large
TOKENS = 200


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one chip."""

    kernel: str
    dtype: str
    width: int
    dropout: float
    chip: int
    warps: int
    stages: int
    registers: int  # per thread
    spilled: int  # bytes of stack per thread
    shared: int  # bytes per program
    matrix: tuple[str, ...]  # its matrix instructions, those of other chips too


def attention(dtype: str, width: int, dropout: float, window: int | None = None, rotary: bool = False) -> None:
    """Runs attention with a bias, as in megatron-bert, or with rotary positions, as in modernbert."""
    import torch

    from minisobert.ops import Documents
    from minisobert.ops.kernels.attention import self_attention

    leaf = torch.zeros(TOKENS, 2, 3, width, dtype=getattr(torch, dtype), requires_grad=True)
    documents, step = Documents.from_bounds([0, TOKENS]), mask(dropout, "attention")
    rotation = torch.zeros(2, TOKENS, width // 2) if rotary else None
    bias = None if rotary else torch.zeros(6 * width, dtype=leaf.dtype, requires_grad=True)
    self_attention(leaf * 1, documents, step, window, rotation, bias).sum().backward()


rotary_attention = partial(attention, rotary=True)
windowed_attention = partial(rotary_attention, window=64)  # any window compiles to the same code


def add_norm(dtype: str, width: int, dropout: float, tokens: int = TOKENS) -> None:
    import torch

    from minisobert.ops.kernels.add_norm import add_norm

    x, r = torch.zeros(2, tokens, width, dtype=getattr(torch, dtype), requires_grad=True)
    b, w, c = torch.zeros(3, width, dtype=x.dtype)
    residual, normal = add_norm(x, b, r, w, c, 1e-5, mask(dropout, "ffn_output"))
    (residual + normal).sum().backward(retain_graph=True)
    normal.sum().backward()  # nothing uses the last block's residual


def others(dtype: str, width: int, dropout: float) -> None:
    import torch

    from minisobert.ops.kernels.bias_gelu import bias_gelu
    from minisobert.ops.kernels.cross_entropy import cross_entropy
    from minisobert.ops.kernels.dropout import drop

    x = torch.zeros(TOKENS, width, dtype=getattr(torch, dtype), requires_grad=True)
    for form in ("erf", "tanh"):
        bias_gelu(x, x[0].detach(), form).sum().backward()
    cross_entropy(x * 1, torch.zeros(TOKENS, dtype=torch.int64)).sum().backward()
    drop(x, mask(0.1, "embedding"))


def modern(dtype: str, width: int, dropout: float) -> None:
    """Runs the operations that only modernbert has: those without biases, rotary positions and gated GELU."""
    import torch

    from minisobert.ops.kernels.add_norm import add_norm
    from minisobert.ops.kernels.bias_gelu import bias_gelu
    from minisobert.ops.kernels.gated_gelu import gated_gelu
    from minisobert.ops.kernels.rotary import rotary

    x, r = torch.zeros(2, TOKENS, width, dtype=getattr(torch, dtype), requires_grad=True)
    residual, normal = add_norm(x, None, r, torch.zeros(width, dtype=x.dtype), None, 1e-5, mask(dropout, "ffn_output"))
    (residual + normal).sum().backward(retain_graph=True)
    normal.sum().backward()
    if dropout:
        return  # the other operations have no dropout
    qkv = torch.zeros(TOKENS, width // 64, 3, 64, dtype=x.dtype, requires_grad=True)
    rotary(qkv * 1, torch.zeros(2, TOKENS, 32)).sum().backward()
    both = torch.zeros(TOKENS, 2 * MODERN[width], dtype=x.dtype, requires_grad=True)
    for form in ("erf", "tanh"):
        bias_gelu(x, None, form).sum().backward()
        gated_gelu(both, form).sum().backward()


def mask(dropout: float, site: str):
    from minisobert.ops import Dropout

    step = Dropout.for_step(dropout, seed=0, step=0, layers=1)
    return step and step.at(0, site)


# the longest jobs first, so that all processes end at about the same time
JOBS = [
    *((attention, dtype, chip, width, p) for width, dtype, chip, p in
      product((128, 96, 64, 32), reversed(DTYPES), reversed(CHIPS), (0.1, 0.0))),
    # in every modern preset heads are 64 wide; fp16 is left out, as it compiles like bf16 and would take minutes
    *((operation, dtype, chip, 64, p) for operation, dtype, chip, p in
      product((rotary_attention, windowed_attention), ("bfloat16", "float32"), reversed(CHIPS), (0.1, 0.0))),
    *((add_norm, dtype, chip, width, p) for dtype, chip, width, p in product(DTYPES, CHIPS, NORM_WIDTHS, (0.0, 0.1))),
    *((others, dtype, chip, 3_072, 0.0) for dtype, chip in product(DTYPES, CHIPS)),
    *((modern, dtype, chip, width, p) for dtype, chip, width, p in
      product(("bfloat16", "float32"), CHIPS, MODERN, (0.0, 0.1))),
]  # fmt: skip


def compile_all() -> list[Compiled]:
    """Compiles all kernels for all chips, on all cores."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, _no_interpreter) as pool:
        # without repeats: the kernels of delta and of the hashes are the same with a window
        return list(dict.fromkeys(compiled for job in pool.map(_run, JOBS) for compiled in job))


def _no_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    import torch

    torch.set_num_threads(1)


def _run(job) -> list[Compiled]:
    operation, dtype, chip, width, dropout = job
    with _without_launching(chip) as compiled:
        operation(dtype, width, dropout)
    return [_describe(kernel, dtype, width, dropout, chip) for kernel in compiled]


@contextmanager
def _without_launching(chip: int) -> Iterator[list]:
    """Within this context, a launch only compiles its kernel for `chip` and adds it to the list."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from minisobert.ops.kernels import attention

    class Chip:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", chip, 32)

        def get_current_device(self) -> int:
            return chip  # Triton's cache of compiled kernels is per device

        def get_current_stream(self, device: int) -> int:
            return 0

    compiled: list = []
    run, family = JITFunction.run, attention.chip_family

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(Chip())
    JITFunction.run = compile_only
    attention.chip_family = lambda device: CHIPS.index(chip)
    try:
        yield compiled
    finally:
        JITFunction.run, attention.chip_family = run, family


def _describe(kernel, dtype: str, width: int, dropout: float, chip: int) -> Compiled:
    usage = tool("cuobjdump", kernel.asm["cubin"], "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    meta = kernel.metadata
    name = meta.name.strip("_").replace("_", " ")
    constants = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    if constants.get("TANH"):
        name += ", tanh"
    if name.startswith("attention") and "rotation" in set(kernel.src.fn.arg_names) - set(constants):
        name += ", rotary"
    if "window" in set(kernel.src.fn.arg_names) - set(constants):
        name += ", window"
    if "d_new_residual" in constants:  # None
        name += ", last block"
    if "bias" in constants or constants.get("BIAS") is False:  # None
        name += ", no biases"
    if constants.get("BACKWARD"):
        name += " back"
    return Compiled(
        name, dtype, width, dropout, chip, meta.num_warps, meta.num_stages,
        registers, stack + local, meta.shared,
        tuple(word for word in MATRIX_INSTRUCTION.values() if word in kernel.asm["ptx"]),
    )  # fmt: skip


def result(compiled: list[Compiled]) -> list[str]:
    """Lines of Markdown: a table with a line per kernel and a column per chip."""
    lines: dict[tuple, dict[int, Compiled]] = {}
    for c in compiled:
        lines.setdefault((c.kernel, c.width, c.dtype, c.dropout), {})[c.chip] = c
    rows = [["", "", "", "", *["warps, stages · registers · spilled · shared KiB"] * len(CHIPS)]]
    for (kernel, width, dtype, dropout), by_chip in sorted(lines.items()):
        cells = [
            f"{c.warps}, {c.stages} · {c.registers} · {c.spilled} · {c.shared / 1024:.0f}"
            for c in (by_chip[chip] for chip in CHIPS)
        ]
        rows.append([kernel, f"{width:,}", dtype, f"{dropout:g}", *cells])
    return [
        "# Every configuration of every kernel, compiled",
        "",
        f"`python -m benchmarks.compiled`, Triton {version('triton')}: {len(compiled):,} kernels, "
        f"{sum(c.spilled > 0 for c in compiled):,} of which spill.",
        "For each chip warps, stages · registers per thread · bytes spilled per thread · KiB of shared memory.",
        "",
        *table(["kernel", "width", "dtype", "dropout", *(f"sm_{chip}" for chip in CHIPS)], rows),
    ]


# Kernels whose instructions are counted: sm_90, bf16, at the widths of base, large, the modern presets and other models
COUNTED = [
    *((attention, "bfloat16", 90, width, p) for width in (64, 96, 128) for p in (0.0, 0.1)),
    (rotary_attention, "bfloat16", 90, 64, 0.0),
    (windowed_attention, "bfloat16", 90, 64, 0.0),
    *((add_norm, "bfloat16", 90, width, p) for width in (768, 1_536) for p in (0.0, 0.1)),
    (others, "bfloat16", 90, 3_072, 0.0),
    (modern, "bfloat16", 90, 768, 0.0),
]
GOALS = {  # (kernel, width, dropout) → instructions per score of the first loop; set before the kernels were changed
    ("attention key gradient", 64, 0.0): 8.8,
    ("attention key gradient", 64, 0.1): 17.3,
    ("attention forward", 64, 0.1): 15.5,
    ("attention query gradient", 64, 0.1): 14.3,
}


def _count(job) -> list[list[str]]:
    """A row of the table for each kernel of a job."""
    operation, dtype, chip, width, dropout = job
    with _without_launching(chip) as compiled:
        operation(dtype, width, dropout)
    rows = {}
    for kernel in compiled:
        c = _describe(kernel, dtype, width, dropout, chip)
        sizes = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
        threads, cubin, columns = 32 * c.warps, kernel.asm["cubin"], sizes.get("COLUMNS", sizes.get("BLOCK"))
        goal = GOALS.get((c.kernel, width, dropout))
        if "QUERIES" in sizes and "KEYS" in sizes:
            is_key = c.kernel.startswith("attention key")
            held, visited = (sizes[name] for name in (("KEYS", "QUERIES") if is_key else ("QUERIES", "KEYS")))
            whole, masked = (lambda counts: (counts[0], counts[-1]))(per_score(cubin, threads, held * visited))
            window = 64 if c.kernel.endswith("window") else None
            of_posts = visits(_posts(), held, visited, window)
            mean = (of_posts["whole"] * whole + of_posts["masked"] * masked) / of_posts["seen"]
            counts = [f"{whole:.2f}", f"{masked:.2f}", f"{mean:.2f}", f"{goal:g}" if goal else ""]
            tile = f"{held} × {visited}"
        elif columns and c.kernel.split()[0] not in ("attention", "rotary"):
            elements = sizes.get("ROWS", 1) * columns
            counts, tile = [f"{per_element(cubin, threads, elements):.1f}", "", "", ""], f"{elements:,}"
        else:
            continue
        tile = f"{tile}, {c.warps}, {c.stages}"
        rows[c.kernel] = [c.kernel, f"{width:,}", f"{dropout:g}", tile, str(c.registers), *counts]
    return list(rows.values())


@cache
def _posts():
    """Bounds of the documents in 200 packed rows of posts."""
    from benchmarks.gpu.setting import REAL, _micro_batch

    return _micro_batch("posts", 200, REAL.row_tokens, REAL.vocabulary, 0).documents.bounds.numpy()


def counted() -> list[str]:
    """Lines of Markdown: a table with a line per kernel."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), _no_interpreter) as pool:
        # without repeats: the forward kernel is the same with rotary positions
        rows = list(dict.fromkeys(tuple(row) for rows in pool.map(_count, COUNTED) for row in rows))
    return [
        "# Instructions in the kernels' loops",
        "",
        f"`python -m benchmarks.compiled --count`, Triton {version('triton')}, sm_90, bf16. Attention's are per "
        "score: in tiles that are seen whole, in masked tiles, and on packed posts per score of tokens that see each "
        "other, so that scores computed in vain are counted too. Those of the other kernels are per element. The goals "
        "were set before the kernels were changed.",
        "",
        *table(
            ["kernel", "width", "dropout", "tile, warps, stages", "registers", "whole", "masked", "on posts", "goal"],
            rows,
        ),
    ]


def main() -> None:
    made = parser("compiled", "--count", "It takes ten minutes on two cores, or half a minute with --count.")
    made.add_argument("--count", action="store_true", help="only count the instructions in their loops, for an H100")
    options = made.parse_args()
    if options.count:
        show(counted(), f"instructions-{version('triton')}", options.write)
    else:
        show(result(compile_all()), "compiled", options.write)


if __name__ == "__main__":
    main()
