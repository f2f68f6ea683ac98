"""Numbers as a network learns them: the standard scores (y - mean) / deviation, with the mean and deviation of train.

The initial weights and learning rates of fine-tuning suit outputs around 1, but a number may be a year or a millionth.
After training, the way back is folded into the last layer, so that a saved or exported model gives the number itself:

    (w x + b) · deviation + mean  =  (deviation · w) x + (deviation · b + mean)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from minisobert.finetuning.loop import Encoded

ROUNDING = 0.01  # of a deviation; at the largest mean that is allowed, fp32 is off by half of this


def last_layer(module: nn.Module) -> nn.Linear:
    """The layer that computes the number. Raises ValueError if there is none, or if it has no bias."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if not linears or linears[-1].bias is None:
        raise ValueError(f"a {type(module).__name__} does not end in a linear layer with a bias, which --number needs")
    return linears[-1]


class Standard:
    """The mean and deviation of some numbers, and the layer of a network that gives their standard scores."""

    def __init__(self, module: nn.Module, values: np.ndarray):
        """values: (N,) the numbers of train. Raises ValueError as `last_layer` does."""
        self.mean, self.deviation = float(values.mean()), float(values.std())
        self.module = module
        self.output = last_layer(module)

    def scores(self, items: list[Encoded]) -> list[Encoded]:
        return [dataclasses.replace(item, targets=(item.targets - self.mean) / self.deviation) for item in items]

    def back(self, scores: list[np.ndarray]) -> list[np.ndarray]:
        return [each * self.deviation + self.mean for each in scores]

    @torch.no_grad()
    def fold(self, give: Callable[[], list[np.ndarray]]) -> None:
        """Makes the network give the numbers themselves. All its parameters become fp32: with the 8 bits of bf16, a
        year would be right only to the decade.

        give: returns what the network gives for a few texts. Raises ValueError if that changes in any other way than
        expected, since an architecture of transformers may do something after its last layer."""
        self.module.float()
        expected = np.concatenate(self.back(give()))
        self.output.weight *= self.deviation
        self.output.bias.mul_(self.deviation).add_(self.mean)
        if not np.allclose(np.concatenate(give()), expected, rtol=0, atol=ROUNDING * self.deviation):
            raise ValueError(
                f"a {type(self.module).__name__} changes the output of its last layer, which --number cannot "
                "undo; choose another model"
            )
