"""The adapter on a quantized linear layer (QOFT), and the table of quantization backends it can be merged into."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from ._quant_ops import Weight4bit
from .base import rotated
from .config import OFTConfig
from .cost_model import FUSED, INPUT, WEIGHT, Problem
from .errors import AdapterError
from .layers import OFTLinear


@dataclass(frozen=True)
class Backend:
    """How layers of one quantization library are recognised, and their weights read and written.

    Attributes:
        name: for messages.
        matches: whether a module is such a layer.
        dequantize: its weight as a float32 matrix ``(n, d)``.
        requantize: a layer like the given one that holds another weight, quantized in the same way.
        prepare: makes a layer ready to be trained through, when it is wrapped; returns the attributes that it changed,
            with the values that they get back when the adapter is taken off.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    dequantize: Callable[[nn.Module], Tensor]
    requantize: Callable[[nn.Module, Tensor], nn.Module]
    prepare: Callable[[nn.Module], dict[str, Any]] = lambda module: {}


def find_backend(module: nn.Module) -> Backend | None:
    """The backend that quantized ``module``, or None."""
    return next((backend for backend in BACKENDS if backend.matches(module)), None)


class QuantOFTLinear(OFTLinear):
    """A frozen quantized linear layer behind a trainable rotation: ``y = base_layer(x R)`` (QOFT).

    The base layer is only ever called, so any quantization works through which gradients flow. On CUDA devices,
    bitsandbytes' 4-bit weights can also be rotated while they are dequantized, for each call alone, where that is
    cheaper: see :func:`oftv2.explain`.

    Args:
        base_layer (nn.Module): a quantized linear layer with ``in_features``, such as bitsandbytes' ``Linear4bit``
            or ``Linear8bitLt``.
        config, **kwargs: see :class:`oftv2.OFTLinear`.

    Raises:
        AdapterError: the block size does not divide ``in_features``.
        RuntimeError: in a forward pass, when the base layer lets no gradient through.
    """

    def __init__(self, base_layer: nn.Module, config: OFTConfig | None = None, **kwargs: Any) -> None:
        super().__init__(base_layer, config, **kwargs)
        backend = find_backend(base_layer)
        self._prepared = {} if backend is None else backend.prepare(base_layer)
        self.requantization_error: float | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() in (2, 3):  # LLM.int8 takes no others
            return super().forward(x, *args, **kwargs)
        y = super().forward(x.reshape(-1, x.shape[-1]), *args, **kwargs)
        return y.view(*x.shape[:-1], y.shape[-1])

    def forms(self, dtype: torch.dtype, *, gradient: bool) -> tuple[str, ...]:
        base, bias = self.base_layer, self.base_layer.bias
        trains = gradient and bias is not None and bias.requires_grad
        multiplies = type(base).__module__.startswith("bitsandbytes") and self.unhooked() and not trains
        if not (multiplies and hasattr(base.weight, "quant_state") and F.runs_kernels(base.weight.device)):
            return (INPUT,)
        if base.compute_dtype not in (None, dtype) or torch.is_autocast_enabled(base.weight.device.type):
            return (INPUT,)
        return (INPUT, WEIGHT) if gradient else (INPUT, FUSED)

    def problem(self, tokens: int, dtype: torch.dtype, *, gradient: bool) -> Problem:
        return super().problem(tokens, dtype, gradient=gradient)._replace(quantized=True)

    def call_in_form(self, form: str, x: Tensor) -> Tensor:
        operator = torch.ops.oftv2.weight_form_4bit if form == WEIGHT else torch.ops.oftv2.rotate_matmul_4bit
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return operator(x, self.delta(x.dtype), bias, *_weight_4bit(self.base_layer))

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

    def backend(self) -> Backend:
        """The backend of the base layer; AdapterError where its weight cannot be read."""
        backend = find_backend(self.base_layer)
        if backend is None:
            known = ", ".join(backend.name for backend in BACKENDS)
            raise AdapterError(
                f"{self.name}: no way is known to read the weight of a {type(self.base_layer).__name__}; known: {known}"
            )
        return backend

    def _dequantized(self, delta: Tensor, dtype: torch.dtype) -> nn.Linear:
        base = self.base_layer
        weight = rotated(self.backend().dequantize(base), delta.mT).to(dtype)
        plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta", dtype=dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if base.bias is not None:
            plain.bias = nn.Parameter(base.bias.detach().to(dtype), requires_grad=base.bias.requires_grad)
        return plain.train(base.training)

    def _requantized(self, delta: Tensor) -> nn.Module:
        backend = self.backend()
        weight = rotated(backend.dequantize(self.base_layer), delta.mT)
        merged = backend.requantize(self.base_layer, weight)
        error = torch.linalg.norm(backend.dequantize(merged) - weight) / torch.linalg.norm(weight)
        self.requantization_error = error.item()
        return merged.train(self.base_layer.training)


