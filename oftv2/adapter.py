"""The adapter in a model: switched off for a while, merged into the weights and out again, and counted."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .adapters import activate, check_changeable, check_sequence
from .base import OFTLayer
from .errors import AdapterError, RequantizationWarning
from .merged_before import note_merged
from .partitioned import full_shape, refuse_partitioned
from .pretrained import forget_quantization, read_from_gguf
from .quant import QuantOFTLinear, find_backend
from .sharding import check_unsharded
from .state import AdapterState, active_parameters, find_state, get_state, oft_layers
from .trained import base_values
from .wrap import uninstall

_CLAIM = threading.Lock()


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context, ``model`` answers as its base model does, its fully trained parameters included.

    It does so in every thread: requests that threads serve take turns.

    Raises:
        AdapterError: the model is not wrapped, its adapter is merged, or another thread is in such a context of it.
    """
    state = get_state(model)
    with _claimed(state):
        refuse_partitioned(
            active_parameters(model).items(),
            "the base model's values cannot take its place; compare with a model in a process without ZeRO-3",
        )
        _require_unmerged(model, "the base model's weights are not at hand while the adapter is merged")
        enabled = {layer: layer.enabled for _, layer in oft_layers(model)}
        with base_values(model):
            try:
                for layer in enabled:
                    layer.enabled = False
                yield model
            finally:
                for layer, was in enabled.items():
                    layer.enabled = was


@contextmanager
def _claimed(state: AdapterState) -> Iterator[None]:
    """Within the context, no other thread may disable the adapter: AdapterError where one does already.

    Two would find what the other changed, and the last to leave would restore the base model for good.
    """
    thread = threading.get_ident()
    with _CLAIM:
        outer = state.disabled_by
        if outer not in (None, thread):
            raise AdapterError(
                "another thread is within disable_adapter of this model: let them take turns (a threading.Lock around "
                "the context)"
            )
        state.disabled_by = thread
    try:
        yield
    finally:
        state.disabled_by = outer


def merge(
    model: nn.Module,
    adapter_names: str | Sequence[str] | None = None,
    *,
    unload: bool = True,
    keep_original: bool = False,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
) -> nn.Module:
    """Folds adapters into the weights, in place: afterwards a plain model, at the base model's speed.

    Several are multiplied in the order in which activations go through them, ``W′ = W (R_a R_b)ᵀ``: merging never
    changes what the model computes. Layers that have none of them are left as they are, quantized ones too.

    Args:
        model (nn.Module): a wrapped model, or one adapted layer.
        adapter_names (str | Sequence[str] | None): which, in their order: they become the active ones first, as by
            :func:`oftv2.set_adapter`. ``None``: those that are active.
        unload (bool): put plain layers back. With ``False`` the adapted layers stay, and :func:`unmerge` can take
            the adapter out again.
        keep_original (bool): with ``unload=False``, keep the original weights, so that :func:`unmerge` restores them
            bit for bit; without, they come back by the inverse rotation (to about 1e-7 in float32). Quantized originals
            are always kept.
        dtype (torch.dtype | None): what quantized layers become: dequantized ``nn.Linear`` of this dtype; ``None``
            takes the dtype of the model's other weights.
        requantize (bool): quantize merged weights again instead; a warning reports the error that this costs.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: not wrapped, already merged, or within ``disable_adapter``; names that :func:`oftv2.set_adapter`
            refuses, generators with NaN or Inf, a weight that cannot be read, or one that is tied in an
            encoder-decoder, whose outputs depend on its being tied. Nothing is changed then.
    """
    names, layers = _merge_ready(model, adapter_names, requantize)
    quantized = [layer for layer in layers.values() if isinstance(layer, QuantOFTLinear)]
    if requantize and not quantized:
        raise AdapterError("requantize=True, and no adapted layer of this model is quantized")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise AdapterError(f"dtype={dtype!r} is not allowed: use a floating-point dtype, such as torch.bfloat16")
    dtype = dtype or _model_dtype(model)
    tied = _tied_weights(model)
    if unload:
        _check_untying(model, [path for path, layer in layers.items() if id(_weight(layer)) in tied])
    if isinstance(model, OFTLayer):
        model.activate(names)
    else:
        activate(model, names, trainable=None)
    for layer in layers.values():
        shared = id(_weight(layer)) in tied
        if isinstance(layer, QuantOFTLinear):
            layer.merge(dtype=dtype, requantize=requantize)
        else:
            layer.merge(keep_original=keep_original or shared)
        if shared and unload and hasattr(model, "config"):
            _untie(model)
    if requantize:
        _report_requantization(layers)
    if unload and not isinstance(model, OFTLayer):
        note_merged(model, names)
        uninstall(model)
        if (quantized or read_from_gguf(model)) and not any(find_backend(module) for module in model.modules()):
            forget_quantization(model)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Takes a merged adapter out of the weights again, in place: the rotation is applied to activations as before.

    So it does where :func:`merge` ended halfway, for lack of memory or by Ctrl-C, and some layers are merged.

    Raises:
        AdapterError: not wrapped (also after ``merge(model)`` with ``unload=True``), or not merged.
    """
    if not isinstance(model, OFTLayer) and find_state(model) is None:
        raise AdapterError(
            f"this {type(model).__name__} has no adapter to unmerge; merge(model, unload=False) keeps it in the model"
        )
    merged = [layer for _, layer in oft_layers(model) if layer.merged]  # not all, where a merge was interrupted
    if not merged:
        raise AdapterError(f"this {type(model).__name__} is not merged: there is nothing to unmerge")
    for layer in merged:
        layer.unmerge()
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters train, in the words known from other adapter libraries."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / max(1, total)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """``(trainable, all)`` numbers of parameters; of 4-bit weights the numbers they stand for, not the bytes."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = full_shape(parameter).numel() if state is None else state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _require_unmerged(model: nn.Module, reason: str) -> None:
    merged = [layer.name for _, layer in oft_layers(model) if layer.merged]
    if merged:
        raise AdapterError(f"{len(merged)} layers ({merged[0]}, …) are merged: {reason}")


