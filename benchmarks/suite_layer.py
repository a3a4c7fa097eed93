"""One linear layer beside its peers, over tokens, block sizes and widths: the suite ``layer``.

Forward and backward with the gradients of the input and of the adapter; one token forward only, without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from correctness import check
from measure import Row, Run, interleave, saved_bytes, timings
from methods import METHODS, available, linear, linear_nf4, on_layer
from options import Options

OWN = ["frozen", "oft", "oft-input", "oft-weight", "peft-oft", "peft-oft-accelerated", "lora", "dora", "oftv1", "full"]
OWN_NF4 = ["frozen-nf4", "qoft", "peft-qoft", "qlora"]
Case = tuple[bool, int, int, int, int]  # NF4, tokens, inputs, outputs, block size


def cases(options: Options) -> list[Case]:
    """What is measured: shapes of small models, then sweeps over one size at a time."""
    b = options.sizes.block_size
    if options.quick:
        shapes = [(70, 64, 32), (1, 64, 32)]
        return [(False, *shape, b) for shape in shapes] + [(True, *shapes[0], b), (False, *shapes[0], 16)]
    if options.device.type == "cuda":
        shapes = [(8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (1, 4096, 4096), (1, 4096, 14336)]
        side, rows = 4096, 8192
        sweep, widths = (16, 256, 1024, 2048, 4096, 8192, 16384), (1024, 2048, 4096, 8192)
    else:
        shapes = [(1024, 1024, 1024), (4096, 576, 576), (2048, 1536, 576), (2048, 576, 1536), (512, 2048, 2048)]
        shapes.append((1, 1024, 1024))
        side, rows = 1024, 1024
        sweep, widths = (16, 64, 256, 512, 1024, 2048, 4096, 8192), (256, 512, 1024, 2048)
    found: list[Case] = [(False, *shape, b) for shape in shapes]
    found += [(False, tokens, side, side, b) for tokens in sweep]
    found += [(False, rows, side, side, size) for size in (8, 16, 32, 64, 128, 256)]
    found += [(False, rows, width, width, b) for width in widths]
    found += [(True, tokens, side, side, b) for tokens in (1, *sweep[1::2])]
    return list(dict.fromkeys(found))


def name(case: Case) -> str:
    nf4, tokens, d, n, b = case
    return f"{tokens} x {d} x {n}, b = {b}{', NF4' * nf4}"


def measure(options: Options) -> Iterator[Row]:
    for case in cases(options):
        if options.wanted(name(case)):
            yield from _measure(case, options)


def _measure(case: Case, options: Options) -> Iterator[Row]:
    nf4, tokens, d, n, b = case
    training = tokens > 1
    sizes = replace(options.sizes, block_size=b)
    common = {
        "group": name(case),
        "mode": "forward + backward" if training else "forward, no gradient",
        "base": "NF4" if nf4 else options.dtype_name,
        **{"tokens": tokens, "in": d, "out": n, "block_size": b, "rank": sizes.rank},
    }
    asked = options.choose(OWN_NF4 if nf4 else OWN)
    methods, missing = available(asked)
    yield from ({**common, "method": method, "missing": reason} for method, reason in missing.items())
    if not methods:
        return
    torch.manual_seed(options.seed)
    place = {"device": options.device, "dtype": options.dtype}
    x, upstream = torch.randn(tokens, d, **place), torch.randn(tokens, n, **place)
    weight, bias = torch.randn(n, d, **place) * d**-0.5, torch.randn(n, **place)
    runs, layers, errors = {}, {}, {}
    for method in methods:
        base = (linear_nf4 if nf4 else linear)(weight.clone(), bias.clone())
        held = _dequantized(base) if nf4 else weight
        layers[method] = on_layer(method, base, sizes).train(training)
        errors[method] = check(method, layers[method], held, bias, x, upstream, sizes)
        runs[method] = step(layers[method], x, upstream, training)
    samples = interleave(runs, options.device, calibrate=True, title=name(case), **options.effort)
    for method in methods:
        row = {**common, "method": method, **timings(samples, method, METHODS[method].ratios)}
        if training:
            own = x.clone().requires_grad_()
            with saved_bytes(layers[method]) as kept:
                out = layers[method](own)
            del out
            row["saved_bytes"] = sum(kept.values())
        row["trainable"] = sum(p.numel() for p in layers[method].parameters() if p.requires_grad)
        yield row | {"error": float(f"{errors[method]:.1e}")}


def step(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor, training: bool) -> Run:
    """What is timed: forward and backward, or a forward pass without gradients."""
    x = x.detach().clone().requires_grad_(training)
    parameters = list(layer.parameters())

    def train(round_: int) -> None:
        layer(x).backward(upstream)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    @torch.no_grad()
    def infer(round_: int) -> None:
        layer(x)

    return train if training else infer


def _dequantized(layer: nn.Module) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