# ---------------------------------------------------------------------------------------------- bitsandbytes


def _is_bitsandbytes(class_name: str) -> Callable[[nn.Module], bool]:
    def matches(module: nn.Module) -> bool:
        classes = type(module).__mro__
        return any(cls.__name__ == class_name and cls.__module__.startswith("bitsandbytes") for cls in classes)

    return matches


def _dequantize_4bit(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(module.weight.quant_state)
    state.dtype = torch.float32
    return dequantize_4bit(module.weight.data, state)


def _weight_4bit(module: Any) -> Weight4bit:
    """The 4-bit weight of a layer as operators take it."""
    state = module.weight.quant_state
    nested = [state.state2.code, state.state2.absmax, state.offset] if state.nested else []
    blocksize2 = state.state2.blocksize if state.nested else 0
    shape = list(state.shape)
    return Weight4bit(module.weight.data, state.absmax, state.code, nested, shape, state.blocksize, blocksize2)


def _requantize_4bit(module: Any, weight: Tensor) -> nn.Module:
    from bitsandbytes.nn import Params4bit

    old = module.weight
    clone: Any = copy.copy(module)
    clone._parameters = dict(module._parameters)
    weight_4bit: Any = Params4bit(
        weight.to(old.quant_state.dtype).cpu(),
        quant_type=old.quant_type,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_storage=old.quant_storage,
        module=clone,
    )
    clone.weight = weight_4bit.to(old.device)
    clone.quant_state = clone.weight.quant_state
    return clone


def _prepare_4bit(module: Any) -> dict[str, Any]:
    """Keeps bitsandbytes from repacking the weight for a CPU's bf16 instructions in the first evaluation.

    That rounds the scales to bf16 for good, and the repacked layer lets no gradient through.
    """
    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        _unpack_4bit(module)
        warnings.warn(
            "an evaluation before wrapping made bitsandbytes repack 4-bit weights for the CPU, which rounded their "
            "scales to bf16. They were unpacked so that they can be trained through; to keep the exact scales, call "
            "wrap_model before the first evaluation (a fresh adapter changes nothing)",
            stacklevel=2,
        )
    changed = {"support_avx512bf16_for_cpu": getattr(module, "support_avx512bf16_for_cpu", False)}
    module.support_avx512bf16_for_cpu = False
    return changed


def _unpack_4bit(module: Any) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    packed = module.weight
    packed.data, packed.quant_state = _convert_weight_packed_for_cpu_inverse(packed.data, packed.quant_state)
    if not packed.quant_state.nested:  # bitsandbytes 0.50 leaves these scales as packed: (d/blocksize, n), in bf16
        packed.quant_state.absmax = packed.quant_state.absmax.T.reshape(-1).float()


def _int8_scales(module: Any) -> Tensor:
    return module.state.SCB if module.state.SCB is not None else module.weight.SCB


def _dequantize_int8(module: Any) -> Tensor:
    if module.state.has_fp16_weights:
        return module.weight.detach().float()
    return module.weight.data.float() * (_int8_scales(module).float()[:, None] / 127)


def _requantize_int8(module: Any, weight: Tensor) -> nn.Module:
    from bitsandbytes import MatmulLtState
    from bitsandbytes.nn import Int8Params

    clone: Any = copy.copy(module)
    clone._parameters = dict(module._parameters)
    clone.state = MatmulLtState()
    clone.state.threshold = module.state.threshold
    clone.state.has_fp16_weights = module.state.has_fp16_weights
    clone.state.use_pool = module.state.use_pool
    weight_8bit: Any = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=module.state.has_fp16_weights)
    clone.weight = weight_8bit.to(module.weight.device)
    return clone


BACKENDS = (
    Backend("bitsandbytes 4-bit", _is_bitsandbytes("Linear4bit"), _dequantize_4bit, _requantize_4bit, _prepare_4bit),
    Backend("bitsandbytes LLM.int8", _is_bitsandbytes("Linear8bitLt"), _dequantize_int8, _requantize_int8),
)
