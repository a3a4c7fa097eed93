"""One linear layer, forward and backward: the adapter beside the frozen layer, PEFT's LoRA and PEFT's OFT.

    python benchmarks/layer.py                          # the table of the README, on this machine
    python benchmarks/layer.py --shapes 1024x1024x1024 --rounds 5
    python benchmarks/layer.py --device cuda --dtype bfloat16 --shapes 8192x4096x4096

The adapter is checked against the float64 reference before it is timed. Rounds are interleaved (each method once a
round), and the figures are medians of the ratios to the frozen layer within a round, so that a machine whose speed
drifts does not favour anyone. Time includes the gradients of the input and of the adapter.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from oftv2 import OFTConfig, OFTLinear, QuantOFTLinear, accelerate_peft, reference
from oftv2.quant import find_backend

SHAPES = ["1024x1024x1024", "4096x576x576", "2048x1536x576", "2048x576x1536", "512x2048x2048", "1x1024x1024"]
METHODS = ["frozen", "oft", "peft-lora", "peft-oft"]
ALL_METHODS = [*METHODS, "peft-oft-accelerated"]
RESULTS = Path(__file__).parent / "results"
# glibc returns freed activations to the system at once, and page faults then drown what is measured.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_MMAP_THRESHOLD_": str(1 << 33)}


def make_layer(method: str, linear: nn.Linear, block_size: int, rank: int) -> nn.Module:
    """The layer of one method around ``linear``, with random small adapter weights."""
    if method == "frozen":
        return linear.requires_grad_(False)
    if method == "oft":
        layer_class = QuantOFTLinear if find_backend(linear) else OFTLinear
        layer: nn.Module = layer_class(linear, OFTConfig(block_size=block_size))
    else:
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft import OFTConfig as PeftOFTConfig
        except ImportError as error:
            raise SystemExit(f"{method} needs peft, which is missing: pip install peft ({error})") from error
        config = (
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"])
            if method == "peft-lora"
            else PeftOFTConfig(oft_block_size=block_size, use_cayley_neumann=True, target_modules=["0"])
        )
        model = inject_adapter_in_model(config, nn.Sequential(linear))
        layer = (accelerate_peft(model) if method == "peft-oft-accelerated" else model)[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.01)
    return layer.to(linear.weight.device)


def check(layer: nn.Module, x: Tensor) -> None:
    """Compares our layer with the float64 reference."""
    if not isinstance(layer, OFTLinear):
        return
    rotation = layer.rotation
    generators = layer.generators["default"].detach().double()
    R = reference.cayley_neumann(reference.skew(generators, rotation.block_size), rotation.terms)
    expected = reference.oft_linear(x.double(), R, layer.weight.double(), layer.bias.double())
    error = torch.linalg.norm(layer(x).double() - expected) / torch.linalg.norm(expected)
    limit = 1e-5 if x.dtype == torch.float32 else 2e-2
    if not error < limit:
        raise SystemExit(f"wrong result: relative error {error:.1e} where {limit:.0e} is allowed; nothing was timed")


def step(layer: nn.Module, x: Tensor, upstream: Tensor, gradient: bool) -> Callable[[], None]:
    """What is timed: forward and backward, or a forward pass without gradients."""
    synchronize = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None

    def run() -> None:
        if gradient:
            layer(x).backward(upstream)
            x.grad = None
            for parameter in layer.parameters():
                parameter.grad = None
        else:
            with torch.no_grad():
                layer(x)
        synchronize()

    return run


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward one, besides parameters and the input itself."""
    known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    del out
    return sum(kept.values())


def measure(shape: str, methods: list[str], args: argparse.Namespace) -> list[dict[str, object]]:
    """One row a method for ``shape`` (``tokens x in_features x out_features``)."""
    tokens, d, n = map(int, shape.split("x"))
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    gradient = tokens > 1
    torch.manual_seed(args.seed)
    x = torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=gradient)
    upstream = torch.randn(tokens, n, device=device, dtype=dtype)
    weight = nn.Linear(d, n, device=device, dtype=dtype).state_dict()
    runs, layers = {}, {}
    for method in methods:
        linear = nn.Linear(d, n, device=device, dtype=dtype)
        linear.load_state_dict(weight)
        layers[method] = make_layer(method, linear, args.block_size, args.rank).train(gradient)
        check(layers[method], x)
        runs[method] = step(layers[method], x, upstream, gradient)
    inner = 1 if gradient else 200
    times: dict[str, list[float]] = {method: [] for method in methods}
    for round_ in range(args.rounds + 2):
        for method in methods if round_ % 2 else methods[::-1]:
            start = time.perf_counter()
            for _ in range(inner):
                runs[method]()
            if round_ >= 2:  # the first two warm up
                times[method].append((time.perf_counter() - start) / inner)
    rows = []
    for method in methods:
        ratios = sorted(a / b for a, b in zip(times[method], times["frozen"], strict=True))
        quarter = len(ratios) // 4
        rows.append(
            {
                "shape": shape,
                "mode": "forward+backward" if gradient else "forward, no gradient",
                "method": method,
                "over_frozen": round(statistics.median(ratios), 3),
                "quartiles": f"{ratios[quarter]:.3f}-{ratios[-1 - quarter]:.3f}",
                "median_ms": round(1e3 * statistics.median(times[method]), 4),
                "saved_kib": round(saved_bytes(layers[method], x) / 1024, 1) if gradient else 0,
                "trainable": sum(p.numel() for p in layers[method].parameters() if p.requires_grad),
            }
        )
    return rows


def machine(args: argparse.Namespace) -> dict[str, object]:
    """Where and with what the figures were taken."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import peft

        versions["peft"] = peft.__version__
    except ImportError:
        versions["peft"] = "missing"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "dtype": args.dtype,
        "block_size": args.block_size,
        "rank": args.rank,
        "rounds": args.rounds,
        "seed": args.seed,
    }


def cpu_name() -> str:
    """The processor's name and the number of cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()} ({os.cpu_count()} cores)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="TxDxN", help="tokens x in_features x out_features"
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=ALL_METHODS)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write <out>.csv and <out>.json")
    args = parser.parse_args()
    if "frozen" not in args.methods:
        parser.error("--methods must include frozen: the others are compared with it")
    if args.device == "cpu" and any(os.environ.get(key) != value for key, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    about = machine(args)
    print(json.dumps(about))
    rows = []
    for shape in args.shapes:
        rows += measure(shape, args.methods, args)
        for row in rows[-len(args.methods) :]:
            print(
                "{shape:>18} {method:>20} {over_frozen:7.3f} [{quartiles}] {median_ms:9.3f} ms".format(**row),
                flush=True,
            )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
        with open(args.out.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
