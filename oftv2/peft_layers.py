"""PEFT's OFT layers on this library's operators: the classes that take the place of PEFT's own in a model.

Only ``forward`` differs. Parameters, their names, merging, saving and loading stay PEFT's; so does what PEFT gets
wrong, unless a layer ``repairs`` it. Imported only where peft is; :mod:`oftv2.peft_acceleration` is the way in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.oft.layer import Conv2d, Embedding, Linear, MultiplicativeDropoutLayer, OFTLayer, OFTRotationModule
from peft.tuners.oft.model import OFTModel
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from . import functional as F
from .conv import convolved
from .cost_model import INPUT
from .layers import OFTLinear, unhooked
from .peft_acceleration import accelerating
from .peft_config import series
from .quant import QuantOFTLinear
from .rotation import Rotation


class AcceleratedRotation(OFTRotationModule):
    """``x R``, with R made anew in every call, as PEFT does.

    Activations keep their dtype: sums are taken in float32 and rounded once, to what PEFT rounds its float32 copy to.
    """

    settings: Rotation
    repairs = False
    dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        image = self.kernel_size != (0, 0)
        if x.dim() != 4 or (self.repairs and not image):
            return self.rotate(x)
        if not image:
            return super().forward(x)  # PEFT takes it for an image, and fails
        if self.kernel_size == (1, 1):
            return self.rotate(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        wide = x.to(self.weight.dtype)  # PEFT adds overlapping patches up before it rounds
        return self._fold(self.rotate(self._unfold(wide)), x.shape).to(x.dtype)

    def rotate(self, x: Tensor) -> Tensor:
        """``x R`` over the last dimension."""
        settings = self.settings
        series_alone = settings.parametrization == "cayley_neumann" and not (self.training and self.dropout)
        if series_alone and F.makes_rotation_on_the_way(x, settings.block_size):
            packed = settings.effective(self.generators()).expand(settings.num_blocks, -1)
            return F.neumann_rotate(x, packed, settings.block_size, settings.terms)
        return F.rotate(x, self.delta())

    def delta(self) -> Tensor:
        """``Δ = R − I`` of ``(r, b, b)``, float32 or wider."""
        delta = self.settings.delta(self.generators())
        blocks = self.weight.shape[0]
        if self.training and self.dropout and blocks > 1:  # what PEFT's MultiplicativeDropoutLayer would do
            dropped = torch.randperm(blocks, device=delta.device) < int(self.dropout * blocks)
            delta = delta.masked_fill(dropped[:, None, None], 0)
        return delta

    def generators(self) -> Tensor:
        """The weight, with the sign that it has in this library: PEFT's exact transform is the transpose."""
        weight: Tensor = self.weight
        if self.coft:  # PEFT projects the parameter itself; a copy goes into the graph, so that the next call may too
            with torch.no_grad():
                self.weight.copy_(self._project_batch(self.weight, eps=self.eps))
            weight = weight.clone()
        return weight if self.use_cayley_neumann else -weight


