"""Where Triton's tests run: on a GPU if there is one, else in the interpreter on the CPU.

Triton 3.7.1's interpreter keeps bfloat16 as bits in uint16. It truncates where the compiled code rounds to the nearest
even, and multiplies the bits as integers in ``tl.dot``. Both are mended here, for tests only, so that bfloat16 means in
the interpreter what it means on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rxt_kernels import triton_runtime

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    triton_runtime.unavailable() is not None, reason=triton_runtime.unavailable() or "it is here"
)


def _to_bfloat16(values: Any) -> Any:
    """float32 to the bits of the nearest bfloat16."""
    tensor = torch.from_numpy(np.array(values, dtype=np.float32))
    return tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


def _from_bfloat16(bits: Any) -> Any:
    """Bits of bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def _mend_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return handle(_to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(_from_bfloat16(side.data), tl.float32) for side in (a, b))
        elif a.dtype.scalar == tl.float16:
            # Products of half precision values are added up in float32, as by the matrix units.
            a, b = (handle(side.data.astype(np.float32), tl.float32) for side in (a, b))
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


if triton_runtime.INTERPRETED and triton_runtime.available():
    _mend_interpreter()
