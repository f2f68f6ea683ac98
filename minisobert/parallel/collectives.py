"""Collectives that gradients pass through, in conjugate pairs: what is one's forward is the other's backward.

                        forward                          backward
    enter               identity                         all-reduce           into the split part of a layer
    leave               all-reduce                       identity             out of it: partial sums become the sum
    gather_tokens       all-gather                       reduce-scatter       as enter and leave, where what lies
    scatter_tokens      reduce-scatter                   all-gather           between layers is split by tokens
    gather_for_all      all-gather                       own slice            to a part that every rank computes alike

All act along dimension 0, tokens, among the ranks of one tensor group. A group of one does nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minisobert.parallel.mesh import Mesh


def all_reduce(x: Tensor, mesh: Mesh) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=mesh.tensor_group)
    return x


def all_gather(x: Tensor, mesh: Mesh) -> Tensor:
    """(n, …) of each rank → (tensor_parallel · n, …)."""
    out = x.new_empty((mesh.tensor_parallel * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=mesh.tensor_group)
    return out


def reduce_scatter(x: Tensor, mesh: Mesh) -> Tensor:
    """(tensor_parallel · n, …) → (n, …): this rank's slice of the sum over the ranks."""
    out = x.new_empty((len(x) // mesh.tensor_parallel, *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), group=mesh.tensor_group)
    return out


def own_slice(x: Tensor, mesh: Mesh) -> Tensor:
    return x.chunk(mesh.tensor_parallel)[mesh.tensor_rank]


def identity(x: Tensor, mesh: Mesh) -> Tensor:
    return x.view_as(x)


class _Pair(torch.autograd.Function):
    """`forward`(x) whose gradient is `backward`(gradient)."""

    @staticmethod
    def forward(ctx, x: Tensor, mesh: Mesh, forward, backward) -> Tensor:
        ctx.mesh, ctx.conjugate = mesh, backward
        return forward(x, mesh)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.conjugate(gradient, ctx.mesh), None, None, None


def _pair(forward, backward):
    def apply(x: Tensor, mesh: Mesh) -> Tensor:
        return x if mesh.tensor_parallel == 1 else _Pair.apply(x, mesh, forward, backward)

    return apply


enter, leave = _pair(identity, all_reduce), _pair(all_reduce, identity)
gather_tokens, scatter_tokens = _pair(all_gather, reduce_scatter), _pair(reduce_scatter, all_gather)
gather_for_all = _pair(all_gather, own_slice)
