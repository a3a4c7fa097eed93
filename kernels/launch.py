"""Starts kernels, from the second time on without asking Triton which one it is.

Triton finds the compiled kernel for the types, values and alignment of some twenty arguments at each launch: that takes
a processor longer than many a kernel runs. What was found is kept here, by a key that tells at least as much apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

# Versions whose compiled kernels are known to take a grid, then all arguments in the order of the signature. Of others,
# each launch is left to Triton.
_KNOWN = (3, 4) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)
_MOST = 4096
_started: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def run(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the device of the first tensor.

    Args:
        kernel: decorated with ``triton.jit``.
        grid: one to three numbers of programs.
        args: for the first parameters of the kernel: tensors, integers, None, and tuples of tensors or of integers; the
            first one is a tensor or has tensors.
        constants: by name, the parameters after these, and Triton's options.
    """
    first = args[0][0] if type(args[0]) is tuple else args[0]
    device = first.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(kernel, grid, *args, **constants)
    key: list[Any] = [id(kernel), device]  # its own hash takes a lock; kernels live as long as their modules
    key += constants.values()
    addresses = 0
    for arg in args:
        kind = type(arg)
        if kind is int or kind is bool or arg is None or (kind is tuple and type(arg[0]) is int):
            key.append(arg)
            continue
        for tensor in arg if kind is tuple else (arg,):
            key.append(tensor.dtype)
            addresses |= tensor.data_ptr()
    found = _started.get(tuple(key)) if addresses % 16 == 0 else None
    if found is not None:
        compiled, rest = found
        compiled[(*grid, 1, 1)[:3]](*args, *rest)
        return None
    compiled = kernel[tuple(grid)](*args, **constants)
    # In the interpreter there is none, and without a module it was compiled and did not run.
    if _KNOWN and addresses % 16 == 0 and getattr(compiled, "module", None) is not None:
        if len(_started) >= _MOST:
            _started.clear()
        _started[tuple(key)] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
    return None
