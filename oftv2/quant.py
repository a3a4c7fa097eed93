"""The adapter on a quantized linear layer (QOFT)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from ._bitsandbytes import weight_4bit
from ._operator import ops, writable
from .backends import BACKENDS, find_backend
from .config import OFTConfig
from .cost_model import FUSED, INPUT, WEIGHT
from .errors import AdapterError
from .layers import OFTLinear
from .merging import rotated


class QuantOFTLinear(OFTLinear):
    """A frozen quantized linear layer behind a trainable rotation: ``y = base_layer(x R)`` (QOFT).

    The base layer is only ever called, so any quantization works through which gradients flow. On CUDA devices,
    bitsandbytes' 4-bit weights can also be rotated while they are dequantized, for each call alone, where that is
    cheaper: see :func:`oftv2.explain`. :mod:`oftv2.backends` lists the libraries whose weights can be merged into.

    Args:
        base_layer (nn.Module): a quantized linear layer with ``in_features``, of any library.
        config, **kwargs: see :class:`oftv2.OFTLinear`.

    Raises:
        AdapterError: the block size does not divide ``in_features``.
        RuntimeError: in a forward pass, when the base layer lets no gradient through.
    """

    dequantizes = True

    def __init__(self, base_layer: nn.Module, config: OFTConfig | None = None, **kwargs: Any) -> None:
        super().__init__(base_layer, config, **kwargs)
        backend = find_backend(base_layer)
        self._prepared = {} if backend is None else backend.prepare(base_layer)
        self._recompute = backend is not None and backend.recompute and not backend.blocks_gradient(base_layer)
        self.requantization_error: float | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "quantization_scheme":  # compressed-tensors would decompress this layer beside its base layer
            raise AttributeError(name)
        return super().__getattr__(name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() in (2, 3):  # LLM.int8 takes no others
            return super().forward(x, *args, **kwargs)
        flat = x.flatten(1, -2) if x.dim() > 3 else x.reshape(-1, x.shape[-1])  # rows stay rows
        y = super().forward(flat, *args, **kwargs)
        return y.view(*x.shape[:-1], y.shape[-1])

    def call_base(self, rotated_x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias_trains = self.bias is not None and self.bias.requires_grad
        trains = self._recompute and torch.is_grad_enabled() and rotated_x.requires_grad and not bias_trains
        if not trains or args or kwargs or torch.compiler.is_compiling() or not self.unhooked():
            return super().call_base(rotated_x, *args, **kwargs)
        return _Product.apply(rotated_x, self.base_layer)

    def forms(self, dtype: torch.dtype, *, gradient: bool) -> tuple[str, ...]:
        base, bias = self.base_layer, self.bias
        trains = gradient and bias is not None and bias.requires_grad
        multiplies = type(base).__module__.startswith("bitsandbytes") and self.unhooked() and not trains
        if not (multiplies and hasattr(base.weight, "quant_state") and F.runs_kernels(base.weight.device)):
            return (INPUT,)
        if base.compute_dtype not in (None, dtype) or torch.is_autocast_enabled(base.weight.device.type):
            return (INPUT,)
        return (INPUT, WEIGHT) if gradient else (INPUT, FUSED)

    def call_in_form(self, form: str, x: Tensor) -> Tensor:
        bias, weight = None if self.bias is None else self.bias.to(x.dtype), weight_4bit(self.base_layer)
        if form == WEIGHT and (packed := self.changing_generators()) is not None:
            rotation = self.rotation
            settings = rotation.block_size, rotation.terms
            return ops.neumann_weight_form_4bit(x, packed, bias, *weight, *settings)
        operator = ops.weight_form_4bit if form == WEIGHT else ops.rotate_matmul_4bit
        return operator(x, self.delta(x.dtype), bias, *weight)

    def merged_base(self, delta: Tensor) -> nn.Module:
        return self._dequantized(delta, torch.float32)

    @torch.no_grad()
    def merge(
        self, *, keep_original: bool = True, dtype: torch.dtype = torch.float32, requantize: bool = False
    ) -> None:
        """Replaces the quantized layer by one that includes the rotation; the original one is always kept.

        Args:
            keep_original (bool): must be True: :meth:`unmerge` restores the quantized weight bit for bit.
            dtype (torch.dtype): of the dequantized ``nn.Linear`` that takes its place.
            requantize (bool): quantize the merged weight again. What this costs, the relative error
                ``‖W″ − W′‖_F / ‖W′‖_F``, is left in ``requantization_error``.

        Raises:
            AdapterError: already merged, generators that are not finite, or no way to read the quantized weight.
        """
        if not keep_original:
            raise AdapterError(
                f"{self.name}: a quantized weight cannot be recovered from a merged one: keep_original=True"
            )
        build = self._requantized if requantize else lambda delta: self._dequantized(delta, dtype)
        self._merge(build, keep_original)

    def unmerge(self) -> None:
        super().unmerge()
        self.requantization_error = None

    def release_base(self) -> nn.Module:
        for name, value in self._prepared.items():
            if hasattr(self.base_layer, name):
                setattr(self.base_layer, name, value)
        return super().release_base()

    def check_merge(self, *, requantize: bool = False) -> None:
        """Raises AdapterError where the weight cannot be read, or not be quantized again."""
        self._dequantize()
        if requantize:  # into a copy of the layer
            self.check_weight()
            self._requantize()

    def _dequantize(self) -> Callable[[nn.Module], Tensor]:
        backend = find_backend(self.base_layer)
        if backend is None or backend.dequantize is None:
            known = ", ".join(backend.name for backend in BACKENDS if backend.dequantize is not None)
            raise AdapterError(
                f"{self.name}: no way is known to read the weight of a {type(self.base_layer).__name__}; known: {known}"
            )
        return backend.dequantize

    def _requantize(self) -> Callable[[nn.Module, Tensor], nn.Module]:
        backend = find_backend(self.base_layer)
        if backend is None or backend.requantize is None:
            library = "its library" if backend is None else backend.name
            raise AdapterError(
                f"{self.name}: {library} cannot quantize a merged weight again without calibration data: merge with "
                "requantize=False, then quantize the merged model with the library's own tools"
            )
        return backend.requantize

    def _dequantized(self, delta: Tensor, dtype: torch.dtype) -> nn.Linear:
        base, bias = self.base_layer, self.bias
        weight = rotated(self._dequantize()(base), delta.mT).to(dtype)
        plain = nn.Linear(base.in_features, base.out_features, bias=bias is not None, device="meta", dtype=dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
        return plain.train(base.training)

    def _requantized(self, delta: Tensor) -> nn.Module:
        dequantize = self._dequantize()
        weight = rotated(dequantize(self.base_layer), delta.mT)
        merged = self._requantize()(self.base_layer, weight)
        error = torch.linalg.norm(dequantize(merged) - weight) / torch.linalg.norm(weight)
        self.requantization_error = error.item()
        return merged.train(self.base_layer.training)


class _Product(torch.autograd.Function):
    """A frozen quantized layer's output; nothing is kept for the backward pass, which dequantizes the weight anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base_layer: nn.Module) -> Tensor:
        ctx.base_layer, ctx.dtype = base_layer, x.dtype
        return writable(base_layer(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        backend = find_backend(ctx.base_layer)
        assert backend is not None
        assert backend.dequantize is not None
        weight = backend.dequantize(ctx.base_layer).to(grad.dtype)
        return (grad @ weight).to(ctx.dtype), None
