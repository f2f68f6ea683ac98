"""Which parameters are split over tensor-parallel ranks, and along which dimension: one table.

    column   W (out, in) and its bias by outputs      each rank computes some of the outputs
    gated    W (2 out, in) likewise, each half        each rank computes the same outputs of either half
    row      W (out, in) by inputs, bias whole        each rank computes a part of the sum in every output
    vocab    by vocabulary entries                    each rank has some of the words

A column layer followed by a row layer needs no communication between them: the outputs of a rank's slice of the first
are the inputs of its slice of the second. Attention heads (in qkv) and MLP features (in ffn_input, or in either half
of gated_ffn_input) are split this way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from torch import Tensor

SPLITS = {
    r"encoder\.embeddings\.word": "vocab",
    r"encoder\.blocks\.\d+\.qkv": "column",
    r"encoder\.blocks\.\d+\.attention_output": "row",
    r"encoder\.blocks\.\d+\.ffn_input": "column",
    r"encoder\.blocks\.\d+\.gated_ffn_input": "gated",
    r"encoder\.blocks\.\d+\.ffn_output": "row",
    r"mlm_head\.decoder": "vocab",
}
# With sequence parallelism these parameters see only the tokens of their rank, so their gradients are summed over the
# ranks. (A row layer's bias is added after the reduction, to those tokens.)
BY_TOKENS = (
    r"encoder\.embeddings\.(position|token_type|norm)\..*|encoder\.blocks\.\d+\.(attention|ffn)_norm\..*"
    r"|encoder\.final_norm\..*|encoder\.blocks\.\d+\.(attention|ffn)_output\.bias"
)


def kind(module: str) -> str | None:
    """How the module with this dotted name is split; None: every rank has it whole."""
    return next((kind for pattern, kind in SPLITS.items() if re.fullmatch(pattern, module)), None)


def split_dimension(parameter: str) -> int | None:
    """The dimension along which the parameter with this dotted name is split; None: every rank has it whole."""
    module, _, name = parameter.rpartition(".")
    if kind(module) == "row":
        return 1 if name == "weight" else None
    return 0 if kind(module) else None


def summed_over_tokens(parameter: str) -> bool:
    """Whether sequence parallelism leaves each rank with only a part of this parameter's gradient."""
    return re.fullmatch(BY_TOKENS, parameter) is not None


def slice_of(parameter: str, whole: Tensor, rank: int, ranks: int) -> Tensor:
    """The slice of a parameter that one of `ranks` tensor-parallel ranks has: a view, or a copy if it is gated."""
    dimension = split_dimension(parameter)
    if kind(parameter.rpartition(".")[0]) == "gated":
        return whole.unflatten(0, (2, -1)).chunk(ranks, 1)[rank].flatten(0, 1)
    return whole if dimension is None else whole.chunk(ranks, dimension)[rank]


def whole_shape(parameter: str, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """The shape of the whole parameter, if one of `ranks` ranks has a slice of `shape`."""
    dimension = split_dimension(parameter)
    return tuple(n * ranks if i == dimension else n for i, n in enumerate(shape))


def contiguous_runs(
    parameter: str, shape: tuple[int, ...], first: int, count: int, rank: int, ranks: int
) -> Iterator[tuple[int, int, int]]:
    """Where elements [first, first + count) of one rank's slice, of `shape` and flattened, are in the flattened whole.

    Yields contiguous runs: (first in the whole, first among the `count`, how many).
    """
    is_gated = kind(parameter.rpartition(".")[0]) == "gated"
    if split_dimension(parameter) != 1 and not is_gated:
        before = rank * math.prod(shape) if split_dimension(parameter) == 0 else 0
        yield before + first, 0, count
        return
    width = math.prod(shape) // 2 if is_gated else shape[1]  # a rank's part of every half, or of every row
    for row in range(first // width, -(-(first + count) // width)):
        start, stop = max(first, row * width), min(first + count, (row + 1) * width)
        yield (row * (ranks - 1) + rank) * width + start, start - first, stop - start
