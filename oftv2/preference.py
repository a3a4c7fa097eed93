"""The reference model of preference training (DPO and its like): the policy itself, without what it is learning.

TRL's trainers would load the whole base model a second time, and not quantized at that, unless the policy is a
``PeftModel`` or they are given a reference. A wrapped model is therefore given one by itself, as long as TRL is
imported before the model is wrapped; ``DPOTrainer(model, ref_model=reference_model(model), …)`` says the same in so
many words. ``GRPOTrainer`` and ``RLOOTrainer`` take no ``ref_model``: they get it where they would load theirs.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .errors import AdapterError
from .patching import replace_once
from .sharding import check_unsharded
from .state import active_parameters, find_state, get_state, oft_layers
from .trained import base_values


class ReferenceModel(nn.Module):
    """A view of a wrapped model as it was when the view was made; it has no parameters of its own.

    A fresh adapter is switched off for the time of a call, which costs nothing. Of an adapter that has learned
    something already, such as from supervised finetuning, the generators (and ``modules_to_save``) are copied, and
    stand in for the policy's during a call.

    Args:
        policy (nn.Module): a wrapped model.

    Raises:
        AdapterError: the model is not wrapped.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.__dict__["policy"] = policy  # no submodule: its parameters are the policy's, its mode too
        check_unsharded(policy, "make its reference_model before")
        state = get_state(policy)
        in_full = active_parameters(policy)
        layers = [layer for _, layer in oft_layers(policy)]
        fresh = not any(packed.any() for layer in layers for packed in layer.generators_of(layer.sequence))
        fresh = fresh and all(state.originals[name].equal(p.to(state.originals[name])) for name, p in in_full.items())
        rotations = [(layer, layer.sequence, _frozen_copy(layer.generators)) for layer in layers]
        self.__dict__["rotations"] = [] if fresh else rotations
        self.__dict__["in_full"] = {} if fresh else {name: p.detach().clone() for name, p in in_full.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's own call, whatever ``forward`` a trainer puts on the view: it puts the same on the policy."""
        with self._as_at_the_start():
            return self.policy(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattr__(name)
        return getattr(self.policy, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's: TRL hashes it to know for which model it kept log-probabilities."""
        return self.policy.state_dict(*args, **kwargs)

    @contextmanager
    def _as_at_the_start(self) -> Iterator[None]:
        from .adapter import disable_adapter  # which imports wrap, which imports pretrained, which imports this

        if not self.rotations:
            with disable_adapter(self.policy):
                yield
            return
        now = [(layer, layer.sequence, layer.generators, layer.training) for layer, *_ in self.rotations]
        with base_values(self.policy, self.in_full):
            try:
                for layer, sequence, generators in self.rotations:
                    layer.sequence = sequence
                    # Another module, not other values: FSDP puts its own tensors into the modules that it knows.
                    layer.generators = generators.to(next(layer.generators.parameters()).device)
                    layer.training = False  # no dropout of blocks
                yield
            finally:
                for layer, sequence, generators, mode in now:
                    layer.sequence, layer.generators, layer.training = sequence, generators, mode


def _frozen_copy(generators: nn.ParameterDict) -> nn.ParameterDict:
    return nn.ParameterDict(
        {name: nn.Parameter(packed.detach().clone(), requires_grad=False) for name, packed in generators.items()}
    )


def reference_model(model: nn.Module) -> ReferenceModel:
    """The ``ref_model`` for a preference trainer: ``model`` as it is now, without a second copy of its weights.

    Args:
        model (nn.Module): a wrapped model.

    Raises:
        AdapterError: the model is not wrapped.
    """
    return ReferenceModel(model)


def serve_trl() -> None:
    """Lets TRL's trainers that want a reference, if TRL is imported, take :func:`reference_model` by themselves."""
    if (trl := sys.modules.get("trl")) is None:
        return
    for name in ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer"):
        try:
            trainer_class = getattr(trl, name)
        except (ImportError, RuntimeError, AttributeError):  # what cannot be imported here cannot be used either
            continue
        module = sys.modules[trainer_class.__module__]
        replace_once(trainer_class, "__init__", functools.partial(_with_reference, module))


def _with_reference(module: Any, original: Any, *args: Any, **kwargs: Any) -> None:
    """The ``__init__`` of a trainer in ``module``, giving a wrapped model a reference where the caller gives none."""
    signature = inspect.signature(original)
    bound = signature.bind(*args, **kwargs)
    given = bound.arguments
    model = given.get("model")
    if not isinstance(model, nn.Module) or find_state(model) is None:
        original(*args, **kwargs)
        return
    _check_arguments(given.get("args"), has_reference=bool(given.get("ref_model")))
    if "ref_model" in signature.parameters:
        given["ref_model"] = given.get("ref_model") or reference_model(model)
        original(*bound.args, **bound.kwargs)
        return
    # The policy is a model already, so this is called for the reference, and only where there is to be one.
    load = module.create_model_from_path
    module.create_model_from_path = lambda *_, **__: reference_model(model)
    try:
        original(*args, **kwargs)
    finally:
        module.create_model_from_path = load


def _check_arguments(args: Any, *, has_reference: bool) -> None:
    """Refuses what a wrapped model cannot do in a trainer of TRL."""
    if getattr(args, "sync_ref_model", False) and not has_reference:
        raise AdapterError(
            "sync_ref_model=True would copy the policy over its reference, and with an adapter these are one "
            "model: use sync_ref_model=False, or pass a ref_model of its own where the trainer takes one"
        )
    if getattr(args, "use_vllm", False):
        raise AdapterError(
            "use_vllm=True would generate without the adapter, which TRL does not send to vLLM: use use_vllm=False"
        )
