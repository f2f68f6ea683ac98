"""The sizes of a run. REAL is for a GPU of 80 GB or more; TOY walks the same stages on a CPU in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config as functorch_config

from benchmarks.lengths import draw
from minisobert.config import PRESETS, ModelConfig
from minisobert.corpus.loader import MicroBatch, Rows
from minisobert.corpus.packing import SPECIALS
from minisobert.corpus.shards import Shards
from minisobert.corpus.tokenizer import FIRST_ORDINARY_ID

LENGTHS = ("rows", "posts")  # documents of a whole row each; documents as long as posts are
DROPOUTS = (0.0, 0.1)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Setting:
    device: torch.device
    row_tokens: int
    tokens: int  # T of attention, layer norm and GELU
    heads: dict[int, int]  # head width → heads
    vocabulary: int
    gemm: int
    copy_bytes: int
    tokens_per_batch: int
    models: dict[str, tuple[ModelConfig, int, int]]  # and its micro-batches: rows of ours, documents of the peers'
    few_rows: tuple[int, ...]  # of smaller micro-batches of base: where do kernels wait for the host?

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

    def micro_batch(self, lengths: str, tokens: int, seed: int) -> MicroBatch:
        """The first rows, so many tokens, of a large epoch of random pieces, packed and masked as pre-training does."""
        rows = tokens // self.row_tokens
        return _micro_batch(lengths, rows, self.row_tokens, self.vocabulary, seed).to(self.device)


@cache  # by far most measurements take the same one
def _micro_batch(lengths: str, rows: int, row_tokens: int, vocabulary: int, seed: int) -> MicroBatch:
    drawn = draw(max(20_000, 100 * rows), seed) if lengths == "posts" else np.full(rows, row_tokens)
    offsets = np.concatenate([[0], np.cumsum(drawn - SPECIALS)])
    tokens = np.random.default_rng(seed).integers(FIRST_ORDINARY_ID, vocabulary, offsets[-1], dtype=np.int32)
    shards = Shards(Path(), {"vocab_size": vocabulary}, tokens, offsets)
    return Rows(shards, range(len(drawn)), seed, row_tokens).micro_batch(0, rows)


REAL = Setting(
    device=torch.device("cuda"),
    row_tokens=2_048,
    tokens=131_072,
    heads={64: 12, 96: 16, 128: 12},
    vocabulary=50_048,
    gemm=8_192,
    copy_bytes=1 << 32,
    tokens_per_batch=524_288,
    models={"base": (PRESETS["base"], 32, 16), "large": (PRESETS["large"], 16, 8)},
    few_rows=(4, 8, 16),
)
_toy_model = ModelConfig(layers=2, hidden=64, heads=2, ffn=256, vocabulary=256, positions=256)
TOY = Setting(
    device=torch.device("cpu"),
    row_tokens=256,
    tokens=1_024,
    heads={64: 2, 96: 2, 128: 2},
    vocabulary=256,
    gemm=128,
    copy_bytes=1 << 20,
    tokens_per_batch=2_048,
    models={"base": (_toy_model, 2, 2), "large": (replace(_toy_model, hidden=96, ffn=384), 2, 2)},
    few_rows=(1,),
)
