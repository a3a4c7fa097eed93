"""The language models that benchmarks adapt: SmolLM2-135M, or random weights in the shape of larger ones."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from checkout import ROOT
from torch import nn

import model_sizes
from measure import MissingError, require
from model_sizes import PROJECTIONS, SIZES, Size

TINY_NAME = "tiny"
TINY = {TINY_NAME: model_sizes.TINY, "tiny-qwen": model_sizes.TINY_QWEN}


def load(name: str, device: torch.device, dtype: torch.dtype, *, nf4: bool = False, seed: int = 0) -> Any:
    """A causal language model in training mode.

    Args:
        name: ``"smollm2"``, a key of SIZES or TINY (random weights), or a folder or hub name.
        nf4: its projections in bitsandbytes' NF4 with double quantization.

    Raises:
        MissingError: a package or the model is not there.
    """
    require("transformers")
    if name in SIZES | TINY:
        torch.manual_seed(seed)
        return random_model((SIZES | TINY)[name], device, dtype, nf4=nf4)
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


def random_model(size: Size, device: torch.device, dtype: torch.dtype, *, nf4: bool = False) -> Any:
    """A causal language model with random weights (speed does not depend on them), in training mode.

    One in NF4 is made layer by layer: it never takes the memory of a 16-bit model.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta" if nf4 else device):
        model = AutoModelForCausalLM.from_config(size.config(), dtype=dtype)
    if not nf4:
        return model.train()
    for path, module in list(model.named_modules()):
        if path.endswith(tuple(PROJECTIONS)):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, random_nf4(module, device))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(
                    module, name, nn.Parameter(nn.init.ones_(value) if value.dim() == 1 else value.normal_(std=0.02))
                )
    model.tie_weights()
    model.is_loaded_in_4bit = True  # by this PEFT tells
    return model.train()


def random_nf4(linear: nn.Linear, device: torch.device) -> nn.Module:
    """bitsandbytes' NF4 layer of the shape and dtype of ``linear``, with random codes and scales."""
    require("bitsandbytes")
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type
    from bitsandbytes.nn import Linear4bit, Params4bit

    n, d = linear.weight.shape
    dtype, has_bias, groups = linear.weight.dtype, linear.bias is not None, -(-n * d // 64)
    with torch.device("meta"):
        layer: nn.Module = Linear4bit(d, n, has_bias, compute_dtype=dtype, quant_type="nf4")
    scale = torch.tensor(2 * d**-0.5, device=device)  # the values of NF4 are about 0.5 at random
    spread = torch.full((-(-groups // 256),), 0.1 * scale.item(), device=device)
    state = QuantState(
        absmax=torch.randint(256, (groups,), dtype=torch.uint8, device=device),
        shape=linear.weight.shape,
        code=get_4bit_type("nf4", device=device),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=scale,
        state2=QuantState(absmax=spread, blocksize=256, code=create_dynamic_map().to(device), dtype=torch.float32),
    )
    packed = torch.randint(256, (-(-n * d // 2), 1), dtype=torch.uint8, device=device)
    layer.weight = Params4bit(packed, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer)
    layer.quant_state = state
    if has_bias:
        layer.bias = nn.Parameter(torch.zeros(n, dtype=dtype, device=device))
    return layer


def twin(model: Any) -> Any:
    """Another model of the same tensors, which take their memory once."""
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]  # bitsandbytes' scales
    shared = {id(there): there for there in (*model.parameters(), *model.buffers(), *states)}
    return copy.deepcopy(model, shared)
