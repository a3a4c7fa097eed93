"""Adapters on the Hugging Face Hub."""

from __future__ import annotations

import glob
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .adapter_file import CONFIG_FILE, TENSORS_FILE
from .model_card import CARD_FILE, LIBRARY, is_edited
from .patching import replace_once
from .sharding import check_unsharded
from .state import find_state

_FILES = (TENSORS_FILE, CONFIG_FILE, CARD_FILE)


def push_adapters(
    model: nn.Module, repo_id: str, adapter_names: Sequence[str] | None = None, *, token: Any = None, **options: Any
) -> Any:
    """Saves adapters and uploads them. Cards on the Hub that somebody edited stay as they are.

    Args:
        model (nn.Module): a wrapped model.
        repo_id (str): the repository's name, which is made if needed.
        adapter_names (Sequence[str] | None): which, as for :func:`oftv2.saving.save_adapters`.
        token (bool | str | None): the access token, if not the one that is stored.
        **options: see :func:`upload_adapters`.

    Returns:
        huggingface_hub.CommitInfo: the commit, a string with its address.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from .saving import places, save_adapters  # which imports wrap, which imports pretrained, which imports this

    check_unsharded(model, "call save_pretrained in every process, and upload what that wrote")
    names = places(model, adapter_names)
    api = HfApi(library_name=LIBRARY, token=token)
    repo_id = _made(api, repo_id, options.get("private"), options.get("revision"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for place in names.values():
            try:
                card = api.hf_hub_download(repo_id, (place / CARD_FILE).as_posix(), revision=options.get("revision"))
            except LocalEntryNotFoundError:  # the Hub was not reached
                raise
            except EntryNotFoundError:
                continue
            (folder / place).mkdir(parents=True, exist_ok=True)
            shutil.copy(card, folder / place / CARD_FILE)
        save_adapters(model, folder, adapter_names)
        return upload_adapters(folder, repo_id, list(names.values()), token=token, **options)


def upload_adapters(
    folder: str | Path,
    repo_id: str,
    places: Sequence[Path],
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Uploads saved adapters and their cards.

    Args:
        folder (str | Path): where the adapters are.
        repo_id (str): the repository's name, which is made if needed.
        places (Sequence[Path]): their folders within ``folder``.
        private (bool | None): whether a new repository is private.
        token (bool | str | None): the access token, if not the one that is stored.
        revision (str | None): the branch, which is made if needed.
        **options: ``commit_message``, ``commit_description``, ``create_pr`` of
            ``huggingface_hub.HfApi.upload_folder``.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name=LIBRARY, token=token)
    repo_id = _made(api, repo_id, private, revision)
    options["commit_message"] = options.get("commit_message") or "Upload OFT adapter"
    files = [glob.escape((place / name).as_posix()) for place in places for name in _FILES]
    return api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files, revision=revision, **options)


def serve_trainer() -> None:
    """Has transformers' ``Trainer``, if it is imported, push whole adapters while it trains.

    It pushes a checkpoint's files by the names that it knows: the adapter's only where peft is installed, its card and
    further adapters never. So they are put beside those files, into the folder that it uploads.
    """
    trainer_class = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    replace_once(trainer_class, "_push_from_checkpoint", _push_from_checkpoint)


def _push_from_checkpoint(original: Any, trainer: Any, checkpoint_folder: str) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if find_state(model) and trainer.is_world_process_zero() and trainer.args.hub_strategy != "end":
        _copy_adapters(model, Path(checkpoint_folder), Path(trainer.args.output_dir))
    original(trainer, checkpoint_folder)


def _copy_adapters(model: nn.Module, source: Path, target: Path) -> None:
    """Copies all adapters of a model from one folder to another, but no card over one that was edited."""
    from .saving import places

    for place in places(model).values():
        (target / place).mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (source / place / name).is_file() and not (name == CARD_FILE and is_edited(target / place / name)):
                shutil.copy(source / place / name, target / place / name)


def _made(api: Any, repo_id: str, private: bool | None, revision: str | None) -> str:
    """The full name of the repository, made if needed, and its branch too."""
    full_name: str = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(full_name, branch=revision, exist_ok=True)
    return full_name
