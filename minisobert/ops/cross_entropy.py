"""The loss of each row of logits z with target t:

    loss = log Σ_j exp(z_j) - z_t                   dz_j = (softmax(z)_j - [j = t]) · dloss

Dimensions: M masked tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minisobert.ops.dispatch import implementation


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.element_size() < 4:
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: (M, V), targets: (M,) int64 in [0, V). Returns (M,) losses in nats, in fp32 (fp64 for fp64). M may be 0.

    The logits hold their gradient after a backward pass on a GPU. Raises ValueError on other shapes or types; targets'
    values are checked where they are made, on the host.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits is {tuple(logits.shape)}, targets {tuple(targets.shape)}; (M, V) and (M,) are needed")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype}; it must be torch.int64")
    return implementation(cross_entropy_reference, logits)(logits, targets)
