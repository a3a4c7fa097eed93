"""Logging the health of an adapter from transformers' ``Trainer``."""

from __future__ import annotations

from typing import Any

from .diagnostics import summary

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("oftv2.callbacks needs transformers: pip install transformers accelerate") from error


class OFTCallback(TrainerCallback):
    """Adds the adapter's worst figures to what the trainer logs, as ``oft/orthogonality_error`` and so on.

    Args:
        every (int): look at the adapter at each so many logs of the loss; 1 by default.

    Raises:
        ValueError: ``every`` is not at least 1.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"OFTCallback: every={every} is not allowed: use an integer of at least 1")
        self.every = every
        self._logs = 0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:  # an evaluation's, or the summary of the run
            return
        self._logs += 1
        if (self._logs - 1) % self.every:
            return
        figures = {f"oft/{name}": value for name, value in summary(kwargs["model"]).items()}
        logs.update(figures)
        state.log_history[-1].update(figures)
