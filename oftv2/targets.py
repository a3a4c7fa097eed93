"""Which modules of a model an adapter goes on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .base import OFTLayer
from .config import ALL_LINEAR, OFTConfig
from .conv import OFTConv2d
from .errors import AdapterError
from .experts import OFTExperts, is_experts
from .layers import OFTEmbedding, OFTLinear, is_conv1d
from .left_out import warn_of_convolutions, warn_of_experts
from .quant import QuantOFTLinear, find_backend
from .rotation import Rotation

_READERS = ("WavLMAttention", "LongcatFlashTopkRouter", "LSHSelfAttention")  # Reformer's reads where it generates
_TO_BE_NAMED = (OFTEmbedding, OFTConv2d, OFTExperts)
_WANT_NAMING = "embeddings, convolutions and experts want naming"


@dataclass(frozen=True)
class Target:
    """One module to adapt.

    Attributes:
        name: its path in the model (the first one, if it has several).
        paths: every path under which it is reached.
        module: the module itself.
        layer_class: the adapter for it.
        block_size: its own block size from the configuration's pattern, or None.
    """

    name: str
    paths: tuple[str, ...]
    module: nn.Module
    layer_class: type[OFTLayer]
    block_size: int | None

    def rotation(self, config: OFTConfig) -> Rotation:
        """The settings of an adapter of this configuration; AdapterError where its block size does not fit."""
        return self.layer_class.resolve(self.module, config, self.name, self.block_size)


def layer_class_for(module: nn.Module, *, named: bool = False) -> type[OFTLayer] | None:
    """The adapter class for a module, or None where there is none.

    A linear layer of an unknown kind, which has ``in_features`` and ``out_features``, is taken only when the user
    ``named`` it: it will be called as a quantized one.
    """
    if find_backend(module) is not None:
        return QuantOFTLinear
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return OFTLinear
    if isinstance(module, nn.Embedding):
        return OFTEmbedding
    if isinstance(module, nn.Conv2d):
        return OFTConv2d
    if is_experts(module):
        return OFTExperts
    return QuantOFTLinear if named and hasattr(module, "in_features") and hasattr(module, "out_features") else None


def find_targets(model: nn.Module, config: OFTConfig) -> list[Target]:
    """The modules that ``config`` chooses in ``model``, in the model's order.

    Raises:
        AdapterError: a name, pattern or layer number that matches nothing, a module of a kind that cannot be adapted,
            or nothing to adapt at all.
    """
    modules, paths = all_modules(model)
    names = [path for path in modules if path]
    saved = saved_modules(model, config)
    chosen = _chosen_names(model, config, names, modules)
    excluded = _matching(names, config.exclude_modules, "exclude_modules") if config.exclude_modules else []
    left_out = {id(module) for name in excluded for module in modules[name].modules()}
    chosen = [name for name in chosen if id(modules[name]) not in left_out]
    if config.layers is not None:
        chosen = _in_layers(chosen, config.layers, config.layers_pattern)
    sizes = _block_sizes(chosen, config)
    targets, seen = [], set()
    for name in chosen:
        module = modules[name]
        if id(module) in seen or any(f"{path}.".startswith(f"{top}.") for path in paths[id(module)] for top in saved):
            continue
        seen.add(id(module))
        layer_class = layer_class_for(module, named=True)
        if layer_class is None:
            raise AdapterError(
                f"{name} is a {type(module).__name__}, which cannot be adapted; target nn.Linear, GPT-2's Conv1D, "
                "nn.Embedding, nn.Conv2d, quantized linear modules or transformers' experts"
            )
        if _is_read(name, modules):
            reader = type(modules[name.rpartition(".")[0]]).__name__
            raise AdapterError(
                f"{name}: {reader} reads this layer's weight without calling it, so an adapter here would never train; "
                "leave it out with exclude_modules"
            )
        if layer_class is OFTExperts and getattr(module, "_is_expert_parallel", False):
            raise AdapterError(
                f"{name}: these experts are spread over devices (expert parallelism), and each device would train an "
                "adapter of its own: leave them out with exclude_modules, or load the model without a plan for experts"
            )
        if isinstance(getattr(module, "weight", None), nn.UninitializedParameter):
            kind = type(module).__name__
            raise AdapterError(f"{name}: this {kind} does not know its size until the model is called once")
        targets.append(Target(name, tuple(paths[id(module)]), module, layer_class, sizes.get(name)))
    if not targets:
        others = [name for name in names if layer_class_for(modules[name]) in _TO_BE_NAMED]
        hint = f"; {_WANT_NAMING}: target_modules=[{others[0]!r}]" if others else ""
        raise AdapterError(
            f"nothing to adapt in this {type(model).__name__}: no module matches target_modules="
            f"{config.target_modules!r} with exclude_modules={config.exclude_modules!r} and layers={config.layers!r}"
            f"{hint}"
        )
    if _takes_all_linear(config):
        adapted = [target.module for target in targets]
        known = {id(module) for top in saved for module in modules[top].modules()} | left_out | set(map(id, adapted))
        warn_of_experts(modules, known)
        warn_of_convolutions(modules, adapted, known)
    return targets


def all_modules(model: nn.Module) -> tuple[dict[str, nn.Module], dict[int, list[str]]]:
    """The modules of a model by each of their paths, and the paths of each by its ``id``."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths: dict[int, list[str]] = {}
    for path, module in modules.items():
        paths.setdefault(id(module), []).append(path)
    return modules, paths


