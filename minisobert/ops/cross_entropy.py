"""The loss of each row of logits z with target t:

    loss = log Σ_j exp(z_j) - z_t                   dz_j = (softmax(z)_j - [j = t]) · dloss

If the vocabulary is split over ranks, each rank has n columns of z and computes three numbers per row: max z, z_t (0 if
t is in another slice) and Σ exp(z - max z). Reducing them over the slices gives the loss. `cross_entropy_parts` and
`cross_entropy_gradient` work on one slice; `parallel/tensor.py` joins them.

Dimensions: M masked tokens, V vocabulary, n columns of a slice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minisobert.ops import dispatch


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.element_size() < 4:
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none")


def cross_entropy_parts_reference(logits: Tensor, targets: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.float()
    column = targets - first
    here = (column >= 0) & (column < logits.shape[1])
    target = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    # finite, so that a slice of the vocabulary that is all -inf adds exp(-inf) = 0 and not NaN
    maximum = logits.amax(1).clamp(min=torch.finfo(torch.float32).min)
    return maximum, target.where(here, 0), (logits - maximum[:, None]).exp().sum(1)


def cross_entropy_gradient_reference(
    logits: Tensor, targets: Tensor, lse: Tensor, d_loss: Tensor, first: int = 0
) -> Tensor:
    p = (logits.float() - lse[:, None]).exp()
    column = targets - first
    here = ((column >= 0) & (column < logits.shape[1])).nonzero()[:, 0]
    p[here, column[here]] -= 1
    return (p * d_loss[:, None]).to(logits.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: (M, V), targets: (M,) int64 in [0, V). Returns (M,) losses in nats, in fp32 (fp64 for fp64). M may be 0.

    On a GPU the backward pass overwrites the logits with their gradient. Raises ValueError on other shapes or types.
    The values of targets are checked on the host, where targets are made, and not here.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits is {tuple(logits.shape)}, targets {tuple(targets.shape)}; give (M, V) and (M,)")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype}; it must be torch.int64")
    implementation = cross_entropy_reference
    if dispatch.takes_kernel(logits):
        from minisobert.ops.kernels.cross_entropy import cross_entropy as implementation
    return implementation(logits, targets)


def cross_entropy_parts(logits: Tensor, targets: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """max z, z_t and Σ exp(z - max z) of each row, (M,) fp32 each; no gradient.

    logits: (M, n), the columns [first, first + n) of the vocabulary; targets: (M,) int64. z_t is 0 if the target is not
    among the columns.
    """
    implementation = cross_entropy_parts_reference
    if dispatch.takes_kernel(logits):
        from minisobert.ops.kernels.cross_entropy import cross_entropy_parts as implementation
    return implementation(logits, targets, first)


def cross_entropy_gradient(logits: Tensor, targets: Tensor, lse: Tensor, d_loss: Tensor, first: int = 0) -> Tensor:
    """(softmax - onehot) d_loss, (M, n); on a GPU it overwrites logits. lse: (M,), log Σ exp(z) of whole rows."""
    implementation = cross_entropy_gradient_reference
    if dispatch.takes_kernel(logits):
        from minisobert.ops.kernels.cross_entropy import cross_entropy_gradient as implementation
    return implementation(logits, targets, lse, d_loss, first)
