"""Cross-entropy in Triton: each row of logits is read once for the loss and once for its gradient.

The forward computes three numbers per row: max, target logit and Σ exp(z - max). A vocabulary-parallel loss reduces
them over the ranks' slices of the vocabulary; here there is one slice.

The backward overwrites the logits with their gradient. At V = 50,048 the logits of 20,000 masked tokens are 2 GB in
bf16, and a separate gradient would take as much again. Until then the logits can be used freely. If another gradient
needs them afterwards, autograd raises its error about in-place changes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisobert.ops.kernels import check, check_contiguous, check_device, on_device, options

TILE = 4_096, 8  # columns of a tile, warps: 16 elements per thread. Not tuned yet.

# Arguments of the kernels, which run one program per row. M rows, n columns of the vocabulary.
#   logits                        (M, n), contiguous; `_cross_entropy_gradient` writes their gradient over them
#   targets                       (M,) int64: ids in the whole vocabulary
#   maximum, target_logit, total  (M,) fp32: per row, max z, z_t (0 if t is in another slice) and Σ exp(z - max z)
#   lse, d_loss                   (M,) fp32: log Σ exp(z) over all slices of a row; the gradient of its loss
#   first                         id of the first column
#   WIDTH, COLUMNS                n; columns of a tile
#
# target_logit and total begin M and 2 M numbers after maximum: do not specialise on their alignment, which M changes.


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["target_logit", "total"])
def _cross_entropy_parts(
    logits, targets, maximum, target_logit, total, first, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0)
    z = logits + row.to(tl.int64) * WIDTH
    # the lowest finite number, so that a tile or slice that is all -inf adds exp(-inf) = 0 and not NaN
    peak, running = -3.4028234663852886e38, 0.0
    for j in tl.range(0, WIDTH, COLUMNS):
        column = j + tl.arange(0, COLUMNS)
        x = tl.load(z + column, column < WIDTH, -float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        running = running * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), 0)
        peak = higher
    target = tl.load(targets + row) - first
    here = (target >= 0) & (target < WIDTH)
    tl.store(maximum + row, peak)
    tl.store(total + row, running)
    tl.store(target_logit + row, tl.load(z + target, here, 0.0).to(tl.float32))


@triton.jit(do_not_specialize=["first"])
def _cross_entropy_gradient(logits, targets, lse, d_loss, first, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    z = logits + row.to(tl.int64) * WIDTH
    target = tl.load(targets + row) - first
    shift, upstream = tl.load(lse + row), tl.load(d_loss + row)
    for j in tl.range(0, WIDTH, COLUMNS):
        column = j + tl.arange(0, COLUMNS)
        p = tl.exp(tl.load(z + column, column < WIDTH, 0.0).to(tl.float32) - shift)
        p = tl.where(column == target, p - 1, p) * upstream
        tl.store(z + column, p.to(logits.dtype.element_ty), column < WIDTH)


def cross_entropy_parts(logits: Tensor, targets: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.cross_entropy_parts`; logits contiguous."""
    rows, width = logits.shape
    maximum, target_logit, total = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    columns, warps = TILE
    with on_device(logits):
        if rows:
            _cross_entropy_parts[rows,](
                logits, targets, maximum, target_logit, total, first, width, columns, **options(warps)
            )
    return maximum, target_logit, total


def cross_entropy_gradient(logits: Tensor, targets: Tensor, lse: Tensor, d_loss: Tensor, first: int = 0) -> Tensor:
    """As `ops.cross_entropy_gradient`; logits contiguous, and overwritten."""
    rows, width = logits.shape
    columns, warps = TILE
    with on_device(logits):
        if rows:
            _cross_entropy_gradient[rows,](
                logits, targets, lse, d_loss.contiguous(), first, width, columns, **options(warps)
            )
    torch.autograd.graph.increment_version(logits)  # autograd does not see that a launch changes logits in place
    return logits


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        maximum, target_logit, total = cross_entropy_parts(logits, targets)
        lse = maximum + total.log()
        ctx.save_for_backward(logits, targets, lse)
        return lse - target_logit

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):
        logits, targets, lse = ctx.saved_tensors
        return cross_entropy_gradient(logits.detach(), targets, lse, d_loss), None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """As `ops.cross_entropy`; its backward overwrites logits. logits: (M, V), contiguous; targets: (M,) int64.

    Raises ValueError on another dtype, device or layout.
    """
    check(logits=logits)
    check_device(logits=logits, targets=targets)
    check_contiguous(logits=logits, targets=targets)
    return _CrossEntropy.apply(logits, targets)
