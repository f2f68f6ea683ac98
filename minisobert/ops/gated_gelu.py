"""A gated linear unit with GELU (GeGLU, Shazeer 2020): one half of the features, through GELU, scales the other.

    forward     y = GELU(a) ∘ b                     x = [a, b]
    backward    da = dy ∘ b ∘ GELU'(a)              db = dy ∘ GELU(a)

GELU and its forms are those of `ops/bias_gelu.py`. Dimensions: T tokens, f features of each half.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from minisobert.ops import dispatch
from minisobert.ops.bias_gelu import FORMS


def gated_gelu_reference(x: Tensor, form: str = "erf") -> Tensor:
    a, b = x.chunk(2, 1)
    return F.gelu(a, approximate="tanh" if form == "tanh" else "none") * b


def gated_gelu(x: Tensor, form: str = "erf") -> Tensor:
    """x: (T, 2f), form: "erf" or "tanh". Returns (T, f). Raises ValueError on anything else."""
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x is {tuple(x.shape)}; it must be (tokens, an even number of features)")
    implementation = gated_gelu_reference
    if dispatch.takes_kernel(x):
        from minisobert.ops.kernels.gated_gelu import gated_gelu as implementation
    return implementation(x, form)