def output_heads(model: nn.Module) -> tuple[set[str], set[str]]:
    """Paths of the modules outside a transformers model's body: ``(language-model heads, task heads)``.

    The models inside a model may have heads too (BLIP's decoder, Bark's three parts). timm's have classifiers.
    """
    classifiers = _classifiers(model)
    outputs = {id(_embeddings(module, "output")) for module in model.modules()}
    language = {name for name, module in model.named_modules() if id(module) in outputs}
    body = getattr(model, "base_model", None)
    prefix = getattr(model, "base_model_prefix", "")
    if not isinstance(body, nn.Module) or body is model or not prefix:
        return language, classifiers
    inputs = _embeddings(model, "input")
    if inputs is not None and all(module is not inputs for module in body.modules()):  # DINOv3ViTModel's encoder
        return language, classifiers
    outside = {name for name, _ in model.named_children() if name != prefix}
    heads = {name for name in outside if name not in language and _has_parameters(model.get_submodule(name))}
    return language, heads | classifiers


def _classifiers(model: nn.Module) -> set[str]:
    """Paths of the classifiers of timm's models."""
    timm: list[Any] = [m for m in model.modules() if any(cls.__module__.startswith("timm.") for cls in type(m).__mro__)]
    heads = [m.get_classifier() for m in timm if callable(getattr(m, "get_classifier", None))]
    found = [part for head in heads for part in (head if isinstance(head, tuple) else (head,))]
    return {name for name, module in model.named_modules() if module in found and _has_parameters(module)}


def _embeddings(model: nn.Module, kind: str) -> nn.Module | None:
    """A transformers model's ``"input"`` or ``"output"`` embeddings, or None."""
    method = getattr(model, f"get_{kind}_embeddings", None)
    try:
        return method() if callable(method) else None
    except (NotImplementedError, AttributeError):  # some have the method and no such module
        return None


def saved_modules(model: nn.Module, config: OFTConfig) -> list[str]:
    """Paths of the modules that are trained in full; by default the task heads of a transformers model.

    Raises:
        AdapterError: a name that matches nothing.
    """
    if config.modules_to_save is None:
        language, heads = output_heads(model)
        return sorted(head for head in heads if not any(name.startswith(head + ".") for name in language))
    names = [name for name, _ in model.named_modules() if name]
    return _matching(names, config.modules_to_save, "modules_to_save") if config.modules_to_save else []


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _chosen_names(model: nn.Module, config: OFTConfig, names: list[str], modules: dict[str, nn.Module]) -> list[str]:
    wanted = config.target_modules
    if not _takes_all_linear(config):
        return _matching(names, wanted, "target_modules")
    entries = [] if isinstance(wanted, str) else [entry for entry in wanted if entry != ALL_LINEAR]
    named = _matching(names, entries, "target_modules")
    language, heads = output_heads(model)
    outside = language | heads
    trained = {id(parameter) for head in outside for parameter in model.get_submodule(head).parameters()}
    linear = [
        name
        for name in names
        if layer_class_for(modules[name]) in (OFTLinear, QuantOFTLinear)
        and not _is_read(name, modules)
        and not type(modules[name]).__name__.endswith("Router")  # Llama 4's and PhiMoE's: they return tuples
        and "Indexer" not in type(modules[name.rpartition(".")[0]]).__name__  # of sparse attention: it only selects
        and not any(name == head or name.startswith(head + ".") for head in outside)
        and id(modules[name]._parameters.get("weight")) not in trained  # tied to a head's, as RT-DETR's decoder's are
    ]
    either = {*linear, *named}
    return [name for name in names if name in either]


