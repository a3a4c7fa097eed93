"""Small mixtures of experts: their sizes as configurations of different families call them, models, what is wrapped."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_experts": 5,
    "num_local_experts": 5,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "max_position_embeddings": 64,
}

WRAPPED: dict[str, Any] = {"block_size": 16, "target_modules": ["all-linear", "experts"]}


def model_of(name: str = "Qwen3Moe", **fields: Any) -> Any:
    """A random model of a family, equal for equal arguments; the experts' weights are large enough to matter."""
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**SIZES, **fields}))
    for parameter in model.parameters():
        if parameter.dim() == 3:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
