"""Operators: known to torch by a schema, a fake kernel and gradients, and called past its dispatcher where it can be.

The dispatcher and autograd in Python take longer than the work of a small call: on a CPU than the rotation of a few
tokens, on a GPU than what it does meanwhile. Where something looks at single operators (a compiler, a dispatch mode, a
tensor subclass), they are called through the dispatcher; else an implementation is called as it is, in an autograd node
of its own where there is something to differentiate. Both compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def unobserved(*tensors: Tensor) -> bool:
    """Whether nothing needs to see which operators work on ``tensors``."""
    return not (_observed() or any(type(tensor) not in _PLAIN for tensor in tensors))


def _observed() -> bool:
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or in_torch_func()
    )


def in_torch_func() -> bool:
    """Whether this is called within a transform of ``torch.func``, such as ``vmap`` or ``grad``."""
    return torch._C._are_functorch_transforms_active()


def require_grad(values: Iterable[Any]) -> bool:
    """Whether one of these requires a gradient, or one in a list among them."""
    return any(require_grad(v) if isinstance(v, list) else getattr(v, "requires_grad", False) for v in values)


def writable(output: Any) -> Any:
    """Results that may be written to: autograd forbids it of views that were made where nothing is recorded."""
    if isinstance(output, Tensor) and not torch.is_grad_enabled() and output._is_view():
        return output.data
    return output


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps what a function of hashable arguments makes of them, but for tensors that belong to a mode or transform."""
    kept: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def made(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return function(*args)
        if (found := kept.get(args)) is None:
            with torch.inference_mode(False):  # what is made within it cannot be differentiated with
                found = function(*args)
            if not (in_torch_func() or capturing()):
                kept[args] = found
        return found

    return made


def capturing() -> bool:
    """Whether a CUDA graph is captured: what is computed now is there once the graph has run."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Operator:
    """An operator ``oftv2::name``. Its first argument is a tensor or a list of them.

    Args:
        name (str): its name in ``torch.ops.oftv2``.
        schema (str): of its arguments and results.

    Attributes:
        plain (Callable): the implementation for every device.
        kernels (dict[str, Callable]): by device type, an implementation that takes its place.
    """

    plain: Callable[..., Any]

    def __init__(self, name: str, schema: str) -> None:
        self.name = name
        self.kernels: dict[str, Callable[..., Any]] = {}
        torch.library.define(f"oftv2::{name}", schema)
        self._dispatched = getattr(torch.ops.oftv2, name).default
        self._defaults = tuple(argument.default_value for argument in self._dispatched._schema.arguments)
        self._recorded: Callable[..., Any] | None = None  # what autograd records; None: its steps

    def default(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Registers the implementation for every device, with autocast off: it would round the float32 blocks."""

        @functools.wraps(function)
        def implementation(first: Tensor | list[Tensor], *args: Any) -> Any:
            device_type = (first if isinstance(first, Tensor) else first[0]).device.type
            if device_type != "meta" and torch.is_autocast_enabled(device_type):
                with torch.autocast(device_type, enabled=False):
                    return writable(function(first, *args))
            return writable(function(first, *args))

        torch.library.impl(f"oftv2::{self.name}", "CompositeExplicitAutograd")(implementation)
        self.plain = implementation
        return implementation

    def fake(self, function: Callable[..., Any]) -> None:
        """Registers what gives results of the right shape and dtype, without values."""
        torch.library.register_fake(f"oftv2::{self.name}")(function)

    def differentiable(self, save: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Registers its gradients: ``save(ctx, inputs, output)`` and ``backward(ctx, *grads)``."""
        torch.library.register_autograd(f"oftv2::{self.name}", backward, setup_context=save)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._implementation(args[0])(*args)
            save(ctx, args, output)
            return output

        def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(None if isinstance(grad, list) else grad for grad in backward(ctx, *grads))

        methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
        camel_case = "".join(word.capitalize() for word in self.name.split("_"))
        node: Any = type(camel_case, (torch.autograd.Function,), methods)
        returns_list = isinstance(self._dispatched._schema.returns[0].type, torch.ListType)
        self._recorded = self._dispatched if returns_list else node.apply  # nor does a node look into lists of results

    def __call__(self, *args: Any) -> Any:
        args += self._defaults[len(args) :]
        if _observed():
            # torch.func goes through plain operations as they are; torch.library's operators it does not know.
            return self.plain(*args) if in_torch_func() else self._seen(args)
        needs_grad = False
        for arg in args:
            if type(arg) in _PLAIN:
                needs_grad = needs_grad or arg.requires_grad
            elif isinstance(arg, Tensor) or (type(arg) is list and not self._takes(arg)):
                return self._seen(args)
        if needs_grad and self._recorded is not None and torch.is_grad_enabled():
            return self._recorded(*args)
        return self._implementation(args[0])(*args)

    def _seen(self, args: tuple[Any, ...]) -> Any:
        """A call through the dispatcher, which would cut gradients where none are registered: of second derivatives."""
        if self._recorded is None and torch.is_grad_enabled() and require_grad(args):
            return self._implementation(args[0])(*args)
        return self._dispatched(*args)

    def _takes(self, values: list[Any]) -> bool:
        """Whether a call with these can be direct. A node of autograd in Python does not look into a list."""
        differentiates = self._recorded is not None and torch.is_grad_enabled()
        return not any(
            isinstance(value, Tensor) and (type(value) not in _PLAIN or (differentiates and value.requires_grad))
            for value in values
        )

    def _implementation(self, first: Any) -> Callable[..., Any]:
        kind = (first if isinstance(first, Tensor) else first[0]).device.type
        if kind == "meta":
            return self._dispatched
        return self.kernels.get(kind, self.plain)


class Operators:
    """All operators, as attributes."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Operator: ...

    def define(self, name: str, schema: str) -> None:
        """Adds an operator."""
        setattr(self, name, Operator(name, schema))


ops = Operators()
