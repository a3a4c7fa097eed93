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

from torch import Tensor, nn

from .errors import AdapterError
from .state import find_state, get_state, oft_layers, trained_parameters


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
        state = get_state(policy)
        originals = {
            parameter: state.originals[name]
            for adapter in state.sequence
            for name, parameter in trained_parameters(policy, adapter).items()
        }
        generators = [packed for _, layer in oft_layers(policy) for packed in layer.generators_of(layer.sequence)]
        fresh = not any(generator.any() for generator in generators)
        fresh = fresh and all(value.equal(parameter.to(value)) for parameter, value in originals.items())
        trained = [] if fresh else [*generators, *originals]
        self.__dict__["start"] = [(parameter, parameter.detach().clone()) for parameter in trained]

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

        if not self.start:
            with disable_adapter(self.policy):
                yield
            return
        layers = [layer for _, layer in oft_layers(self.policy)]
        modes = [layer.training for layer in layers]
        now = [parameter.data for parameter, _ in self.start]
        try:
            _set_data(self.start)
            for layer in layers:
                layer.training = False  # no dropout of blocks
            yield
        finally:
            _set_data(zip((parameter for parameter, _ in self.start), now, strict=True))
            for layer, mode in zip(layers, modes, strict=True):
                layer.training = mode


def _set_data(pairs: Any) -> None:
    parameter: nn.Parameter
    value: Tensor
    for parameter, value in pairs:
        parameter.data = value.to(parameter.device)


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
        if not hasattr(trainer_class.__init__, "_oftv2"):
            trainer_class.__init__ = _with_reference(trainer_class.__init__, sys.modules[trainer_class.__module__])


def _with_reference(original: Any, module: Any) -> Any:
    """The ``__init__`` of a trainer in ``module``, giving a wrapped model a reference where the caller gives none."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N807
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

    __init__._oftv2 = True  # type: ignore[attr-defined]
    return __init__


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
