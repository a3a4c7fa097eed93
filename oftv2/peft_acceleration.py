"""PEFT's own OFT layers on this library's operators: in one model, or in all of an unchanged script."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from .errors import AdapterError, PeftRepairWarning, itemized

VARIABLE = "OFTV2_ACCELERATE_PEFT"
_TUNER = "peft.tuners.oft.model"
_warned: set[str] = set()  # reasons for which a layer was left to PEFT
_REPAIRS = (
    "this model differs from PEFT on purpose from now on: module_dropout drops blocks in training (linear layers and "
    "convolutions); convolutions with kernels above 1×1 rotate their kernels, as merging does; adapters merged "
    "together are multiplied in the order of the forward pass; inputs of four dimensions crash no linear layer and no "
    "embedding"
)


def accelerate_peft(model: nn.Module, enabled: bool = True, *, repair: bool = False) -> nn.Module:
    """Makes PEFT's OFT layers in ``model`` run on this library's operators, in place.

    Parameters, their names, files, merging and every method stay PEFT's, and results are the same to rounding. That
    covers quantized base layers, autocast, several adapters, and adapters that are added later to a ``PeftModel``.
    Everything is checked first: a model is accelerated whole or left as it was.

    Args:
        model (nn.Module): a ``PeftModel`` with OFT adapters, or any module that holds PEFT's OFT layers.
        enabled (bool): False gives the layers back to PEFT.
        repair (bool): mend, with a :class:`PeftRepairWarning`, what PEFT gets wrong, so that results differ from its:
            ``module_dropout``, which it stores and never applies (on linear layers and convolutions); convolutions with
            kernels above 1×1, of which it adds overlapping patches up; the order in which ``merge`` multiplies several
            adapters; inputs of four dimensions to linear layers and embeddings, which crash.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: no OFT layers of PEFT's, or layers that cannot be reproduced exactly, each with the reason.
    """
    layers = _oft_layers(model)
    if not layers:
        raise AdapterError(
            f"this {type(model).__name__} holds no OFT layers of PEFT's: call "
            "peft.get_peft_model(model, peft.OFTConfig(…)) first, or oftv2.wrap_model(model) instead"
        )
    if repair and not enabled:
        raise AdapterError("repair=True goes with enabled=True: layers that are given back to PEFT are not repaired")
    peft_layers = _peft_layers()
    if enabled:
        reasons = {name: peft_layers.obstacle(layer, repair=repair) for name, layer in layers.items()}
        problems = [f"{name}: {why}" for name, why in reasons.items() if why is not None]
        if problems:
            raise AdapterError(itemized(problems, most=5, indent=""))
    if repair:
        warnings.warn(_REPAIRS, PeftRepairWarning, stacklevel=2)
    tuners = [module for module in model.modules() if isinstance(module, peft_layers.OFTModel)]
    for layer in layers.values():
        if enabled:
            peft_layers.accelerate(layer, repair=repair)
        else:
            peft_layers.restore(layer)
    for tuner in tuners:
        peft_layers.set_tuner(tuner, enabled, repair=repair)
    return model


def _peft_layers() -> ModuleType:
    """The module that imports PEFT; AdapterError where PEFT lacks what it takes from there, as before 0.19."""
    try:
        from . import peft_layers
    except ImportError as error:
        raise AdapterError(
            f"this was written with PEFT 0.19 to 0.21, and the one installed is another: {error}"
        ) from error
    return peft_layers


def _oft_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's OFT layers by path; none where PEFT's OFT is not even imported."""
    module = sys.modules.get("peft.tuners.oft.layer")
    if module is None:
        return {}
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, module.OFTLayer)}


def accelerate_all_if_asked() -> None:
    """With ``OFTV2_ACCELERATE_PEFT=1``: every OFT layer that PEFT makes from now on; PEFT may be imported later."""
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return
    if _TUNER in sys.modules:
        _accelerate_all(sys.modules[_TUNER])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _accelerate_all(tuner: ModuleType) -> None:
    tuner.OFTModel._create_and_replace = accelerating(tuner.OFTModel._create_and_replace)


def accelerating(create_and_replace: Callable[..., None]) -> Callable[..., None]:
    """PEFT's ``OFTModel._create_and_replace``, which makes one layer or one adapter more on it; they are accelerated.

    Nothing fails here for what cannot be: PEFT's own stays, and a warning says so, once for each reason.
    """

    @functools.wraps(create_and_replace)
    def both(
        self: Any, config: Any, adapter: str, target: Any, target_name: str, parent: Any, *args: Any, **kwargs: Any
    ) -> None:
        create_and_replace(self, config, adapter, target, target_name, parent, *args, **kwargs)
        layer = getattr(parent, target_name)
        repair = getattr(layer, "repairs", getattr(self, "repairs", False))
        try:
            why = _peft_layers().obstacle(layer, repair=repair)
        except AdapterError as error:
            why = str(error)
        if why is None:
            _peft_layers().accelerate(layer, repair=repair)
        elif why not in _warned:
            _warned.add(why)
            name = kwargs.get("current_key", target_name)
            warnings.warn(f"not accelerated, PEFT's own stays: {name}, and all like it: {why}", stacklevel=2)

    return both


class _WhenImported(importlib.abc.MetaPathFinder):
    """Waits for PEFT's OFT to be imported, so that a script which needs no PEFT does not import it."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != _TUNER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run: Any = spec.loader.exec_module

        def run_and_accelerate(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            _accelerate_all(module)

        spec.loader.exec_module = run_and_accelerate  # type: ignore[method-assign]
        return spec