def _merge_ready(
    model: nn.Module, adapter_names: str | Sequence[str] | None, requantize: bool
) -> tuple[tuple[str, ...], dict[str, OFTLayer]]:
    """The adapters to merge and the layers that have any of them; AdapterError where something is in the way."""
    known = model.sequence if isinstance(model, OFTLayer) else get_state(model).sequence
    check_unsharded(model, "call save_adapter in every process, load that into a model in one process, and merge there")
    _require_unmerged(model, "call unmerge first")
    check_changeable(model)
    names = check_sequence(model, known if adapter_names is None else adapter_names)
    layers = {path: layer for path, layer in oft_layers(model) if set(names) & set(layer.rotations)}
    for layer in layers.values():
        layer.check_generators(names)
        if isinstance(layer, QuantOFTLinear):
            layer.check_merge(requantize=requantize)
        else:
            layer.check_weight()
    return names, layers


def _model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most floating-point weights that are neither generators nor quantized; float32 if there are none."""
    generators = {id(parameter) for _, layer in oft_layers(model) for parameter in layer.generators.values()}
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        quantized = getattr(parameter, "quant_state", None) is not None or parameter.dtype.itemsize == 1
        if id(parameter) not in generators and parameter.is_floating_point() and not quantized:
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _tied_weights(model: nn.Module) -> set[int]:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {key for key, count in uses.items() if count > 1}


def _weight(layer: OFTLayer) -> nn.Parameter | None:
    return layer.base_layer._parameters.get("weight")


def _check_untying(model: nn.Module, tied_layers: list[str]) -> None:
    """Raises AdapterError where weights that merging makes different cannot be untied."""
    config: Any = getattr(model, "config", None)
    if tied_layers and getattr(config, "is_encoder_decoder", False):  # T5 and its kin
        raise AdapterError(
            f"{tied_layers[0]}: its weight is tied, and this {type(model).__name__} scales its outputs by whether "
            "tie_word_embeddings says so: leave the adapter unmerged, or merge with unload=False"
        )


def _untie(model: nn.Module) -> None:
    """Says in a transformers configuration that weights are no longer tied, so that saving keeps both.

    Of a model that is loaded so, no biases are tied either (BERT's decoder and its ``predictions``).
    """
    seen: set[int] = set()
    for module in model.modules():
        bias = module._parameters.get("bias")
        if bias is not None and id(bias) in seen:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        seen.add(id(bias))
    top: Any = model.config
    nested: Any = getattr(top, "text_config", None)
    for config in (top, nested):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _report_requantization(layers: dict[str, OFTLayer]) -> None:
    errors = {
        name: layer.requantization_error
        for name, layer in layers.items()
        if isinstance(layer, QuantOFTLinear) and layer.requantization_error is not None
    }
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    warnings.warn(
        f"requantizing changed the merged weights by {mean:.2%} on average, {errors[worst]:.2%} at most ({worst}), "
        "relative to their norm; merging to a dequantized model (requantize=False) costs nothing",
        RequantizationWarning,
        stacklevel=3,
    )
