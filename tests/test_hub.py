"""Model cards, and adapters on the Hub, which is a local folder here."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from peft import AutoPeftModel, PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments

from conftest import randomize
from oftv2 import AdapterError, add_adapter, load_adapter, save_adapter, set_adapter, unwrap_model, wrap_model
from trainer_runs import IDS, ROWS

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder in place of the Hub, with a folder for each repository."""
    root = tmp_path / "hub"

    def create_repo(self: HfApi, repo_id: str, **_: Any) -> SimpleNamespace:
        repo_id = repo_id if "/" in repo_id else f"user/{repo_id}"
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self: HfApi, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        (root / repo_id / f".{branch}").touch()

    def check(repo_id: str, revision: str | None) -> None:
        """As the Hub: a repository, and a branch, has to be there before anything is read or written."""
        answer: Any = SimpleNamespace(headers={}, request=None, status_code=404)
        if not (root / repo_id).is_dir():
            raise RepositoryNotFoundError(repo_id, response=answer)
        if revision is not None and not (root / repo_id / f".{revision}").exists():
            raise RevisionNotFoundError(revision, response=answer)

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Any, **options: Any) -> Any:
        from huggingface_hub.utils import filter_repo_objects

        check(repo_id, options.get("revision"))
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        place = root / repo_id / options.get("path_in_repo", "")
        allow, ignore = options.get("allow_patterns"), options.get("ignore_patterns")
        for name in filter_repo_objects(files, allow_patterns=allow, ignore_patterns=ignore):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, place / name)
        commit = f"https://hub/{repo_id}: {options['commit_message']}"
        done = SimpleNamespace(is_done=lambda: True, done=lambda: True, result=lambda: commit)
        return done if options.get("run_as_future") else commit

    def hf_hub_download(self: HfApi, repo_id: str, filename: str, revision: str | None = None) -> str:
        check(repo_id, revision)
        if not (root / repo_id / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(root / repo_id / filename)

    for method in (create_repo, create_branch, upload_folder, hf_hub_download):
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
    assert "model = …  # the base model\n" in text
    folder = save_adapter(wrapped(tiny_llama), tmp_path / "own", format="oftv2")
    assert "PeftModel" not in (folder / "README.md").read_text()


def test_a_model_of_another_task_is_loaded_by_its_own_class(base_folder, tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3)
    randomize(wrap_model(model, block_size=16))
    save_adapter(model, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert 'model = LlamaForSequenceClassification.from_pretrained("path/to/the/base/model")  # or quantized' in text
    assert "from transformers import LlamaForSequenceClassification\n" in text
    loaded = AutoPeftModel.from_pretrained(tmp_path, num_labels=3)
    torch.testing.assert_close(loaded(IDS).logits, model.eval()(IDS).logits)


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
    card.write_bytes("Grüße".encode("latin-1"))
    save_adapter(model, tmp_path)
    assert card.read_bytes() == "Grüße".encode("latin-1")


def test_push_to_hub_and_back(tiny_llama, hub):
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


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_adapter_is_pushed_or_those_that_are_selected(tiny_llama, tmp_path, hub):
    model = wrapped(tiny_llama)
    for name in ("style", "task [1]"):
        add_adapter(model, name, block_size=8)
    randomize(model)
    subfolders = {f"{name}/{file}" for name in ("style", "task [1]") for file in ADAPTER}
    model.push_to_hub("user/all", revision="dev")
    assert files(hub / "user/all") == ADAPTER | subfolders | {".dev"}
    card = hub / "user/all/style/README.md"
    card.write_text("Mine")
    model.push_to_hub("user/all")
    assert card.read_text() == "Mine"
    (tmp_path / "saved/checkpoint-1").mkdir(parents=True)
    (tmp_path / "saved/checkpoint-1" / "adapter_config.json").touch()
    model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert files(hub / "user/saved") == ADAPTER | subfolders
    for name, place in {"default": "", "style": "style", "task [1]": "task [1]"}.items():
        set_adapter(model, name)
        loaded = load_adapter(tiny_llama(), hub / "user/all" / place)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    set_adapter(model, ["default", "style"])
    model.push_to_hub("user/several")
    assert files(hub / "user/several") == ADAPTER | subfolders
    model.push_to_hub("user/one", selected_adapters=["task [1]"])
    assert files(hub / "user/one") == ADAPTER
    set_adapter(model, "task [1]")
    assert torch.equal(load_adapter(tiny_llama(), hub / "user/one")(IDS).logits, model(IDS).logits)
    with pytest.raises(AdapterError, match="'stile'"):
        model.push_to_hub("user/wrong", selected_adapters=["style", "stile"])
    with pytest.raises(AdapterError, match="no adapter is named"):
        model.save_pretrained(tmp_path / "none", selected_adapters=[])
    assert not (hub / "user/wrong").exists()
    assert not (tmp_path / "none").exists()


def test_peft_finds_every_pushed_adapter(tiny_llama, hub):
    model = wrapped(tiny_llama)
    add_adapter(model, "style", block_size=8)
    randomize(model)
    model.push_to_hub("user/both")
    theirs = PeftModel.from_pretrained(tiny_llama(), hub / "user/both").eval()
    theirs.load_adapter(hub / "user/both/style", "style")
    for name in ("default", "style"):
        set_adapter(model, name)
        theirs.set_adapter(name)
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits)


def test_save_pretrained_pushes_what_it_saved(tiny_llama, tmp_path, hub):
    model = wrapped(tiny_llama)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("Mine")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert {path.name for path in (hub / "user/mine").iterdir()} == ADAPTER
    assert (hub / "user/mine/README.md").read_text() == "Mine"
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="other/name")
    assert {path.name for path in (hub / "other/name").iterdir()} == ADAPTER


