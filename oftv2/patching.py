"""Functions of other libraries that treat a wrapped model otherwise than any other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def replace_once(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Has ``function(original, …)`` run in place of ``owner.name(…)``.

    Args:
        owner (Any): a class or a module; nothing happens where it has no such function, or was given this before.
        name (str): the function's.
        function (Callable): called with the function as it was, and with the arguments.
    """
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "_oftv2"):
        return

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    replacement._oftv2 = True  # type: ignore[attr-defined]
    setattr(owner, name, replacement)
