"""Rotary positions: queries and keys are rotated by angles that grow with their positions (Su et al. 2021).

The two halves of a head form pairs (a_i, b_i), i < d/2. Each pair is rotated in its plane, at a speed of its own:

    angle   θ(t, i) = t base^(-2i/d)
    forward     a' = a cos θ - b sin θ              b' = b cos θ + a sin θ
    backward    da = da' cos θ + db' sin θ          db = db' cos θ - da' sin θ        (the inverse rotation)

so that q·k depends on the distance between the two tokens and not on where they are (`docs/rotary.md`). Pairing halves,
and not neighbouring features, follows Hugging Face's models. Values are not changed.

Dimensions: T tokens, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minisobert.ops import dispatch


def rotation(positions: Tensor, width: int, base: float) -> Tensor:
    """(2, T, width / 2) fp32: cos and sin of the angles. positions: (T,) integers, 0 at the start of each document."""
    # in fp32, as released models were trained: at position 2,048 rounding has moved an angle by up to 1e-4
    speeds = base ** -(torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions[:, None].float() * speeds
    return torch.stack([angles.cos(), angles.sin()])


def rotary_reference(qkv: Tensor, rotation: Tensor) -> Tensor:
    cos, sin = rotation[:, :, None, None]  # (T, 1, 1, d/2) each
    same, other = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    # split and roll have gradients of one copy each, while that of a slice first fills the rest of qkv with zeros.
    # Rotating both halves at once takes fewer passes over memory than a cos - b sin and b cos + a sin apart.
    qk, v = qkv.split((2, 1), 2)
    turned = qk * same + qk.roll(qkv.shape[-1] // 2, -1) * other  # roll: (a, b) → (b, a)
    return torch.cat([turned.to(qkv.dtype), v], 2)


def check_shapes(qkv: Tensor, rotation: Tensor) -> None:
    tokens, _, three, width = qkv.shape if qkv.dim() == 4 else (0, 0, 0, 0)
    if three != 3 or width % 2 or rotation.shape != (2, tokens, width // 2):
        raise ValueError(
            f"qkv is {tuple(qkv.shape)}, rotation {tuple(rotation.shape)}; they must be (tokens, heads, 3, an even "
            "head width) and (2, tokens, half the head width)"
        )


def rotary(qkv: Tensor, rotation: Tensor) -> Tensor:
    """Rotates q and k. qkv: (T, H, 3, d), of one floating dtype; rotation: (2, T, d/2), from `rotation`.

    Returns (T, H, 3, d); on a GPU it overwrites qkv. Raises ValueError on other shapes.
    """
    check_shapes(qkv, rotation)
    implementation = rotary_reference
    if dispatch.takes_kernel(qkv):
        from minisobert.ops.kernels.rotary import rotary as implementation
    return implementation(qkv, rotation)
