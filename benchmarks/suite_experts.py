"""The experts of a mixture beside their peers: the suite ``experts``.

One module of transformers' ``Qwen3MoeExperts``, forward and backward with the gradients of the hidden states, the
routing weights and the adapter. LoRA is PEFT's on the stacked weights (``target_parameters``); PEFT's OFT takes none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import oftv2
from measure import MissingError, Row, Run, interleave, relative_error, require, saved_bytes, timings
from methods import perturb
from options import Options

OWN = ["frozen", "oft", "lora", "peft-oft"]
WEIGHTS = ["gate_up_proj", "down_proj"]
RATIOS = {"over_frozen": "frozen", "over_lora": "lora"}
Case = tuple[int, int, int, int, int]  # tokens, experts, of which each token takes, features, inner features


def cases(options: Options) -> list[Case]:
    """Of fine-grained mixtures (Qwen3-30B-A3B, its shape whole on a GPU) and of coarse ones (Mixtral)."""
    if options.quick:
        return [(40, 4, 2, 64, 32)]
    if options.device.type == "cuda":
        return [(8192, 128, 8, 2048, 768), (8192, 8, 2, 4096, 14336)]
    return [(1024, 16, 4, 512, 256), (256, 16, 4, 512, 256), (1024, 4, 2, 576, 1536)]


def measure(options: Options) -> Iterator[Row]:
    require("transformers")
    for case in cases(options):
        tokens, count, top_k, d, inner = case
        group = f"{tokens} tokens, {top_k} of {count} experts, {d} x {inner}"
        if options.wanted(group):
            shared = {"group": group, "tokens": tokens, "experts": count, "top_k": top_k, "in": d, "inner": inner}
            yield from _measure(shared, case, options)


class _Block(nn.Module):
    """What holds experts in a model, for PEFT to find them in."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.experts(*inputs)


def _measure(shared: Row, case: Case, options: Options) -> Iterator[Row]:
    tokens, count, top_k, d, _ = case
    torch.manual_seed(options.seed)
    place: dict[str, Any] = {"device": options.device, "dtype": options.dtype}
    routes = torch.rand(tokens, count, device=options.device).topk(top_k).indices
    inputs = torch.randn(tokens, d, **place), routes, torch.rand(tokens, top_k, **place)
    upstream, base = torch.randn(tokens, d, **place), _experts(case, options)
    modules, runs = {}, {}
    for method in options.choose(OWN):
        try:
            modules[method] = _attach(method, copy.deepcopy(base), options)
        except MissingError as error:
            yield {**shared, "method": method, "missing": str(error)}
            continue
        runs[method] = _step(modules[method], inputs, upstream)
    error = _error(modules["oft"], inputs) if "oft" in modules else 0.0
    if not error < (1e-5 if options.dtype == torch.float32 else 3e-2):
        raise SystemExit(f"{shared['group']}: rotated and merged experts differ by {error:.1e}; nothing was timed")
    samples = interleave(runs, options.device, calibrate=True, title=shared["group"], **options.effort)
    for method, module in modules.items():
        own = [tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs]
        with saved_bytes(module) as kept:
            out = module(*own)
        del out
        yield {
            **shared,
            "dtype": options.dtype_name,
            "method": method,
            **timings(samples, method, RATIOS),
            "saved_bytes": sum(kept.values()),
            "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "error": float(f"{error:.1e}") if method == "oft" else "",
        }


def _experts(case: Case, options: Options) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    _, count, top_k, d, inner = case
    config = Qwen3MoeConfig(hidden_size=d, moe_intermediate_size=inner, num_experts=count, num_experts_per_tok=top_k)
    config._experts_implementation = "grouped_mm"
    with torch.device(options.device):
        module = Qwen3MoeExperts(config).to(options.dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=d**-0.5)
    return module.requires_grad_(False)


def _attach(method: str, experts: Any, options: Options) -> nn.Module:
    if method == "oft":
        return perturb(method, oftv2.OFTExperts(experts, oftv2.OFTConfig(block_size=options.sizes.block_size)))
    if method == "peft-oft":
        raise MissingError("PEFT's OFT takes no stacked weights")
    if method == "lora":
        require("peft")
        import peft

        rank = options.sizes.rank
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=WEIGHTS)
        return perturb(method, peft.get_peft_model(_Block(experts), config))
    return experts


def _step(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor) -> Run:
    hidden, routes, weights = inputs
    leaves = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    parameters = list(module.parameters())

    def train(round_: int) -> None:
        module(leaves[0], routes, leaves[1]).backward(upstream)
        for tensor in (*leaves, *parameters):
            tensor.grad = None

    return train


@torch.no_grad()
def _error(layer: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """How far the rotated experts are from the same with their rotations folded in."""
    actual, merged = layer(*inputs), copy.deepcopy(layer)
    merged.merge()
    return relative_error(actual, merged(*inputs))
