"""Tensor parallelism: `shard` turns a whole model into one rank's slice of it, layer by layer as `splits.py` says.

    column   y = x Wᵀ        W = [W₀; W₁; …]        rank i computes yᵢ = x Wᵢᵀ                dx = Σᵢ dyᵢ Wᵢ
    row      y = x Wᵀ        W = [W₀, W₁, …]        rank i computes xᵢ Wᵢᵀ; y is their sum

A block therefore communicates four times: after each row layer in the forward pass, and after each column layer in the
backward pass (Shoeybi et al. 2019). Sequence parallelism (Korthikanti et al. 2022) splits each of these sums into two
halves, a reduce-scatter after a row layer and an all-gather before the next column layer. Between them, in layer norms
and dropout, each rank has only its share of the tokens, which divides the memory between the layers. A column layer
does not keep what it gathers but gathers it again in its backward, so 5/4 of the bytes are sent.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minisobert import ops
from minisobert.model import Decoder, Linear, MaskedLM, QKVLinear
from minisobert.parallel import splits
from minisobert.parallel.collectives import (
    all_gather,
    all_gather_into,
    gather_from_sequence_parallel,
    own_slice,
    reduce_from_tensor_parallel,
    reduce_scatter_into,
    reduce_scatter_to_sequence_parallel,
)
from minisobert.parallel.mesh import Mesh


class _ColumnProduct(torch.autograd.Function):
    """x Wᵀ + b. The backward computes dW while the sum of dx over the ranks is under way."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, mesh: Mesh, by_tokens: bool) -> Tensor:
        # save only the rank's own share of the tokens: the backward gathers the whole again
        ctx.save_for_backward(x, weight)
        ctx.mesh, ctx.by_tokens = mesh, by_tokens
        return F.linear(all_gather(x, mesh) if by_tokens else x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        group = ctx.mesh.tensor_group
        if ctx.by_tokens:
            share, x = x.contiguous(), x.new_empty(len(dy), x.shape[1])
            gathering = all_gather_into(x, share, group=group, async_op=True)
            whole = dy @ weight
            dx = torch.empty_like(share)
            under_way = reduce_scatter_into(dx, whole, group=group, async_op=True)
            gathering.wait()
        else:
            dx = dy @ weight
            under_way = dist.all_reduce(dx, group=group, async_op=True)
        dw = dy.T @ x
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        under_way.wait()
        return dx, dw, db, None, None


class ColumnParallelLinear(nn.Module):
    """One rank's rows of a linear. weight: (out / tensor_parallel, in), bias: (out / tensor_parallel,)."""

    def __init__(self, whole: nn.Linear, own: dict[str, nn.Parameter], mesh: Mesh, by_tokens: bool):
        super().__init__()
        self.mesh, self.by_tokens = mesh, by_tokens
        self.adds_bias = isinstance(whole, QKVLinear)
        self.weight, self.bias = own["weight"], own.get("bias")

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.detach() if self.adds_bias and self.bias is not None else None
        return _ColumnProduct.apply(x, self.weight, bias, self.mesh, self.by_tokens)


class RowParallelLinear(nn.Module):
    """One rank's columns of a linear. weight: (out, in / tensor_parallel); bias: (out,), which the next op adds."""

    def __init__(self, whole: Linear, own: dict[str, nn.Parameter], mesh: Mesh, by_tokens: bool):
        super().__init__()
        self.mesh, self.reduce = mesh, reduce_scatter_to_sequence_parallel if by_tokens else reduce_from_tensor_parallel
        self.weight, self.bias = own["weight"], own.get("bias")

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(F.linear(x, self.weight), self.mesh)


class VocabularyParallelEmbedding(nn.Module):
    """One rank's words. A token of another rank's words is zeros here; the sum over the ranks fills it in.

    An id that is in no rank's slice would be zeros everywhere: ids are checked on the host, where they come in.
    """

    def __init__(self, whole: nn.Embedding, own: dict[str, nn.Parameter], mesh: Mesh, by_tokens: bool):
        super().__init__()
        self.mesh, self.reduce = mesh, reduce_scatter_to_sequence_parallel if by_tokens else reduce_from_tensor_parallel
        self.weight = own["weight"]
        self.first = mesh.tensor_rank * len(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        here = (tokens >= self.first) & (tokens < self.first + len(self.weight))
        x = F.embedding((tokens - self.first).where(here, 0), self.weight)
        return self.reduce(x * here[:, None].to(x.dtype), self.mesh)


class VocabularyParallelDecoder(nn.Module):
    """Logits of one rank's words, (M, V / tensor_parallel)."""

    def __init__(self, whole: Decoder, own: dict[str, nn.Parameter], mesh: Mesh, by_tokens: bool):
        super().__init__()
        self.mesh = mesh
        self.bias = own["bias"]

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        # all M masked tokens are on every rank, with or without sequence parallelism
        return _ColumnProduct.apply(x, word_embeddings, self.bias, self.mesh, False)


PARALLEL = {
    ("column", QKVLinear): ColumnParallelLinear,
    ("column", Linear): ColumnParallelLinear,
    ("gated", Linear): ColumnParallelLinear,
    ("row", Linear): RowParallelLinear,
    ("vocab", nn.Embedding): VocabularyParallelEmbedding,
    ("vocab", Decoder): VocabularyParallelDecoder,
}


def shard(model: MaskedLM, mesh: Mesh, sequence_parallel: bool = False) -> MaskedLM:
    """Replaces the modules in `splits.SPLITS` by this rank's slices. Logits become (M, V / tensor_parallel).

    Parameters keep their names. A mesh without tensor parallelism leaves the model as it is.
    """
    if mesh.tensor_parallel == 1:
        return model
    for name, module in list(model.named_modules()):
        if kind := splits.kind(name):
            parent, _, child = name.rpartition(".")
            own = {
                each: nn.Parameter(
                    splits.slice_of(f"{name}.{each}", whole.detach(), mesh.tensor_rank, mesh.tensor_parallel).clone()
                )
                for each, whole in module.named_parameters()
            }
            split = PARALLEL[kind, type(module)](module, own, mesh, sequence_parallel)
            setattr(model.get_submodule(parent), child, split)
    if sequence_parallel:
        # a position table is read for the rank's own tokens, while rotary positions rotate all tokens of the rank's own
        # heads; every rank has a head, which takes the whole output of the encoder
        if hasattr(model.encoder.embeddings, "position"):
            model.encoder.embeddings.position.register_forward_pre_hook(lambda _, args: (own_slice(args[0], mesh),))
        model.encoder.register_forward_hook(lambda _, args, hidden: gather_from_sequence_parallel(hidden, mesh))
    return model


class _CrossEntropy(torch.autograd.Function):
    """Two all-reduces over the slices of the vocabulary: max, then target logit and sum of exponentials together."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
        ctx.first = mesh.tensor_rank * logits.shape[1]
        maximum, target_logit, total = ops.cross_entropy_parts(logits, targets, ctx.first)
        highest = _highest(maximum, mesh)
        target_logit, total = mesh.sum_over_slices(torch.stack([target_logit, total * (maximum - highest).exp()]))
        lse = highest + total.log()
        ctx.save_for_backward(logits, targets, lse)
        return lse - target_logit

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        logits, targets, lse = ctx.saved_tensors
        return ops.cross_entropy_gradient(logits.detach(), targets, lse, d_loss, ctx.first), None, None


def _highest(x: Tensor, mesh: Mesh) -> Tensor:
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MAX, mesh.tensor_group)
    return x


def cross_entropy(logits: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
    """(M,) losses in nats, the same on all ranks of a tensor group.

    logits: (M, V / tensor_parallel), the columns of this rank; targets: (M,) in the whole vocabulary.
    """
    if mesh.tensor_parallel == 1:
        return ops.cross_entropy(logits, targets)
    return _CrossEntropy.apply(logits, targets, mesh)


def guessed_right(logits: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
    """(M,) bool: whether no word has a higher logit than the target."""
    maximum, target_logit, _ = ops.cross_entropy_parts(logits, targets, mesh.tensor_rank * logits.shape[1])
    if mesh.tensor_parallel > 1:
        maximum, target_logit = _highest(maximum, mesh), mesh.sum_over_slices(target_logit.clone())
    return target_logit >= maximum
