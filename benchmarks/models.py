"""The language models that benchmarks adapt: SmolLM2-135M, or random weights in the shape of larger ones."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from checkout import ROOT

from measure import MissingError, require
from methods import linear_nf4

# hidden size, feed-forward size, layers, heads, heads of k and v, vocabulary
SIZES = {"Llama-3-8B": (4096, 14336, 32, 32, 8, 128256), "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064)}
TINY_NAME = "tiny"
TINY = {TINY_NAME: (64, 128, 2, 4, 2, 128)}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(name: str, device: torch.device, dtype: torch.dtype, *, nf4: bool = False, seed: int = 0) -> Any:
    """A causal language model in training mode.

    Args:
        name: ``"smollm2"``, a key of SIZES or TINY (random weights), or a folder or hub name.
        nf4: its projections quantized by bitsandbytes.

    Raises:
        MissingError: a package or the model is not there.
    """
    require("transformers")
    if name in SIZES | TINY:
        torch.manual_seed(seed)
        model = random_llama((SIZES | TINY)[name], device, dtype)
        return quantize(model) if nf4 else model
    require("psutil")
    sys.path.insert(0, str(ROOT / "examples"))
    from _model import ModelError, default_cache, load_base, smollm2_folder

    try:
        source = smollm2_folder(default_cache()) if name == "smollm2" else name
        return load_base(source, dtype, device, "nf4" if nf4 else "none").train()
    except ModelError as error:
        raise MissingError(str(error)) from error
    finally:
        sys.path.remove(str(ROOT / "examples"))


def random_llama(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Any:
    """A causal language model with random weights (speed does not depend on them)."""
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
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def quantize(model: Any) -> Any:
    """The model with its projections in bitsandbytes' NF4, in place."""
    for path, module in list(model.named_modules()):
        if path.endswith(tuple(PROJECTIONS)):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, linear_nf4(module.weight.data))
    model.is_loaded_in_4bit = True  # by this PEFT tells
    return model


def twin(model: Any) -> Any:
    """Another model of the same tensors, which take their memory once."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
