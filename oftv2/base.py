"""What every adapted layer shares: generators by adapter name, their rotation and its cache, merge and unmerge."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from .config import OFTConfig
from .errors import AdapterError, StabilityWarning
from .rotation import KeptRotation, Rotation, generator_norm

DEFAULT_ADAPTER = "default"
_WARN_NORM = 0.9
# Reading a norm waits for an accelerator, and takes a CPU 0.1 ms: look at it once in so many training steps.
_NORM_CHECK_INTERVAL = 64


class OFTLayer(nn.Module):
    """A frozen base layer and the orthogonal adapters on it.

    Args:
        base_layer (nn.Module): the layer as it was; called as it is, and frozen.
        config (OFTConfig | None): the adapter's configuration; the default one where ``None``.
        adapter_name (str): the name of the adapter.
        name (str): the layer's path in its model, for messages.
        block_size (int | None): this layer's own block size, before that of ``config``.

    Attributes:
        generators (nn.ParameterDict): by adapter name, the packed generators ``(r, b(b−1)/2)``, float32 (float64 on a
            float64 base); all that is trained.
        rotations (dict[str, Rotation]): by adapter name, the settings.
    """

    base_layer: Any  # a module of any class; its attributes are its own affair

    def __init__(
        self,
        base_layer: nn.Module,
        config: OFTConfig | None = None,
        *,
        adapter_name: str = DEFAULT_ADAPTER,
        name: str = "",
        block_size: int | None = None,
    ) -> None:
        super().__init__()
        config = config or OFTConfig()
        self.name = name or type(base_layer).__name__
        features, groups = self.rotated_features(base_layer)
        rotation = Rotation.resolve(config, features, self.name, groups=groups, block_size=block_size)
        self.base_layer = base_layer.requires_grad_(False)
        self.rotations = {adapter_name: rotation}
        device, wide = _placement(base_layer)
        generators = torch.zeros(rotation.shape, device=device, dtype=torch.float64 if wide else torch.float32)
        self.generators = nn.ParameterDict({adapter_name: nn.Parameter(generators)})
        self.init = config.init
        self.active = adapter_name
        self.enabled = True
        self.merged = False
        self._original: tuple[nn.Module, ...] = ()
        self._merged_delta: Tensor | None = None
        self._cache: KeptRotation | None = None
        self._norm_checks = 0
        self._warned = False
        self.reset_parameters()
        self.train(base_layer.training)

    @staticmethod
    def rotated_features(base_layer: Any) -> tuple[int, int]:
        """``(size of what is rotated, parts of it that no block may straddle)``."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The active adapter back to its start: the identity, or small random generators (``init="normal"``)."""
        parameter = self.generators[self.active]
        if self.init == "normal":
            parameter.normal_(std=0.02)
        else:
            parameter.zero_()

    @property
    def rotation(self) -> Rotation:
        """The settings of the active adapter."""
        return self.rotations[self.active]

    @property
    def rotating(self) -> bool:
        """Whether a forward pass applies the rotation to the activations: neither disabled nor merged."""
        return self.enabled and not self.merged

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that looks at its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # base_layer and generators, in every forward pass: spares the search for them
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in modules:
                raise
            return getattr(self.base_layer, name)

    # ------------------------------------------------------------------------------------------ the rotation

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """``Δ = R − I`` of the active adapter, ``(r, b, b)``, as this forward pass uses it; where it is kept, in
        ``dtype`` if one is given, which spares a kernel for few tokens half of what it reads.

        Built anew whenever a gradient may flow to the generators or the layer trains: optimizers and engines write
        through ``.data``, which no version counter sees. In eval mode it is kept by the generators' version.
        """
        generators = self.generators[self.active]
        if self._changes(generators):
            return self._dropped(self.rotation.delta(generators))
        kept = self._cache
        if kept is None or not kept.is_of(generators):
            with torch.inference_mode(False), torch.no_grad():
                self._cache = kept = KeptRotation(generators, self.rotation.delta(generators))
        return kept.delta if dtype is None else kept.cast(dtype)

    def _changes(self, generators: Tensor) -> bool:
        """Whether Δ has to be built anew; drops the cache then."""
        if torch.compiler.is_compiling():
            return True
        if self.training or (torch.is_grad_enabled() and generators.requires_grad):
            self._check_norm(generators)
            self._cache = None
            return True
        return False

    def rotate(self, x: Tensor) -> Tensor:
        """``x R`` of activations ``(..., d)`` by the active adapter, in one step where a kernel can."""
        if self.training or torch.is_grad_enabled():
            rotation = self.rotation
            if F.makes_rotation_on_the_way(x, rotation.block_size):
                packed = self.changing_generators()
                if packed is not None:
                    return F.neumann_rotate(x, packed, rotation.block_size, rotation.terms)
        return F.rotate(x, self.delta() if x.is_cpu else self.delta(x.dtype))

    def changing_generators(self) -> Tensor | None:
        """The effective generators ``(num_blocks, b(b−1)/2)``, where they and the Neumann series alone make this
        pass's rotation; None where it is cached, exact, or has dropout."""
        rotation, generators = self.rotation, self.generators[self.active]
        plain = rotation.parametrization == "cayley_neumann" and not (self.training and rotation.dropout)
        if not (plain and self._changes(generators)):
            return None
        return rotation.effective(generators).expand(rotation.num_blocks, -1)

    def _dropped(self, delta: Tensor) -> Tensor:
        dropout = self.rotation.dropout
        if not (self.training and dropout):
            return delta
        keep = torch.rand(delta.shape[0], 1, 1, device=delta.device) >= dropout
        return delta * keep

    @torch.no_grad()
    def _check_norm(self, generators: Tensor) -> None:
        """Warns, once, when the series is about to diverge. ‖Q‖₂ ≤ ‖packed‖₂ spares all but few layers the SVD."""
        if self._warned or self.rotation.parametrization == "cayley" or generators.is_meta:
            return
        self._norm_checks += 1
        if self._norm_checks % _NORM_CHECK_INTERVAL != 1:
            return
        packed = self.rotation.effective(generators)
        if torch.linalg.vector_norm(packed, dim=1).amax() <= _WARN_NORM:
            return
        norm = generator_norm(packed, self.rotation.block_size)
        if norm > _WARN_NORM:
            self._warned = True
            warnings.warn(
                f"{self.name}: the generators reached ‖Q‖₂ = {norm:.2f}; from 1 on the Neumann series diverges and R "
                "is no rotation any more. Lower the learning rate, set OFTConfig.constraint, or use "
                'parametrization="cayley", which is orthogonal for every Q',
                StabilityWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------------------------------------ merging

    def merged_base(self, delta: Tensor) -> nn.Module:
        """A base layer that does on its own what the rotation by ``I + Δ`` and the present one do together."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    @torch.no_grad()
    def merge(self, *, keep_original: bool = False) -> None:
        """Folds the active adapter into the base layer's weight, in float32 (or wider) and block by block.

        Args:
            keep_original (bool): keep the original weight, so that :meth:`unmerge` restores it bit for bit.

        Raises:
            AdapterError: already merged, or generators that are not finite.
        """
        self._merge(self.merged_base, keep_original)

    def _merge(self, build: Callable[[Tensor], nn.Module], keep_original: bool) -> None:
        if self.merged:
            raise AdapterError(f"{self.name}: already merged; call unmerge first")
        self.check_generators()
        delta = self.rotation.delta(self.generators[self.active].detach())
        merged = build(delta)
        self._original = (self.base_layer,) if keep_original else ()
        self._merged_delta = delta
        self.base_layer = merged
        self.merged = True
        self._cache = None

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the adapter out of the weight again: the kept original, or else by the inverse of what was merged.

        Raises:
            AdapterError: not merged.
        """
        if not self.merged:
            raise AdapterError(f"{self.name}: not merged")
        if self._original:
            (original,) = self._original
            self.base_layer = original.to(_placement(self.base_layer)[0])
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

    def check_generators(self) -> None:
        """Raises AdapterError where the active generators hold NaN or Inf, or are only a shard of themselves."""
        generators = self.generators[self.active]
        if hasattr(generators, "full_tensor"):
            raise AdapterError(
                f"{self.name}: the generators are sharded (FSDP); call unshard() on the sharded modules first, or load "
                "the adapter into a model that is not sharded"
            )
        if not generators.isfinite().all():
            raise AdapterError(f"{self.name}: the generators hold NaN or Inf")

    # ------------------------------------------------------------------------------------------ module plumbing

    def train(self, mode: bool = True) -> OFTLayer:
        self._cache = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OFTLayer:
        """Moves the layer; generators never go below float32, whatever dtype the model is sent to."""
        own = {id(parameter) for parameter in self.generators.values()}
        own |= {id(parameter.grad) for parameter in self.generators.values() if parameter.grad is not None}

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in own and moved.is_floating_point() and moved.element_size() < 4:
                return tensor.to(moved.device, torch.float32)
            return moved

        self._cache = None
        if self._merged_delta is not None:
            self._merged_delta = self._merged_delta.to(fn(self._merged_delta).device)
        return super()._apply(keep_wide, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def extra_repr(self) -> str:
        rotation = self.rotation
        state = "merged" if self.merged else "" if self.enabled else "disabled"
        shared = ", one shared block" if rotation.block_share else ""
        return f"block_size={rotation.block_size}, num_blocks={rotation.num_blocks}{shared}{state and ', ' + state}"


def with_weight(module: Any, weight: Tensor) -> nn.Module:
    """A copy of ``module`` (class, attributes, hooks) with another weight; a tied weight is left to its peers."""
    clone = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        setattr(clone, registry, dict(getattr(module, registry)))
    clone.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    return clone


def rotated(weight: Tensor, delta: Tensor) -> Tensor:
    """``weight`` of ``(n, d)`` rotated by ``I + Δ`` in float32 or wider, back in its own dtype; in chunks of rows.

    ``W + W Δ``, not ``W (I + Δ)``: rounding the diagonal of ``I + Δ`` would bias every merge in the same direction.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    delta = delta.to(weight.device, wide)
    rows = max(1, (1 << 19) // max(1, weight.shape[1]))  # 2 MB: twice as fast on a CPU as eight times as much
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            # A copy in any case: products round by how memory is aligned, and that of mapped files is as it happens.
            blocks = weight[part].to(wide, copy=True).unflatten(1, delta.shape[:2]).transpose(0, 1)
            out[part] = torch.baddbmm(blocks, blocks, delta).transpose(0, 1).flatten(1).to(weight.dtype)
    return out


def _placement(base_layer: nn.Module) -> tuple[torch.device, bool]:
    """Where generators go, and whether in float64: beside the base weight, or where a dispatched base computes."""
    parameters = [*base_layer.parameters(), *base_layer.buffers()]
    device = parameters[0].device if parameters else torch.device("cpu")
    elsewhere = getattr(getattr(base_layer, "_hf_hook", None), "execution_device", None)
    if device.type == "meta" and elsewhere is not None:
        device = torch.device(elsewhere)
    return device, any(parameter.dtype == torch.float64 for parameter in parameters)
