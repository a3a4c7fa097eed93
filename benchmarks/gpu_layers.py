"""Whole layers beside their peers: suites of ``gpu_check.py``."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable

import torch
from gpu_measure import Settings, at_most, medians, random, row
from torch import Tensor, nn

from host_time import beyond_frozen
from host_time import samples as host_samples
from measure import MissingError, require, saved_bytes
from methods import Sizes, available, linear, linear_nf4, on_layer
from model_sizes import Size

# Which input each projection reads.
_READS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}


def decoder_step(settings: Settings, layers: dict[str, nn.Module], size: Size) -> Callable[[int], None]:
    """Forward and backward of all seven projections, including the gradients of their inputs."""
    T = settings.tokens
    widths = (size.hidden, size.hidden, size.hidden, size.ffn)
    inputs = [[random(settings, T, width).requires_grad_() for width in widths] for _ in range(2)]
    grads = [random(settings, T, out) for _, out in size.projections.values()]
    parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]

    def run(round_: int) -> None:
        given = inputs[round_ % 2]
        outputs = [layer(given[_READS[name]]) for name, layer in layers.items()]
        torch.autograd.backward(outputs, grads)
        for tensor in (*given, *parameters):
            tensor.grad = None

    return run


def decoder(settings: Settings) -> list[dict[str, object]]:
    """All seven projections of a decoder layer in 16 bit, beside the frozen ones, PEFT's LoRA and PEFT's OFT."""
    goals = {"frozen": 1.06, "lora": 0.90, "peft-oft": 0.50}
    return [found for model in settings.models for found in _decoder(settings, model, linear, "oft", goals)]


def decoder_nf4(settings: Settings) -> list[dict[str, object]]:
    """The same on an NF4 base."""
    require("bitsandbytes")
    goals = {"frozen-nf4": 1.03, "qlora": 0.90, "peft-qoft": 0.50}
    return [found for model in settings.models for found in _decoder(settings, model, linear_nf4, "qoft", goals)]


def _decoder(
    settings: Settings, model: str, make: Callable[[Tensor], nn.Module], own: str, goals: dict[str, float]
) -> list[dict[str, object]]:
    size = settings.models[model]
    weights = {name: random(settings, n, d) * d**-0.5 for name, (d, n) in size.projections.items()}
    runs = {}
    for method in available([own, *goals])[0]:
        layers = {name: on_layer(method, make(weight), Sizes()).train() for name, weight in weights.items()}
        runs[method] = decoder_step(settings, layers, size)
    times = medians(settings, runs)
    frozen = next(iter(goals))
    rows = [row(f"decoder layer, {model}, {settings.tokens} tokens: {frozen}", "", f"{1e3 * times[frozen]:.2f} ms")]
    for method, goal in goals.items():
        what = f"decoder layer, {model}: {own} over {method}"
        found = method in times
        rows.append(
            at_most(what, goal, times[own] / times[method]) if found else row(what, f"<= {goal:g}", "missing: peft")
        )
    return rows


def decoding(settings: Settings) -> list[dict[str, object]]:
    """One to sixteen tokens through an unmerged layer, over the base layer, replayed from CUDA graphs."""
    methods = ["frozen", "oft", "lora"]
    return [found for model in settings.models for found in _decoding(settings, model, linear, methods)]


def decoding_nf4(settings: Settings) -> list[dict[str, object]]:
    """The same on an NF4 base."""
    require("bitsandbytes")
    methods = ["frozen-nf4", "qoft", "qlora"]
    return [found for model in settings.models for found in _decoding(settings, model, linear_nf4, methods)]


def _decoding(
    settings: Settings, model: str, make: Callable[[Tensor], nn.Module], methods: list[str]
) -> list[dict[str, object]]:
    rows = []
    for name in ("q", "k", "gate", "down"):
        d, n = settings.models[model].projections[f"{name}_proj"]
        weight = random(settings, n, d) * d**-0.5
        layers = {m: on_layer(m, make(weight), Sizes()).eval() for m in available(methods)[0]}
        frozen, own = methods[:2]
        if settings.real:  # the form that the cost model did not choose, too
            layers["fused"] = on_layer(own, make(weight), Sizes()).eval()
            layers["fused"].form = "fused"  # type: ignore[assignment]
        for tokens in (1, 16):
            x = random(settings, tokens, d)
            times = medians(settings, {m: _replayed(settings, layer, x) for m, layer in layers.items()})
            others = ", ".join(f"{m} {times[m] / times[frozen]:.2f}" for m in times if m not in (frozen, own))
            what = f"decoding {tokens} tokens, {model} {name} ({d} -> {n}): {own} over {frozen} ({others})"
            rows.append(at_most(what, 1.10, times[own] / times[frozen]))
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


def host(settings: Settings) -> list[dict[str, object]]:
    """Python and launches: a layer so small that the device waits for them, beyond the frozen one, over LoRA's."""
    rows = []
    for what, gradient in (("training step", True), ("pass without gradients", False)):
        taken = host_samples(settings.device, settings.dtype, gradient=gradient, rounds=settings.rounds)
        times = ", ".join(f"{method} {1e6 * statistics.median(found):.0f}" for method, found in taken.items())
        over: float | str = "missing: peft"
        if "lora" in taken:
            over = statistics.median(beyond_frozen(taken, "oft", "lora"))
        rows.append(row(f"host time of a {what} ({times} µs): oft over lora, beyond frozen", "", over))
    return rows


