"""OFT adapters of PEFT 0.14 and 0.15, as today's PEFT would write them.

There ``y = s ⊙ (x·R·Wᵀ)``: ``oft_r`` holds whole matrices ``A`` of ``(r, b, b)``, of which the skew-symmetric part
``S = (A − Aᵀ)/2`` makes ``R = (I − S)(I + S)⁻¹``, today's exact transform; ``oft_s`` of ``(n, 1)`` scales the outputs,
which today's OFT does not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .adapter_file import GENERATORS, PREFIX
from .errors import AdapterError
from .peft_config import DEFAULT_EPS

_GENERATORS, _SCALES = ".oft_r", ".oft_s"
_IGNORED = ("rank_pattern", "alpha_pattern")
_SCALED = (
    "written by PEFT 0.14 or 0.15, which scaled the outputs too: {} layers keep a scaled copy of their weight, as the "
    "adapter's own, and train it in full where the adapter trains"
)
_UNCONSTRAINED = "trained with coft=True of PEFT 0.14 or 0.15: the constraint is in the values, and not kept up further"


def is_before_016(tensors: dict[str, Tensor]) -> bool:
    """Whether these are the tensors of such an adapter."""
    return any(key.endswith((_GENERATORS, _SCALES)) for key in tensors)


def modernized(
    tensors: dict[str, Tensor], values: dict[str, Any], source: Any
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """The tensors and the configuration in today's layout, the output scales by layer, and what the user should know.

    Raises:
        AdapterError: tensors of other shapes, or without their peers; a constraint of unknown size.
    """
    out, scales, notes = {}, {}, []
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        if kind == "oft_r":
            if f"{layer}{_SCALES}" not in tensors or tensor.dim() != 3 or tensor.shape[1] != tensor.shape[2]:
                raise AdapterError(f"{source}: {key} of shape {tuple(tensor.shape)} is no (r, b, b) with an oft_s")
            matrices = (
                _constrained(tensor, len(tensors[layer + _SCALES]), values, key) if values.get("coft") else tensor
            )
            rows, columns = torch.triu_indices(tensor.shape[1], tensor.shape[1], 1)
            out[layer + GENERATORS] = ((matrices - matrices.mT) / 2)[:, rows, columns]
        elif kind == "oft_s":
            if f"{layer}{_GENERATORS}" not in tensors or tensor.shape != (len(tensor), 1):
                raise AdapterError(f"{source}: {key} of shape {tuple(tensor.shape)} is no (n, 1) with an oft_r")
            if not tensor.isfinite().all():
                raise AdapterError(f"{source}: {key} holds NaN or Inf")
            if (tensor != 1).any():
                scales[layer.removeprefix(PREFIX)] = tensor[:, 0]
        else:
            out[key] = tensor
    if scales:
        notes.append(_SCALED.format(len(scales)))
    if values.get("coft"):
        notes.append(_UNCONSTRAINED)
    kept = {name: value for name, value in values.items() if name not in _IGNORED}
    return out, {**kept, "coft": False, "use_cayley_neumann": False}, scales, tuple(notes)


def _constrained(matrices: Tensor, outputs: int, values: dict[str, Any], key: str) -> Tensor:
    """Every matrix within the norm that it had in each forward pass; PEFT scaled the limit by outputs per block."""
    if values.get("block_share"):
        raise AdapterError(f"{key}: coft and block_share together; how many blocks PEFT counted is not in the file")
    count = len(matrices)
    limit = values.get("eps", DEFAULT_EPS) * math.ceil(outputs / count) ** 2 / math.sqrt(count)
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    return torch.where(norms > limit, matrices * (limit / norms), matrices)
