"""What ``gpu_check.py`` measures: kernels beside a copy of the same bytes, decoder layers beside their peers."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
from collections.abc import Callable

import torch
from gpu_measure import MissingError, Settings, at_least, at_most, close, medians, random, row
from layer import make_layer
from torch import Tensor, nn

from oftv2 import functional as F
from oftv2 import reference

# Sets of inputs that are taken in turn, so that none is found in the cache.
_SETS = 4


def kernels(settings: Settings) -> list[dict[str, object]]:
    """``rotate`` forward and backward against a copy of the same bytes."""
    rows = []
    for model, (d, _, ffn) in settings.models.items():
        rows += _rotation(settings, model, d) + _rotation(settings, model, ffn)
    return rows


def _rotation(settings: Settings, model: str, d: int) -> list[dict[str, object]]:
    T, b = settings.tokens, 32
    xs, grads = ([random(settings, T, d) for _ in range(_SETS)] for _ in range(2))
    generators = torch.randn(d // b, b * (b - 1) // 2, device=settings.device) * 0.01
    delta = F.cayley_neumann(generators, b)
    few = xs[0][:64]
    close(
        "rotate", F.rotate(few, delta), reference.rotate(few.double(), delta.double() + torch.eye(b).to(delta.device))
    )
    out = torch.empty_like(xs[0])
    ops = torch.ops.oftv2
    times = medians(
        settings,
        {
            "copy": lambda i: out.copy_(xs[i % _SETS]),
            "forward": lambda i: ops.rotate(xs[i % _SETS], delta),
            "from generators": lambda i: ops.neumann_rotate(xs[i % _SETS], generators, b, 4),
            "backward": lambda i: ops.rotate_backward(grads[i % _SETS], xs[i % _SETS], delta),
        },
    )
    where = f"{model}, {T} x {d}"
    return [
        row(f"copy, {where}", "", f"{4 * T * d / times['copy'] / 1e12:.2f} TB/s"),
        at_least(f"rotate forward, of a copy's speed, {where}", 0.90, times["copy"] / times["forward"]),
        row(f"the same from generators, {where}", "", times["copy"] / times["from generators"]),
        # reads two and writes one, where a copy reads one and writes one
        at_least(f"rotate backward, of the bound of its bytes, {where}", 0.85, 1.5 * times["copy"] / times["backward"]),
    ]


def determinism(settings: Settings) -> list[dict[str, object]]:
    """Two runs of every gradient give equal bits."""
    x, grad = random(settings, settings.tokens, 256), random(settings, settings.tokens, 256)
    generators = torch.randn(8, 496, device=settings.device) * 0.01
    delta = F.cayley_neumann(generators, 32)
    weight = random(settings, 128, 256)
    runs: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "rotate": lambda: torch.ops.oftv2.rotate_backward(grad, x, delta),
        "neumann_rotate": lambda: torch.ops.oftv2.neumann_rotate_backward(grad, x, generators, 32, 4),
        "weight form": lambda: torch.ops.oftv2.weight_form_backward(grad[:, :128].contiguous(), x, delta, weight),
    }
    same = {name: all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True)) for name, run in runs.items()}
    return [
        row(f"{name}: two runs, equal bits", "yes", "yes" if equal else "FAIL", equal) for name, equal in same.items()
    ]


def projections(size: tuple[int, int, int]) -> dict[str, tuple[int, int]]:
    """The seven linear layers of a decoder layer: inputs and outputs."""
    d, kv, ffn = size
    return {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, ffn), "up": (d, ffn), "down": (ffn, d)}


# Which input each projection reads.
_READS = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}


def decoder_step(settings: Settings, layers: dict[str, nn.Module], size: tuple[int, int, int]) -> Callable[[int], None]:
    """Forward and backward of all seven projections, including the gradients of their inputs."""
    T = settings.tokens
    widths = (size[0], size[0], size[0], size[2])
    inputs = [[random(settings, T, width).requires_grad_() for width in widths] for _ in range(2)]
    grads = [random(settings, T, out) for _, out in projections(size).values()]
    parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]

    def run(round_: int) -> None:
        given = inputs[round_ % 2]
        outputs = [layer(given[_READS[name]]) for name, layer in layers.items()]
        torch.autograd.backward(outputs, grads)
        for tensor in (*given, *parameters):
            tensor.grad = None

    return run


def available(methods: list[str]) -> list[str]:
    """Those whose package is there."""
    return [m for m in methods if not m.startswith("peft") or importlib.util.find_spec("peft")]


def decoder(settings: Settings) -> list[dict[str, object]]:
    """All seven projections of a decoder layer in 16 bit, beside the frozen ones, PEFT's LoRA and PEFT's OFT."""
    goals = {"frozen": 1.06, "peft-lora": 0.90, "peft-oft": 0.50}
    rows = []
    for model, size in settings.models.items():
        weights = {name: random(settings, n, d) * d**-0.5 for name, (d, n) in projections(size).items()}
        runs = {}
        for method in available(["frozen", "oft", "peft-lora", "peft-oft"]):
            layers = {name: make_layer(method, _linear(weight), 32, 16).train() for name, weight in weights.items()}
            runs[method] = decoder_step(settings, layers, size)
        times = medians(settings, runs)
        for method, goal in goals.items():
            what = f"decoder layer, {model}, {settings.tokens} tokens: over {method}"
            if method in times:
                rows.append(at_most(what, goal, times["oft"] / times[method]))
            else:
                rows.append(row(what, f"<= {goal:g}", "missing: peft"))
        rows.append(row(f"decoder layer, {model}: frozen", "", f"{1e3 * times['frozen']:.2f} ms"))
    return rows


def _linear(weight: Tensor) -> nn.Linear:
    """A layer without a bias around an existing weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def decoding(settings: Settings) -> list[dict[str, object]]:
    """One to sixteen tokens through an unmerged layer, over the base layer, replayed from CUDA graphs."""
    rows = []
    for model, size in settings.models.items():
        for name, (d, n) in {k: v for k, v in projections(size).items() if k in ("q", "k", "gate", "down")}.items():
            weight = random(settings, n, d) * d**-0.5
            layers = {
                m: make_layer(m, _linear(weight), 32, 16).eval() for m in available(["frozen", "oft", "peft-lora"])
            }
            for tokens in (1, 16):
                x = random(settings, tokens, d)
                times = medians(settings, {m: _replayed(settings, layer, x) for m, layer in layers.items()})
                what = f"decoding {tokens} tokens, {model} {name} ({d} -> {n}), bf16: over the base layer"
                lora = f" (LoRA {times['peft-lora'] / times['frozen']:.2f})" if "peft-lora" in times else ""
                rows.append(at_most(what + lora, 1.10, times["oft"] / times["frozen"]))
    return rows