def pushing(model: nn.Module, folder: Path, **fields: Any) -> Trainer:
    """A trainer that pushes."""
    arguments = TrainingArguments(
        folder,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id="user/mine",
        **fields,
    )
    return Trainer(model, arguments, train_dataset=ROWS)


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_a_trainer_that_pushes(tiny_llama, tmp_path, hub, strategy):
    model = wrapped(tiny_llama)
    trainer = pushing(model, tmp_path / "run", hub_strategy=strategy)
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


@pytest.mark.parametrize("peft", [True, False], ids=["peft", "without"])
@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints"])
def test_what_is_pushed_during_training_is_whole(tiny_llama, tmp_path, hub, monkeypatch, strategy, peft):
    monkeypatch.setattr(transformers.trainer, "is_peft_available", lambda: peft)
    model = wrapped(tiny_llama)
    add_adapter(model, "style", block_size=8)
    randomize(model)
    trainer = pushing(model, tmp_path / "run", hub_strategy=strategy, hub_always_push=True)
    trainer.train()  # pushes after both steps, and nothing is pushed at the end
    for name, place in {"default": "", "style": "style"}.items():
        assert {path.name for path in (hub / "user/mine" / place).iterdir()} >= ADAPTER
        set_adapter(model, name)
        loaded = load_adapter(tiny_llama(), hub / "user/mine" / place).eval()
        assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    set_adapter(model, "default")
    metadata, _ = parts(hub / "user/mine/README.md")
    assert metadata["base_model"] == "someone/tiny-llama"
    if strategy == "all_checkpoints":
        assert files(hub / "user/mine/checkpoint-2") >= ADAPTER | {f"style/{file}" for file in ADAPTER}

    (tmp_path / "run/README.md").write_text("Mine")
    trainer.train()
    assert (hub / "user/mine/README.md").read_text() == "Mine"


def test_a_trainer_that_pushes_at_the_end_writes_nothing_before(tiny_llama, tmp_path, hub):
    trainer = pushing(wrapped(tiny_llama), tmp_path / "run", hub_strategy="end")
    trainer.train()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_tags_go_with_the_adapter(tiny_llama):
    model = tiny_llama()
    before = model.model_tags
    wrap_model(model, block_size=16)
    assert "oftv2" in model.model_tags
    assert unwrap_model(model).model_tags == before
