"""How each method folds what it trained into the weights, and whether the merged model computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import oftv2
from measure import relative_error


def _peft(model: Any) -> Any:
    return model.merge_and_unload()


# 4-bit bases: oftv2 gives plain layers of the model's dtype, PEFT quantizes again.
MERGE: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("oft", "qoft"), oftv2.merge),
    **dict.fromkeys(("peft-oft", "lora", "dora", "peft-qoft", "qlora"), _peft),
}


@torch.no_grad()
def check_merged(name: str, model: Any, merged: Any, ids: Tensor, limit: float | None = None) -> float:
    """The relative difference of the merged model's logits.

    Raises:
        SystemExit: it is above ``limit``, by default what rounding explains.
    """
    expected = model(ids).logits
    error = relative_error(merged(ids).logits, expected)
    limit = limit or (1e-3 if expected.dtype == torch.float32 else 5e-2)
    if not error < limit:
        raise SystemExit(
            f"{name}: merged, the logits differ by {error:.1e} where {limit:.0e} is allowed; nothing timed"
        )
    return error
