"""The operations in Triton, under the same names and with the same arguments. Each is imported when it is first used.

Each file has its kernels, one `autograd.Function` and the function that launches it. They run on CUDA tensors, or, if
TRITON_INTERPRET=1 was set before the import, on CPU tensors in Triton's interpreter (fp32 and fp16 only: it computes
bf16 wrongly unless it is patched as in tests/bfloat16.py). Arguments are checked before a launch, without reading
device memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# The checks skip arguments that are None, as biases may be. The first is a tensor, which the others must match.


def check(**arguments: Tensor | None) -> None:
    """Raises ValueError unless all have the same dtype, one of DTYPES, are on one device, and have contiguous rows."""
    (first, x), *others = tensors = _given(arguments)
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{first} is {x.dtype}; the kernels take {', '.join(map(str, DTYPES))}, and the reference takes any"
        )
    for name, y in others:
        if y.dtype != x.dtype:
            raise ValueError(f"{name} is {y.dtype}, {first} {x.dtype}; they must have the same dtype")
    check_device(**arguments)
    for name, y in tensors:
        if y.dim() and y.stride(-1) != 1 and y.shape[-1] > 1:
            raise ValueError(f"{name} has the strides {y.stride()}; the last must be 1 (call .contiguous())")


def check_device(**arguments: Tensor | None) -> None:
    """Raises ValueError unless all are on one device."""
    (first, x), *others = _given(arguments)
    for name, y in others:
        if y.device != x.device:
            raise ValueError(f"{name} is on {y.device}, {first} on {x.device}; they must be on the same device")


def check_contiguous(**arguments: Tensor | None) -> None:
    for name, x in _given(arguments):
        if not x.is_contiguous():
            raise ValueError(f"{name} has the strides {x.stride()}; it must be contiguous (call .contiguous())")


def _given(arguments: dict[str, Tensor | None]) -> list[tuple[str, Tensor]]:
    return [(name, x) for name, x in arguments.items() if x is not None]


def options(warps: int, stages: int = 1) -> dict:
    """Options of a launch. Fusion makes a * b + c one instruction; Triton 3.10 does not do it by default."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def on_device(x: Tensor):
    """The context to launch in: Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def chip_family(device: torch.device) -> int:
    """The column of a table of tiles: 0 for sm_80 and chips that share its matrix instructions, 1 sm_90, 2 sm_100."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return {9: 1, 10: 2}.get(major, 0)
