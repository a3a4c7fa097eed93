"""``explain``: which form an adapted layer would take for so many tokens, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cost_model import Machine, Problem, cheapest, costs, machine
from .errors import AdapterError
from .functional import runs_kernels
from .layers import OFTLinear

DESCRIPTIONS = {
    "input": "rotates the input, then calls the base layer",
    "weight": "rotates the weight for this call, then multiplies once",
    "fused": "rotates the input on its way into the product",
}


@dataclass(frozen=True)
class Explanation:
    """What a call of an adapted layer would do.

    Attributes:
        layer (str): its path in the model.
        problem (Problem): the sizes.
        machine (Machine): the numbers that the estimate is made from.
        form (str): what would run.
        forced (bool): whether ``layer.form`` decided that.
        costs (dict[str, float]): estimated seconds beyond the frozen layer, of each form that is possible.
        impossible (dict[str, str]): why the other forms are not.
    """

    layer: str
    problem: Problem
    machine: Machine
    form: str
    forced: bool
    costs: dict[str, float]
    impossible: dict[str, str]

    def __str__(self) -> str:
        p = self.problem
        mode = "forward and backward" if p.gradient else "forward, no gradient"
        lines = [
            f"{self.layer}: {p.tokens} tokens, {p.inputs} → {p.outputs}, b = {p.block_size}, {mode}",
            f"  form {self.form!r}{' (forced by layer.form)' if self.forced else ''}: {DESCRIPTIONS[self.form]}",
        ]
        for form, seconds in sorted(self.costs.items(), key=lambda item: item[1]):
            lines.append(f"  {form:>6}: about {1e6 * seconds:,.1f} µs beyond the frozen layer")
        lines += [f"  {form:>6}: not possible: {why}" for form, why in self.impossible.items()]
        return "\n".join([*lines, f"  estimated for {self.machine.name} ({self.machine.source})"])


def explain(
    layer: OFTLinear, tokens: int, *, gradient: bool | None = None, dtype: torch.dtype | None = None
) -> Explanation:
    """Tells which form of an adapted linear layer would run, and what each is estimated to cost.

    Args:
        layer (OFTLinear): a layer, such as ``model.get_submodule("model.layers.0.mlp.down_proj")`` of a wrapped model.
        tokens (int): rows of the input, all leading dimensions together.
        gradient (bool | None): whether a backward pass follows; as ``layer.training`` where ``None``.
        dtype (torch.dtype | None): of the activations; that of the weight where ``None``, bfloat16 for a quantized one.

    Returns:
        Explanation: to print, or to look into.

    Raises:
        AdapterError: not an adapted linear layer, one without an active adapter, or a number of tokens below 0.
    """
    if not isinstance(layer, OFTLinear):
        raise AdapterError(
            f"explain takes an adapted linear layer (OFTLinear, QuantOFTLinear), not a {type(layer).__name__}"
        )
    if not isinstance(tokens, int) or tokens < 0:
        raise AdapterError(f"explain: tokens={tokens!r} is not allowed: use a whole number from 0 up")
    if not layer.sequence:
        raise AdapterError(f"{layer.name}: no adapter is active on this layer: it is its base layer alone")
    gradient = layer.training if gradient is None else gradient
    weight = _weight(layer)
    ordinary = weight is not None and weight.is_floating_point() and weight.dtype.itemsize > 1
    dtype = dtype or (weight.dtype if weight is not None and ordinary else torch.bfloat16)
    possible = layer.forms(dtype, gradient=gradient)
    problem = layer.problem(tokens, dtype, gradient=gradient)
    on = machine(_device(layer))
    form = layer.form or cheapest(problem, possible, on)
    if form not in possible:
        raise AdapterError(f"{layer.name}: form={form!r} is not possible here; possible: {', '.join(possible)}")
    return Explanation(
        layer=layer.name,
        problem=problem,
        machine=on,
        form=form,
        forced=layer.form is not None,
        costs=costs(problem, possible, on),
        impossible={other: _reason(layer, other, gradient) for other in DESCRIPTIONS if other not in possible},
    )


def _reason(layer: OFTLinear, form: str, gradient: bool) -> str:
    """Why a form is not possible, in the order in which it is found out."""
    if form == "fused" and gradient:
        return "it has no backward pass"
    if form == "fused" and not runs_kernels(_device(layer)):
        return f"it is a kernel for CUDA devices, and none runs on {_device(layer)}"
    weight = _weight(layer)
    return (
        "it wants a frozen, ordinary weight in the activations' dtype, without hooks or autocast (on a CPU, not in 16 "
        f"bit); here, {type(layer.base_layer).__name__} with {'no ordinary weight' if weight is None else weight.dtype}"
    )


def _device(layer: OFTLinear) -> torch.device:
    return layer.generators_of(layer.sequence)[0].device


def _weight(layer: OFTLinear) -> torch.Tensor | None:
    """The base layer's weight; None where a quantization library keeps it in tensors of other names."""
    weight = getattr(layer.base_layer, "weight", None)
    return weight if isinstance(weight, torch.Tensor) else None
