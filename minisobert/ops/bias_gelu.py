"""The bias of a linear and the GELU after it (Hendrycks and Gimpel 2016), with z = x + b:

    erf     y = z Φ(z)                              dy/dz = Φ(z) + z φ(z)
    tanh    y = z/2 (1 + tanh u)                    dy/dz = (1 + tanh u)/2 + z/2 (1 - tanh² u) du/dz
            u = sqrt(2/π) (z + 0.044715 z³)

Φ, φ: distribution function and density of the standard normal. `tanh` is the approximation that Megatron-LM fuses.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from minisobert.ops import dispatch

FORMS = ("erf", "tanh")


def bias_gelu_reference(x: Tensor, bias: Tensor | None, form: str = "erf") -> Tensor:
    x = x if bias is None else x + bias
    return F.gelu(x, approximate="tanh" if form == "tanh" else "none")


def bias_gelu(x: Tensor, bias: Tensor | None, form: str = "erf") -> Tensor:
    """x: (T, n), bias: (n,) or None, form: "erf" or "tanh". Returns (T, n). Raises ValueError on anything else."""
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
    if x.dim() != 2 or (bias is not None and bias.shape != x.shape[1:]):
        shape = bias if bias is None else tuple(bias.shape)
        raise ValueError(f"x is {tuple(x.shape)}, bias {shape}; they must be (tokens, n) and (n,)")
    implementation = bias_gelu_reference
    if dispatch.takes_kernel(x):
        from minisobert.ops.kernels.bias_gelu import bias_gelu as implementation
    return implementation(x, bias, form)
