"""Merging: weights rotated in float32 block by block and put into a copy of their layer, and how they come back."""

from __future__ import annotations

import copy
import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .errors import AdapterError
from .partitioned import refuse_partitioned
from .sharding import is_sharded

_VALUES = 1 << 19  # at a time, 2 MB in float32: twice as fast to rotate on a CPU as eight times as much


class MergeableLayer(nn.Module):
    """The part of :class:`oftv2.OFTLayer` that folds its active adapters into the base layer, and takes them out."""

    name: str
    base_layer: Any
    generators: nn.ParameterDict
    rotations: dict[str, Any]
    sequence: tuple[str, ...]
    merged: bool
    _original: tuple[nn.Module, ...]
    _merged_delta: Tensor | None
    _cache: Any

    def _build(self, *, dropout: bool = False) -> Tensor:
        raise NotImplementedError

    def merged_base(self, delta: Tensor) -> nn.Module:
        """A base layer that does on its own what the rotation by ``I + Δ`` and the present one do together."""
        weight = self.rotated_weight(self.base_layer, self.base_layer.weight.detach(), delta)
        return with_weights(self.base_layer, {"weight": weight})

    def check_weight(self) -> None:
        """Raises AdapterError where the base layer would not go by another weight, or has none here."""
        base = self.base_layer
        if any(parameter.is_meta for parameter in base.parameters()):
            raise AdapterError(
                f"{self.name}: the weight is on the meta device, offloaded perhaps: load the base without offloading, "
                "merge files with `python -m oftv2 merge`, or leave the adapter unmerged"
            )
        if "forward" in vars(base) and _rebound(base.forward, base, self) is base.forward:
            raise AdapterError(
                f"{self.name}: the forward of its {type(base).__name__} was replaced by a function that may go on with "
                "the weight as it is: take that off before merging, or leave the adapter unmerged"
            )
        if isinstance(vars(base).get("weight"), Tensor) or is_parametrized(base):
            raise AdapterError(
                f"{self.name}: the weight of its {type(base).__name__} is computed in each forward pass "
                "(weight_norm, spectral_norm, pruning, another parametrization), so nothing can be merged into it: "
                "make it a plain parameter first, as by torch.nn.utils.parametrize.remove_parametrizations(base_layer, "
                '"weight"), or leave the adapter unmerged'
            )

    @staticmethod
    def rotated_weight(base_layer: Any, weight: Tensor, delta: Tensor) -> Tensor:
        """``weight``, of the base layer's shape or some rows of it, with the rotation by ``I + Δ`` folded in.

        Of a ``Conv1D`` and of a convolution with groups it takes all rows: each is not rotated on its own there.
        """
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, *, keep_original: bool = False) -> None:
        """Folds the active adapters into the base layer's weight, in float32 (or wider) and block by block.

        ``W′ = W · (R_a R_b …)ᵀ = W · … R_bᵀ R_aᵀ``, the very function that the forward pass computes.

        Args:
            keep_original (bool): keep the original weight, so that :meth:`unmerge` restores it bit for bit.

        Raises:
            AdapterError: already merged, no adapter active, generators that are not finite, or a weight that is
                computed in each forward pass.
        """
        self.check_weight()
        self._merge(self.merged_base, keep_original)

    def _merge(self, build: Callable[[Tensor], nn.Module], keep_original: bool) -> None:
        if self.merged:
            raise AdapterError(f"{self.name}: already merged; call unmerge first")
        if not self.sequence:
            raise AdapterError(f"{self.name}: no active adapter to merge; this layer has {', '.join(self.rotations)}")
        self.check_generators(self.sequence)
        delta = self._build()
        merged = build(delta)
        self._original = (self.base_layer,) if keep_original else ()
        self._merged_delta = delta
        self.base_layer = merged
        self.merged = True
        self._cache = None

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes what was merged out of the weight again: the kept original, or else by the inverse of what was merged.

        Raises:
            AdapterError: not merged.
        """
        if not self.merged:
            raise AdapterError(f"{self.name}: not merged")
        if self._original:
            (original,) = self._original
            self.base_layer = original.to(placement(self.base_layer)[0])
        else:
            assert self._merged_delta is not None
            delta = self._merged_delta.double().cpu()  # not every device has float64
            identity = torch.eye(delta.shape[-1], dtype=delta.dtype)
            inverse = torch.linalg.inv(identity + delta) - identity
            self.base_layer = self.merged_base(inverse.to(self._merged_delta))
        self._original, self._merged_delta, self.merged, self._cache = (), None, False, None

    def release_base(self) -> nn.Module:
        """The base layer, to stand on its own again."""
        return self.base_layer

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        getattr(destination, "_metadata", {}).setdefault(prefix[:-1], {})["merged"] = self.merged

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        self._cache = None
        if local_metadata.get("merged", self.merged) != self.merged:
            there, here, first, applied = (
                ("not merged", "it is", "unmerge(model)", "not at all")
                if self.merged
                else ("merged", "not", "merge(model, unload=False)", "twice")
            )
            raise AdapterError(
                f"{self.name}: when this state dictionary was taken, the adapter was {there}, and here {here}: "
                f"{first} first, or rotations would be applied {applied}"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def check_generators(self, adapter_names: Sequence[str]) -> None:
        """Raises AdapterError where generators hold NaN or Inf, or are only a shard of themselves.

        Args:
            adapter_names (Sequence[str]): of which adapters; those that this layer does not have are passed over.
        """
        for name in adapter_names:
            if name not in self.rotations:
                continue
            generators = self.generators[name]
            refuse_partitioned(
                ((f"{self.name}: {part}", parameter) for part, parameter in self.named_parameters()),
                "call save_adapter in every process, and load the adapter into the base model in a process without "
                "ZeRO-3, or merge with `python -m oftv2 merge`",
            )
            if generators.shape != self.rotations[name].shape or is_sharded(generators):
                raise AdapterError(
                    f"{self.name}: the generators are sharded (FSDP): load the adapter into a model that is not"
                )
            if not generators.isfinite().all():
                raise AdapterError(f"{self.name}: the generators of {name!r} hold NaN or Inf")


def cloned(module: Any) -> Any:
    """A copy of ``module`` (class, attributes, hooks) with the same weights, which may be replaced by others."""
    clone = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        setattr(clone, registry, dict(getattr(module, registry)))
    vars(clone).update({name: _rebound(value, module, clone) for name, value in vars(clone).items()})
    return clone


def with_weights(module: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``module`` with other weights; a tied weight is left to its peers."""
    clone = cloned(module)
    for name, weight in weights.items():
        setattr(clone, name, nn.Parameter(weight, requires_grad=getattr(module, name).requires_grad))
    return clone