def _is_read(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the module around a layer multiplies by its weight itself, past any adapter, and never calls it."""
    parent, _, child = name.rpartition(".")
    reader = type(modules[parent])
    if child == "dt_proj" and "Mamba" in reader.__name__:
        return find_backend(modules[name]) is None  # quantized ones are called
    if (child, reader.__name__) == ("correction_coefs", "Gemma3nTextAltUp"):  # called in eval mode alone
        return True
    if child == "k_proj" and reader.__name__.endswith("MHAttentionMap"):  # DETR's and its kin's
        return True
    if re.fullmatch("rel_pos_([xy]_)?bias", child) and reader.__name__.endswith("Encoder"):  # LayoutLMv2's and v3's
        return True
    return issubclass(reader, nn.MultiheadAttention) or reader.__name__ in _READERS


def _takes_all_linear(config: OFTConfig) -> bool:
    """Whether the targets are every linear layer, perhaps with others."""
    wanted = config.target_modules
    return wanted == ALL_LINEAR if isinstance(wanted, str) else ALL_LINEAR in wanted


def _matching(names: list[str], wanted: str | Iterable[str], field: str) -> list[str]:
    """The names that a regular expression matches whole, or that equal or end with one of a list of names."""
    if isinstance(wanted, str):
        found = [name for name in names if re.fullmatch(wanted, name)]
        if not found:
            is_name = any(name.endswith("." + wanted) for name in names)
            meant = (
                f"; as a name it goes into a list: [{wanted!r}]" if is_name else _close([*names, ALL_LINEAR], wanted)
            )
            raise AdapterError(f"{field}={wanted!r} matches no module path as a regular expression{meant}")
        return found
    entries = list(wanted)
    for entry in entries:
        if not any(name == entry or name.endswith("." + entry) for name in names):
            raise AdapterError(f"{field}: {entry!r} is not the name of any module{_close(names, entry)}")
    return [name for name in names if any(name == entry or name.endswith("." + entry) for entry in entries)]


def _close(names: list[str], wanted: str) -> str:
    ends = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    close = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], ends, n=3, cutoff=0.5)
    return (
        f"; did you mean {' or '.join(map(repr, close))}?"
        if close
        else f"; there are {', '.join(map(repr, ends[:20]))}"
    )


def _in_layers(names: list[str], layers: tuple[int, ...], lists: tuple[str, ...] | None) -> list[str]:
    within = rf"(?:^|\.)(?:{'|'.join(lists)})\." if lists else r"(?:^|\.)"
    number = {name: match and int(match[1]) for name in names for match in [re.search(rf"{within}(\d+)(?:\.|$)", name)]}
    missing = sorted(set(layers) - {value for value in number.values() if value is not None})
    if missing:
        of = f" of layers_pattern={list(lists)!r}" if lists else ""
        raise AdapterError(f"layers: no target module lies in layer {', '.join(map(str, missing))}{of}")
    return [name for name in names if number[name] in layers]


def _block_sizes(names: list[str], config: OFTConfig) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for pattern, size in config.block_size_pattern.items():
        found = [name for name in names if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)]
        if not found:
            raise AdapterError(
                f"block_size_pattern: {pattern!r} matches none of the target modules{_close(names, pattern)}"
            )
        for name in found:
            sizes.setdefault(name, size)
    return sizes
