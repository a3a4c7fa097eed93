"""What becomes of every tensor of a checkpoint that an adapter is merged into; settled before anything is written."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapter_file import AdapterFile
from .base_check import compare_sketches, sketch_weight, sketched_rows
from .checkpoint import Checkpoint
from .checkpoint_config import Changes, class_notes, merged_config, with_labels
from .checkpoint_names import StoredNames, empty_model, load_config, model_class, stored_names
from .errors import listed, refuse
from .experts import OFTExperts
from .fitting import check_tensors, check_trained, compare_plain
from .merged_before import merged_before, with_adapter
from .quant import QuantOFTLinear
from .safetensors_stream import DTYPES, Entry
from .single_file import located
from .state import persistent_buffers, plain_parameter
from .targets import Target

_IN_MEMORY = "Merge in memory: load the model, oftv2.load_adapter, oftv2.merge, save_pretrained"


@dataclass(frozen=True)
class Piece:
    """Where one tensor of the merged checkpoint comes from.

    Attributes:
        source: the base's tensor, or None of a head that the base lacks.
        trained: the adapter's parameter that takes its place.
        target: the adapted layer whose rotation it gets.
        entry: dtype, shape and size of the result.
    """

    source: str | None
    trained: str | None
    target: Target | None
    entry: Entry

    @property
    def copied(self) -> bool:
        """Whether only the dtype may change."""
        return self.trained is None and self.target is None


@dataclass(frozen=True)
class Plan:
    """A merge that fits.

    Attributes:
        adapter: the adapter under the names of the model.
        files: by file, what each of its tensors is.
        config: what the merged ``config.json`` holds.
        notes: what the user should know.
    """

    adapter: AdapterFile
    files: dict[str, dict[str, Piece]]
    config: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(piece.entry.size for pieces in self.files.values() for piece in pieces.values())


def make_plan(base: Checkpoint, adapter: AdapterFile, dtype: torch.dtype | None, *, check_base: bool) -> Plan:
    """Finds every adapted layer and every fully trained parameter in the checkpoint.

    Raises:
        AdapterError: one error that lists all that does not fit.
    """
    title = f"the adapter does not fit {base.folder}, and nothing was written"
    refuse(title, check_tensors(adapter))
    config = load_config(base.folder)
    cls = model_class(config, adapter)
    config, model = with_labels(cls, config, adapter)
    adapter = located(adapter, model)
    problems, targets = compare_plain(model, adapter)
    untied = dataclasses.replace(adapter, apart=())  # copies trained apart find a place of their own here
    refuse(title, problems + check_trained(model, untied))
    names = stored_names(model, base.where)
    draft = _Draft(base, adapter, names, model, targets)
    refuse(title, draft.problems)
    if check_base:
        found = merged_before(base.config, adapter) or _other_base(base, adapter, draft)
        refuse(title, [f"{problem}; --no-check-base merges it all the same" for problem in found])
    dtype = dtype or base.dequantized
    notes = [*adapter.notes, *_quantized_notes(base, adapter, dtype)]
    changes = Changes(dtype)
    if draft.apart:
        separate = _untied(cls, config)
        refuse(title, _still_tied(cls, config, draft.apart, separate))
        draft.store_apart(separate)
        refuse(title, draft.problems)
        changes = dataclasses.replace(changes, untied=True)
        notes.append(
            f"{', '.join(sorted(draft.apart))} were tied and are two tensors now: tie_word_embeddings is false"
        )
    pieces = {key: Piece(key, None, None, base.entry(key)) for key in base.where} | draft.pieces
    added = [key for key in pieces if key not in base.where]
    if added and cls.__name__ != (config.architectures or [None])[0]:
        changes = dataclasses.replace(changes, architecture=cls.__name__, labels=config.num_labels)
        state = model.state_dict()
        dropped = [key for key, name in names.parameters.items() if name not in state]
        pieces = {key: piece for key, piece in pieces.items() if key not in dropped}
        notes += class_notes(cls, config, added, dropped)
    if not names.converted:
        notes += _missing(model, names, pieces)
    last = list(base.files)[-1]
    files: dict[str, dict[str, Piece]] = {name: {} for name in base.files}
    for key, piece in pieces.items():
        file = base.where[key].path.name if key in base.where else last
        files[file][key] = dataclasses.replace(piece, entry=_entry_in(piece.entry, dtype))
    files = {name: held for name, held in files.items() if held}
    return Plan(adapter, files, with_adapter(merged_config(base.config, changes), adapter), tuple(notes))


class _Draft:
    """The tensors that are not copied as they are: ``pieces`` by name, what is wrong, and what is no longer tied."""

    def __init__(
        self, base: Checkpoint, adapter: AdapterFile, names: StoredNames, model: nn.Module, targets: list[Target]
    ) -> None:
        self.base, self.adapter, self.names, self.model = base, adapter, names, model
        self.pieces: dict[str, Piece] = {}
        self.problems = [
            f"{target.name} is a {type(target.module).__name__}, and how its weight is stored is not known"
            for target in targets
            if target.layer_class is QuantOFTLinear
        ]
        experts = [target.name for target in targets if target.layer_class is OFTExperts]
        self.problems += [
            f"{name} are experts with stacked weights, which stay as they are here: {_IN_MEMORY}" for name in experts
        ]
        self.apart: list[str] = []
        self.sources: dict[str, str | None] = {}
        self._targets = {id(target.module): target for target in targets}
        shared: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        for name, buffer in persistent_buffers(model).items():
            if buffer.is_floating_point():  # a count of batches stays that of the base
                shared.setdefault(id(buffer), []).append(name)
        self._groups = list(shared.values())
        for group in self._groups:
            self._add(group)

    def _add(self, group: list[str]) -> None:
        """One parameter of the model, under all of its names."""
        together = next(
            (name for name in group if name in self.adapter.trained and name not in self.adapter.apart), None
        )
        trained = {name: name if name in self.adapter.apart else together for name in group}
        targets = {name: self._target(name) for name in group}
        if not any(trained.values()) and not any(targets.values()):
            return
        keys = [self.names.keys[name] for name in group if name in self.names.keys]
        source = keys[0] if keys else None
        if source is None and not all(trained.values()):
            self.problems.append(self._not_found(group[0]))
            return
        if source is not None and (problem := self._unfit(group[0], source)):
            self.problems.append(problem)
            return
        if any(not self._equal(source, key) for key in keys[1:]):
            self.problems.append(f"{' and '.join(keys)} are one parameter in the model, and differ in the checkpoint")
            return
        self.sources |= {target.name: source for target in targets.values() if target is not None}
        if len({(trained[name], id(targets[name])) for name in group}) == 1:
            for key in keys or group[:1]:
                self._put(key, source, trained[group[0]], targets[group[0]])
            return
        self.apart += group
        for name in group:
            self._put(self.names.keys.get(name, name), source, trained[name], targets[name])

    def store_apart(self, separate: dict[str, nn.Parameter]) -> None:
        """Gives all else that is one parameter in the model, and several in ``separate``, a tensor under each name."""
        for group in self._groups:
            source = next((self.names.keys[name] for name in group if name in self.names.keys), None)
            if source is None or len({id(separate.get(name)) for name in group}) == 1:
                continue
            same = self.pieces.get(source, Piece(source, None, None, self.base.entry(source)))
            for name in group:
                if name not in self.names.keys and name not in self.pieces:
                    self._put(name, source, same.trained, same.target)

    def _put(self, key: str, source: str | None, trained: str | None, target: Target | None) -> None:
        if key not in self.base.where and key not in self.names.loads_as_named:
            self.problems.append(f"{key}: transformers renames it on loading, so it cannot be added under this name")
            return
        if source is None:
            assert trained is not None
            entry = Entry.of(_usual_dtype(self.base), tuple(self.adapter.parameter(trained).shape))
        else:
            entry = self.base.entry(source)
        self.pieces[key] = Piece(source, trained, target, entry)

    def _target(self, name: str) -> Target | None:
        parent, _, leaf = name.rpartition(".")
        return self._targets.get(id(self.model.get_submodule(parent))) if leaf == "weight" else None

    def _not_found(self, name: str) -> str:
        why = (
            f"transformers converts weights of this {type(self.model).__name__} on loading, this one among them"
            if self.names.converted
            else "no tensor is loaded into it"
        )
        return f"{name} is not in the checkpoint under a name of its own: {why}. {_IN_MEMORY}"

    def _unfit(self, name: str, key: str) -> str | None:
        entry, shape = self.base.entry(key), tuple(plain_parameter(self.model, name).shape)
        if entry.shape != shape:
            return f"{key} has shape {entry.shape} in the checkpoint, and the model of its configuration has {shape}"
        if entry.dtype not in DTYPES:
            return f"{key} is stored as {entry.dtype}: only 16, 32 and 64-bit floating point can be merged into"
        return None

    def _equal(self, one: str | None, other: str) -> bool:
        assert one is not None
        if self.base.entry(one) != self.base.entry(other):
            return False
        first, second = (self.base.where[key].pieces(key) for key in (one, other))
        return all(a == b for a, b in zip(first, second, strict=True))


def _usual_dtype(base: Checkpoint) -> torch.dtype:
    """The dtype of most of the floating-point weights."""
    sizes: Counter[str] = Counter()
    for key in base.where:
        sizes[base.entry(key).dtype] += math.prod(base.entry(key).shape)
    return next((DTYPES[name] for name, _ in sizes.most_common() if name in DTYPES), torch.float32)


def _entry_in(entry: Entry, dtype: torch.dtype | None) -> Entry:
    return entry if dtype is None or entry.dtype not in DTYPES else Entry.of(dtype, entry.shape)


def _other_base(base: Checkpoint, adapter: AdapterFile, draft: _Draft) -> list[str]:
    def ours(layer: str) -> dict[str, Any] | None:
        source = draft.sources.get(layer)
        if source is None:
            return None
        file, rows = base.where[source], sketched_rows(base.entry(source).shape[0])
        weight = torch.cat([file.read(source, slice(row, row + 1)) for row in rows])
        return sketch_weight(weight, quantized=base.dequantized is not None)

    return compare_sketches(adapter.base, ours)


def _quantized_notes(base: Checkpoint, adapter: AdapterFile, dtype: torch.dtype | None) -> list[str]:
    if base.dequantized is not None:
        return [f"the base is quantized; the merged model is not, and has weights of {dtype}"]
    if not any(sketch["quantized"] for sketch in adapter.base["sketches"].values()):
        return []
    return [
        "the adapter was trained on a quantized base, and is merged into weights that are not: common, and usually "
        "good, but not the very model that was trained, whose weights differ from these by the quantization's rounding "
        "(about 10% for 4 bit). For that one, give the quantized model as BASE (saved with save_pretrained)"
    ]


def _untied(cls: Any, config: Any) -> dict[str, nn.Parameter]:
    """The parameters of the model by each of their names, where the configuration says that none are tied."""
    untied = copy.deepcopy(config)
    untied.get_text_config().tie_word_embeddings = untied.tie_word_embeddings = False
    return dict(empty_model(cls, untied).named_parameters(remove_duplicate=False))


def _still_tied(cls: Any, config: Any, apart: list[str], separate: dict[str, nn.Parameter]) -> list[str]:
    """What keeps weights together, though the adapter makes them different."""
    all_apart = len({id(separate[name]) for name in apart}) == len(apart)
    if all_apart and not config.is_encoder_decoder:  # T5 and its kin scale their outputs by tie_word_embeddings
        return []
    return [
        f"{', '.join(apart)} are one tensor in this {cls.__name__}, and the adapter changes some of them alone: such a "
        "model cannot be written without tying them again. Leave the adapter unmerged"
    ]


def _missing(model: nn.Module, names: StoredNames, pieces: dict[str, Piece]) -> list[str]:
    """Parameters that neither the base nor the adapter holds, of which transformers makes up values."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    present = {id(parameters[name]) for name in (*names.keys, *pieces) if name in parameters}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in present]
    return [f"neither the base nor the adapter holds {listed(missing)}: transformers fills it anew"] if missing else []
