"""What launchers of Triton kernels launch on each GPU generation, found out without a GPU.

A stand-in for the CUDA driver names the target, and a launch compiles its kernel, or notes what it is compiled from,
and stops there; so what is seen is what would run on that GPU: the launcher's own tile sizes, warps and stages, and
Triton's own specialization on divisible arguments.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock


class GPU(NamedTuple):
    """What launchers ask of a device; KiB as in the CUDA programming guide's table of technical specifications."""

    multiprocessors: int
    shared_kib: int  # that one block can have

    def answers(self) -> dict[str, int]:
        """By the functions of ``oftv2.kernels.tiles`` that ask."""
        return {"multiprocessors": self.multiprocessors, "shared_memory": self.shared_kib * 1024}


# By compute capability: A100, RTX 3090, RTX 4090, H100 and H200, B200, RTX 5090.
GPUS = {80: GPU(108, 163), 86: GPU(82, 99), 89: GPU(128, 99), 90: GPU(132, 227), 100: GPU(148, 227), 120: GPU(170, 99)}


class CompileOnlyDriver:
    """Takes the CUDA driver's place in Triton: says which GPU to compile for, and knows no other."""

    def __init__(self, capability: int, device: int | None = None) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)
        # Triton keeps compiled kernels by device: one "device" a target.
        self.device = capability if device is None else device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(launch: Any, capability: int, device: str = "meta") -> list[tuple[Any, Any]]:
    """The kernels that ``launch(device)`` launches, compiled for a target and not run: (function, compiled kernel)."""
    launches: list[tuple[Any, Any]] = []

    def take(function: Any, compile: Callable[[], Any]) -> Any:
        launches.append((function, compile()))
        return launches[-1][1]

    _launch(launch, device, CompileOnlyDriver(capability), take)
    return launches


class _NotCompiledError(Exception):
    """Ends a compilation where it has what it starts from."""


def launch_sources(launch: Any, capability: int) -> list[tuple[Any, str]]:
    """The kernels that ``launch(device)`` launches on a target, each with a hash of what it is compiled from: Triton's
    first form of its code, where types, sizes of tiles and divisible arguments are in their places, and its options."""
    from triton import knobs
    from triton.compiler import ASTSource

    launches: list[tuple[Any, str]] = []
    make_ir = ASTSource.make_ir

    def make_only(self: Any, target: Any, options: Any, *rest: Any) -> Any:
        chosen = {name: value for name, value in vars(options).items() if name != "extern_libs"}  # this machine's paths
        code = make_ir(self, target, options, *rest).str_nodebug()
        launches.append((self.fn, hashlib.sha256(f"{code}{sorted(chosen.items())}".encode()).hexdigest()[:16]))
        raise _NotCompiledError

    def take(function: Any, compile: Callable[[], Any]) -> None:
        with contextlib.suppress(_NotCompiledError):
            compile()

    with knobs.compilation.scope(), mock.patch.object(ASTSource, "make_ir", make_only):
        knobs.compilation.always_compile = True
        # A "device" of its own, for which nothing is ever compiled, so that Triton keeps nothing.
        _launch(launch, "meta", CompileOnlyDriver(capability, device=-capability), take)
    return launches


def _launch(launch: Any, device: str, driver: CompileOnlyDriver, take: Callable[[Any, Callable[[], Any]], Any]) -> None:
    """Calls ``launch(device)`` as if on the driver's GPU, with ``take(kernel, compile)`` in place of each launch."""
    import torch
    import triton
    from triton.runtime.jit import JITFunction

    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # Triton's default is what users run
    run = JITFunction.run

    def take_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return take(self, lambda: run(self, *args, grid=grid, warmup=True, **kwargs))

    triton.runtime.driver.set_active(driver)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", take_launch))
        for module in [module for name, module in sys.modules.items() if name.startswith("oftv2.kernels.")]:
            for name, answer in GPUS[driver.target.arch].answers().items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, return_value=answer))
        launch(torch.device(device))


def kernel_name(function: Any) -> str:
    """As in the tables: the module's name and the function's."""
    return f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__}"
