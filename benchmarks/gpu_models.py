"""Whole models beside their peers, randomly initialised (speed does not depend on the weights): ``gpu_check.py``."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from gpu_measure import MissingError, Settings, at_most, medians, row
from torch import Tensor, nn

import oftv2

# hidden size, feed-forward size, layers, heads, heads of k and v, vocabulary
SIZES = {"Llama-3-8B": (4096, 14336, 32, 32, 8, 128256), "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064)}
TINY = {"tiny": (64, 128, 2, 4, 2, 128)}
SEQUENCES = (4, 2048)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def steps(settings: Settings) -> list[dict[str, object]]:
    """A training step in 16 bit over the frozen model's, LoRA's and PEFT's OFT, and peak memory."""
    goals = {"frozen": 1.05, "peft-lora": 0.95, "peft-oft": 0.6}
    return [found for name in _sizes(settings) for found in _steps(settings, name, nf4=False, goals=goals)]


def steps_nf4(settings: Settings) -> list[dict[str, object]]:
    """The same on an NF4 base."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError("wants bitsandbytes")
    goals = {"peft-lora": 0.9}
    return [found for name in _sizes(settings) for found in _steps(settings, name, nf4=True, goals=goals)]


def _sizes(settings: Settings) -> dict[str, tuple[int, ...]]:
    if importlib.util.find_spec("transformers") is None:
        raise MissingError("wants transformers")
    return dict(list(SIZES.items())[: 1 if settings.quick else 2]) if settings.real else TINY


def _steps(settings: Settings, name: str, *, nf4: bool, goals: dict[str, float]) -> list[dict[str, object]]:
    base = make_model(settings, _sizes(settings)[name], nf4=nf4)
    methods = ["frozen", "oft", *(method for method in goals if method != "frozen")]
    found = [method for method in methods if not method.startswith("peft") or importlib.util.find_spec("peft")]
    models = {method: adapted(method, twin(base)) for method in found}
    batch, length = SEQUENCES if settings.real else (2, 16)
    ids = torch.randint(base.config.vocab_size, (batch, length), device=settings.device)
    rows = []
    for checkpointing in (False, True):
        for model in models.values():
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        times = medians(settings, {method: step(model, ids) for method, model in models.items()}, few=True)
        memory = {method: _peak_gib(settings, step(model, ids)) for method, model in models.items()}
        how = f"{name}, {'NF4' if nf4 else 'bf16'}, {batch} x {length}{', checkpointing' * checkpointing}"
        rows.append(row(f"step of {how}: frozen", "", f"{1e3 * times['frozen']:.0f} ms"))
        for method, goal in goals.items():
            if method in times:
                rows.append(at_most(f"step of {how}: oft over {method}", goal, times["oft"] / times[method]))
            else:
                rows.append(row(f"step of {how}: oft over {method}", f"<= {goal:g}", "missing: peft"))
        if "peft-lora" in memory and settings.real:
            what = f"peak memory of {how}: oft {memory['oft']:.1f} GiB over LoRA's {memory['peft-lora']:.1f}"
            rows.append(at_most(what, 1.0, memory["oft"] / memory["peft-lora"]))
    return rows


def make_model(settings: Settings, size: tuple[int, ...], *, nf4: bool) -> Any:
    """A causal language model with random weights, its projections in NF4 if asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, ffn, layers, heads, kv_heads, vocabulary = size
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        use_cache=False,
        dtype=settings.dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(settings.dtype)
    try:
        with torch.device(settings.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if nf4:
        from gpu_layers import linear_nf4

        for path, module in list(model.named_modules()):
            if path.endswith(tuple(PROJECTIONS)):
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, linear_nf4(module.weight.data))
    return model.train()


def twin(model: Any) -> Any:
    """Another model of the same tensors, which take their memory once."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def adapted(method: str, model: Any) -> Any:
    """The model with the adapter of one method."""
    if method == "oft":
        return oftv2.wrap_model(model, block_size=32)
    if method == "frozen":
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return model
    from peft import LoraConfig, get_peft_model
    from peft import OFTConfig as PeftOFTConfig

    if method == "peft-lora":
        config: Any = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS)
    else:
        config = PeftOFTConfig(oft_block_size=32, use_cayley_neumann=True, target_modules=PROJECTIONS)
    model.enable_input_require_grads()
    return get_peft_model(model, config)


def step(model: nn.Module, ids: Tensor) -> Callable[[int], None]:
    """Forward and backward to the embeddings."""

    def run(round_: int) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


def _peak_gib(settings: Settings, run: Callable[[int], None]) -> float:
    if not settings.real:
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    run(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30
