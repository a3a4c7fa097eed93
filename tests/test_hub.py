"""Model cards, and adapters on the Hub, which is a local folder here."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import Trainer, TrainingArguments

from conftest import randomize
from oftv2 import load_adapter, save_adapter, unwrap_model, wrap_model

IDS = torch.arange(80).view(8, 10) % 128
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder in place of the Hub, with a folder for each repository."""
    root = tmp_path / "hub"

    def create_repo(self: HfApi, repo_id: str, **_: Any) -> SimpleNamespace:
        repo_id = repo_id if "/" in repo_id else f"user/{repo_id}"
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Any, **options: Any) -> Any:
        from huggingface_hub.utils import filter_repo_objects

        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        allow, ignore = options.get("allow_patterns"), options.get("ignore_patterns")
        for name in filter_repo_objects(files, allow_patterns=allow, ignore_patterns=ignore):
            (root / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, root / repo_id / name)
        commit = f"https://hub/{repo_id}: {options['commit_message']}"
        done = SimpleNamespace(is_done=lambda: True, done=lambda: True, result=lambda: commit)
        return done if options.get("run_as_future") else commit

    def hf_hub_download(self: HfApi, repo_id: str, filename: str, **_: Any) -> str:
        if not (root / repo_id / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(root / repo_id / filename)

    for method in (create_repo, upload_folder, hf_hub_download):
        monkeypatch.setattr(HfApi, method.__name__, method)
    return root


def parts(card: Path) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text."""
    _, metadata, text = card.read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def wrapped(tiny_llama: Any, name: str = "someone/tiny-llama") -> nn.Module:
    model = tiny_llama()
    model.config._name_or_path = name
    wrap_model(model, block_size=16, target_modules=r".*\.(q_proj|v_proj)")
    randomize(model)
    return model


def test_the_card_says_what_it_is_and_how_to_load_it(tiny_llama, tmp_path):
    metadata, text = parts(save_adapter(wrapped(tiny_llama), tmp_path) / "README.md")
    assert metadata["library_name"] == "oftv2"
    assert metadata["base_model"] == "someone/tiny-llama"
    assert metadata["base_model_relation"] == "adapter"
    assert set(metadata["tags"]) == {"oftv2", "oft", "orthogonal-finetuning"}
    assert 'AutoModelForCausalLM.from_pretrained("someone/tiny-llama")' in text
    assert "oftv2.load_adapter(" in text
    assert "PeftModel.from_pretrained(" in text
    assert "| adapted layers | 4 |" in text
    assert "| `block_size` | `16` |" in text
    assert r"(q_proj\|v_proj)" in text  # a table's column would end there


def test_a_base_that_is_a_folder_here_is_not_named_as_one_of_the_hub(tiny_llama, tmp_path):
    metadata, text = parts(save_adapter(wrapped(tiny_llama, str(tmp_path)), tmp_path / "out") / "README.md")
    assert "base_model" not in metadata
    assert str(tmp_path) not in text
    _, text = parts(save_adapter(wrap_model(nn.Sequential(nn.Linear(64, 4))), tmp_path / "plain") / "README.md")
    assert "`Sequential`" in text
    folder = save_adapter(wrapped(tiny_llama), tmp_path / "own", format="oftv2")
    assert "PeftModel" not in (folder / "README.md").read_text()


def test_a_card_is_renewed_until_somebody_edits_it(tiny_llama, tmp_path):
    model = wrapped(tiny_llama)
    card = save_adapter(model, tmp_path) / "README.md"
    wrap_model(unwrap_model(model), block_size=8)
    save_adapter(model, tmp_path)
    assert "| `block_size` | `8` |" in card.read_text()
    card.write_text(card.read_text().replace("# OFT adapter", "# Mine"))
    edited = card.read_text()
    model.save_pretrained(tmp_path)
    assert card.read_text() == edited
    card.write_text("Something else")
    save_adapter(model, tmp_path)
    assert card.read_text() == "Something else"


def test_push_to_hub_and_back(tiny_llama, tmp_path, hub):
    model = wrapped(tiny_llama)
    commit = model.push_to_hub("mine", private=True, max_shard_size="1GB", commit_message="First")
    assert commit == "https://hub/user/mine: First"
    assert {path.name for path in (hub / "user/mine").iterdir()} == ADAPTER
    expected = model(IDS).logits
    assert torch.equal(load_adapter(tiny_llama(), hub / "user/mine")(IDS).logits, expected)


def test_a_card_edited_on_the_hub_stays(tiny_llama, hub):
    model = wrapped(tiny_llama)
    model.push_to_hub("user/mine")
    card = hub / "user/mine/README.md"
    card.write_text(card.read_text().replace("# OFT adapter", "# Mine"))
    model.push_to_hub("user/mine")
    assert "# Mine" in card.read_text()


def test_save_pretrained_pushes_what_it_saved(tiny_llama, tmp_path, hub):
    model = wrapped(tiny_llama)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("Mine")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert {path.name for path in (hub / "user/mine").iterdir()} == ADAPTER
    assert (hub / "user/mine/README.md").read_text() == "Mine"
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="other/name")
    assert {path.name for path in (hub / "other/name").iterdir()} == ADAPTER


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_a_trainer_that_pushes(tiny_llama, tmp_path, hub, strategy):
    model = wrapped(tiny_llama)
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id="user/mine",
        hub_strategy=strategy,
    )
    trainer = Trainer(model, arguments, train_dataset=ROWS)
    trainer.train()
    trainer.push_to_hub()
    names = {path.name for path in (hub / "user/mine").iterdir()}
    assert names >= ADAPTER
    assert "config.json" not in names
    metadata, _ = parts(hub / "user/mine/README.md")  # Trainer's own card
    assert metadata["base_model"] == "someone/tiny-llama"
    assert set(metadata["tags"]) >= {"oftv2", "oft", "orthogonal-finetuning", "generated_from_trainer"}
    loaded = load_adapter(tiny_llama(), hub / "user/mine", check_base=False).eval()
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_tags_go_with_the_adapter(tiny_llama):
    model = tiny_llama()
    before = model.model_tags
    wrap_model(model, block_size=16)
    assert "oftv2" in model.model_tags
    assert unwrap_model(model).model_tags == before