def saved(settings: Settings) -> list[dict[str, object]]:
    """Bytes kept for the backward pass by q, k and v on one input, beyond the weights, over one copy of it."""
    size = next(iter(settings.models.values()))
    d = size.hidden
    layers = [on_layer("oft", linear(random(settings, n, d)), Sizes()).train() for n in (d, size.kv, size.kv)]
    x = random(settings, settings.tokens, d).requires_grad_()
    with saved_bytes(*layers) as kept:
        outputs = [layer(x) for layer in layers]
    del outputs
    figure = sum(kept.values()) / (x.numel() * x.element_size())
    return [at_most("saved for backward by q, k and v, over one copy of their input", 1.01, figure)]


def launches(settings: Settings) -> list[dict[str, object]]:
    """Kernels that a layer launches beside the frozen layer's own, forward and backward."""
    if not settings.real:
        raise MissingError("counts kernels of a CUDA device")
    d = next(iter(settings.models.values())).hidden
    weight = random(settings, 4 * d, d)
    _kernels(lambda: weight + 1)  # the first profile of a process may miss what runs while it sets itself up
    frozen, oft = (_launches(settings, on_layer(method, linear(weight), Sizes())) for method in ("frozen", "oft"))
    if not all(frozen):
        raise MissingError("the profiler saw no kernel of the base layer")
    rows = []
    for what, goal, alone, adapted in zip(("forward", "backward"), (1, 2), frozen, oft, strict=True):
        count = len(adapted) - len(alone)
        names = ", ".join(name[:40] for name in (Counter(adapted) - Counter(alone)).elements())
        what = f"kernels launched by a layer beside the base layer's, {what}: {names}"
        rows.append(row(what, f"<= {goal}", str(count), count <= goal))
    return rows


def _launches(settings: Settings, layer: nn.Module) -> tuple[list[str], list[str]]:
    """Kernels of a forward and of a backward pass."""
    x = random(settings, 512, layer.weight.shape[1]).requires_grad_()
    for _ in range(2):
        y = layer.train()(x)
        upstream = torch.ones_like(y)
        torch.autograd.grad(y, x, upstream)
    forward = _kernels(lambda: layer(x))
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return forward, _kernels(lambda: torch.autograd.grad(y, [x, *trained], upstream))


def _kernels(run: Callable[[], object]) -> list[str]:
    """Names of the kernels that run on the device, copies, fills and the profiler's own events left out."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.lower().startswith(("memset", "memcpy", "activity buffer"))]
