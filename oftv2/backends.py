"""The quantization libraries whose layers are recognised: how their weights are read, and quantized again.

A layer is recognised by its class or by that of its weight, never by importing a library: none of them is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _bitsandbytes as bnb
from .merging import with_weights


@dataclass(frozen=True)
class Backend:
    """How layers of one quantization library are recognised, and their weights read and written.

    Attributes:
        name: for messages.
        matches: whether a module is such a layer.
        dequantize: its weight as a float32 matrix ``(n, d)``; None where the library keeps it in a layout of its own.
        requantize: a layer like the given one that holds another weight, quantized in the same way; None where that
            takes calibration data.
        prepare: makes a layer ready to be trained through, when it is wrapped; returns the attributes that it changed,
            with the values that they get back when the adapter is taken off.
        blocks_gradient: why no gradient gets through the layer, or None.
        recompute: whether its own product would keep the dequantized weight, or the input, until the backward pass: a
            layer in training then dequantizes once more instead.
        probed: whether a layer is also tried out before it is trained through; not where that would change it.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    dequantize: Callable[[nn.Module], Tensor] | None = None
    requantize: Callable[[nn.Module, Tensor], nn.Module] | None = None
    prepare: Callable[[nn.Module], dict[str, Any]] = lambda module: {}
    blocks_gradient: Callable[[nn.Module], str | None] = lambda module: None
    recompute: bool = False
    probed: bool = True


def find_backend(module: nn.Module) -> Backend | None:
    """The backend that quantized ``module``, or None."""
    return next((backend for backend in BACKENDS if backend.matches(module)), None)


def _is_class(package: str, *names: str) -> Callable[[nn.Module], bool]:
    """Whether a module's class, or one that it derives from, has one of these names in a package."""

    def matches(module: nn.Module) -> bool:
        return any(cls.__name__ in names and _within(cls, package) for cls in type(module).__mro__)

    return matches


def _holds(package: str, *names: str) -> Callable[[nn.Module], bool]:
    """Whether a module is ``nn.Linear`` with a weight of one of these tensor classes of a package, or of any."""

    def matches(module: nn.Module) -> bool:
        kind = type(getattr(module, "weight", None))
        return isinstance(module, nn.Linear) and _within(kind, package) and (not names or kind.__name__ in names)

    return matches


def _within(cls: type, package: str) -> bool:
    return cls.__module__ == package or cls.__module__.startswith(package + ".")


def _plain(module: Any, weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """``nn.Linear`` with a weight and the bias of a quantized layer, for libraries that quantize such layers."""
    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta", dtype=dtype)
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return plain


# ---------------------------------------------------------------------------------------------- torchao


def _dequantize_torchao(module: Any) -> Tensor:
    return module.weight.detach().dequantize().float()


def _dequantize_torchao_nf4(module: Any) -> Tensor:
    return module.weight.detach().get_original_weight().float()


def _requantize_torchao(module: Any, weight: Tensor) -> nn.Module:
    from torchao.quantization import MappingType, PerBlock

    old = module.weight
    weight, kind, block = weight.to(old.dtype), type(old), tuple(old.block_size)
    shifted = getattr(old, "zero_point", None) is not None and bool(old.zero_point.any())
    mapping = MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC
    if kind.__name__ == "Int8Tensor":
        new = kind.from_hp(weight, PerBlock(block), mapping, reduce_range=old.reduce_range)
    elif kind.__name__ == "Float8Tensor":
        new = kind.from_hp(
            weight, old.qdata.dtype, PerBlock(block), old.mm_config, kernel_preference=old.kernel_preference
        )
    else:
        new = kind.from_hp(weight, block, old.target_dtype, mapping_type=mapping)
        new.scale = new.scale.to(old.scale.dtype)
    return with_weights(module, {"weight": new})


def _torchao_activations(module: Any) -> str | None:
    names = ("act_quant_kwargs", "act_quant_scale", "activation_quantization", "input_quant_func")
    quantizes = any(getattr(module.weight, name, None) is not None for name in names)
    return "torchao rounds its activations (dynamic quantization), without a gradient" if quantizes else None


# ---------------------------------------------------------------------------------------------- optimum-quanto


def _dequantize_quanto(module: Any) -> Tensor:
    with torch.no_grad():
        weight = module.weight if module.qweight is None else module.qweight.dequantize()
    return weight.detach().float()


def _requantize_quanto(module: Any, weight: Tensor) -> nn.Module:
    new = type(module).from_module(
        _plain(module, weight, module.weight.dtype), module.weight_qtype, module.activation_qtype, module.optimizer
    )
    new.input_scale, new.output_scale = module.input_scale, module.output_scale
    new.freeze()
    return new.requires_grad_(False)


# ---------------------------------------------------------------------------------------------- HQQ


def _dequantize_hqq(module: Any) -> Tensor:
    return module.dequantize().detach().float()


def _requantize_hqq(module: Any, weight: Tensor) -> nn.Module:
    settings = {**copy.deepcopy(module.quant_config), "offload_meta": module.offload_meta}  # which HQQ takes out
    return type(module)(
        _plain(module, weight, module.compute_dtype),
        settings,
        compute_dtype=module.compute_dtype,
        device=module.device,
    )


def _prepare_hqq(module: Any) -> dict[str, Any]:
    """HQQ clones the bias with its history, which would carry gradients and cannot be copied."""
    if module.bias is not None:
        module.bias = module.bias.detach()
    return {}


# ---------------------------------------------------------------------------------------------- GPTQ, AWQ, AQLM


def _dequantize_gptq(module: Any) -> Tensor:
    return module.dequantize_weight(num_itr=module.g_idx.shape[0] // module.in_features).detach().T.float()


def _dequantize_awq(module: Any) -> Tensor:
    """4-bit codes, eight to an int32 in the order 0 2 4 6 1 3 5 7, with a scale and a zero for each group of inputs."""
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], device=module.qweight.device) * 4
    codes, zeros = ((packed[:, :, None] >> order & 15).flatten(1).float() for packed in (module.qweight, module.qzeros))
    group = module.in_features // zeros.shape[0]
    return ((codes - zeros.repeat_interleave(group, 0)) * module.scales.float().repeat_interleave(group, 0)).T


