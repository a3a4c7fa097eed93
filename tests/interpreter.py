"""Makes Triton's interpreter compute bfloat16 as a GPU does, and loop with the NumPy of today.

On its own it multiplies the bit patterns of bfloat16 operands in a dot, and cuts float32 off where it should round. Up
to Triton 3.6 it makes an ``int`` of an array with one element, for a loop's bounds, which NumPy 2.5 refuses.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widened(handle: TensorHandle) -> TensorHandle:
    """A bfloat16 operand in float32, which holds it exactly."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(data: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16."""
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def install() -> None:
    """Puts the corrected dot, cast and conversion to an index in place."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    patch_tensor = triton_interpreter._patch_lang_tensor

    def create_dot(self, a, b, d, *options):
        return dot(self, _widened(a), _widened(b), d, *options)

    def cast_impl(self, source, dst_type):
        if source.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        return cast(self, source, dst_type)

    def patch_lang_tensor(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, lambda self, source, dst_type: self.cast_impl(source, dst_type))
    triton_interpreter._patch_lang_tensor = patch_lang_tensor
