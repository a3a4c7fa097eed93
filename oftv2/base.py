"""What every adapted layer shares: generators by adapter name, their rotation and its cache, merge and unmerge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import functional as F
from ._operator import capturing, in_torch_func
from .checkpointing import in_checkpoint
from .config import OFTConfig
from .errors import AdapterError
from .merging import MergeableLayer, placement
from .rotation import KeptRotation, Rotation, settle
from .stability import DivergenceCheck

if TYPE_CHECKING:
    from .rows import LayerRows

DEFAULT_ADAPTER = "default"


class OFTLayer(MergeableLayer):
    """A frozen base layer and the orthogonal adapters on it.

    With several active adapters, activations go through them in the order of ``sequence``: ``x̂ = ((x R_a) R_b) …``.
    The product of block-diagonal rotations is one too, with blocks of the least common multiple of their sizes, so
    every form of a layer works with it as with a single one.

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
        sequence (tuple[str, ...]): the active adapters that this layer has, in the order in which they rotate; without
            any it is its base layer. :meth:`activate` sets it.
    """

    rows: LayerRows | None = None  # within adapters_per_row
    handed: KeptRotation | None = None  # of one forward pass, made with those of the model's other layers

    def __init__(
        self,
        base_layer: nn.Module,
        config: OFTConfig | None = None,
        *,
        adapter_name: str = DEFAULT_ADAPTER,
        name: str = "",
        block_size: int | None = None,
    ) -> None:
        if not isinstance(base_layer, nn.Module):
            example = "OFTLinear(nn.Linear(1024, 4096))"
            raise AdapterError(f"{type(self).__name__} goes around a layer, as in {example}, not {base_layer!r}")
        super().__init__()
        self.name = name or type(base_layer).__name__
        config = config or OFTConfig()
        rotation = self.resolve(base_layer, config, self.name, block_size)
        self.base_layer = base_layer.requires_grad_(False)
        self.rotations: dict[str, Rotation] = {}
        self.inits: dict[str, str] = {}
        self.generators = nn.ParameterDict()
        self.sequence: tuple[str, ...] = ()
        self.enabled = True
        self.merged = False
        self.weight_read = False  # in training, by code that looks at its dtype, or multiplies by it past the rotation
        self._original: tuple[nn.Module, ...] = ()
        self._merged_delta: Tensor | None = None
        self._cache: KeptRotation | None = None
        self._check_divergence = DivergenceCheck()
        self._put(adapter_name, rotation, config.init)
        self.activate([adapter_name], trainable=True)
        self.train(base_layer.training)

    @staticmethod
    def rotated_features(base_layer: Any) -> tuple[int, int]:
        """``(size of what is rotated, parts of it that no block may straddle)``."""
        raise NotImplementedError

    @classmethod
    def resolve(cls, base_layer: nn.Module, config: OFTConfig, name: str, block_size: int | None = None) -> Rotation:
        """The settings of an adapter on a base layer; AdapterError, with the name, if the block size does not fit."""
        features, groups = cls.rotated_features(base_layer)
        return Rotation.resolve(config, features, name, groups=groups, block_size=block_size)

    # ------------------------------------------------------------------------------------------ its adapters

    def add(self, adapter_name: str, config: OFTConfig | None = None, *, block_size: int | None = None) -> None:
        """Adds another adapter, which is neither active nor trains before :meth:`activate`.

        Args:
            adapter_name, config, block_size: as for the first one.

        Raises:
            AdapterError: a name that is taken, or a block size that does not divide.
        """
        if adapter_name in self.rotations:
            raise AdapterError(f"{self.name}: there is an adapter {adapter_name!r} already")
        config = config or OFTConfig()
        self._put(adapter_name, self.resolve(self.base_layer, config, self.name, block_size), config.init)

    def _put(self, adapter_name: str, rotation: Rotation, init: str) -> None:
        device, wide = placement(self.base_layer)
        with torch.inference_mode(False):  # what is made within it cannot be trained, nor counts its versions
            generators = torch.zeros(rotation.shape, device=device, dtype=torch.float64 if wide else torch.float32)
            self.generators[adapter_name] = nn.Parameter(generators, requires_grad=False)
        self.rotations[adapter_name], self.inits[adapter_name] = rotation, init
        self.reset_parameters(adapter_name)

    def remove(self, adapter_name: str) -> None:
        """Removes an adapter."""
        self.activate([name for name in self.sequence if name != adapter_name])
        del self.generators[adapter_name], self.rotations[adapter_name], self.inits[adapter_name]

    def activate(self, adapter_names: Sequence[str], *, trainable: bool | None = None) -> None:
        """Makes these adapters rotate, one after the other; those that this layer does not have are passed over.

        Args:
            adapter_names (Sequence[str]): in the order in which activations go through them.
            trainable (bool | None): whether they train, while the others do not; ``None`` leaves that as it is.
        """
        self.sequence = tuple(name for name in adapter_names if name in self.rotations)
        self._cache, self._check_divergence = None, DivergenceCheck()
        if trainable is not None:
            for name, parameter in self.generators.items():
                parameter.requires_grad_(trainable and name in self.sequence)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str | None = None) -> None:
        """An adapter, or each, back to its start: the identity, or small random generators (``init="normal"``)."""
        for name in [adapter_name] if adapter_name else self.rotations:
            if self.inits[name] == "normal":
                self.generators[name].normal_(std=0.02)
            else:
                self.generators[name].zero_()

    @property
    def active(self) -> str:
        """The active adapter, where there is one; AdapterError with several or none."""
        if len(self.sequence) != 1:
            raise AdapterError(f"{self.name}: active are {list(self.sequence)}, and this takes exactly one adapter")
        return self.sequence[0]

    @property
    def rotation(self) -> Rotation:
        """The settings of the active adapter; AdapterError with several or none."""
        return self.rotations[self.active]

    @property
    def block_size(self) -> int:
        """The block size of the active adapters' product: the least common multiple of theirs."""
        if len(self.sequence) == 1:
            return self.rotations[self.sequence[0]].block_size
        return math.lcm(*(self.rotations[name].block_size for name in self.sequence))

    @property
    def rotating(self) -> bool:
        """Whether a forward pass applies one rotation to all activations: active, neither disabled nor merged."""
        return self.enabled and not self.merged and self.sequence != () and self.rows is None

    @property
    def current_rows(self) -> LayerRows | None:
        """What a forward pass goes by row by row, instead of ``sequence``; None where it does not."""
        return self.rows if self.enabled and not self.merged else None

    def use_rows(self, rows: LayerRows | None) -> None:
        """Goes by ``rows`` from now on, or again by ``sequence``."""
        self.rows, self._cache = rows, None

    if TYPE_CHECKING:
        base_layer: Any  # a module of any class; its attributes are its own affair
        generators: nn.ParameterDict
    else:  # in every forward pass, several times: spares the search for them, 1.4 µs each time
        base_layer = property(lambda self: self._modules["base_layer"])
        generators = property(lambda self: self._modules["generators"])

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that looks at its dtype or device."""
        if self.training and not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self.weight_read = True
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)

    # ------------------------------------------------------------------------------------------ the rotation

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """``Δ = R − I`` of the active adapters' product, ``(r, b, b)``, as this forward pass uses it; where it is kept,
        in ``dtype`` if one is given, which spares a kernel for few tokens half of what it reads.

        Built anew whenever a gradient may flow to the generators or the layer trains: optimizers and engines write
        through ``.data``, which no version counter sees. In eval mode it is kept by the generators' version.
        """
        handed = self._in_hand()
        return self.kept_or_built(self.sequence, self._build, dtype) if handed is None else handed

    def _in_hand(self) -> Tensor | None:
        """Δ that the model made for this pass, of these adapters as they are; not in a checkpoint, which makes it again
        when it is gone."""
        if torch.compiler.is_compiling() or self.handed is None or not torch.is_grad_enabled() or in_checkpoint():
            return None
        return self.handed.delta if self.handed.is_of(self.generators_of(self.sequence)) else None

    def kept_or_built(
        self, names: Sequence[str], build: Callable[..., Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        """``build(dropout=…)``, made of the generators of ``names``, or what was kept of it; see :meth:`delta`."""
        generators = self.generators_of(names)
        if self._changes(names, generators):
            return build(dropout=self.training)
        kept = self._cache
        if kept is None or not kept.is_of(generators):
            with torch.inference_mode(False), torch.no_grad():
                kept = KeptRotation(generators, build(dropout=False))
            if not capturing():
                settle(kept.delta)
                self._cache = kept
        return kept.delta if dtype is None else kept.cast(dtype)

    def generators_of(self, adapter_names: Sequence[str]) -> list[Tensor]:
        """The generators of adapters, in their order."""
        generators = self.generators
        parameters: Any = generators._parameters  # by [name] each is searched for, which takes longer
        return [parameters[name] if name in parameters else generators[name] for name in adapter_names]

    def _build(self, *, dropout: bool = False) -> Tensor:
        deltas = []
        for name in self.sequence:
            rotation = self.rotations[name]
            delta = rotation.delta(self.generators[name])
            deltas.append(rotation.dropped(delta) if dropout else delta)
        return F.compose(deltas)

    def refresh(self) -> None:
        """Writes a kept Δ anew where it is, after generators got other values: captured CUDA graphs read it there."""
        if self.rows is not None:
            self._cache = None
        if self._cache is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._cache.rewrite(self.generators_of(self.sequence), self._build())

    def _changes(self, names: Sequence[str], generators: Sequence[Tensor]) -> bool:
        """Whether Δ has to be built anew; drops the cache then."""
        if torch.compiler.is_compiling() or in_torch_func():  # values are not to be read
            return True
        if self.training or (torch.is_grad_enabled() and any(packed.requires_grad for packed in generators)):
            self._check_divergence(zip((self.rotations[name] for name in names), generators, strict=True), self.name)
            if self._cache is not None:
                self._cache = None
            return True
        return False

    def rotate(self, x: Tensor) -> Tensor:
        """``x R`` of activations ``(..., d)`` by the active adapters, in one step where a kernel can."""
        delta = self._in_hand()
        if delta is None and (self.training or torch.is_grad_enabled()) and len(self.sequence) == 1:
            rotation = self.rotation
            if F.makes_rotation_on_the_way(x, rotation.block_size):
                packed = self.changing_generators()
                if packed is not None:
                    return F.neumann_rotate(x, packed, rotation.block_size, rotation.terms)
        if delta is None:
            delta = self.kept_or_built(self.sequence, self._build, None if x.is_cpu else x.dtype)
        return F.rotate(x, delta)

    def changing_generators(self) -> Tensor | None:
        """The effective generators ``(num_blocks, b(b−1)/2)``, where they and the Neumann series alone make this
        pass's rotation; None where it is cached, exact, has dropout, or is a product of several."""
        if len(self.sequence) != 1 or self._in_hand() is not None:
            return None
        (name,) = self.sequence
        rotation = self.rotations[name]
        plain = rotation.parametrization == "cayley_neumann" and not (self.training and rotation.dropout)
        generators = self.generators_of(self.sequence)
        if not (plain and self._changes(self.sequence, generators)):
            return None
        packed = rotation.effective(generators[0])
        return packed.expand(rotation.num_blocks, -1) if rotation.block_share else packed

    # ------------------------------------------------------------------------------------------ module plumbing

    def train(self, mode: bool = True) -> OFTLayer:
        self._cache = self.handed = None
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
        without_values = [name for name, parameter in self.generators.items() if parameter.is_meta]
        super()._apply(keep_wide, recurse)
        for name in without_values:  # to_empty has left what was in the memory
            self.reset_parameters(name)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "rows": None, "handed": None}

    def extra_repr(self) -> str:
        described = ", ".join(f"{name}: {self.rotations[name]}" for name in self.sequence) or "no active adapter"
        if len(self.sequence) == 1:
            described = str(self.rotation)
        state = "merged" if self.merged else "" if self.enabled else "disabled"
        return f"{described}{state and ', ' + state}"
