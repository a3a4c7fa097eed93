"""Small models of each kind of layer, and inputs for them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from peers import output

VECTORS = torch.randn(5, 32, generator=torch.Generator().manual_seed(7))
IMAGES = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(8))
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


def conv2d() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1))


def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16))
