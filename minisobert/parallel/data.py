"""Data parallelism: each rank has rows of its own, and the gradients are summed over the ranks before a step.

All parameters of a rank are in one flat buffer and their gradients in another, in the order in which a backward pass
computes gradients, last layer first. The buffers are cut into buckets, and one collective sums a whole bucket:

    gradients   | ffn_output … qkv  block 1 | ffn_output … qkv  block 0 |  embeddings    |
                |        bucket 0           |        bucket 1           |   bucket 2     |
                  summed while block 0's backward runs ───┘

`Gradients` is the simple version: it sums everything after the backward pass. `OverlappedGradients` sums each bucket as
soon as its gradients are complete, during the last backward pass of a step, and gives the same bits.

With a sharded optimizer (ZeRO stage 1, Rajbhandari et al. 2020) each rank owns 1/data_parallel of every bucket. It
receives the sum of its own share only (reduce-scatter) and updates that share of the parameters; an all-gather then
gives the new parameters to all ranks. These are the two halves of an all-reduce with the step in between: no extra
bytes, and each rank stores only its share of the optimizer state.

    data_parallel 2    bucket 0: | rank 0 | rank 1 |    bucket 1: | rank 0 | rank 1 |    …
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minisobert.parallel import splits
from minisobert.parallel.collectives import all_gather_into, reduce_scatter_into
from minisobert.parallel.mesh import Mesh

BUCKET = 1 << 24  # elements, 64 MB of gradients: enough that a collective's latency does not matter
ALIGN = 64  # elements: parameters begin at multiples of it, for matrix units and 16-byte loads


@dataclass(frozen=True)
class Bucket:
    """Elements [start, stop) of the flat buffers: whole parameters and a little padding."""

    start: int
    stop: int
    names: tuple[str, ...]
    by_tokens: bool  # each tensor-parallel rank has the gradients of its own tokens only

    def share(self, rank: int, ranks: int) -> slice:
        size = (self.stop - self.start) // ranks
        return slice(self.start + rank * size, self.start + (rank + 1) * size)


def lay_out(
    sizes: dict[str, int], data_parallel: int, sequence_parallel: bool = False
) -> tuple[dict[str, slice], list[Bucket]]:
    """The place of each parameter in the flat buffers, and the buckets.

    sizes: elements of each parameter, in the order of the model.
    """
    by_tokens = {name for name in sizes if sequence_parallel and splits.summed_over_tokens(name)}
    places: dict[str, slice] = {}
    buckets: list[Bucket] = []
    at = 0
    for last in (False, True):  # parameters whose gradients are summed over tokens come last
        names = [name for name in reversed(sizes) if (name in by_tokens) == last]
        start, inside = at, []
        for name in names:
            places[name] = slice(at, at + sizes[name])
            at = _round_up(at + sizes[name], ALIGN)
            inside.append(name)
            if at - start >= BUCKET or name == names[-1]:
                at = start + _round_up(at - start, ALIGN * data_parallel)
                buckets.append(Bucket(start, at, tuple(inside), last))
                start, inside = at, []
    return places, buckets


class FlatParameters:
    """One buffer of `dtype` for a model's parameters, which become views of it, and an fp32 one for their gradients.

    Backward passes add to `gradients`, whatever the dtype of the parameters, until it is zeroed. places: where each
    parameter is in both.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, mesh: Mesh, sequence_parallel: bool = False):
        """model: in fp32, on its device, already split by `tensor.shard`."""
        self.parameters = dict(model.named_parameters())
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        self.places, self.buckets = lay_out(sizes, mesh.data_parallel, sequence_parallel)
        size, device = self.buckets[-1].stop, next(model.parameters()).device
        self.weights = torch.zeros(size, dtype=dtype, device=device)
        self.gradients = torch.zeros(size, dtype=torch.float32, device=device)

    def adopt(self) -> None:
        """Makes the model's parameters views of `weights`, and from then on sends their gradients to `gradients`."""
        for name, parameter in self.parameters.items():
            view = self.weights[self.places[name]].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            if parameter.dtype == torch.float32:
                parameter.grad = self.gradient(name)  # autograd adds in place to a gradient that exists
            else:
                parameter.register_post_accumulate_grad_hook(partial(_move_gradient, self.gradient(name)))

    def gradient(self, name: str) -> Tensor:
        return self.gradients[self.places[name]].view(self.parameters[name].shape)

    def owned(self, rank: int, ranks: int) -> Iterator[tuple[str, int, slice]]:
        """The parts of parameters in one rank's shares: (name, first element of it, place in the buffers)."""
        for bucket in self.buckets:
            share = bucket.share(rank, ranks)
            for name in bucket.names:
                place = self.places[name]
                start, stop = max(place.start, share.start), min(place.stop, share.stop)
                if start < stop:
                    yield name, start - place.start, slice(start, stop)