def _dequantize_aqlm(module: Any) -> Tensor:
    """Sums of one vector ``(out_group, in_group)`` from each codebook, with a scale for each group of outputs."""
    codes = module.codes.detach().long() % module.codebook_size  # stored as signed
    if module.gemv_op is not None and not module.codes.is_cuda and module.codebook_size == 256:
        codes = codes.transpose(0, 1)  # AQLM's first call on a CPU reorders them
    books = module.codebooks.detach().float()
    groups = sum(book[codes[..., i]] for i, book in enumerate(books))  # (n/out_group, d/in_group, out_group, in_group)
    return (groups * module.scales.detach().float()).transpose(1, 2).reshape(module.out_features, module.in_features)


# ---------------------------------------------------------------------------------------------- compressed-tensors, FP8


def _is_compressed_tensors(module: nn.Module) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return _within(type(scheme), "compressed_tensors") and getattr(scheme, "weights", None) is not None


def _dequantize_compressed_tensors(module: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    scheme = module.quantization_scheme
    if module.quantization_status == QuantizationStatus.COMPRESSED:
        tensors = {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}
        compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
        return compressor.decompress(tensors, scheme)["weight"].float()
    return forward_quantize(module, module.weight.detach(), "weight", scheme.weights).float()


def _compressed_tensors_activations(module: Any) -> str | None:
    scheme = module.quantization_scheme
    if scheme.input_activations is None and scheme.output_activations is None:
        return None
    return "compressed-tensors rounds its activations, without a gradient; load it with dequantize=True"


def _dequantize_fp8(module: Any) -> Tensor:
    weight, scale = module.weight.detach().float(), module.weight_scale_inv.detach().float()
    if module.block_size is not None:
        scale = scale.repeat_interleave(module.block_size[0], 0).repeat_interleave(module.block_size[1], 1)
        scale = scale[: weight.shape[0], : weight.shape[1]]
    return weight * scale


def _dequantize_fp8_rows(module: Any) -> Tensor:
    return module.weight.detach().float() * module.weight_scale.detach().float().view(-1, 1)


def _is_narrow_linear(module: nn.Module) -> bool:
    """``nn.Linear`` whose weight is no ordinary matrix of 16 bit or more, by whatever library."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, Tensor) and weight.dtype.itemsize == 1


BACKENDS = (
    Backend(
        "bitsandbytes 4-bit",
        _is_class("bitsandbytes", "Linear4bit"),
        bnb.dequantize_4bit,
        bnb.requantize_4bit,
        bnb.prepare_4bit,
        probed=False,
    ),
    Backend(
        "bitsandbytes LLM.int8",
        _is_class("bitsandbytes", "Linear8bitLt"),
        bnb.dequantize_int8,
        bnb.requantize_int8,
        probed=False,
    ),
    Backend(
        "torchao int8, float8 and intx",
        _holds("torchao", "Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"),
        _dequantize_torchao,
        _requantize_torchao,
        blocks_gradient=_torchao_activations,
        recompute=True,
    ),
    Backend("torchao NF4", _holds("torchao", "NF4Tensor"), _dequantize_torchao_nf4),
    Backend("another tensor of torchao", _holds("torchao"), blocks_gradient=_torchao_activations),
    Backend(
        "optimum-quanto", _is_class("optimum.quanto", "QLinear"), _dequantize_quanto, _requantize_quanto, recompute=True
    ),
    Backend("HQQ", _is_class("hqq", "HQQLinear"), _dequantize_hqq, _requantize_hqq, _prepare_hqq, recompute=True),
    Backend("GPTQModel", _is_class("gptqmodel", "TorchLinear"), _dequantize_gptq, recompute=True),
    Backend(
        "AWQ in GPTQModel", _is_class("gptqmodel", "AwqTorchLinear", "AwqGEMMLinear"), _dequantize_awq, recompute=True
    ),
    Backend("AWQ", _is_class("awq", "WQLinear_GEMM"), _dequantize_awq),
    Backend("AQLM", _is_class("aqlm", "QuantizedLinear"), _dequantize_aqlm),
    Backend(
        "compressed-tensors",
        _is_compressed_tensors,
        _dequantize_compressed_tensors,
        blocks_gradient=_compressed_tensors_activations,
    ),
    Backend(
        "compressed-tensors FP8 in transformers",
        _is_class("transformers", "CompressedTensorsFP8Linear"),
        _dequantize_fp8_rows,
        blocks_gradient=lambda module: "its FP8 kernel is for inference alone; load it with dequantize=True",
    ),
    Backend("fine-grained FP8 in transformers", _is_class("transformers", "FP8Linear"), _dequantize_fp8),
    Backend("another kernel of GPTQModel", _is_class("gptqmodel", "BaseQuantLinear")),
    Backend("another kernel of AWQ", lambda module: _within(type(module), "awq") and hasattr(module, "qweight")),
    Backend("an unknown library", _is_narrow_linear),
)
