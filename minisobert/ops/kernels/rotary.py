"""Rotary positions in Triton: queries and keys are rotated in place, and their gradients are rotated back.

Both are bound by memory. Per token and head in bf16, the forward reads and writes q and k, 8d bytes, and leaves v
alone; a copy of qkv would move 12d. The backward reads and writes the gradients of all three, 12d bytes. The cos and
sin of a token are another 4d bytes, which all its heads share. Heads of one token are neighbours in the grid, so that
only the first reads them from memory, and the others from the L2 cache. In a model only the forward runs, because the
kernels of attention's gradients rotate their own results back (all but heads of two parts, see attention_parts.py).

In half precision a thread loads 16 bytes at once, because the halves a and b of q and of k are each d/2 contiguous
elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisobert.ops.kernels import check, check_contiguous, check_device, on_device, options

# Pairs of q and as many of k, warps. In half precision 8 pairs per thread fill a load of 16 bytes. Not tuned yet.
TILE = 512, 2

# Arguments of the kernel. T tokens, H heads, d head width.
#   x, out         (T, H, 3, d) each, contiguous, of one dtype; in the forward they are the same memory
#   rotation       (2, T, d/2) fp32: cos and sin, contiguous
#   tokens         T
#   HEADS, D       H; d
#   TOKENS, BLOCK  tokens of a tile; the power of two that d/2 is padded to
#   BACKWARD       whether to rotate back, and to copy v


@triton.jit(do_not_specialize=["tokens"])
def _rotary(
    x, out, rotation, tokens,
    HEADS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    head = tl.program_id(0) % HEADS
    token, pair = tl.program_id(0) // HEADS * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (pair < HALF)[None, :]
    token = token.to(tl.int64)[:, None]  # T * 3h passes 2**31 at 0.9 million tokens of the base model
    angle = rotation + token * HALF + pair[None, :]
    cos = tl.load(angle, inside, 0.0)
    sin = tl.load(angle + tl.cast(tokens, tl.int64) * HALF, inside, 0.0)
    if BACKWARD:
        sin = -sin
    at = (token * HEADS + head) * (3 * D) + pair[None, :]
    # all loads before the first store: the compiler cannot know that none of them reads what a store wrote
    q_a = tl.load(x + at, inside, 0.0).to(tl.float32)
    q_b = tl.load(x + at + HALF, inside, 0.0).to(tl.float32)
    k_a = tl.load(x + at + D, inside, 0.0).to(tl.float32)
    k_b = tl.load(x + at + D + HALF, inside, 0.0).to(tl.float32)
    if BACKWARD:
        v_a = tl.load(x + at + 2 * D, inside, 0.0)
        v_b = tl.load(x + at + 2 * D + HALF, inside, 0.0)
        tl.store(out + at + 2 * D, v_a, inside)
        tl.store(out + at + 2 * D + HALF, v_b, inside)
    dtype = out.dtype.element_ty
    tl.store(out + at, (q_a * cos - q_b * sin).to(dtype), inside)
    tl.store(out + at + HALF, (q_b * cos + q_a * sin).to(dtype), inside)
    tl.store(out + at + D, (k_a * cos - k_b * sin).to(dtype), inside)
    tl.store(out + at + D + HALF, (k_b * cos + k_a * sin).to(dtype), inside)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rotation: Tensor, heads: int) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(rotation)
        ctx.heads = heads
        return turn(x, x, rotation, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (rotation,) = ctx.saved_tensors
        grad = grad.contiguous()
        # not in place: autograd hands the same memory to every input of a sum, and a hook may have kept it
        return turn(grad, torch.empty_like(grad), rotation, ctx.heads, back=True), None, None


def turn(x: Tensor, out: Tensor, rotation: Tensor, heads: int, back: bool = False) -> Tensor:
    """Writes the rotated queries and keys of x, (T, H, 3, d), to out. Forward, out must be x, because values are not
    copied. back: rotates back, and copies the values."""
    _, tokens, half = rotation.shape
    pairs, warps = TILE
    block = triton.next_power_of_2(half)
    rows = max(pairs // block, 1)
    with on_device(x):
        if tokens:
            grid = (triton.cdiv(tokens, rows) * heads,)
            _rotary[grid](x, out, rotation, tokens, heads, 2 * half, rows, block, back, **options(warps))
    return out


def check_rotation(qkv: Tensor, rotation: Tensor) -> None:
    """Raises ValueError if rotation is not fp32 or on another device, or if either is not contiguous."""
    if rotation.dtype != torch.float32:
        raise ValueError(f"rotation is {rotation.dtype}; it must be torch.float32")
    check_device(qkv=qkv, rotation=rotation)
    check_contiguous(qkv=qkv, rotation=rotation)


def rotary(qkv: Tensor, rotation: Tensor) -> Tensor:
    """As `ops.rotary`; q and k are overwritten. qkv: (T, H, 3, d), contiguous; rotation: fp32, contiguous.

    Raises ValueError on another dtype, device or layout.
    """
    check(qkv=qkv)
    check_rotation(qkv, rotation)
    # qkv is a view of what a linear returned. Changing a view in place is allowed, but its backward copies the whole
    # gradient four times (CopySlices, AsStrided). Changing the base, which is the same memory, copies nothing, and
    # autograd still gives other users of qkv the right gradient.
    base = qkv._base
    whole = qkv if base is None or base.numel() != qkv.numel() or not base.is_contiguous() else base
    return _Rotary.apply(whole, rotation, qkv.shape[1]).view(qkv.shape)
