"""bf16 in Triton's interpreter, which stores it as 16-bit integers and does arithmetic on these integers.

`install` mends that: a bf16 is held as the equal fp32, and rounded to bf16 wherever one is made, by a cast, by
arithmetic in bf16 or from a constant. In memory it has its 16 bits. Matrix products then multiply the same numbers as
on a chip, and add in fp32. fp8 is left as it was.
"""

from __future__ import annotations

import numpy as np


def rounded(x: np.ndarray) -> np.ndarray:
    """fp32 rounded to the nearest bf16 (to even, if two are equally near), as fp32."""
    bits = x.view(np.uint32)
    up = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(x), x, (up & np.uint32(0xFFFF0000)).view(np.float32))


def install() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    if interpreter._get_np_dtype.__module__.endswith("bfloat16"):  # a second time would mend what is mended
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    np_dtype, is_of_size, check = interpreter._get_np_dtype, interpreter._validate_np_data_size, handle.__post_init__
    load, store, cast = builder.create_masked_load, builder.create_masked_store, builder.cast_impl
    to_other_float, bitcast, magnitude = builder.create_fp_to_fp, builder.create_bitcast, builder.create_fabs

    def is_bf16(dtype) -> bool:
        return not isinstance(dtype, tl.pointer_type) and dtype.scalar == tl.bfloat16

    def bits(x):
        return interpreter.TensorHandle((x.data.view(np.uint32) >> np.uint32(16)).astype(np.uint16), tl.uint16)

    def from_bits(x):
        return interpreter.TensorHandle(
            (x.data.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32), tl.bfloat16
        )

    def post_init(self):
        if is_bf16(self.dtype):
            self.data = rounded(np.ascontiguousarray(self.data, np.float32))
        check(self)

    def masked_load(self, pointers, mask, other, *how):
        if pointers.get_element_ty() != tl.bfloat16:
            return load(self, pointers, mask, other, *how)
        pointers = interpreter.TensorHandle(pointers.data, tl.pointer_type(tl.uint16))
        return from_bits(load(self, pointers, mask, other and bits(other), *how))

    def masked_store(self, pointers, value, *how):
        return store(self, pointers, bits(value) if is_bf16(value.dtype) else value, *how)

    def cast_impl(self, x, dtype):
        if is_bf16(x.dtype) or is_bf16(dtype):
            return interpreter.TensorHandle(x.data.astype(interpreter._get_np_dtype(dtype.scalar)), dtype.scalar)
        return cast(self, x, dtype)

    def fp_to_fp(self, x, dtype, rounding):
        if is_bf16(x.dtype) or is_bf16(dtype):
            return cast_impl(self, x, dtype)
        return to_other_float(self, x, dtype, rounding)

    def create_bitcast(self, x, dtype):
        if is_bf16(x.dtype):
            x = bits(x)
        if is_bf16(dtype):
            return from_bits(x)
        return bitcast(self, x, dtype)

    def fabs(self, x):
        return interpreter.TensorHandle(abs(x.data), x.dtype.scalar) if is_bf16(x.dtype) else magnitude(self, x)

    interpreter._get_np_dtype = lambda dtype: np.dtype(np.float32) if is_bf16(dtype) else np_dtype(dtype)
    interpreter._validate_np_data_size = lambda data, dtype: is_bf16(dtype) or is_of_size(data, dtype)
    handle.__post_init__ = post_init
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.cast_impl, builder.create_fp_to_fp, builder.create_bitcast = cast_impl, fp_to_fp, create_bitcast
    builder.create_fabs = fabs
