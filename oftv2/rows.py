"""One batch whose rows go through different adapters, or through none.

Each adapted layer is told what the rows go through in it, and rotates them with one grouped operator: its own adapters'
``Δ`` stacked, and an index for each row. The weight is left alone, so a layer's other forms are not used.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from .adapters import check_sequence, check_unmerged
from .base import OFTLayer
from .errors import AdapterError
from .repeats import Repeats, following_generate
from .rotation import Rotation
from .state import get_state, oft_layers

_CHECKPOINT = "_gradient_checkpointing_func"  # where transformers' modules keep what they checkpoint with
_ENTRY = threading.Lock()


@contextmanager
def adapters_per_row(
    model: nn.Module, rows: Sequence[str | Sequence[str] | None], *, repeated: bool = False
) -> Iterator[nn.Module]:
    """Within the context, each row of a batch goes through an adapter of its own, or through the base model alone.

    Every adapted layer rotates all rows in one call; a row's result is what the model gives with that adapter alone, to
    rounding. Inputs are to have the rows as their first dimension, as many as are named; transformers' ``generate``
    may repeat each for its beams and return sequences. What trains is left as it is: after
    ``set_adapter(model, ["a", "b"])`` both do, each from its own rows.

    Args:
        model (nn.Module): a wrapped model.
        rows (Sequence[str | Sequence[str] | None]): for each row an adapter, several that rotate one after the other
            as in :func:`oftv2.set_adapter`, or ``None`` for the base model. Which ones are active does not matter.
        repeated (bool): take inputs of any multiple of the rows for ones in which each row is repeated in place, as by
            ``repeat_interleave``: for models that make several rows of one, such as one for each image of a row.

    Yields:
        nn.Module: the same object. Contexts may be nested; the inner one counts. It holds in every thread: requests
        that threads serve take turns, or share a batch.

    Raises:
        AdapterError: a model that is not wrapped, merged, or within ``disable_adapter``; unknown names; adapters (the
            active ones among them) with base parameters that they train in full, which rows cannot have each their
            own of; layers that keep the batch in their second dimension; another thread that is in such a context of
            this model. Within the context: an input with another number of rows (experts that get some of the tokens;
            batches laid out flat), or a checkpoint that is not transformers' own, whose recomputation could come after
            the context.
    """
    with ExitStack() as stack:
        with _ENTRY:  # no other thread comes in between the look for one and its being seen
            batch = _Batch(model, _checked(model, rows), repeated)
            stack.enter_context(batch.entered())
        for module in model.modules():
            stack.enter_context(following_generate(module, batch.repeats))
            if _CHECKPOINT in vars(module):
                function = vars(module)[_CHECKPOINT]
                stack.callback(setattr, module, _CHECKPOINT, function)
                setattr(module, _CHECKPOINT, batch.replaying(function))
        yield model


def _checked(model: nn.Module, rows: Sequence[str | Sequence[str] | None]) -> list[tuple[str, ...]]:
    """The adapters of each row, in order; AdapterError where they cannot be used row by row."""
    state = get_state(model)
    check_unmerged(model)
    if any(layer.rows is not None and layer.rows.thread != threading.get_ident() for _, layer in oft_layers(model)):
        raise AdapterError(
            "another thread is within adapters_per_row of this model, and would go by these rows: let them take turns "
            "(a threading.Lock around the context), or put the rows of both into one batch"
        )
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not rows:
        raise AdapterError(f"adapters_per_row takes a sequence with an entry for each row, not {rows!r}")
    wrong = [entry for entry in rows if not (entry is None or isinstance(entry, (str, Sequence)))]
    if wrong:
        raise AdapterError(f"adapters_per_row takes names, sequences of names and None for rows, not {wrong[0]!r}")
    names = [() if entry is None else check_sequence(model, entry) for entry in rows]
    for adapter in dict.fromkeys([*state.sequence, *(name for own in names for name in own)]):
        if state.trained[adapter]:
            raise AdapterError(
                f"the adapter {adapter!r} trains {state.trained[adapter][0]} in full (modules_to_save, bias), and all "
                "rows of a batch share that parameter: leave its rows out, and activate another adapter first"
            )
    second = [name for name, module in model.named_modules() if getattr(module, "batch_first", True) is False]
    if second:
        raise AdapterError(f"{second[0]} has batch_first=False: rows are to be the first dimension of every input")
    return names


class _Batch:
    """What the rows of a batch go through in every layer of a model."""

    def __init__(self, model: nn.Module, rows: Sequence[tuple[str, ...]], repeated: bool) -> None:
        self.repeats = Repeats(any_number=repeated)
        alike: dict[Any, LayerRows] = {}  # layers with the same adapters share an index
        self.layers: dict[OFTLayer, LayerRows] = {}
        for _, layer in oft_layers(model):
            device = next(iter(layer.generators.values())).device
            key = device, tuple(name in layer.rotations for name in get_state(model).configs)
            if key not in alike:
                alike[key] = LayerRows.of(layer, rows, device, self.repeats)
            self.layers[layer] = alike[key]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within the context, the layers go by these rows."""
        before = {layer: layer.rows for layer in self.layers}
        try:
            for layer, rows in self.layers.items():
                layer.use_rows(rows)
            yield
        finally:
            for layer, were in before.items():
                layer.use_rows(were)

    def replaying(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpoint function whose functions go by these rows when they are recomputed, too."""

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():  # a graph holds what is recomputed
                function = _Replayed(self, function)
            return checkpoint(function, *args, **kwargs)

        return run


@dataclass
class _Replayed:
    """A checkpointed function: called in the forward pass, and again in the backward one, when the context is left."""

    batch: _Batch
    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if all(layer.rows is rows for layer, rows in self.batch.layers.items()):
            return self.function(*args, **kwargs)
        with self.batch.entered():
            return self.function(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class LayerRows:
    """What the rows of a batch go through in one layer, as far as it has their adapters.

    Attributes:
        sequences: the different sequences of adapters, sorted; none is empty.
        places: for each row, which of them; −1 where the layer leaves it as it is.
        index: ``places`` as a tensor ``(B,)``. Compiled graphs depend on no more of the places than their number.
        repeats: how many times each row may be there.
        thread: which one entered the context.
    """

    sequences: tuple[tuple[str, ...], ...]
    places: tuple[int, ...]
    index: Tensor
    repeats: Repeats
    thread: int = field(default_factory=threading.get_ident)

    @classmethod
    def of(cls, layer: OFTLayer, rows: Sequence[tuple[str, ...]], device: torch.device, repeats: Repeats) -> LayerRows:
        """For rows of these adapters."""
        own = [tuple(name for name in names if name in layer.rotations) for names in rows]
        sequences = tuple(sorted({names for names in own if names}))
        places = tuple(sequences.index(names) if names else -1 for names in own)
        return cls(sequences, places, torch.tensor(places, device=device), repeats)

    def rotate(self, layer: OFTLayer, x: Tensor) -> Tensor:
        """Activations ``(B·n, ..., d)``, ``n`` for each row one after the other, rotated row by row."""
        repeats = self._repeats(layer, x)
        if not self.sequences:
            return x
        by_row = x.reshape(self.index.shape[0], repeats * x.shape[1:-1].numel(), x.shape[-1])
        return F.rotate_rows(by_row, self.delta(layer, x), self.index).view(x.shape)

    def each(self, layer: OFTLayer, x: Tensor, call: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """``call(rows, Δ)`` for the rows of each sequence, Δ being None where there is none, in the rows' order."""
        repeats = self._repeats(layer, x)
        delta = self.delta(layer, x) if self.sequences else None
        outputs, order = [], []
        for place in dict.fromkeys(self.places):
            own = [row * repeats + i for row, at in enumerate(self.places) if at == place for i in range(repeats)]
            part = x.index_select(0, torch.tensor(own, device=x.device))
            outputs.append(call(part, None if delta is None or place < 0 else delta[place]))
            order += own
        return torch.cat(outputs).index_select(0, torch.tensor(order, device=x.device).argsort())

    def delta(self, layer: OFTLayer, x: Tensor) -> Tensor:
        """Δ of the different sequences, ``(A, r, b, b)``, ``b`` the least common multiple of their block sizes.

        What a GPU keeps of it is in the dtype of ``x`` alone: with many adapters it is large.
        """
        names = list(dict.fromkeys(name for sequence in self.sequences for name in sequence))
        rotations = [layer.rotations[name] for name in names]

        def build(*, dropout: bool) -> Tensor:
            made = Rotation.deltas(rotations, [layer.generators[name] for name in names])
            if dropout:
                made = [rotation.dropped(delta) for rotation, delta in zip(rotations, made, strict=True)]
            own = dict(zip(names, made, strict=True))
            products = [F.compose([own[name] for name in sequence]) for sequence in self.sequences]
            block_size = math.lcm(*(delta.shape[-1] for delta in products))
            stacked = torch.stack([F.in_blocks_of(delta, block_size) for delta in products])
            return stacked if x.is_cpu or stacked.requires_grad else stacked.to(x.dtype)

        kept = layer.kept_or_built(names, build)
        if x.is_cpu or kept.requires_grad or kept.dtype == x.dtype:
            return kept
        layer.use_rows(self)  # kept for activations of another dtype
        return layer.kept_or_built(names, build)

    def _repeats(self, layer: OFTLayer, x: Tensor) -> int:
        """How many times each row is there; AdapterError for inputs that do not have the rows first."""
        count, given = self.index.shape[0], x.shape[0] if x.dim() > 1 else 0
        routed = x.dim() == 2 and "experts" in layer.name.split(".")
        if given % count or (given != count and x.dim() == 2) or x.dim() < 2 or routed:
            raise AdapterError(
                f"{layer.name}: its input of {tuple(x.shape)} does not have the {count} rows of adapters_per_row as "
                "its first dimension; name an adapter for each row of the batch. Layers that see rows in another "
                "order, as experts do, cannot be used with it: call the model once for each adapter instead"
            )
        repeats = given // count
        if not self.repeats.allow(repeats):
            raise AdapterError(
                f"{layer.name}: its input of {tuple(x.shape)} has {repeats} times the {count} rows of "
                "adapters_per_row: name an adapter for each row of the batch. Where a model makes several rows of one, "
                "in place, adapters_per_row(…, repeated=True) takes them; generate within the context does not need it"
            )
        if (torch.is_grad_enabled() or layer.training) and not torch.compiler.is_compiling():
            _refuse_checkpoints(layer.name)
        return repeats


def _refuse_checkpoints(name: str) -> None:
    """Raises AdapterError in a checkpointed function that would not know the rows when it is recomputed."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _Replayed.__call__.__code__:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise AdapterError(
                f"{name}: adapters_per_row within torch.utils.checkpoint: the layer is computed again in the backward "
                "pass, where the rows are no longer known. Transformers' gradient_checkpointing_enable(), called "
                "before adapters_per_row, works; or train without checkpoints, or one adapter at a time"
            )
        frame = frame.f_back  # type: ignore[assignment]