def _rebound(value: Any, module: nn.Module, clone: nn.Module) -> Any:
    """A method of ``module`` as one of ``clone``, such as the forward that accelerate's hooks put in its place."""
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, clone)
    if isinstance(value, functools.partial) and any(argument is module for argument in value.args):
        arguments = (clone if argument is module else argument for argument in value.args)
        rebound = functools.partial(value.func, *arguments, **value.keywords)
        vars(rebound).update({name: _rebound(inner, module, clone) for name, inner in vars(value).items()})
        return rebound
    return value


def row_slices(shape: Sequence[int]) -> Iterator[slice]:
    """The rows of a tensor of ``shape``, in parts that are rotated one at a time; a scalar is one row."""
    count, rows = math.prod(shape[:1]), max(1, _VALUES // max(1, math.prod(shape[1:])))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def rotated(weight: Tensor, delta: Tensor) -> Tensor:
    """``weight`` of ``(n, d)`` rotated by ``I + Δ`` in float32 or wider, back in its own dtype; in chunks of rows.

    ``W + W Δ``, not ``W (I + Δ)``: rounding the diagonal of ``I + Δ`` would bias every merge in the same direction.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    delta = delta.to(weight.device, wide)
    with torch.autocast(weight.device.type, enabled=False):
        for part in row_slices(weight.shape):
            # A copy in any case: products round by how memory is aligned, and that of mapped files is as it happens.
            blocks = weight[part].to(wide, copy=True).unflatten(1, delta.shape[:2]).transpose(0, 1)
            out[part] = torch.baddbmm(blocks, blocks, delta).transpose(0, 1).flatten(1).to(weight.dtype)
    return out


def scaled_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """``weight`` of ``(n, …)``, each row times its own factor of ``(n,)``, in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) * scale.to(weight.device, wide).view(-1, *[1] * (weight.dim() - 1))


def placement(base_layer: nn.Module) -> tuple[torch.device, bool]:
    """Where generators go, and whether in float64: beside the base weight, or where a dispatched base computes."""
    parameters = [*base_layer.parameters(), *base_layer.buffers()]
    device = parameters[0].device if parameters else torch.device("cpu")
    elsewhere = getattr(getattr(base_layer, "_hf_hook", None), "execution_device", None)
    if device.type == "meta" and elsewhere is not None:
        device = torch.device(elsewhere)
    return device, any(parameter.dtype == torch.float64 for parameter in parameters)
