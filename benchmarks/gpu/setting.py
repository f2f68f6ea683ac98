"""The sizes of a run. REAL is for a GPU of 80 GB or more; TOY tries the same stages on a CPU in a minute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config as functorch_config

from benchmarks.lengths import draw
from minisobert.config import PRESETS, ModelConfig, TrainConfig
from minisobert.corpus.loader import MicroBatch, Rows
from minisobert.corpus.masking import EVALUATION_RATE
from minisobert.corpus.packing import SPECIALS
from minisobert.corpus.shards import Shards
from minisobert.corpus.tokenizer import FIRST_ORDINARY_ID

LENGTHS = ("rows", "posts")  # documents that fill a row each; documents with the lengths of posts
DROPOUTS = (0.0, 0.1)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Setting:
    device: torch.device
    row_tokens: int
    tokens: int  # T in attention, layer norm and GELU
    heads: dict[int, int]  # head width → heads
    vocabulary: int
    gemm: int
    copy_bytes: int
    tokens_per_batch: int
    models: dict[str, tuple[ModelConfig, int, int]]  # with the rows of our micro-batch and the documents of a peer's
    rows: tuple[int, ...]  # other sizes of base's micro-batch, to see when the GPU waits for the host
    steps: int  # optimizer steps of train.py
    distinct: int  # micro-batches timed one after the other, as different ones follow in a run

    @property
    def dry(self) -> bool:
        return self.device.type != "cuda"

    def compile(self, function: Callable, repeat_backward: bool = True) -> Callable:
        """torch.compile, except in a dry run: on a CPU it would take minutes.

        repeat_backward: allows several backward passes after one forward pass, so that they can be timed alone.
        """
        if self.dry:
            return function
        # otherwise the first backward pass reuses the saved tensors' memory ("donated buffers")
        functorch_config.donated_buffer = not repeat_backward
        return torch.compile(function, dynamic=False)

    def dropouts(self, preset: str) -> tuple[float, ...]:
        """0, and the dropout of the preset's recipe if it has any."""
        return tuple(dict.fromkeys((0.0, recipe(preset).dropout)))

    def packed(self, lengths: str, tokens: int, seed: int, preset: str = "base") -> MicroBatch:
        """The first `tokens` tokens of a large epoch of random documents, packed as in pre-training and masked as the
        preset's recipe says. On the host."""
        rows, rate = tokens // self.row_tokens, recipe(preset).mask_rate
        return _micro_batch(lengths, rows, self.row_tokens, self.vocabulary, seed, rate)

    def micro_batch(self, lengths: str, tokens: int, seed: int, preset: str = "base") -> MicroBatch:
        """`packed`, on the device."""
        return self.packed(lengths, tokens, seed, preset).to(self.device)


@cache
def recipe(preset: str) -> TrainConfig:
    return TrainConfig(preset=preset)


def random_documents(lengths: np.ndarray, vocabulary: int, seed: int, folder: Path = Path()) -> Shards:
    """Documents of random tokens. lengths: with [CLS] and [SEP]. folder: where they will be stored."""
    offsets = np.concatenate([[0], np.cumsum(lengths - SPECIALS)])
    tokens = np.random.default_rng(seed).integers(FIRST_ORDINARY_ID, vocabulary, offsets[-1], dtype=np.int32)
    return Shards(folder, {"vocab_size": vocabulary}, tokens, offsets)


@cache  # most measurements use the same one
def _micro_batch(
    lengths: str, rows: int, row_tokens: int, vocabulary: int, seed: int, rate: float = EVALUATION_RATE
) -> MicroBatch:
    drawn = draw(max(20_000, 100 * rows), seed) if lengths == "posts" else np.full(rows, row_tokens)
    shards = random_documents(drawn, vocabulary, seed)
    return Rows(shards, range(len(drawn)), seed, row_tokens).micro_batch(0, rows, rate)


REAL = Setting(
    device=torch.device("cuda"),
    row_tokens=2_048,
    tokens=131_072,
    heads={64: 12, 96: 16, 128: 12},
    vocabulary=50_048,
    gemm=8_192,
    copy_bytes=1 << 32,
    tokens_per_batch=524_288,
    models={
        "base": (PRESETS["base"], 32, 16),
        "large": (PRESETS["large"], 8, 8),
        "modern-base": (PRESETS["modern-base"], 32, 16),
    },
    rows=(4, 8, 16),
    steps=20,
    distinct=4,
)
_toy = ModelConfig(layers=1, hidden=128, heads=2, ffn=256, vocabulary=256, positions=128)
_toy_modern = replace(_toy, architecture="modernbert", layers=2, ffn=192, global_every=2, window=16)
TOY = Setting(
    device=torch.device("cpu"),
    row_tokens=128,
    tokens=256,
    heads={64: 1, 96: 1, 128: 1},
    vocabulary=256,
    gemm=128,
    copy_bytes=1 << 20,
    tokens_per_batch=1_024,
    models={
        "base": (_toy, 1, 1),
        "large": (replace(_toy, hidden=192, ffn=384), 1, 1),
        "modern-base": (_toy_modern, 1, 1),
    },
    rows=(2,),
    steps=4,
    distinct=1,
)
