"""Methods of other libraries that would lose an adapter in silence: they say so instead, while a model is wrapped.

``save_pretrained`` of diffusers' models, of sentence-transformers, of ``PyTorchModelHubMixin`` and of transformers'
models inside another one writes parameters under the names they have in the wrapped model. Nothing finds them there
again, and some libraries then begin with random weights. diffusers' ``fuse_qkv_projections`` reads weights past their
rotations.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .base import OFTLayer
from .errors import AdapterError, TargetWarning
from .pretrained import WrappedPreTrainedModel, is_pretrained

_REASONS = {
    "save_pretrained": "it would write adapted layers under names that from_pretrained does not look for, and the "
    "weights would be lost: call oftv2.save_adapter(model, folder), or oftv2.merge(model) first",
    "disable_adapters": "it switches off peft's layers alone: use `with oftv2.disable_adapter(model):`",
    "load_adapter": "it would put peft's layers inside the adapted ones: call oftv2.load_adapter(model, folder, "
    "adapter_name=…) for another adapter beside this one",
    "fuse_qkv_projections": "it would join the weights without their rotations: call oftv2.merge(model) first",
}


class Refusal:
    """In place of a method, as an attribute of the one module.

    Args:
        what (str): the method, of which module.
        reason (str): why it is refused, and what to do.
    """

    def __init__(self, what: str, reason: str) -> None:
        self.what = what
        self.reason = reason

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raises AdapterError."""
        raise AdapterError(f"{self.what} is refused while it is wrapped by oftv2: {self.reason}")


def refuse_methods(model: nn.Module) -> None:
    """Puts the refusals on a wrapped model and on what is in it; one of transformers' has its own way to save."""
    reasons = {**_REASONS, "save_pretrained": _REASONS["save_pretrained"] + _instead(model)}
    for module in model.modules():
        own = ("save_pretrained",) if isinstance(module, WrappedPreTrainedModel) else ()
        names = [name for name in reasons if name not in own and callable(getattr(type(module), name, None))]
        if not names or not any(isinstance(inner, OFTLayer) for inner in module.modules()):
            continue
        for name in names:
            vars(module)[name] = Refusal(f"{name} of this {type(module).__name__}", reasons[name])


def warn_of_saving(model: nn.Module) -> None:
    """A TargetWarning where :func:`refuse_methods` will stop a trainer at its first checkpoint, and need not."""
    instead = _instead(model)
    if instead and callable(getattr(model, "save_pretrained", None)):
        warnings.warn(
            f"save_pretrained of this {type(model).__name__} is refused from now on, and would stop a trainer at its "
            f"first checkpoint: call oftv2.save_adapter(model, folder) yourself{instead}",
            TargetWarning,
            stacklevel=3,
        )


def allow_methods(model: nn.Module) -> None:
    """Takes them off again."""
    for module in model.modules():
        for name in [name for name in _REASONS if isinstance(vars(module).get(name), Refusal)]:
            del vars(module)[name]


def _instead(model: nn.Module) -> str:
    """Of a model that is put together of others, such as sentence-transformers': what to wrap in its place."""
    if is_pretrained(model):
        return ""
    inner = next((place for place, module in model.named_modules() if is_pretrained(module)), "")
    return f'; or wrap model.get_submodule("{inner}"), whose save_pretrained then writes the adapter' if inner else ""
