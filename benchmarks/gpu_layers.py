"""Whole layers beside their peers: suites of ``gpu_check.py``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from gpu_measure import MissingError, Settings, at_most, medians, random, row
from layer import make_layer
from torch import Tensor, nn


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
    return [found for model in settings.models for found in _decoder(settings, model, _linear, "bf16", goals)]


def decoder_nf4(settings: Settings) -> list[dict[str, object]]:
    """The same on an NF4 base."""
    goals = {"frozen": 1.03, "peft-lora": 0.90, "peft-oft": 0.50}
    return [found for model in settings.models for found in _decoder(settings, model, linear_nf4, "NF4", goals)]


def _decoder(
    settings: Settings, model: str, make: Callable[[Tensor], nn.Module], base: str, goals: dict[str, float]
) -> list[dict[str, object]]:
    size = settings.models[model]
    weights = {name: random(settings, n, d) * d**-0.5 for name, (d, n) in projections(size).items()}
    runs = {}
    for method in available(["frozen", "oft", *(name for name in goals if name != "frozen")]):
        layers = {name: make_layer(method, make(weight), 32, 16).train() for name, weight in weights.items()}
        runs[method] = decoder_step(settings, layers, size)
    times = medians(settings, runs)
    rows = [
        row(f"decoder layer, {model}, {base}, {settings.tokens} tokens: frozen", "", f"{1e3 * times['frozen']:.2f} ms")
    ]
    for method, goal in goals.items():
        what = f"decoder layer, {model}, {base}: oft over {method}"
        found = method in times
        rows.append(
            at_most(what, goal, times["oft"] / times[method]) if found else row(what, f"<= {goal:g}", "missing: peft")
        )
    return rows


def _linear(weight: Tensor) -> nn.Linear:
    """A layer without a bias around an existing weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def linear_nf4(weight: Tensor) -> nn.Module:
    """bitsandbytes' NF4 layer of an existing weight."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError("wants bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        layer: nn.Module = Linear4bit(*reversed(weight.shape), False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(weight.device)


def decoding(settings: Settings) -> list[dict[str, object]]:
    """One to sixteen tokens through an unmerged layer, over the base layer, replayed from CUDA graphs."""
    return [found for model in settings.models for found in _decoding(settings, model, _linear, "bf16")]


def decoding_nf4(settings: Settings) -> list[dict[str, object]]:
    """The same on an NF4 base."""
    return [found for model in settings.models for found in _decoding(settings, model, linear_nf4, "NF4")]


def _decoding(
    settings: Settings, model: str, make: Callable[[Tensor], nn.Module], base: str
) -> list[dict[str, object]]:
    rows = []
    shapes = projections(settings.models[model])
    for name in ("q", "k", "gate", "down"):
        d, n = shapes[name]
        weight = random(settings, n, d) * d**-0.5
        layers = {m: make_layer(m, make(weight), 32, 16).eval() for m in available(["frozen", "oft", "peft-lora"])}
        if settings.real:  # the form that the cost model did not choose, too
            layers["fused"] = make_layer("oft", make(weight), 32, 16).eval()
            layers["fused"].form = "fused"  # type: ignore[assignment]
        for tokens in (1, 16):
            x = random(settings, tokens, d)
            times = medians(settings, {m: _replayed(settings, layer, x) for m, layer in layers.items()})
            others = ", ".join(f"{m} {times[m] / times['frozen']:.2f}" for m in times if m not in ("frozen", "oft"))
            what = f"decoding {tokens} tokens, {model} {name} ({d} -> {n}), {base}: over the base layer ({others})"
            rows.append(at_most(what, 1.10, times["oft"] / times["frozen"]))
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
    """Kernels on the device, copies and fills left out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.lower().startswith(("memset", "memcpy")) for event in on_device)
