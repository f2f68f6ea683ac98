"""Attention beside torch's own, forward and backward: on rows of one document each, and on rows packed with posts.

The FLOPs count only visible pairs of real documents: 4 d H Σ n² forward (two products), 2.5 times that backward (five).
All implementations read q, k and v as the model gives them, as views of one (T, H, 3, d) tensor. The peers get the rows
as a batch, so they do not compute pairs of different rows. Where they need a mask, it is built for each batch and timed
separately:

    sdpa-cudnn, sdpa-flash, sdpa-efficient   one backend, forced; posts with a boolean mask, which flash does not take
    varlen                                   torch.nn.attention.varlen: flash attention with bounds; no dropout
    flex                                     compiled FlexAttention with a document mask; no dropout
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import timing
from benchmarks.gpu.setting import DTYPE, Setting
from minisobert import ops
from minisobert.ops import Dropout
from minisobert.ops.attention import WithBias
from minisobert.ops.kernels import attention_tiles

EARLIER = {  # d = 64: the tiles chosen before instructions were counted; the gradients have two stages
    "FORWARD": (128, 64, 4, 3), "FORWARD_DROPOUT": (64, 64, 4, 3),
    "KEY_GRADIENT": (64, 64, 4, 2), "QUERY_GRADIENT": (64, 64, 4, 2),
}  # fmt: skip
TILES = {  # d = 64, dropout 0.1: (rows held, tokens visited, warps, stages) that instruction counts do not rule out
    "forward": ((128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3)),
    "key gradient": ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (64, 32, 4, 3)),
    "query gradient": ((128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3)),
}
TABLES = {"forward": "FORWARD_DROPOUT", "key gradient": "KEY_GRADIENT", "query gradient": "QUERY_GRADIENT"}
BACKWARD = 2.5  # five products (q kᵀ again, dP, dV, dQ, dK) for two in the forward pass


def flops(pairs: int, heads: int, width: int) -> float:
    """FLOPs of the forward pass."""
    return 4.0 * width * heads * pairs


class Case:
    def __init__(self, setting: Setting, lengths: str, dropout: float):
        self.setting, self.lengths, self.dropout = setting, lengths, dropout
        batch = setting.micro_batch(lengths, setting.tokens, seed=0)
        self.documents, self.pairs = batch.documents, int((batch.lengths**2).sum())
        # (R, row) int32: each token's document, identified by its first token
        self.document = self.documents.start.unflatten(0, (-1, setting.row_tokens))

    def rows(self, x: Tensor) -> Tensor:
        """(T, H, d) as (R, H, row, d)."""
        return x.unflatten(0, (-1, self.setting.row_tokens)).transpose(1, 2)


# Each implementation takes the case and returns two functions: one that builds the mask of a batch, or None, and one
# that computes (q, k, v, mask) → result


def minisobert(case: Case):
    step = Dropout.for_step(case.dropout, 0, 0, 1, case.setting.device)
    dropout = step and step.at(0, "attention")
    return None, lambda q, k, v, mask=None: ops.attention(q, k, v, case.documents, dropout)


def sdpa(backend: str, case: Case):
    def mask() -> Tensor:
        return (case.document[:, :, None] == case.document[:, None, :])[:, None]

    def run(q, k, v, mask):
        # a CPU has only one of these backends; a dry run checks the rest of the path with MATH
        with sdpa_kernel(SDPBackend.MATH if case.setting.dry else getattr(SDPBackend, backend)):
            out = F.scaled_dot_product_attention(*map(case.rows, (q, k, v)), mask, dropout_p=case.dropout)
        return out.transpose(1, 2).flatten(0, 1)

    return mask if case.lengths == "posts" else None, run


def varlen(case: Case):
    from torch.nn.attention.varlen import varlen_attn

    bounds = case.documents.bounds.to(case.setting.device, torch.int32)
    longest = int(case.documents.bounds.diff().max())
    return None, lambda q, k, v, mask: varlen_attn(q, k, v, bounds, bounds, longest, longest)


def flex(case: Case):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document, row, device = case.document, case.setting.row_tokens, str(case.setting.device)
    create, attend = case.setting.compile(create_block_mask), case.setting.compile(flex_attention)

    def same_document(b, h, i, j):
        return document[b, i] == document[b, j]

    def run(q, k, v, mask):
        return attend(*map(case.rows, (q, k, v)), block_mask=mask).transpose(1, 2).flatten(0, 1)

    return lambda: create(same_document, len(document), None, row, row, device), run


IMPLEMENTATIONS: dict[str, Callable] = {
    "minisobert": minisobert,
    "sdpa-cudnn": partial(sdpa, "CUDNN_ATTENTION"),
    "sdpa-flash": partial(sdpa, "FLASH_ATTENTION"),
    "sdpa-efficient": partial(sdpa, "EFFICIENT_ATTENTION"),
    "varlen": varlen,
    "flex": flex,
}


def takes(lengths: str, dropout: float, name: str) -> bool:
    """Whether an implementation supports these documents and this dropout."""
    return lengths == "rows" if name == "sdpa-flash" else not dropout or name not in ("varlen", "flex")


def measure_tile(setting: Setting, kernel: str, tile: tuple[int, int, int, int]) -> dict:
    """Measures posts with this tile for one kernel; the other kernels keep the tiles that ship."""
    with in_place({TABLES[kernel]: tile}):
        return measure(setting, 64, "posts", 0.1, "minisobert")


def measure_earlier(setting: Setting, width: int, lengths: str, dropout: float) -> dict:
    with in_place(EARLIER):
        return measure(setting, width, lengths, dropout, "minisobert")


@contextmanager
def in_place(tiles: dict[str, tuple[int, int, int, int]]) -> Iterator[None]:
    """Within this context, each of these tables has the given tile for bf16 and d = 64."""
    tables = {name: getattr(attention_tiles, name) for name in tiles}
    shipped = {name: table[2, 64] for name, table in tables.items()}
    try:
        for name, tile in tiles.items():
            tables[name][2, 64] = [tile] * 3
        yield
    finally:
        for name, table in tables.items():
            table[2, 64] = shipped[name]


SURROUNDINGS = ("nothing", "bias", "bias apart", "rotary", "rotary apart")


def measure_surroundings(setting: Setting, width: int, lengths: str, dropout: float, what: str) -> dict:
    """Attention of one (T, H, 3, d) tensor, copied first, together with the bias or the rotary positions that a block
    adds. "apart": these take separate passes, as they did before `self_attention` included them."""
    case, heads = Case(setting, lengths, dropout), setting.heads[width]
    step = Dropout.for_step(dropout, 0, 0, 1, setting.device)
    dropped = step and step.at(0, "attention")
    qkv = torch.randn(setting.tokens, heads, 3, width, dtype=DTYPE, device=setting.device, requires_grad=True)
    bias = torch.zeros(3 * heads * width, dtype=DTYPE, device=setting.device, requires_grad=True)
    rotation = ops.rotation(case.documents.start * 0, width, 10_000.0)

    def run(qkv, bias=None):
        qkv = qkv.clone()  # rotary positions overwrite it
        if what == "bias apart":
            return ops.self_attention(WithBias.apply(qkv, bias), case.documents, dropped)
        if what == "rotary apart":
            return ops.self_attention(RotaryApart.apply(qkv, rotation), case.documents, dropped)
        turned = rotation if what == "rotary" else None
        return ops.self_attention(qkv, case.documents, dropped, None, turned, bias)

    result = timing.measure(run, None, [qkv, bias] if what.startswith("bias") else [qkv])
    work = flops(case.pairs, heads, width)
    return result | {
        "forward_tflops": work / result["forward_seconds"] / 1e12,
        "backward_tflops": BACKWARD * work / result["backward_seconds"] / 1e12,
    }


class RotaryApart(torch.autograd.Function):
    """Rotates in place, and rotates the gradient back in a separate pass."""

    @staticmethod
    def forward(ctx, x: Tensor, rotation: Tensor) -> Tensor:
        from minisobert.ops.kernels.rotary import turn  # imports Triton; a dry run must set TRITON_INTERPRET first

        ctx.rotation, ctx.turn = rotation, turn
        return turn(x, x, rotation, x.shape[1]).view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.turn(grad, torch.empty_like(grad), ctx.rotation, grad.shape[1], back=True), None


def measure(setting: Setting, width: int, lengths: str, dropout: float, name: str) -> dict:
    case, heads = Case(setting, lengths, dropout), setting.heads[width]
    qkv = torch.randn(setting.tokens, heads, 3, width, dtype=DTYPE, device=setting.device, requires_grad=True)
    build, run = IMPLEMENTATIONS[name](case)
    mask = build and build()
    # with dropout each draws its own mask, and results cannot be compared
    ours = minisobert(case)[1] if name != "minisobert" and not dropout else None
    result = timing.measure(partial(run, mask=mask), ours, list(qkv.unbind(2)))
    work = flops(case.pairs, heads, width)
    return result | {
        "build_seconds": timing.seconds(build, setting.device) if build else 0.0,
        "forward_tflops": work / result["forward_seconds"] / 1e12,
        "backward_tflops": BACKWARD * work / result["backward_seconds"] / 1e12,
    }
