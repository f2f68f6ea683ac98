"""The sizes of a run. REAL is for a GPU of 80 GB or more; TOY walks the same stages on a CPU in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch._functorch.config as functorch_config

from benchmarks.lengths import packed_rows
from minisobert.config import PRESETS, ModelConfig

LENGTHS = ("rows", "posts")  # documents of a whole row each; documents as long as posts are
DROPOUTS = (0.0, 0.1)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Setting:
    device: torch.device
    row_tokens: int
    tokens: int  # T of attention, layer norm and GELU
    heads: dict[int, int]  # head width → heads
    widths: tuple[int, ...]  # hidden sizes of layer norm; GELU is four times as wide
    logits: tuple[int, int]  # M masked tokens, V vocabulary
    gemm: int
    copy_bytes: int
    tokens_per_batch: int
    models: dict[str, tuple[ModelConfig, int, int]]  # and its micro-batches: rows of ours, documents of the peers'

    @property
    def dry(self) -> bool:
        return self.device.type != "cuda"

    def compile(self, function: Callable, repeat_backward: bool = True) -> Callable:
        """torch.compile, but not in a dry run: on a CPU it would take minutes.

        repeat_backward: one forward pass may be followed by several backward passes, which are timed alone.
        """
        if self.dry:
            return function
        # what is saved for backward is otherwise given away in the first one ("donated buffers")
        functorch_config.donated_buffer = not repeat_backward
        return torch.compile(function, dynamic=False)

    def bounds(self, lengths: str, tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """bounds (D+1,) of the documents of so many tokens, and (D,) whether each is real and not padding."""
        rows = tokens // self.row_tokens
        if lengths == "posts":
            return packed_rows(rows, self.row_tokens, seed)
        return np.arange(rows + 1) * self.row_tokens, np.ones(rows, bool)


def pairs(bounds: np.ndarray, real: np.ndarray) -> int:
    """Pairs of tokens that see each other: the sum of squares of the real documents' lengths."""
    return int((np.diff(bounds)[real] ** 2).sum())


REAL = Setting(
    device=torch.device("cuda"),
    row_tokens=2_048,
    tokens=131_072,
    heads={64: 12, 96: 16, 128: 12},
    widths=(768, 1_536),
    logits=(19_660, 50_048),  # 15 % of the tokens
    gemm=8_192,
    copy_bytes=1 << 32,
    tokens_per_batch=524_288,
    models={"base": (PRESETS["base"], 32, 16), "large": (PRESETS["large"], 16, 8)},
)


def _toy_model(hidden: int) -> ModelConfig:
    return ModelConfig(layers=2, hidden=hidden, heads=2, ffn=2 * hidden, vocabulary=256, positions=256)


TOY = Setting(
    device=torch.device("cpu"),
    row_tokens=256,
    tokens=1_024,
    heads={64: 2, 96: 2, 128: 2},
    widths=(64, 96),
    logits=(77, 256),
    gemm=128,
    copy_bytes=1 << 20,
    tokens_per_batch=2_048,
    models={"base": (_toy_model(64), 2, 2), "large": (_toy_model(96), 2, 2)},
)
