"""Between two branches of a pre-LN encoder: add the branch to the residual stream, then layer-normalise that.

    forward     r' = r + dropout(x + b)            μ, σ² = mean, variance of r' over h (biased)
                x̂ = (r' - μ) / sqrt(σ² + ε)        n = w ∘ x̂ + c

    backward    g = dn ∘ w
                dr' += (g - mean(g) - x̂ ∘ mean(g ∘ x̂)) / sqrt(σ² + ε)
                dr = dr'                           dx = dr' ∘ keep/(1-p)          db = Σ_T dx
                dw = Σ_T dn ∘ x̂                    dc = Σ_T dn

Layer norm: Ba et al. 2016. Dimensions: T tokens, h hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from minisobert.ops import dispatch
from minisobert.ops.dropout import Dropout, drop_reference


def add_norm_reference(
    branch: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    residual = residual + drop_reference(branch if bias is None else branch + bias, dropout)
    return residual, F.layer_norm(residual, weight.shape, weight, norm_bias, eps)


def add_norm(
    branch: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """branch, residual: (T, h); bias (of the linear before), weight, norm_bias: (h,). Both biases may be None.

    Returns the new residual and its layer-normed copy, both (T, h). Raises ValueError on other shapes.
    """
    if branch.dim() != 2 or branch.shape != residual.shape:
        raise ValueError(
            f"branch is {tuple(branch.shape)}, residual {tuple(residual.shape)}; both must be (tokens, hidden)"
        )
    for name, vector in (("bias", bias), ("weight", weight), ("norm_bias", norm_bias)):
        if vector is not None and vector.shape != branch.shape[1:]:
            raise ValueError(f"{name} is {tuple(vector.shape)}; it must be ({branch.shape[1]},), the width of branch")
    implementation = add_norm_reference
    if dispatch.takes_kernel(branch):
        from minisobert.ops.kernels.add_norm import add_norm as implementation
    return implementation(branch, bias, residual, weight, norm_bias, eps, dropout)
