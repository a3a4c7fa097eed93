"""Adapters on the Hugging Face Hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from .adapter_file import CONFIG_FILE, TENSORS_FILE
from .model_card import CARD_FILE, LIBRARY


def push_adapter(model: nn.Module, repo_id: str, *, revision: str | None = None, **options: Any) -> Any:
    """Saves the adapter and uploads it. A card on the Hub that somebody edited stays as it is.

    Args:
        model (nn.Module): a wrapped model.
        repo_id (str): the repository's name, which is made if needed.
        revision (str | None): the branch.
        **options: see :func:`upload_adapter`.

    Returns:
        huggingface_hub.CommitInfo: the commit, a string with its address.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    from .saving import save_adapter  # which imports wrap, which imports pretrained, which imports this

    with tempfile.TemporaryDirectory() as folder:
        try:
            card = HfApi(library_name=LIBRARY, token=options.get("token")).hf_hub_download(
                repo_id, CARD_FILE, revision=revision
            )
            shutil.copy(card, Path(folder) / CARD_FILE)
        except EntryNotFoundError:  # no card, or no repository yet
            pass
        save_adapter(model, folder)
        return upload_adapter(folder, repo_id, revision=revision, **options)


def upload_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    **options: Any,
) -> Any:
    """Uploads a saved adapter and its card.

    Args:
        folder (str | Path): where the adapter is.
        repo_id (str): the repository's name, which is made if needed.
        private (bool | None): whether a new repository is private.
        token (bool | str | None): the access token, if not the one that is stored.
        **options: ``commit_message``, ``commit_description``, ``revision``, ``create_pr`` of
            ``huggingface_hub.HfApi.upload_folder``.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name=LIBRARY, token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    options["commit_message"] = options.get("commit_message") or "Upload OFT adapter"
    files = [TENSORS_FILE, CONFIG_FILE, CARD_FILE]
    return api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files, **options)
