"""What runs in several processes share: models, what to read from them, and the list of runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from byte_tokenizer import byte_tokenizer

IDS = (torch.arange(240).view(24, 10) * 7) % 128
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
RUNS: dict[str, Callable[[Path, int, int], Any]] = {}


def make_base(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def base(folder: Path, kind: str) -> Any:
    """The model in ``folder / "base"``, in a dtype, or in NF4 whose bytes are stored as a dtype."""
    if not kind.startswith("nf4"):
        return LlamaForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, kind))
    dtype = torch.bfloat16 if kind == "nf4-bfloat16" else torch.float32
    storage = getattr(torch, kind.removeprefix("nf4-"))
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=storage
    )
    return LlamaForCausalLM.from_pretrained(folder / "base", quantization_config=config, device_map="cpu", dtype=dtype)


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def generators(model: nn.Module) -> list[Tensor]:
    return [whole(parameter) for name, parameter in model.named_parameters() if ".generators." in name]


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run(name: str) -> Callable[[Callable], Callable]:
    """Registers a run under a name."""
    return lambda function: RUNS.setdefault(name, function)


def fsdp_on_cpu() -> None:
    """accelerate shards on accelerators alone; in these runs on a CPU too."""
    original = AcceleratorState.__init__

    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if self.__dict__.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = __init__


def forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
