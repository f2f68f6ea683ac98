"""Which parameters are split over tensor-parallel ranks, and along which dimension: one table.

    column   W (out, in) and its bias by outputs      each rank makes some of the outputs
    row      W (out, in) by inputs, bias whole        each rank makes a part of the sum in every output
    vocab    by vocabulary entries                    each rank has some of the words

A column layer followed by a row layer needs no communication between them: what one rank's slice of the first makes is
what its slice of the second takes. Attention heads (of qkv) and MLP features (of ffn_input) are split so.
"""

from __future__ import annotations

import re

PLAN = {
    r"encoder\.embeddings\.word": "vocab",
    r"encoder\.blocks\.\d+\.qkv": "column",
    r"encoder\.blocks\.\d+\.attention_output": "row",
    r"encoder\.blocks\.\d+\.ffn_input": "column",
    r"encoder\.blocks\.\d+\.ffn_output": "row",
    r"mlm_head\.decoder": "vocab",
}
# With sequence parallelism these see the tokens of their rank alone: their gradients are summed over the ranks. (A row
# layer's bias is added after the reduction, to those tokens.)
BY_TOKENS = (
    r"encoder\.embeddings\.(position|token_type)\..*|encoder\.blocks\.\d+\.(attention|ffn)_norm\..*"
    r"|encoder\.final_norm\..*|encoder\.blocks\.\d+\.(attention|ffn)_output\.bias"
)


def kind(module: str) -> str | None:
    """How the module of this dotted name is split; None: it is whole on every rank."""
    return next((kind for pattern, kind in PLAN.items() if re.fullmatch(pattern, module)), None)


def split_dimension(parameter: str) -> int | None:
    """The dimension along which the parameter of this dotted name is split; None: it is whole on every rank."""
    module, name = parameter.rsplit(".", 1)
    if kind(module) == "row":
        return 1 if name == "weight" else None
    return 0 if kind(module) else None


def summed_over_tokens(parameter: str) -> bool:
    """Whether sequence parallelism leaves each rank with a part of this parameter's gradient."""
    return re.fullmatch(BY_TOKENS, parameter) is not None
