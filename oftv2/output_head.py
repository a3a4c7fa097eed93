"""An adapter on the output head trains only if the head is called.

TRL's losses, Liger's, and others that never build the logits multiply by ``lm_head.weight`` themselves: past the
rotation, which would then get no gradient, silently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import OFTLayer
from .errors import AdapterError


class HeadWatch:
    """Hooks on a model and on its adapted output head, which find a training step that goes past the head."""

    def __init__(self, head: OFTLayer) -> None:
        self.head = head
        self.called = True

    def start(self, module: nn.Module, args: Any) -> None:
        """Before a pass of the model: the head was not called yet."""
        self.called = torch.compiler.is_compiling()

    def note(self, module: nn.Module, args: Any) -> None:
        """Before a call of the head."""
        self.called = True

    def check(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a pass of the model: AdapterError where the head's adapter trains and the head was passed over."""
        head = self.head
        rotating = head.rotating or head.current_rows is not None
        trains = rotating and module.training and torch.is_grad_enabled() and not self.called
        if trains and any(packed.requires_grad for packed in head.generators.values()):
            raise AdapterError(
                f"{head.name}: this training step reads the output head's weight itself instead of calling the head, "
                "as TRL's trainers and fused losses do, so its adapter would never train. Leave it out with "
                f"exclude_modules=[{head.name!r}], or train the head in full with modules_to_save=[{head.name!r}]"
            )


def watch_head(model: Any) -> None:
    """Puts the hooks on a transformers model, if its output head is adapted."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, OFTLayer):
        watch = HeadWatch(head)
        model.register_forward_pre_hook(watch.start)
        head.register_forward_pre_hook(watch.note)
        model.register_forward_hook(watch.check)


def unwatch_head(model: nn.Module) -> None:
    """Takes them off again."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(watch := getattr(hook, "__self__", None), HeadWatch):
                del hooks[key]
                on_head = watch.head._forward_pre_hooks
                for note in [note for note, hook in on_head.items() if hook == watch.note]:
                    del on_head[note]
