"""Triton's interpreter with three faults repaired, so that it computes what a GPU computes, and sooner.

- bf16 is stored as raw bits there and ``tl.dot`` multiplies the bits; a GPU multiplies the numbers.
- fp32 -> bf16 truncates there; a GPU rounds to nearest even.
- Descriptor loads must start on 16 bytes there; the hardware takes any element offset.

Half of its time it does what has no effect: it looks for functions of the language to replace by its own at every call
from a kernel, which the launch has done, and computes whether integers overflow, which it then ignores.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    InterpreterOptions,
    TensorDescHandle,
    TensorHandle,
)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _cast(self, src, dst_type):
    src_type, dst = src.dtype.scalar, dst_type.scalar
    data = _from_bf16(src.data) if src_type == tl.bfloat16 else src.data
    if dst == tl.bfloat16:
        return TensorHandle(_to_bf16(data), dst)
    return TensorHandle(data.astype(interpreter._get_np_dtype(dst)), dst)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    left, right = (_from_bf16(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
    return TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _pointers(self, offsets):
    size = self.base.dtype.element_ty.primitive_bitwidth // 8
    address = np.full(self.block_shape, self.base.data.item(), dtype=np.int64)
    inside = np.ones(self.block_shape, dtype=bool)
    for axis, (offset, extent, stride) in enumerate(zip(offsets, self.shape, self.strides, strict=True)):
        along = [-1 if i == axis else 1 for i in range(self.ndim)]
        index = (offset.data.astype(np.int64) + np.arange(self.block_shape[axis])).reshape(along)
        address = address + index * stride.data.astype(np.int64) * size
        inside = inside & (index >= 0) & (index < extent.data)
    return TensorHandle(address.astype(np.uint64), self.base.dtype.scalar), inside


def _call(self, *args, **kwargs):
    # A launch replaces what its kernel sees; what tl.sum and the like see is replaced by the first of them, for good.
    if tl.core.is_builtin(tl.core.load):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def repair() -> None:
    """Installs the repairs in this process."""
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_dot = _dot
    TensorDescHandle.materialize_pointers = _pointers
    InterpretedFunction.__call__ = _call
    interpreter.interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)
