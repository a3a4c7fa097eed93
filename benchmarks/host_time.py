"""What a processor takes to send a layer's work to a GPU: Python, torch and launches. It bounds small models' steps.

    python benchmarks/host_time.py                                    # a minute
    python benchmarks/host_time.py --out benchmarks/results/host-time

The layer is so small that its work takes no time. Without a CUDA device, a stand-in for its driver takes the launches
of Triton's kernels, which are compiled for such a device, and runs none; torch's own operations, all that LoRA consists
of, run on the processor instead, which takes about as long as launching them. So only ratios mean something.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkout

checkout.make_importable()

import torch  # noqa: E402
from provenance import environment  # noqa: E402
from tabular import write_csv  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from kernel_launches import CompileOnlyDriver  # noqa: E402
from measure import Row, interleave, spread  # noqa: E402
from methods import Sizes, available, linear, on_layer  # noqa: E402

OVER_LORA = "beyond_frozen_over_lora"
METHODS = ["frozen", "oft", "lora", "peft-oft"]
_DTYPES = torch.bfloat16, torch.float32  # LoRA in PEFT has float32 factors, and casts for them
_PASSES = ("training step", True), ("pass without gradients", False)
_FEATURES, _TOKENS, _REPEATS = 256, 8, 20


class LaunchingNothingDriver(CompileOnlyDriver):
    """Loads compiled kernels and takes launches, and does nothing with them.

    Args:
        capability (int): compute capability of the GPU to compile for.
        note (Callable | None): called with a kernel's metadata, its grid and its arguments at each launch.
    """

    def __init__(self, capability: int, note: Callable[[Any, tuple[int, ...], tuple[Any, ...]], None] | None = None):
        super().__init__(capability)
        self.utils, self._note = self, note

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        return "module", "function", 32, 0, 1024  # registers, spills, threads that a block may have

    def unload_module(self, module: Any) -> None:
        """As the driver's own."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
            if self._note is not None:
                self._note(metadata, (x, y, z), rest[3:])  # after its own metadata and two hooks

        return launch


@contextlib.contextmanager
def kernels_on_a_cpu() -> Iterator[None]:
    """Within this context, layers take a CPU for a GPU whose driver is :class:`LaunchingNothingDriver`; so does Triton
    from then on."""
    import triton

    from oftv2.kernels.register import register, unregister

    triton.runtime.driver.set_active(LaunchingNothingDriver(90))
    library = register("CPU")
    try:
        yield
    finally:
        unregister(library, "CPU")


def samples(device: torch.device, dtype: torch.dtype, *, gradient: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step, or of a pass without gradients, round by round, of each method there is."""
    weight, x = (torch.randn(size, _FEATURES, device=device, dtype=dtype) for size in (_FEATURES, _TOKENS))
    layers = {method: on_layer(method, linear(weight), Sizes()).train(gradient) for method in available(METHODS)[0]}

    def run(layer: nn.Module, given: Tensor) -> None:
        for _ in range(_REPEATS):
            y = layer(given)
            if gradient:
                y.backward(x)

    inputs = {method: x.clone().requires_grad_(gradient) for method in layers}
    runs = {method: lambda _, method=method: run(layers[method], inputs[method]) for method in layers}
    with torch.set_grad_enabled(gradient):
        taken = interleave(runs, device, rounds=rounds, warmup=3, wall=True)
    return {method: [seconds / _REPEATS for seconds in found] for method, found in taken.items()}


def beyond_frozen(taken: dict[str, list[float]], method: str, over: str) -> list[float]:
    """What a method takes beyond the frozen layer, over what another one does, round by round."""
    return [(a - f) / (b - f) for a, b, f in zip(taken[method], taken[over], taken["frozen"], strict=True)]


def measure(rounds: int) -> list[Row]:
    """The rows for this machine's CUDA device, or for the stand-in."""
    real = torch.cuda.is_available()
    device = torch.device("cuda" if real else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a device's launches have
    torch.set_flush_denormal(True)  # kernels that do not run leave any numbers, and slow ones among them
    rows: list[Row] = []
    with contextlib.nullcontext() if real else kernels_on_a_cpu():
        for dtype, (what, gradient) in itertools.product(_DTYPES, _PASSES):
            taken = samples(device, dtype, gradient=gradient, rounds=rounds)
            for method, seconds in taken.items():
                row = {"what": what, "dtype": str(dtype)[6:], "method": method}
                row |= spread("us", [1e6 * value for value in seconds], 3)
                if method != "frozen" and "lora" in taken:
                    row |= spread(OVER_LORA, beyond_frozen(taken, method, "lora"), 3)
                rows.append(
                    {**row, "rounds": rounds, "launches": "real" if real else "stand-in", **environment(device)}
                )
    torch.set_num_threads(threads)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="of all methods in turns (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write <out>.csv and <out>.json")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton: the interpreter compiles nothing
    rows = measure(args.rounds)
    for row in rows:
        over_lora = f"{row[OVER_LORA]:8.2f} of LoRA's beyond the frozen layer" if OVER_LORA in row else ""
        print(f"{row['what']:24}{row['dtype']:10}{row['method']:10}{row['us']:8.1f} µs{over_lora}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        write_csv(args.out.with_suffix(".csv"), rows)


if __name__ == "__main__":
    main()
