"""Collectives that gradients pass through, in conjugate pairs: the forward of one is the backward of the other.

    name, as in Megatron-LM                       forward           backward
    f   (copy to tensor parallel)                 identity          all-reduce         before a column layer
    g   reduce_from_tensor_parallel               all-reduce        identity           after a row layer
    ḡ   reduce_scatter_to_sequence_parallel       reduce-scatter    all-gather         after a row layer
        (gather into tensor parallel)             all-gather        reduce-scatter     before a column layer
        gather_from_sequence_parallel             all-gather        own slice          before layers that are not split

The first two serve plain tensor parallelism (Shoeybi et al. 2019, who named f and g), the next two sequence parallelism
(Korthikanti et al. 2022). All act along dimension 0, the tokens, within one tensor group. The two in brackets are not
functions here: a column layer does their work itself, so that it can compute its weight's gradient at the same time
(`tensor.py`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minisobert.parallel.mesh import Mesh

# torch 2.13 renames them and warns of the old names
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, mesh: Mesh) -> Tensor:
    """(n, …) from each rank → (tensor_parallel · n, …)."""
    out = x.new_empty((mesh.tensor_parallel * len(x), *x.shape[1:]))
    all_gather_into(out, x.contiguous(), group=mesh.tensor_group)
    return out


def reduce_scatter(x: Tensor, mesh: Mesh) -> Tensor:
    """(tensor_parallel · n, …) → (n, …): this rank's slice of the sum over the ranks."""
    out = x.new_empty((len(x) // mesh.tensor_parallel, *x.shape[1:]))
    reduce_scatter_into(out, x.contiguous(), group=mesh.tensor_group)
    return out


def own_slice(x: Tensor, mesh: Mesh) -> Tensor:
    return x.chunk(mesh.tensor_parallel)[mesh.tensor_rank]


class _Pair(torch.autograd.Function):
    """`forward`(x) whose gradient is `backward`(gradient)."""

    @staticmethod
    def forward(ctx, x: Tensor, mesh: Mesh, forward, backward) -> Tensor:
        ctx.mesh, ctx.conjugate = mesh, backward
        return forward(x, mesh)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.conjugate(gradient, ctx.mesh), None, None, None


class _ReduceInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=mesh.tensor_group)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def reduce_from_tensor_parallel(x: Tensor, mesh: Mesh) -> Tensor:
    """Sums x in place and returns it: x is the output that a layer has just computed, and nothing else uses it."""
    return _ReduceInPlace.apply(x, mesh)


def reduce_scatter_to_sequence_parallel(x: Tensor, mesh: Mesh) -> Tensor:
    return _Pair.apply(x, mesh, reduce_scatter, all_gather)


def gather_from_sequence_parallel(x: Tensor, mesh: Mesh) -> Tensor:
    return _Pair.apply(x, mesh, all_gather, own_slice)
