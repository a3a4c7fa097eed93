"""Small models of each kind of layer, and inputs for them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from peers import output

VECTORS = torch.randn(5, 32, generator=torch.Generator().manual_seed(7))
IDS = torch.arange(12).view(2, 6)


@torch.no_grad()
def answer(model: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs or logits, without a gradient."""
    return output(model(inputs))


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))


def embedding() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 8))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16))
