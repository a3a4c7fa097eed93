"""Gate and up projections, which read the same input, rotated together: opt-in, for the modules that allow it.

A gated feed-forward module of the Llama family computes ``down(act(gate(x)) · up(x))`` and nothing else, so it can hand
``x`` to both rotations at once. Attention does more between its projections, and is left as it is.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import Tensor, nn

from . import functional as F
from .cost_model import INPUT
from .errors import AdapterError
from .layers import OFTLinear, unhooked

_GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
_FORWARDS = (
    f"def forward(self, x): down_proj = {_GATED} return down_proj",
    f"def forward(self, x): return {_GATED}",
)


class GroupedProjections:
    """Mixed into the class of a gated feed-forward module, in front of it."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: Any

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if not (_rotates(gate, x) and _rotates(up, x) and gate.block_size == up.block_size):
            return super().forward(x)  # type: ignore[misc]
        x_gate, x_up = F.rotate_group(x, _deltas(gate, up))
        return self.down_proj(self.act_fn(gate.call_base(x_gate)) * up.call_base(x_up))

    def __reduce__(self) -> tuple[Any, ...]:
        """The class exists only in this process: pickle the one it was made from."""
        return _new, (type(self).__mro__[2],), self.__dict__


def group_projections(model: nn.Module) -> nn.Module:
    """Makes gated feed-forward modules rotate the input of their gate and up projections once for both, in place.

    Args:
        model (nn.Module): a wrapped model.

    Returns:
        nn.Module: the same object; its results are the same.

    Raises:
        AdapterError: no module of the model computes ``down(act(gate(x)) * up(x))`` and nothing else.
    """
    for module in check_groups(model):
        module.__class__ = _grouped_class(type(module))
    return model


def check_groups(model: nn.Module) -> list[nn.Module]:
    """The modules that can be grouped; AdapterError where there are none."""
    found = [module for module in model.modules() if not isinstance(module, GroupedProjections) and _is_gated(module)]
    if not found and not any(isinstance(module, GroupedProjections) for module in model.modules()):
        raise AdapterError(
            f"group_projections: no module of this {type(model).__name__} computes {_GATED} and nothing else, as the "
            "feed-forward modules of Llama, Mistral, Qwen and Gemma do in transformers; leave it out"
        )
    return found


def ungroup(model: nn.Module) -> None:
    """Gives the modules the class back that they had."""
    for module in model.modules():
        if isinstance(module, GroupedProjections):
            module.__class__ = type(module).__mro__[2]


def _is_gated(module: nn.Module) -> bool:
    if "forward" in vars(module):  # replaced on the object, as accelerate does
        return False
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False
    return re.sub(r"\s+", " ", source).strip() in _FORWARDS


def _rotates(layer: Any, x: Tensor) -> bool:
    """Whether calling ``layer`` does nothing but rotate ``x`` and call its base layer."""
    return (
        isinstance(layer, OFTLinear)
        and layer.rotating
        and x.dim() in (2, 3)
        and unhooked(layer)
        and layer.choose_form(x) == INPUT
    )


def _deltas(*layers: OFTLinear) -> list[Tensor]:
    """Δ of each, made in one launch where they change."""
    packed = [layer.changing_generators() for layer in layers]
    if any(generators is None for generators in packed) or len({layer.rotation.terms for layer in layers}) > 1:
        return [layer.delta() for layer in layers]
    return F.cayley_neumann_many([p for p in packed if p is not None], layers[0].block_size, layers[0].rotation.terms)


def _grouped_class(cls: type) -> type:
    attributes = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (GroupedProjections, cls), attributes)


def _new(cls: type) -> Any:
    return object.__new__(_grouped_class(cls))
