"""AdamW on fp32 masters, and one flat fp32 buffer that all gradients of a step are summed in.

In fp32 the masters are the parameters themselves. In bf16 they are copies, since steps of 1e-4 on weights of 0.02 are
lost in bf16's 8 bits; the parameters are their rounding, made anew after every step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019); weight decay on matrices alone, not on biases and layer norms.

    gradient: (number of parameters,) fp32. Backward passes add to it, whatever the dtype of the parameters, until
    `step`, which scales it, applies it and zeroes it.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8
    ):
        """model: in fp32; its parameters become `dtype`, and the masters keep what they were."""
        self.parameters = dict(model.named_parameters())
        device = next(model.parameters()).device
        sizes = [p.numel() for p in self.parameters.values()]
        self.gradient = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.masters: dict[str, Tensor] = {}
        for (name, parameter), flat in zip(self.parameters.items(), self.gradient.split(sizes)):
            view = flat.view(parameter.shape)
            self.masters[name] = parameter
            if dtype != torch.float32:
                self.masters[name] = nn.Parameter(parameter.detach().clone())
                parameter.data = parameter.data.to(dtype)
                parameter.register_post_accumulate_grad_hook(lambda p, view=view: _move_gradient(p, view))
            self.masters[name].grad = view  # autograd adds to a gradient that is there in place

        decay = [p for p in self.masters.values() if p.dim() > 1]
        rest = [p for p in self.masters.values() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, learning_rate: float, count: float, clip: float) -> tuple[float, bool]:
        """Divides the summed gradient by count, clips its norm and applies it. Returns (norm before clipping, applied).

        A gradient that is not finite is not applied: nothing changes, and applied is False.
        """
        norm = self.gradient.norm().item() / count
        applied = norm < float("inf")  # False for NaN too
        if applied:
            self.gradient *= min(clip / (norm + 1e-6), 1.0) / count
            for group in self.adam.param_groups:
                group["lr"] = learning_rate
            self.adam.step()
            self._round_masters()
        self.gradient.zero_()
        return norm, applied

    def _round_masters(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """Adam's moments by parameter name, and its number of steps; empty before the first step."""
        state = {}
        for name, master in self.masters.items():
            for key, value in self.adam.state[master].items() if master in self.adam.state else ():
                state["step" if key == "step" else f"{key}.{name}"] = value
        return state

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """weights: the masters by name, in fp32; state: as `state` returned it."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
            if state:
                moments = {key: state[f"{key}.{name}"].to(master.device) for key in ("exp_avg", "exp_avg_sq")}
                self.adam.state[master] = {"step": state["step"].clone().to(master.device), **moments}
        self._round_masters()


def _move_gradient(parameter: Tensor, view: Tensor) -> None:
    view += parameter.grad
    parameter.grad = None
