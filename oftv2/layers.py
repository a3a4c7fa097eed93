"""Adapters on linear layers (``nn.Linear`` and transformers' ``Conv1D``) and on embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional as F
from ._ops import rotate_few
from .base import OFTLayer
from .cost_model import INPUT, WEIGHT, Problem, cheapest, machine
from .merging import rotated
from .partitioned import full_shape

_GENERATED = 16  # tokens of a pass that generates: one for each row


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D`` (GPT-2), a linear layer that keeps its weight as ``(d, n)``."""
    if type(module) is nn.Linear:
        return False
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers") for cls in type(module).__mro__)


def unhooked(module: nn.Module, *, but: type | None = None) -> bool:
    """Whether calling ``module`` runs its class's forward alone, hooks of the class ``but`` aside."""
    after: Any = module._forward_hooks
    if but is not None:
        after = [hook for hook in after.values() if not isinstance(hook, but)]
    hooks = (after, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not (any(hooks) or _has_any_global_hook() or "forward" in module.__dict__)


class OFTLinear(OFTLayer):
    r"""A frozen linear layer behind a trainable rotation: ``y = (x R) Wᵀ + bias`` (OFTv2, arXiv 2506.19847).

    Args:
        base_layer (nn.Module): ``nn.Linear`` with a weight of ``(n, d)``, or transformers' ``Conv1D`` with ``(d, n)``.
        config (OFTConfig | None): block size, Neumann terms, dropout and so on; its targets are not looked at.
        adapter_name, name, block_size: see :class:`oftv2.base.OFTLayer`.

    Raises:
        AdapterError: the block size does not divide ``d``.
        RuntimeError: in a forward pass, when the base layer lets no gradient through.

    Shape:
        input ``(..., d)`` of any number of dimensions, output ``(..., n)``; dtypes as the base layer takes them.

    Attributes:
        form (str | None): forces a form of the layer: ``"input"`` rotates the input, ``"weight"`` the weight (for the
            call alone), ``"fused"`` the input on its way into the product (no gradient). ``None``, the default, takes
            the cheapest for each call; :func:`oftv2.explain` tells which and why.
    """

    form: str | None = None
    dequantizes = False  # the weight, in every pass

    @staticmethod
    def rotated_features(base_layer: Any) -> tuple[int, int]:
        return (full_shape(base_layer.weight)[0] if is_conv1d(base_layer) else base_layer.in_features), 1

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.rotating:
            rows = self.current_rows
            if rows is None:
                return self.base_layer(x, *args, **kwargs)
            return self.call_base(rows.rotate(self, x), *args, **kwargs)
        if not (args or kwargs) and (delta := self._kept_for_few(x)) is not None:
            return self.base_layer(rotate_few(x, delta))
        form = INPUT if args or kwargs else self.choose_form(x)
        if form != INPUT:
            return self.call_in_form(form, x)
        return self.call_base(self.rotate(x), *args, **kwargs)

    def _kept_for_few(self, x: Tensor) -> Tensor | None:
        """Δ where it is kept and a few tokens generate on a CPU: asking for all that a call may be takes longer there
        than rotating (one token, 1024 → 1024, caches cold: 0.23 ms over the frozen layer, and 0.16 in this way)."""
        if torch.compiler.is_compiling():  # before anything that a compiled graph would watch
            return None
        kept, d = self._cache, x.shape[-1]
        if kept is None or self.training or self.form is not None or not x.is_cpu or x.numel() > _GENERATED * d:
            return None
        delta = kept.delta
        if x.dtype != delta.dtype or d != delta.shape[0] * delta.shape[1] or F.runs_kernels(x.device):
            return None
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        return delta if kept.is_of(self.generators_of(self.sequence)) else None

    def call_in_form(self, form: str, x: Tensor) -> Tensor:
        """The layer's output in one of the forms that do not call the base layer."""
        if form == WEIGHT and (packed := self.changing_generators()) is not None:
            rotation = self.rotation
            settings = rotation.block_size, rotation.terms
            return F.neumann_weight_form(x, packed, self.base_layer.weight, self.bias, *settings)
        return F.oft_linear(x, self.delta(x.dtype), self.base_layer.weight, self.bias, form=form)

    def call_base(self, rotated_x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output; RuntimeError where it lets no gradient through."""
        y = self.base_layer(rotated_x, *args, **kwargs)
        if rotated_x.requires_grad and not y.requires_grad:
            raise RuntimeError(
                f"{self.name}: the base layer ({type(self.base_layer).__name__}) returns an output without a gradient, "
                "so nothing in front of it would train. Choose a quantization that can be trained through, such as "
                "bitsandbytes NF4, or leave this layer out with exclude_modules"
            )
        return y

    def forms(self, dtype: torch.dtype, *, gradient: bool) -> tuple[str, ...]:
        """The forms that a call with activations of ``dtype`` can take."""
        base = self.base_layer
        weight = base._parameters.get("weight")  # spares the search for it, in every forward pass
        if type(base) is not nn.Linear or type(weight) is not nn.Parameter or not unhooked(base):
            return (INPUT,)  # calling it may do more than multiply by an ordinary weight
        return F.forms(dtype, weight, base.bias, gradient=gradient)

    def problem(self, tokens: int, dtype: torch.dtype, *, gradient: bool) -> Problem:
        """The sizes of a call, for the cost model."""
        d, n = self.rotated_features(self.base_layer)[0], self.out_features
        return Problem(tokens, d, n, self.block_size, dtype.itemsize, gradient, self.dequantizes)

    def choose_form(self, x: Tensor) -> str:
        """The form of this call: the forced one, or the cheapest."""
        if self.form is None and torch.compiler.is_compiling():
            return INPUT  # another would be frozen into the graph, whatever the tokens of later calls
        gradient = torch.is_grad_enabled()
        # Up to n tokens this is it, and for few, asking costs as much as what is chosen; but kernels for no gradient,
        # or for a weight that is dequantized in any case, may beat it.
        input_first = (gradient and not self.dequantizes) or not F.runs_kernels(x.device)
        if self.form is None and input_first and x.numel() <= x.shape[-1] * self.out_features:
            return INPUT
        possible = self.forms(x.dtype, gradient=gradient)
        if self.form is not None:
            if self.form not in possible:
                raise ValueError(f"{self.name}: form={self.form!r} is not possible here; possible: {possible}")
            return self.form
        if len(possible) == 1:
            return possible[0]
        tokens = x.numel() // max(1, x.shape[-1])
        return cheapest(self.problem(tokens, x.dtype, gradient=gradient), possible, machine(x.device))

    @property
    def out_features(self) -> int:
        """``n``."""
        base = self.base_layer
        return full_shape(base.weight)[1] if is_conv1d(base) else base.out_features

    def unhooked(self) -> bool:
        """Whether calling the base layer runs its class's forward alone."""
        return unhooked(self.base_layer)

    @staticmethod
    def rotated_weight(base_layer: Any, weight: Tensor, delta: Tensor) -> Tensor:
        if is_conv1d(base_layer):
            return rotated(weight.mT, delta.mT).mT.contiguous()
        return rotated(weight, delta.mT)


class OFTEmbedding(OFTLayer):
    """A frozen embedding whose vectors are rotated: ``E[ids] · R``. A head tied to ``E`` keeps the weight as it was.

    Args:
        base_layer (nn.Embedding): with a weight of ``(num_embeddings, d)``.
        config, adapter_name, name, block_size: see :class:`OFTLinear`.

    Shape:
        input ``(...)`` of integers, output ``(..., d)``.
    """

    @staticmethod
    def rotated_features(base_layer: Any) -> tuple[int, int]:
        return base_layer.embedding_dim, 1

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        vectors = self.base_layer(ids, *args, **kwargs)
        if self.rotating:
            return self.rotate(vectors)
        rows = self.current_rows
        return vectors if rows is None else rows.rotate(self, vectors)

    @staticmethod
    def rotated_weight(base_layer: Any, weight: Tensor, delta: Tensor) -> Tensor:
        return rotated(weight, delta)
