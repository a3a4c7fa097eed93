"""How a wrapped transformers model presents itself to ``Trainer``.

``Trainer`` refuses a quantized model unless told that it carries adapters, and would save the whole base model in every
checkpoint. The wrapped model therefore becomes an instance of a subclass of its own class whose ``save_pretrained``
writes the adapter; so ``isinstance`` and everything else of its class hold, peft is not needed, and the user's trainer
stays as it is. Each checkpoint also holds the adapter under ``model.safetensors``, in this model's own parameter names:
from there ``Trainer`` resumes and restores the best checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapter_file import serialized, write_atomically
from .deepspeed_engine import serve_deepspeed
from .errors import AdapterError
from .fsdp_checkpoints import serve_accelerate
from .hub import push_adapters, serve_trainer, upload_adapters
from .model_card import TAGS
from .output_head import unwatch_head, watch_head
from .partitioned import filled
from .peft_state import add_peft_hook, remove_peft_hook
from .precision import ATTRIBUTE as FLOAT32
from .precision import forget_float32, restore_float32
from .preference import serve_trl
from .resuming import CHECKPOINT_FILE, NOTE, described, serve_resuming
from .sharding import is_sharded, is_writer, unsharded, whole
from .state import adapter_parameters, get_state, plain_parameter
from .trained import set_trainable, trained_keys

if TYPE_CHECKING:
    _Mixin = nn.Module  # what it is mixed into
else:
    _Mixin = object


class WrappedPreTrainedModel(_Mixin):
    """Mixed into the class of a wrapped transformers model, in front of it."""

    _hf_peft_config_loaded = True  # what transformers asks of a quantized model before it may be trained

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """``type(model)(config)`` and ``type(model).from_pretrained(…)`` make a plain model."""
        return cls.__mro__[2](*args, **options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        selected_adapters: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """Writes the active adapter as :func:`oftv2.save_adapter` does, and all of them for ``Trainer`` to resume from.

        Every other adapter goes into a subfolder of its name, as in PEFT; of several active ones, the first does not.
        ``selected_adapters`` are those to write so and to upload, where it is not to be all of them. Of a model that
        FSDP2 shards, every process has to call this, or the first one with the gathered ``state_dict``.

        Raises:
            AdapterError: see :func:`oftv2.save_adapter`; unknown names; under DeepSpeed ZeRO-3, no ``state_dict``.
        """
        from .saving import places, save_adapters  # which imports wrap, which imports this

        sharded = any(is_sharded(parameter) for parameter in self.parameters())
        gathers = sharded and state_dict is None
        if not (is_main_process or gathers) or (sharded and state_dict == {}):  # gathered for the first process alone
            return
        serve_trainer()  # by the time that a Trainer calls this, it is imported
        names = set(trained_keys(self))
        own = {name: p for name, p in self.named_parameters(remove_duplicate=False) if name in names}
        given = unsharded(self, self.parameters(), state_dict) if state_dict else nullcontext()
        with filled(own, state_dict), given:
            folder = save_adapters(self, save_directory, selected_adapters)
            state_dict = state_dict or self.state_dict()
            tensors = {name: whole(tensor) for name, tensor in state_dict.items() if name in names}
        if gathers and not is_writer():
            return
        write_atomically(folder / CHECKPOINT_FILE, serialized(tensors, **{NOTE: described(self)}))
        if push_to_hub:
            written = list(places(self, selected_adapters).values())
            upload_adapters(folder, options.get("repo_id") or folder.name, written, **_hub_options(options))

    def push_to_hub(self, repo_id: str, selected_adapters: Sequence[str] | None = None, **options: Any) -> Any:
        """Uploads the adapters and their model cards to the Hub, with the arguments of transformers' own method.

        All of them, or ``selected_adapters``, each where :meth:`save_pretrained` would write it.
        """
        return push_adapters(self, repo_id, selected_adapters, **_hub_options(options))

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """What a checkpoint leaves out; ``Trainer`` would warn that these keys are missing when it resumes."""
        state_dict = self.state_dict()
        kept = {*trained_keys(self), *_scales(state_dict)}
        return [name for name in state_dict if name not in kept]

    @property
    def peft_config(self) -> AdapterConfigs:
        """The adapters by name, as trackers such as wandb log them, and as peft asks before it adds its own."""
        state = get_state(self)
        return AdapterConfigs(type(self).__name__, {name: config.to_dict() for name, config in state.configs.items()})

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """transformers' way to activate an adapter, or several: :func:`oftv2.set_adapter`."""
        from .adapters import set_adapter  # which imports wrap, which imports this

        set_adapter(self, adapter_name)

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """transformers' way to delete adapters: :func:`oftv2.delete_adapter`."""
        from .adapters import delete_adapter

        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            delete_adapter(self, name)

    def active_adapters(self) -> list[str]:
        """transformers' way to ask which are active, in their order."""
        return list(get_state(self).sequence)

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """transformers' way to add an adapter of peft's: refused."""
        self.peft_config[adapter_name or "default"] = adapter_config

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **options: Any
    ) -> Any:
        """As ever, but refused where an adapter rotates or trains the embeddings or the head: it could not be saved.

        Raises:
            AdapterError: one does, and the number is another.
        """
        model: Any = self
        trained = {id(plain_parameter(model, name)) for name in get_state(model).originals}
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight: Any = getattr(getattr(module, "base_layer", module), "weight", None)
            if hasattr(module, "base_layer") or id(weight) in trained:
                multiple = pad_to_multiple_of or 1
                rows = -(-(new_num_tokens or len(weight)) // multiple) * multiple
                if rows != len(weight):
                    raise AdapterError(
                        f"an adapter rotates or trains this {type(module).__name__} of {len(weight)} rows: call "
                        f"resize_token_embeddings({rows}) before wrap_model"
                    )
        if pad_to_multiple_of is not None or args:  # some models take the number alone
            args = (pad_to_multiple_of, *args)
        return super().resize_token_embeddings(new_num_tokens, *args, **options)  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        restore_float32(self, warn=False)  # DeepSpeed casts, and then moves the model
        serve_resuming()  # a Trainer that moves the model is imported by now
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        restore_float32(self)
        serve_deepspeed()  # by the time that an engine trains this, it is imported
        return super().train(mode)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As ever; but bitsandbytes saves the scales of a 4-bit weight beside it, and does not load them again.

        The frozen base has them already, so accelerate's saved states, which hold the whole model, fit.
        """
        restore_float32(self)
        if scales := _scales(state_dict):
            state_dict = {key: value for key, value in state_dict.items() if key not in scales}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Called by whoever turns gradient checkpointing on.

        If nothing trains by then, everything was frozen after the model had been wrapped, which is what peft's
        ``prepare_model_for_kbit_training`` does: the adapter goes on training.
        """
        restore_float32(self)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            train_adapter(self)
        super().enable_input_require_grads()  # type: ignore[misc]
        handles = getattr(self, "_require_grads_hooks", None) or [getattr(self, "_require_grads_hook", None)]
        for handle in handles:
            if handle is not None:  # transformers' own are local functions, which cannot be pickled
                handle.hooks_dict_ref()[handle.id] = _require_grad

    def __reduce__(self) -> tuple[Any, ...]:
        """The class exists only in this process: pickle the one it was made from.

        So does a ``forward`` that a trainer put on the model: TRL's and accelerate's are local functions.
        """
        left_out = {FLOAT32}
        if "<locals>" in getattr(self.__dict__.get("forward"), "__qualname__", ""):
            left_out |= {"forward", "_original_forward"}
        return _new, (type(self).__mro__[2],), {k: v for k, v in self.__dict__.items() if k not in left_out}


class AdapterConfigs(dict[str, dict[str, Any]]):
    """Configurations by adapter name. Adding one is what peft does first of all, before it changes a model."""

    def __init__(self, model: str, configs: dict[str, dict[str, Any]]) -> None:
        super().__init__(configs)
        self._model = model

    def __setitem__(self, name: str, config: Any) -> None:
        kind = type(config).__name__
        raise AdapterError(
            f"this {self._model} is wrapped by oftv2, and peft would put its adapter ({kind}) inside those layers: "
            "leave peft_config out of the trainer (or do not call get_peft_model), or call merge(model) or "
            "unwrap_model(model) first; oftv2.add_adapter(model, name) puts another of this library's beside it"
        )

    def update(self, configs: Any) -> None:  # type: ignore[override]
        for name, config in configs.items():
            self[name] = config


def train_adapter(model: nn.Module) -> None:
    """Has the active adapters' parameters train, their fully trained ones too."""
    for name in get_state(model).sequence:
        for parameter in adapter_parameters(model, name):
            set_trainable(parameter, True)


def _scales(state_dict: Mapping[str, Any]) -> set[str]:
    """The keys of what bitsandbytes saves beside a 4-bit weight, and neither loads nor misses."""
    return {key for key in state_dict if ".weight." in key and key.rpartition(".weight.")[0] + ".weight" in state_dict}


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of transformers' options that concern an upload, and not how large a model is split into files."""
    names = ("private", "token", "revision", "create_pr", "commit_message", "commit_description")
    return {name: options[name] for name in names if options.get(name) is not None}


def _require_grad(module: nn.Module, args: Any, output: Any) -> None:
    for tensor in output if isinstance(output, tuple) else (output,):  # Swin's embeddings return sizes beside it
        if isinstance(tensor, Tensor):
            tensor.requires_grad_(True)


def present(model: nn.Module) -> None:
    """Gives a transformers model that has been wrapped its subclass; leaves any other model alone."""
    if is_pretrained(model):
        model.__class__ = _wrapped_class(type(model))
        add_peft_hook(model)
        watch(model)
        serve_trl()
        serve_accelerate()
        serve_resuming()
        tags: Any = getattr(model, "model_tags", None)
        vars(model)["model_tags"] = [*(tags or ()), *TAGS]  # for the model card that Trainer writes


def is_pretrained(model: nn.Module) -> bool:
    """Whether this is a transformers model."""
    classes = type(model).__mro__
    return any(cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers") for cls in classes)


def watch(model: nn.Module) -> None:
    """Looks after the adapters that a transformers model has by now; leaves any other model alone."""
    if isinstance(model, WrappedPreTrainedModel):
        restore_float32(model)
        unwatch_head(model)
        watch_head(model)


def unpresent(model: nn.Module) -> None:
    """Back to the class it had."""
    if isinstance(model, WrappedPreTrainedModel):
        model.__class__ = type(model).__mro__[2]
        remove_peft_hook(model)
        forget_float32(model)
        unwatch_head(model)
        tags = [tag for tag in vars(model).get("model_tags") or () if tag not in TAGS]
        vars(model)["model_tags"] = tags or None


def read_from_gguf(model: nn.Module) -> bool:
    """Whether transformers read this model from GGUF to plain weights: it marks it as quantized, and saves none."""
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(settings, "quant_method", None) != "gguf":
        return False
    return all(tensor.dtype != torch.uint8 for tensor in (*model.parameters(), *model.buffers()))


def forget_quantization(model: nn.Module) -> None:
    """Takes from a model of transformers' or diffusers' that is not quantized any more the word that it is."""
    if "is_quantized" not in vars(model):
        return
    model.is_quantized = False  # type: ignore[assignment]
    for name in ("hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)
    for bits in ("4bit", "8bit"):
        vars(model).pop(f"is_loaded_in_{bits}", None)
        vars(model).pop(f"is_{bits}_serializable", None)
    config: Any = model.config
    names = ("quantization_config", "_pre_quantization_dtype")
    if isinstance(config, dict):  # diffusers', which cannot lose an entry
        model._internal_dict = type(config)({k: v for k, v in config.items() if k not in names})  # type: ignore
        return
    for name in names:
        vars(config).pop(name, None)


def _wrapped_class(cls: type) -> type:
    attributes = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (WrappedPreTrainedModel, cls), attributes)


def _new(cls: type) -> Any:
    return object.__new__(_wrapped_class(cls))
