"""How weights of bitsandbytes' layers are read and written."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ._quant_ops import Weight4bit
from .merging import cloned


def dequantize_4bit(module: Any) -> Tensor:
    """The weight ``(n, d)`` of a 4-bit layer, in float32."""
    from bitsandbytes import functional

    kept_by = module.weight if hasattr(module.weight, "quant_state") else module  # FSDP takes it from the weight
    state = copy.copy(kept_by.quant_state)
    state.dtype = torch.float32
    return functional.dequantize_4bit(module.weight.data, state)


def weight_4bit(module: Any) -> Weight4bit:
    """The 4-bit weight of a layer as operators take it."""
    state = module.weight.quant_state
    nested = [state.state2.code, state.state2.absmax, state.offset] if state.nested else []
    blocksize2 = state.state2.blocksize if state.nested else 0
    shape = list(state.shape)
    return Weight4bit(module.weight.data, state.absmax, state.code, nested, shape, state.blocksize, blocksize2)


def requantize_4bit(module: Any, weight: Tensor) -> nn.Module:
    """A copy of a 4-bit layer with another weight ``(n, d)``, quantized as the layer's own was."""
    from bitsandbytes.nn import Params4bit

    old = module.weight
    clone = cloned(module)
    packed: Any = Params4bit(
        weight.to(old.quant_state.dtype).cpu(),
        quant_type=old.quant_type,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_storage=old.quant_storage,
        module=clone,
    )
    clone.weight = packed.to(old.device)
    clone.quant_state = clone.weight.quant_state
    return clone


def prepare_4bit(module: Any) -> dict[str, Any]:
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


def dequantize_int8(module: Any) -> Tensor:
    """The weight ``(n, d)`` of an int8 layer, in float32."""
    if module.state.has_fp16_weights:
        return module.weight.detach().float()
    return module.weight.data.float() * (_int8_scales(module).float()[:, None] / 127)


def requantize_int8(module: Any, weight: Tensor) -> nn.Module:
    """A copy of an int8 layer with another weight ``(n, d)``, quantized as the layer's own was."""
    from bitsandbytes import MatmulLtState
    from bitsandbytes.nn import Int8Params

    clone = cloned(module)
    clone.state = MatmulLtState()
    clone.state.threshold = module.state.threshold
    clone.state.has_fp16_weights = module.state.has_fp16_weights
    clone.state.use_pool = module.state.use_pool
    weight_8bit: Any = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=module.state.has_fp16_weights)
    clone.weight = weight_8bit.to(module.weight.device)
    return clone
