"""Muon (Jordan et al. 2024), for matrices between hidden states: steps along the orthogonal matrix nearest to momentum.

    momentum    M ← μ M + (1-μ) G                   U = μ M + (1-μ) G                        (Nesterov)
    direction   O = U (UᵀU)^(-1/2), nearly          W ← W - rate (0.2 sqrt(max(m, n)) O + decay W)

All singular values of O are about 1, so directions that few tokens contribute to move as far as those that all
contribute to. The elements of such an m × n matrix have a root mean square of sqrt(1 / max(m, n)), and those of AdamW's
steps one of about 0.2 learning rates. The factor makes both equally large, so that they can share a rate and a weight
decay (Liu et al. 2025, "Moonlight").

O comes from five Newton-Schulz iterations X ← a X + b X XᵀX + c X (XᵀX)², which push singular values in (0, 1] to
between 0.7 and 1.2. The polynomial is written with the Gram matrix XᵀX of the side that is never split over
tensor-parallel ranks:

    G = Σ over ranks XᵢᵀXᵢ        Xᵢ ← Xᵢ (a + b G + c G²)

Each rank has some rows Xᵢ of X, or of Xᵀ. With one all-reduce of G per iteration, its result is that of the whole
matrix (`docs/muon.md`). The first G also gives the norm: ‖X‖² is its trace.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from minisobert.parallel import splits
from minisobert.parallel.mesh import Mesh

MATRICES = (
    r"(encoder\.blocks\.\d+\.(qkv|attention_output|ffn_input|gated_ffn_input|ffn_output)|mlm_head\.dense)\.weight"
)
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # Jordan's, steepest at 0
AS_ADAMW = 0.2  # root mean square of AdamW's steps, in learning rates


def is_matrix(parameter: str) -> bool:
    """Whether Muon updates the parameter with this dotted name. AdamW updates embeddings, norms and biases."""
    return re.fullmatch(MATRICES, parameter) is not None


def matrices(name: str, weight: Tensor, head_width: int) -> Tensor:
    """A view (k, rows, columns) of the k matrices in a weight, whose columns no rank splits.

    qkv counts as 3H matrices, the query, key and value of each head. In short runs they did as well as three of (h, h).
    Their Gram matrices are d × d instead of h × h, and tensor parallelism does not split them.
    """
    layer = name.split(".")[-2]
    if layer == "qkv":
        return weight.unflatten(0, (-1, head_width)).mT  # (3H, h, d)
    if layer == "gated_ffn_input":
        return weight.unflatten(0, (2, -1))  # (2, f, h)
    return weight.mT[None] if layer.endswith("_output") else weight[None]


def is_split(name: str) -> bool:
    """Whether each rank of a tensor group has only some rows of the parameter's matrices."""
    return splits.split_dimension(name) is not None and not name.endswith("qkv.weight")


@torch.no_grad()
def orthogonalise(x: Tensor, mesh: Mesh) -> Tensor:
    """The orthogonal factors of k matrices.

    x: (k, rows, columns), the rows that this rank of a tensor group has, or all of them for a mesh without tensor
    parallelism. Returns the same rows of the factors. Products are in fp32 on a CPU, and in bf16 on a GPU: its rounding
    errors are far smaller than those that five iterations leave.
    """
    a, b, c = COEFFICIENTS
    gram = mesh.sum_over_slices(_product(x.mT, x))
    norm_squared = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=1e-30)  # a matrix of zeros stays
    x, gram = x * norm_squared.rsqrt(), gram / norm_squared
    for i in range(ITERATIONS):
        if i:
            gram = mesh.sum_over_slices(_product(x.mT, x))
        x = a * x + _product(x, b * gram + c * _product(gram, gram))
    return x


def _product(x: Tensor, y: Tensor) -> Tensor:
    return (x.bfloat16() @ y.bfloat16()).float() if x.is_cuda else x @ y
