"""Starts kernels, from the second time on without asking Triton which one it is.

Triton finds the compiled kernel for the types, values and alignment of some twenty arguments at each launch: that takes
a processor longer than many a kernel runs. What was found is kept here, by a key that tells at least as much apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

# Versions whose compiled kernels are known to take a grid, then all arguments in the order of the signature.
_KNOWN = (3, 4) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)
_MOST = 4096
_started: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def run(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the device of the first tensor.

    Args:
        kernel: decorated with ``triton.jit``.
        grid: one to three numbers of programs.
        args: tensors, integers, None, and tuples of these, for the first parameters of the kernel.
        constants: by name, the parameters after these, and Triton's options.
    """
    device = _device(args[0])
    with _current(device):
        key = (kernel, device, *constants.values(), *map(_kind, args))
        found = _started.get(key)
        if found is None:
            _first_start(key, kernel, grid, args, constants)
        else:
            compiled, rest = found
            compiled[(*grid, 1, 1)[:3]](*args, *rest)


def _first_start(key: tuple[Any, ...], kernel: Any, grid: Sequence[int], args: Sequence[Any], constants: Any) -> None:
    compiled = kernel[tuple(grid)](*args, **constants)
    if _KNOWN and getattr(compiled, "module", None) is not None:  # it is none in the interpreter, and only compiled
        if len(_started) >= _MOST:
            _started.clear()
        _started[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


def _kind(arg: Any) -> Any:
    """What Triton may compile another kernel for: an integer's value, a tensor's dtype and alignment."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() & 15
    return tuple(map(_kind, arg)) if isinstance(arg, tuple) else arg


def _device(first: Any) -> torch.device:
    return first.device if isinstance(first, Tensor) else _device(first[0])


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a device the current one, which is where Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
