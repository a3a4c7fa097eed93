"""Where Triton's kernels are used: not on every device, and not for every size and dtype."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from oftv2.errors import KernelWarning

_OLDEST = (8, 0)  # compute capability from which the tensor cores take bfloat16 and tf32
_PASSING = ("out of memory", "captur")  # "operation not permitted when stream is capturing", and what follows from it


@functools.lru_cache(maxsize=16)
def usable(device: torch.device) -> bool:
    """Whether the kernels run on a device: not with ``OFTV2_KERNELS=0``, and where Triton starts one.

    Raises:
        ValueError: another value of that variable than 0 and 1.
        RuntimeError: no memory, or a CUDA graph that is captured, kept the first kernel from starting: no answer is
            kept then.
    """
    wanted = os.environ.get("OFTV2_KERNELS", "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"OFTV2_KERNELS={wanted!r} is not allowed: use 0 for plain torch on every device, or 1")
    if wanted == "0" or importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda":
        return True  # the interpreter
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < _OLDEST:
        return False
    try:
        from . import tiles

        with torch.cuda.device(device):
            tiles.nothing[(1,)](0)
    except Exception as error:  # no C compiler, no Python headers, a GPU that Triton does not know: it raises anything
        if any(words in str(error) for words in _PASSING):  # plain torch, or the graph, would fail as well
            raise
        warnings.warn(
            f"oftv2: Triton's kernels do not start on {device}, so plain torch is used there, which is slower (without "
            f"this warning: OFTV2_KERNELS=0). {type(error).__name__}: {error}",
            KernelWarning,
            stacklevel=2,
        )
        return False
    return True


def rotates(x: Tensor, block_size: int, *, group: int = 1, terms: int = 0) -> bool:
    """Whether a kernel rotates ``x``, by Δ or (with ``terms``) from packed generators."""
    return _rotates(x.device, x.dtype, block_size, group, terms)


@functools.lru_cache(maxsize=1024)
def _rotates(device: torch.device, dtype: torch.dtype, block_size: int, group: int, terms: int) -> bool:
    if not usable(device):
        return False
    from . import rotate

    return rotate.supports(dtype, block_size, group=group, terms=terms)


def transforms(generators: Tensor, block_size: int) -> bool:
    """Whether a kernel makes Δ from packed generators, or inverts R."""
    return _transforms(generators.device, generators.dtype, block_size)


@functools.lru_cache(maxsize=1024)
def _transforms(device: torch.device, dtype: torch.dtype, block_size: int) -> bool:
    if not usable(device):
        return False
    from . import cayley

    return cayley.supports(dtype, block_size)
