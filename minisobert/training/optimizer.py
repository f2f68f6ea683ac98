"""AdamW, or Muon with AdamW, on fp32 master weights of what this rank owns: everything, or a share of every bucket.

In fp32 the masters are the parameters themselves. In bf16 they are copies, because a step of 1e-4 on a weight of 0.02
is lost in bf16's 8 bits; after every step the parameters are set to the rounded masters.

Muon needs whole matrices, but a share may end inside one. Every rank has the whole buffer of gradients, so the shares
of the momentum are gathered there, and each rank orthogonalises there the matrices of which it owns a part. With a
sharded optimizer the ranks thus divide that work, and no state is kept twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisobert.parallel import splits
from minisobert.parallel.data import FlatParameters, Gradients, OverlappedGradients
from minisobert.parallel.mesh import Mesh
from minisobert.training import muon
from minisobert.training.checkpoint import FILES, Slice

MOMENTS = ("exp_avg", "exp_avg_sq")
WORKSPACE = 1 << 24  # elements of matrices that are orthogonalised together


@dataclass(frozen=True)
class Part:
    """Elements [first, first + len(master)) of one of this rank's parameters, flattened, which this rank updates."""

    name: str
    first: int
    place: slice  # in the flat buffers
    master: Tensor  # (n,) fp32


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019), and with a momentum Muon for the matrices that `muon.is_matrix` selects.

    Weight decay does not apply to biases and layer norms.

    gradients: what backward passes add to, until `step` sums it over ranks, scales, applies and zeroes it.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        betas: tuple[float, float],
        weight_decay: float,
        mesh: Mesh | None = None,
        *,
        sharded: bool = False,
        sequence_parallel: bool = False,
        eps: float = 1e-8,
        momentum: float | None = None,
    ):
        """model: this rank's slice, in fp32; its parameters become `dtype`, and masters keep their values. momentum:
        Muon's; None: AdamW for all parameters."""
        if dtype == torch.bfloat16:
            # else cuBLAS may round partial sums to bf16 if it splits a long sum, such as a weight's gradient over all
            # tokens
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self.mesh, self.sharded = mesh or Mesh(), sharded
        self.flat = flat = FlatParameters(model, dtype, self.mesh, sequence_parallel)
        owned = list(flat.owned(self.mesh.data_rank, self.mesh.data_parallel) if sharded else flat.owned(0, 1))
        masters = [
            flat.parameters[name].detach().flatten()[first : first + place.stop - place.start].clone()
            for name, first, place in (owned if dtype != torch.float32 else ())
        ]
        flat.adopt()
        masters = masters or [flat.weights[place] for _, _, place in owned]
        self.parts = [Part(*where, master) for where, master in zip(owned, masters)]
        kind = OverlappedGradients if self.mesh.world > 1 else Gradients
        self.gradients = kind(flat, self.mesh, sharded)

        self.momentum, self.weight_decay = momentum, weight_decay
        self.config = getattr(model, "config", None)
        of_adam = [part for part in self.parts if not self._is_muons(part.name)]
        groups = [
            {"params": [p.master for p in of_adam if (flat.parameters[p.name].dim() > 1) == d], "weight_decay": decay}
            for d, decay in ((True, weight_decay), (False, 0.0))
        ]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        self.state: dict[Tensor, dict[str, Tensor]] = self.adam.state
        for part in self.parts:
            part.master.grad = flat.gradients[part.place]
            self.state[part.master] = {name: torch.zeros_like(part.master) for name in self._moments(part.name)}
        for part in of_adam:
            self.state[part.master]["step"] = torch.zeros((), device=part.master.device)
        # The norm of the whole gradient is a sum over all ranks. A part that n ranks hold alike is weighted 1/n on
        # each, so that it counts once: n is tensor_parallel for a parameter that is not split, times data_parallel if
        # the optimizer is not sharded
        split = [splits.split_dimension(part.name) is not None for part in self.parts]
        copies = [1 if each else self.mesh.tensor_parallel for each in split]
        self._weights = 1 / torch.tensor(copies, dtype=torch.float64, device=flat.weights.device)
        if not sharded:
            self._weights /= self.mesh.data_parallel

    def _is_muons(self, name: str) -> bool:
        return self.momentum is not None and muon.is_matrix(name)

    def _moments(self, name: str) -> tuple[str, ...]:
        """The moments that are kept for a parameter between steps: Muon has no squares."""
        return MOMENTS[:1] if self._is_muons(name) else MOMENTS

    def norm(self) -> float:
        """The norm of the whole model's summed gradient, the same on all ranks."""
        gradients = [part.master.grad for part in self.parts]
        # in fp64: torch's fp32 norm of ten million elements is off by 4e-4 on a CPU
        norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float64))
        return self.mesh.sum_over_all((norms.square() * self._weights).sum()).sqrt().item()

    @torch.no_grad()
    def step(
        self, learning_rate: float, count: float, clip: float, muon_learning_rate: float = 0.0
    ) -> tuple[float, bool]:
        """Divides the sum of the gradients of all ranks by count, clips its norm and applies it.

        Returns (norm before clipping, applied). A gradient that is not finite is not applied: nothing changes on any
        rank, and applied is False.
        """
        self.gradients.sum()
        norm = self.norm() / count
        applied = norm < float("inf")  # False for NaN too
        if applied:
            self.flat.gradients *= min(clip / (norm + 1e-6), 1.0) / count
            for group in self.adam.param_groups:
                group["lr"] = learning_rate
            self._muon_step(muon_learning_rate)
            self.adam.step()
            self._round_masters()
        self.flat.gradients.zero_()
        return norm, applied

    def _muon_step(self, learning_rate: float) -> None:
        if self.momentum is None:
            return
        parts = [part for part in self.parts if self._is_muons(part.name)]
        for part in parts:
            gradient, mean = part.master.grad, self.state[part.master]["exp_avg"]
            mean.lerp_(gradient, 1 - self.momentum)
            gradient.lerp_(mean, self.momentum)
        self.gradients.gather(self._is_muons)
        # in the order of the parts, the same on all ranks of a tensor group: every iteration has a collective
        whole = {
            part.name: muon.matrices(part.name, self.flat.gradient(part.name), self.config.head_width) for part in parts
        }
        ranks = {name: self.mesh.tensor_parallel if muon.is_split(name) else 1 for name in whole}
        for n in sorted(set(ranks.values())):  # in one order on all ranks
            for views in _alike([view for name, view in whole.items() if ranks[name] == n]):
                directions = muon.orthogonalise(torch.cat(views), self.mesh if n > 1 else Mesh())
                for view, direction in zip(views, directions.split(len(views[0]))):
                    view.copy_(direction)
        for part in parts:
            _, rows, columns = whole[part.name].shape
            size = muon.AS_ADAMW * max(rows * ranks[part.name], columns) ** 0.5
            part.master.mul_(1 - learning_rate * self.weight_decay).add_(part.master.grad, alpha=-learning_rate * size)

    def not_finite(self) -> list[str | None]:
        """After a step that was not applied: for each rank, its first gradient that is not finite, or None."""
        names = list(self.flat.places)  # in the order in which the backward pass computes them
        norms = self.gradients.rank_norms
        bad = [i for i, name in enumerate(names) if not norms[name].isfinite()]
        first = [0] * self.mesh.world
        first[self.mesh.rank] = bad[0] + 1 if bad else 0
        return [names[i - 1] if i else None for i in self.mesh.sum_on_hosts(first)]

    def _round_masters(self) -> None:
        if self.flat.weights.dtype != torch.float32:
            for part in self.parts:
                self.flat.weights[part.place].copy_(part.master)
        self.gradients.gather_parameters()

    def checkpoint_names(self, parameter: str) -> list[tuple[str, str]]:
        """(file of a checkpoint, name in it) of a parameter's master and its moments."""
        return [("model", parameter), *(("optimizer", f"{moment}.{parameter}") for moment in self._moments(parameter))]

    def tensors(self, part: Part) -> list[Tensor]:
        """The master and the moments of a part, (n,) each, in the order of `checkpoint_names`."""
        return [part.master, *(self.state[part.master][moment] for moment in self._moments(part.name))]

    def whole_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shape of each unsharded tensor of a checkpoint, by file and name."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {file: {} for file in FILES}
        for name, parameter in self.flat.parameters.items():
            whole = splits.whole_shape(name, tuple(parameter.shape), self.mesh.tensor_parallel)
            for file, tensor in self.checkpoint_names(name):
                shapes[file][tensor] = whole
        return shapes

    def slices(self) -> list[Slice]:
        """The slices of a checkpoint that this rank writes: the first of several ranks that hold one writes it."""
        mesh, slices = self.mesh, []
        for part in self.parts:
            one_of_a_kind = self.sharded or mesh.data_rank == 0
            if one_of_a_kind and (splits.split_dimension(part.name) is not None or mesh.tensor_rank == 0):
                shape, elements = tuple(self.flat.parameters[part.name].shape), (part.first, len(part.master))
                runs = [*splits.contiguous_runs(part.name, shape, *elements, mesh.tensor_rank, mesh.tensor_parallel)]
                for (file, name), tensor in zip(self.checkpoint_names(part.name), self.tensors(part)):
                    slices.append(Slice(file, name, tensor, runs))
        return slices

    @torch.no_grad()
    def restore(self, files: dict[str, dict[str, Tensor]], steps: int) -> None:
        """Loads a checkpoint. files: whole, unsharded tensors by file and name. steps: how many were applied."""
        mesh = self.mesh
        for part in self.parts:
            for (file, name), tensor in zip(self.checkpoint_names(part.name), self.tensors(part)):
                mine = splits.slice_of(part.name, files[file][name], mesh.tensor_rank, mesh.tensor_parallel)
                tensor.copy_(mine.flatten()[part.first : part.first + len(tensor)])
            if "step" in self.state[part.master]:
                self.state[part.master]["step"].fill_(steps)
        self._round_masters()


def _alike(views: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of matrices of one shape, with at most WORKSPACE elements unless a single one has more: a batched product
    is as fast as one large one, and a group takes one all-reduce."""
    of_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for view in views:
        group = of_shape.setdefault(tuple(view.shape), [])
        group.append(view)
        if (len(group) + 1) * view.numel() > WORKSPACE:
            yield of_shape.pop(tuple(view.shape))
    yield from of_shape.values()
