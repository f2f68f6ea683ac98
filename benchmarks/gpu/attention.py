"""Attention, forward and backward, beside what torch offers: on rows of one document, and on rows packed with posts.

FLOPs count visible pairs of real documents alone: 4 d H Σ n² forward (two products), 2.5 times that backward (five).
All read q, k and v as the model gives them, views of one (T, H, 3, d) tensor. The peers get the rows as a batch, which
spares them the pairs of different rows:

    sdpa-cudnn, sdpa-flash, sdpa-efficient   one backend forced; posts by a boolean mask, which flash does not take
    varlen                                   torch.nn.attention.varlen, flash attention told the bounds; no dropout
    flex                                     compiled FlexAttention with a document mask; no dropout
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.setting import DTYPE, Setting, pairs
from benchmarks.gpu.timing import check, seconds
from minisobert.ops import Documents, Dropout, attention

# bf16 keeps 8 bits: rounding probabilities and results, each to half a unit of 2**-8, in different orders gives 0.3 %
TOLERANCE = 0.01


def flops(pairs: int, heads: int, width: int) -> float:
    """Of the forward pass."""
    return 4.0 * width * heads * pairs


BACKWARD = 2.5  # backward's products for each of forward's: q kᵀ again, dP, dV, dQ and dK for two


@dataclass(frozen=True)
class Case:
    setting: Setting
    width: int  # d
    lengths: str
    dropout: float

    def __post_init__(self):
        bounds, real = self.setting.bounds(self.lengths, self.setting.tokens, seed=0)
        object.__setattr__(self, "pairs", pairs(bounds, real))
        object.__setattr__(self, "documents", Documents.from_bounds(bounds, self.setting.device))

    @property
    def document(self) -> Tensor:
        """(R, row) int32: for each token its document, by where that begins."""
        return self.documents.start.unflatten(0, (-1, self.setting.row_tokens))

    def rows(self, x: Tensor) -> Tensor:
        """(T, H, d) as (R, H, row, d)."""
        return x.unflatten(0, (-1, self.setting.row_tokens)).transpose(1, 2)


# Each peer is a function of the case: (what has to be built for a batch, or None; (q, k, v, what was built) → output)


def minisobert(case: Case):
    dropout = Dropout.for_step(case.dropout, 0, 0, 1, case.setting.device)
    here = dropout and dropout.at(0, "attention")
    return None, lambda q, k, v, _: attention(q, k, v, case.documents, here)


def sdpa(backend: str):
    def implementation(case: Case):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def mask() -> Tensor:
            return (case.document[:, :, None] == case.document[:, None, :])[:, None]

        def run(q, k, v, mask):
            # of these backends a CPU has one; a dry run checks the rest of the path with plain mathematics
            with sdpa_kernel(SDPBackend.MATH if case.setting.dry else getattr(SDPBackend, backend)):
                out = F.scaled_dot_product_attention(*map(case.rows, (q, k, v)), mask, dropout_p=case.dropout)
            return out.transpose(1, 2).flatten(0, 1)

        return mask if case.lengths == "posts" else None, run

    return implementation


def varlen(case: Case):
    from torch.nn.attention.varlen import varlen_attn

    bounds = case.documents.bounds.to(case.setting.device, torch.int32)
    longest = int(case.documents.bounds.diff().max())
    return None, lambda q, k, v, _: varlen_attn(q, k, v, bounds, bounds, longest, longest)


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
    "sdpa-cudnn": sdpa("CUDNN_ATTENTION"),
    "sdpa-flash": sdpa("FLASH_ATTENTION"),
    "sdpa-efficient": sdpa("EFFICIENT_ATTENTION"),
    "varlen": varlen,
    "flex": flex,
}


def takes(name: str, lengths: str, dropout: float) -> bool:
    """Whether an implementation can be asked for this at all."""
    if name == "sdpa-flash":
        return lengths == "rows"
    return dropout == 0 or name not in ("varlen", "flex")


def measure(setting: Setting, width: int, lengths: str, dropout: float, name: str) -> dict:
    case, heads = Case(setting, width, lengths, dropout), setting.heads[width]
    torch.manual_seed(0)
    qkv = torch.randn(setting.tokens, heads, 3, width, dtype=DTYPE, device=setting.device, requires_grad=True)
    gradient = torch.randn(setting.tokens, heads, width, dtype=DTYPE, device=setting.device)
    inputs = qkv.unbind(2)

    def both_ways(run, built) -> list[Tensor]:
        out = run(*inputs, built)
        return [out, *torch.autograd.grad(out, inputs, gradient)]

    build, run = IMPLEMENTATIONS[name](case)
    built = build and build()
    result = {}
    if name != "minisobert" and not dropout:  # with dropout each draws a mask of its own
        result["difference"] = check(both_ways(minisobert(case)[1], None), both_ways(run, built), TOLERANCE)
    out = run(*inputs, built)
    forward = seconds(lambda: run(*inputs, built), setting.device)
    backward = seconds(lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True), setting.device)
    work = flops(case.pairs, heads, width)
    return result | {
        "forward_seconds": forward,
        "backward_seconds": backward,
        "build_seconds": seconds(build, setting.device) if build else 0.0,
        "forward_tflops": work / forward / 1e12,
        "backward_tflops": BACKWARD * work / backward / 1e12,
        "documents": len(case.documents),
        "pairs": case.pairs,
    }
