"""Adapters on the experts of a mixture, which transformers keeps as weights of three dimensions in one module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ._operator import ops
from ._segment_ops import by_token
from .base import OFTLayer
from .errors import AdapterError
from .merging import rotated, with_weights
from .partitioned import full_shape

DOWN = "down_proj"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def is_experts(module: Any) -> bool:
    """Whether ``module`` is one of transformers' modules of experts, whose weights and steps have common names."""
    if not hasattr(type(module), "_apply_gate"):
        return False
    return all(_is_stacked(module._parameters.get(name)) for name in (up_name(module), DOWN))


def holds_experts(module: nn.Module, name: str) -> bool:
    """Whether a module looks like experts with stacked weights, of any library and dtype."""
    called = "experts" in name.rpartition(".")[2] or type(module).__name__.endswith("Experts")
    return called and any(len(full_shape(weight)) == 3 for weight in module.parameters(recurse=False))


def up_name(module: Any) -> str:
    """The name of the weight that an expert's input meets."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


class OFTExperts(OFTLayer):
    r"""Frozen experts of a mixture, each behind two rotations: of its input, and of what goes into its last product.

    ``y_e = f((x R_e) W_eᵀ) R′_e W′_eᵀ``. Tokens are sorted by expert, and each expert's are rotated with one operator
    for all of them (on a GPU, one launch). A token that goes to several experts is kept once for the backward pass.

    Args:
        base_layer (nn.Module): a module of transformers' with stacked weights, such as ``Qwen3MoeExperts``:
            ``gate_up_proj`` (or ``up_proj``) ``(E, n, d)`` and ``down_proj`` ``(E, d, m)``, or both transposed.
        config, adapter_name, name, block_size: see :class:`oftv2.OFTLinear`; the block size must divide ``d`` and
            ``m``.

    Shape:
        hidden states ``(T, d)``, the experts of each token ``(T, k)`` and their weights ``(T, k)``; output ``(T, d)``.

    Attributes:
        generators (nn.ParameterDict): ``(E · (d + m) / b, b(b−1)/2)``: the blocks of the experts' inputs, expert by
            expert, then those of what goes into ``down_proj``.
    """

    @staticmethod
    def rotated_features(base_layer: Any) -> tuple[int, int]:
        (count, inputs), (_, inner) = _sizes(base_layer, up_name(base_layer)), _sizes(base_layer, DOWN)
        return count * (inputs + inner), count * (inputs + inner) // math.gcd(inputs, inner)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.down_proj

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.current_rows is not None:
            raise AdapterError(
                f"{self.name}: experts see tokens in another order, so adapters_per_row cannot be used with adapters "
                "on them: call the model once for each adapter instead"
            )
        if not self.rotating:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        base = self._usable_base()
        up, down = getattr(base, up_name(base)), base.down_proj
        x = hidden_states.to(up.dtype)
        up_delta, down_delta = self._deltas(x)
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        numbers = torch.arange(base.num_experts, device=experts.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)

        x = ops.rotate_segments(x, up_delta, ends, order)
        x = self._product(x, up_name(base), ends, experts)
        x = base._apply_gate(x) if getattr(base, "has_gate", True) else base.act_fn(x)
        x = ops.rotate_segments(x.to(down.dtype), down_delta, ends)
        x = self._product(x, DOWN, ends, experts)
        if getattr(base, "has_post_expert_norm", False):
            x = base.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[order, None]
        return by_token(x, order, top_k_index.shape[-1]).to(hidden_states.dtype)

    def _usable_base(self) -> Any:
        base = self.base_layer
        for weight in (getattr(base, up_name(base)), base.down_proj):
            if weight.is_meta or weight.dim() != 3:
                raise AdapterError(
                    f"{self.name}: the experts' weights are not here (offloaded, or partitioned by ZeRO-3), and they "
                    "are read without calling their module: keep them on the device, or leave the experts out with "
                    "exclude_modules"
                )
            if weight.requires_grad:
                raise AdapterError(
                    f"{self.name}: the experts' weights are to be frozen, and requires_grad is set on one"
                )
        return base

    def _deltas(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``Δ`` of the experts' inputs and of what goes into ``down_proj``, ``(E, r, b, b)`` each."""
        delta = self.delta() if x.is_cpu else self.delta(x.dtype)
        count = self.base_layer.num_experts
        inputs = count * x.shape[-1] // delta.shape[-1]
        parts = delta[:inputs], delta[inputs:]
        return parts[0].unflatten(0, (count, -1)), parts[1].unflatten(0, (count, -1))

    def _product(self, x: Tensor, name: str, ends: Tensor, experts: Tensor) -> Tensor:
        base = self.base_layer
        weight = getattr(base, name)
        y = ops.segment_matmul(x, weight if _is_transposed(base) else weight.mT, ends)
        return y + getattr(base, f"{name}_bias")[experts] if getattr(base, "has_bias", False) else y

    def merged_base(self, delta: Tensor) -> nn.Module:
        base: Any = self.base_layer
        names = up_name(base), DOWN
        (count, inputs), (_, inner) = (_sizes(base, name) for name in names)
        parts = delta.split([count * size // delta.shape[-1] for size in (inputs, inner)])
        merged = {}
        for name, part in zip(names, parts, strict=True):
            weight, by_expert = getattr(base, name).detach(), part.unflatten(0, (count, -1)).mT
            out = torch.empty_like(weight)
            for expert in range(count):
                if _is_transposed(base):
                    out[expert] = rotated(weight[expert].mT, by_expert[expert]).mT
                else:
                    out[expert] = rotated(weight[expert], by_expert[expert])
            merged[name] = out
        return with_weights(base, merged)


def _is_stacked(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and len(full_shape(weight)) == 3 and weight.dtype in _DTYPES


def _is_transposed(base: Any) -> bool:
    return getattr(base, "is_transposed", False)


def _sizes(base: Any, name: str) -> tuple[int, int]:
    """The number of experts, and of the features that a weight multiplies."""
    shape = full_shape(getattr(base, name))
    return shape[0], shape[1] if _is_transposed(base) else shape[2]
