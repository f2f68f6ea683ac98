"""A number as a network learns it: its standard score (y - mean) / deviation, by the mean and deviation of train.

Weights and rates of fine-tuning suit outputs around 1, but a number may be a year or a millionth. After training the
last layer takes over what leads back, so that what is saved and exported gives the number itself:

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

ROUNDING = 0.01  # of a deviation: fp32 at the largest mean that is let in is off by half of it


def last_layer(module: nn.Module) -> nn.Linear:
    """The one that makes the number. Raises ValueError where there is none, or none with a bias."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if not linears or linears[-1].bias is None:
        raise ValueError(f"a {type(module).__name__} ends in no linear layer with a bias, which --number needs")
    return linears[-1]


class Standard:
    """The mean and deviation of some numbers, and the layer of a network that learns their standard scores."""

    def __init__(self, module: nn.Module, values: np.ndarray):
        """values: (N,) of train. Raises ValueError as `last_layer` does."""
        self.mean, self.deviation = float(values.mean()), float(values.std())
        self.module = module
        self.output = last_layer(module)

    def scores(self, items: list[Encoded]) -> list[Encoded]:
        return [dataclasses.replace(item, targets=(item.targets - self.mean) / self.deviation) for item in items]

    def back(self, scores: list[np.ndarray]) -> list[np.ndarray]:
        return [each * self.deviation + self.mean for each in scores]

    @torch.no_grad()
    def fold(self, give: Callable[[], list[np.ndarray]]) -> None:
        """From here on the network gives numbers. All its parameters become fp32: with the 8 bits of bf16 a year would
        be right to the decade.

        give: what the network gives for a few texts. Raises ValueError where that is not as expected, because something
        comes after the last layer, as in an architecture of transformers it may."""
        self.module.float()
        expected = np.concatenate(self.back(give()))
        self.output.weight *= self.deviation
        self.output.bias.mul_(self.deviation).add_(self.mean)
        if not np.allclose(np.concatenate(give()), expected, rtol=0, atol=ROUNDING * self.deviation):
            raise ValueError(
                f"a {type(self.module).__name__} does something with what its last layer gives, which --number cannot "
                "undo; choose another model"
            )