def _replayed(settings: Settings, layer: nn.Module, x: Tensor) -> Callable[[int], object]:
    """A call without gradients, from a CUDA graph; sixteen in a row, so that events resolve it."""
    with torch.no_grad():
        layer(x)
        if not settings.real:
            return lambda i: layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(16):
                layer(x)
    return lambda i: graph.replay()


def saved(settings: Settings) -> list[dict[str, object]]:
    """Bytes kept for the backward pass by q, k and v on one input, beyond the weights, over one copy of it."""
    d, kv, _ = next(iter(settings.models.values()))
    layers = [make_layer("oft", _linear(random(settings, n, d)), 32, 16).train() for n in (d, kv, kv)]
    x = random(settings, settings.tokens, d).requires_grad_()
    weights = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    del outputs
    figure = sum(kept.values()) / (x.numel() * x.element_size())
    return [at_most("saved for backward by q, k and v, over one copy of their input", 1.01, figure)]


def launches(settings: Settings) -> list[dict[str, object]]:
    """Kernels that a layer launches beside the frozen layer's own, forward and backward."""
    if not settings.real:
        raise MissingError("counts kernels of a CUDA device")
    d = next(iter(settings.models.values()))[0]
    weight = random(settings, 4 * d, d)
    frozen, oft = (_launches(settings, make_layer(method, _linear(weight), 32, 16)) for method in ("frozen", "oft"))
    forward, backward = oft[0] - frozen[0], oft[1] - frozen[1]
    return [
        row("kernels launched by a layer beside the base layer's, forward", "<= 1", str(forward), forward <= 1),
        row("the same, backward", "<= 2", str(backward), backward <= 2),
    ]


def _launches(settings: Settings, layer: nn.Module) -> tuple[int, int]:
    """Kernels of a forward and of a backward pass."""
    x = random(settings, 512, layer.weight.shape[1]).requires_grad_()
    for _ in range(2):
        y = layer.train()(x)
        upstream = torch.ones_like(y)
        torch.autograd.grad(y, x, upstream)
    forward = _count(lambda: layer(x))
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return forward, _count(lambda: torch.autograd.grad(y, [x, *trained], upstream))


def _count(run: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    skipped = ("memset", "memcpy")
    return sum(e.count for e in profile.key_averages() if not e.key.lower().startswith(skipped))


def about(settings: Settings) -> dict[str, object]:
    """Where and with what the figures were taken."""
    packages = {}
    for name in ("torch", "triton", "peft", "bitsandbytes"):
        found = importlib.util.find_spec(name)
        packages[name] = __import__(name).__version__ if found else "missing"
    driver = "none"
    if settings.real:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if settings.real else "cpu",
        "driver": driver,
        "python": platform.python_version(),
        "versions": packages,
        "commit": commit.stdout.strip() or "unknown",
        "tokens": settings.tokens,
        "rounds": settings.rounds,
        "quick": settings.quick,
    }


SUITES: list[Callable[[Settings], list[dict[str, object]]]] = [
    determinism,
    kernels,
    decoder,
    decoding,
    saved,
    launches,
]