class _Accelerated(nn.Module, OFTLayer):  # in the order of PEFT's, or Python refuses to exchange the classes
    """What the three kinds of layers share."""

    repairs = False

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """``x`` as it is: the operators take 16 bit. Between two rotations PEFT does not round, though."""
        return x if len(self.active_adapters) == 1 else super()._cast_input_dtype(x, dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if self.repairs and not isinstance(self, Embedding):
            # x R₁ R₂ Wᵀ: the last rotation comes first to the weight
            adapter_names = check_adapters_to_merge(self, adapter_names)[::-1]
        super().merge(safe_merge, adapter_names)


class AcceleratedLinear(_Accelerated, Linear):
    """PEFT's linear layer, in the cheapest of this library's forms."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rotation = None if args or kwargs or torch.compiler.is_compiling() else self._rotation()
        if rotation is not None and (x.dim() != 4 or self.repairs):
            dense = type(self.base_layer) is nn.Linear
            view: Any = (_LinearView if dense else _QuantizedView)(self.base_layer, rotation)
            form = view.choose_form(x)
            if form != INPUT:
                return view.call_in_form(form, x)
        return super().forward(x, *args, **kwargs)

    def _rotation(self) -> AcceleratedRotation | None:
        """The one rotation of this call, if it may go into the weight: not with several, or where hooks watch it."""
        names = [name for name in self.active_adapters if name in self.oft_R]
        if self.disable_adapters or self.merged or len(names) != 1:
            return None
        rotation = self.oft_R[names[0]]
        return rotation if type(rotation) is AcceleratedRotation and unhooked(rotation) else None


class AcceleratedEmbedding(_Accelerated, Embedding):
    """PEFT's embedding."""


class AcceleratedConv2d(_Accelerated, Conv2d):
    """PEFT's convolution; one that ``repairs`` rotates its kernels, as merging does, and not overlapping patches."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        if self.disable_adapters or self.merged or not self.repairs or pointwise(base):
            return super().forward(x, *args, **kwargs)
        rows = base.weight.flatten(1)
        for name in self.active_adapters[::-1]:
            if name in self.oft_R:
                rotation: Any = self.oft_R[name]
                rows = F.rotate(rows, rotation.delta().mT)
        return convolved(base, x, rows.view(base.weight.shape)).to(x.dtype)


class _View:
    """A layer of PEFT's as one of this library's, for one call: it chooses the form, and computes it.

    It is registered nowhere and keeps no state, so it is spared the setting up of a module.
    """

    def __init__(self, base_layer: nn.Module, rotation: AcceleratedRotation) -> None:
        self.__dict__.update(_modules={"base_layer": base_layer}, peft_rotation=rotation)

    @property
    def block_size(self) -> int:
        return self.__dict__["peft_rotation"].settings.block_size

    def changing_generators(self) -> None:
        """PEFT's rotations are made as PEFT makes them."""

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.__dict__["peft_rotation"].delta()


class _LinearView(_View, OFTLinear): ...


class _QuantizedView(_View, QuantOFTLinear): ...


# ---------------------------------------------------------------------------------------------- which, and whether


def pointwise(base_layer: Any) -> bool:
    """Whether a convolution's patches are single pixels."""
    return tuple(base_layer.kernel_size) == (1, 1)


def rotations(layer: Any) -> Iterator[tuple[str, Any]]:
    """The rotations of a layer, by adapter name."""
    for held in (layer.oft_R, getattr(layer, "oft_embedding_R", {})):
        yield from held.items()


def obstacle(layer: Any, *, repair: bool) -> str | None:
    """Why a layer cannot be accelerated, if so."""
    if not _agrees_with_peft():
        return "this PEFT computes another rotation than versions 0.19 to 0.21 do, with which this was written"
    for module in (layer, *(rotation for _, rotation in rotations(layer))):
        if "forward" in module.__dict__:
            return (
                f"forward of its {type(module).__name__} was replaced on the instance, as accelerate's dispatch_model "
                "does; accelerate first"
            )
    for adapter, rotation in rotations(layer):
        if (why := _rotation_obstacle(rotation)) is not None:
            return f"adapter {adapter!r}: {why}"
    base = layer.base_layer
    if not repair or not isinstance(layer, Conv2d) or pointwise(base):
        return None
    if type(base) is nn.Conv2d and base.groups == 1 and unhooked(base):
        return None
    return "repair=True rotates its kernels, and that takes an ordinary convolution, without groups or hooks"


def _rotation_obstacle(rotation: Any) -> str | None:
    if type(rotation) not in (OFTRotationModule, AcceleratedRotation):
        return f"its rotation is a {type(rotation).__name__}, of which is not known what it computes"
    if rotation.block_size < 2:
        return f"a block size of {rotation.block_size} rotates nothing"
    try:
        series(rotation.use_cayley_neumann, rotation.num_cayley_neumann_terms)
    except ValueError as error:
        return str(error)
    return None


@functools.cache
def _agrees_with_peft() -> bool:
    """Whether PEFT's rotation is the one that is known here: tried out, for its series changed once (in 0.18)."""
    for neumann, terms in ((True, 2), (True, 3), (True, 5), (True, 6), (False, 5)):
        with torch.device("cpu"), torch.no_grad():
            rotation: Any = OFTRotationModule(2, 6, 4, 8, use_cayley_neumann=neumann, num_cayley_neumann_terms=terms)
            # past what puts parameters on the meta device as they are registered: loading a model may be going on
            rotation._parameters["weight"] = torch.linspace(-0.3, 0.4, 12, dtype=torch.float64).view(2, 6)
            x = torch.linspace(-1, 2, 24, dtype=torch.float64).view(3, 8)
            theirs = rotation(x)
            _accelerate_rotation(rotation)
            if not torch.allclose(rotation(x), theirs, rtol=1e-9):
                return False
    return True


# ---------------------------------------------------------------------------------------------- there and back


class AcceleratedOFTModel(OFTModel):
    """PEFT's tuner; what adapters that come later put into the model is accelerated too."""

    _create_and_replace = accelerating(OFTModel._create_and_replace)


_FASTER: dict[type, type] = {
    OFTRotationModule: AcceleratedRotation,
    Linear: AcceleratedLinear,
    Embedding: AcceleratedEmbedding,
    Conv2d: AcceleratedConv2d,
    OFTModel: AcceleratedOFTModel,
}
_PLAIN = {faster: plain for plain, faster in _FASTER.items()}
for _plain, _faster in _FASTER.items():
    _faster.__name__ = _plain.__name__  # which PEFT's reports show; pickling goes by the qualified name


def plain_class(module: Any) -> type:
    """PEFT's class in place of which ``module``'s stands."""
    return _PLAIN.get(type(module), type(module))


def accelerate(layer: Any, *, repair: bool = False) -> None:
    """Puts a layer without an obstacle on this library's operators."""
    for adapter, rotation in rotations(layer):
        _accelerate_rotation(rotation)
        asked = dict(layer.oft_dropout.items()).get(adapter)
        rotation.repairs = repair
        rotation.dropout = asked.p if repair and isinstance(asked, MultiplicativeDropoutLayer) else 0.0
    # PEFT before 0.21 has classes of its own for quantized layers: of these the rotations alone are swapped
    layer.__class__ = _FASTER.get(type(layer), type(layer))
    layer.repairs = repair


def _accelerate_rotation(rotation: Any) -> None:
    fields = series(rotation.use_cayley_neumann, rotation.num_cayley_neumann_terms)
    rotation.settings = Rotation(
        block_size=rotation.block_size,
        num_blocks=rotation.in_features // rotation.block_size,
        terms=fields.get("neumann_terms", 0),
        parametrization=fields["parametrization"],
        block_share=rotation.block_share,
    )
    rotation.__class__ = AcceleratedRotation


def restore(layer: Any) -> None:
    """Gives a layer back to PEFT."""
    for module in (layer, *(rotation for _, rotation in rotations(layer))):
        module.__class__ = plain_class(module)
        for attribute in ("settings", "repairs", "dropout"):
            module.__dict__.pop(attribute, None)


def set_tuner(tuner: Any, enabled: bool, *, repair: bool) -> None:
    """Has PEFT's tuner accelerate what adapters that come later put into its model, or no longer."""
    tuner.__class__ = _FASTER.get(type(tuner), type(tuner)) if enabled else plain_class(tuner)
    tuner.__dict__.pop("repairs", None)
    if repair:
        tuner.repairs = True