class Gradients:
    """Sums the gradients of the ranks after the backward pass, bucket by bucket."""

    def __init__(self, flat: FlatParameters, mesh: Mesh, sharded: bool = False):
        self.flat, self.mesh, self.sharded = flat, mesh, sharded
        self.rank_norms: dict[str, Tensor] = {}  # norms of this rank's own gradients, to find the origin of a NaN

    def before_last_backward(self) -> None:
        """Call this before the backward pass after which the gradients are complete."""
        self.rank_norms = {}

    def sum(self) -> None:
        """Sums all buckets. With a sharded optimizer, only this rank's shares hold the sum afterwards."""
        for bucket in self.flat.buckets:
            work = self._start(bucket)
            if work:
                work.wait()

    def _start(self, bucket: Bucket) -> dist.Work | None:
        norms = torch._foreach_norm([self.flat.gradients[self.flat.places[name]] for name in bucket.names])
        self.rank_norms |= zip(bucket.names, norms)
        gradients = self.flat.gradients[bucket.start : bucket.stop]
        if bucket.by_tokens:
            self.mesh.sum_over_slices(gradients)
        if self.mesh.data_parallel == 1:
            return None
        if self.sharded:
            own = self.flat.gradients[bucket.share(self.mesh.data_rank, self.mesh.data_parallel)]
            return reduce_scatter_into(own, gradients, group=self.mesh.data_group, async_op=True)
        return dist.all_reduce(gradients, group=self.mesh.data_group, async_op=True)

    def gather_parameters(self) -> None:
        """Gathers the parameters from the ranks, each of which has updated its own shares."""
        self._gather(self.flat.weights, self.flat.buckets)

    def gather(self, wanted: Callable[[str], bool]) -> None:
        """Gathers the buckets of gradients that hold a wanted parameter, of which each rank has its own shares."""
        self._gather(self.flat.gradients, [b for b in self.flat.buckets if any(map(wanted, b.names))])

    def _gather(self, buffer: Tensor, buckets: list[Bucket]) -> None:
        mesh, works = self.mesh, []
        for bucket in buckets if self.sharded and mesh.data_parallel > 1 else ():
            own = buffer[bucket.share(mesh.data_rank, mesh.data_parallel)]
            whole = buffer[bucket.start : bucket.stop]
            works.append(all_gather_into(whole, own, group=mesh.data_group, async_op=True))
        for work in works:
            work.wait()


class OverlappedGradients(Gradients):
    """Starts to sum a bucket once its gradients are complete, while the backward pass goes on with earlier layers."""

    def __init__(self, flat: FlatParameters, mesh: Mesh, sharded: bool = False):
        super().__init__(flat, mesh, sharded)
        self._missing: list[int] = []  # per bucket, the number of gradients still to come; empty: do not start
        self._works: list[dist.Work | None] = []
        for i, bucket in enumerate(flat.buckets):
            for name in bucket.names:
                flat.parameters[name].register_post_accumulate_grad_hook(lambda _, i=i: self._arrived(i))

    def before_last_backward(self) -> None:
        super().before_last_backward()
        self._missing, self._works = [len(bucket.names) for bucket in self.flat.buckets], []

    def _arrived(self, bucket: int) -> None:
        if self._missing:
            self._missing[bucket] -= 1
            # in the order of the buckets: all ranks must start the collectives in the same order
            while (at := len(self._works)) < len(self._missing) and not self._missing[at]:
                self._works.append(self._start(self.flat.buckets[at]))

    def sum(self) -> None:
        self._missing = []
        for bucket in self.flat.buckets[len(self._works) :]:
            self._works.append(self._start(bucket))
        for work in self._works:
            if work:
                work.wait()
        self._works = []


def _move_gradient(gradient: Tensor, parameter: Tensor) -> None:
    gradient += parameter.grad
    parameter.grad = None


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to
