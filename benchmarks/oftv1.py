"""The original orthogonal finetuning (OFT, arXiv 2306.07280), weight-centric, as a baseline.

    y = x (W · blockdiag(R₁ … R_r)ᵀ)ᵀ + bias,    R_j = (I + Q_j)(I − Q_j)⁻¹

At every forward pass the blocks are inverted and laid out in a dense d × d matrix, which is multiplied with the frozen
weight, n · d² operations; autograd goes back through all of it and keeps the d × d matrix and the n × d product.
OFTv2 (arXiv 2506.19847) reports its speed and memory over this. Only the packed generators are not the original's,
which trained full b × b matrices and used their skew part: b(b−1)/2 numbers a block serve the baseline better than b².
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oftv2.reference import skew


class OFTv1Linear(nn.Module):
    """A frozen ``nn.Linear`` whose weight is rotated densely at every call; ``b`` must divide its input size."""

    def __init__(self, base_layer: nn.Linear, block_size: int) -> None:
        super().__init__()
        d = base_layer.in_features
        if d % block_size:
            raise ValueError(f"block size {block_size} does not divide {d} inputs")
        self.base_layer = base_layer.requires_grad_(False)
        self.block_size = block_size
        shape = (d // block_size, block_size * (block_size - 1) // 2)
        self.generators = nn.Parameter(torch.zeros(shape, device=base_layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        Q = skew(self.generators, self.block_size)
        identity = torch.eye(self.block_size, device=Q.device, dtype=Q.dtype)
        R = (identity + Q) @ torch.linalg.inv(identity - Q)
        dense = torch.block_diag(*R).to(self.base_layer.weight.dtype)  # (d, d)
        return nn.functional.linear(x, self.base_layer.weight @ dense.mT, self.base_layer.bias)


def wrap(model: nn.Module, block_size: int) -> nn.Module:
    """Puts it on every ``nn.Linear`` of a model but the output head, in place, and freezes everything else."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, OFTv1Linear(module, block_size))
    return model
