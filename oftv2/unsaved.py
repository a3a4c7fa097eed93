"""What became of a model beside its adapters, and goes with none of them: said when one is saved."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .errors import TargetWarning, listed
from .pretrained import is_pretrained
from .state import get_state, plain_parameter


def warn_of_unsaved(model: nn.Module) -> None:
    """A TargetWarning for base parameters that train, and for resized embeddings, where no adapter holds them."""
    held = {id(plain_parameter(model, name)) for name in get_state(model).originals}
    training = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".generators." not in name and id(parameter) not in held
    ]
    if training:
        _warn(
            f"{listed(training)}, which train, and which no adapter holds: name their modules in modules_to_save when "
            "you wrap the model, or save them yourself"
        )
    sizes, resized = _resized(model)
    names = [
        name
        for name, module in model.named_modules()
        if module in resized and id(getattr(module, "base_layer", module).weight) not in held
    ]
    if names:
        _warn(
            f"{' and '.join(names)}, resized from {sizes[0]} to {sizes[1]} rows, so whoever loads the adapter gets "
            f"other new rows: modules_to_save={names!r} trains and saves them; or save the resized model first "
            "(save_pretrained), and wrap what is loaded from there"
        )


def _resized(model: Any) -> tuple[tuple[int, ...], list[nn.Module]]:
    """The numbers of embeddings, as the model came from its folder or the Hub's cache and as it is, and the modules
    that were resized."""
    if not is_pretrained(model) or not model.config._name_or_path:
        return (), []
    try:
        before = type(model.config).from_pretrained(model.config._name_or_path, local_files_only=True)
        sizes = tuple(config.get_text_config().vocab_size for config in (before, model.config))
    except (AttributeError, OSError, ValueError):  # no vocabulary, or several; the folder is gone
        return (), []
    resized = [] if sizes[0] == sizes[1] else [model.get_input_embeddings(), model.get_output_embeddings()]
    return sizes, [module for module in resized if module is not None]


def _warn(what: str) -> None:
    warnings.warn(f"not saved with the adapter: {what}", TargetWarning, stacklevel=4)
