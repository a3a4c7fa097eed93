"""A wrapped model on several devices: two processes of ``distributed_runs.py`` find what a single one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import mixtures
import oftv2
from conftest import adapted_paths, assert_close, randomize
from distributed_models import base, generators
from distributed_runs import PLAIN, STATE_DICT_TYPES
from distributed_trainers import PREFERENCES, TRAINERS
from oftv2 import AdapterError, load_adapter, merge, save_adapter, wrap_model

# Two halves of a batch are summed in another order than the batch; bf16 activations round at each step.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Results:
    """What each run returned, by its name, the number of processes and the rank."""

    def __init__(self, folder: Path, log: str) -> None:
        self.folder, self.log = folder, log

    def __call__(self, name: str, world: int, rank: int = 0) -> Any:
        path = self.folder / f"{name}-{world}-{rank}.pt"
        assert path.exists(), f"rank {rank} of {world} stopped before {name}:\n{self.log[-3000:]}"
        found = torch.load(path, weights_only=False)
        assert not isinstance(found, str), f"{name}, rank {rank} of {world}:\n{found}"
        return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    script = Path(__file__).with_name("distributed_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, script, folder], env=environment, capture_output=True, text=True, timeout=400
    )
    return Results(folder, done.stdout + done.stderr)


def rounding(kind: str) -> float:
    return ROUNDING[torch.bfloat16 if "bfloat16" in kind else torch.float32]


def assert_all_close(name: str, actual: list[torch.Tensor], expected: list[torch.Tensor], relative: float) -> None:
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"{name} {number}", one, other, relative)


def same_losses(actual: list[float], expected: list[float], kind: str = "float32") -> None:
    assert len(expected) >= 3
    assert actual == pytest.approx(expected, rel=3e-4 if "bfloat16" in kind else 2e-6)


def same_steps(ranks: list[dict[str, Any]], single: dict[str, Any], kind: str = "float32") -> None:
    same_losses(
        [sum(both) / 2 for both in zip(*(rank["losses"] for rank in ranks), strict=True)], single["losses"], kind
    )
    for rank in ranks:
        for step, gradients in enumerate(rank["gradients"]):
            assert_all_close(f"gradient of step {step}", gradients, single["gradients"][step], rounding(kind))
        assert_all_close("generators", rank["generators"], single["generators"], rounding(kind))
        assert all(map(torch.equal, rank["generators"], ranks[0]["generators"]))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_torch(results, name):
    """Gradients, updates and what is saved, in both forms of a layer, with checkpointing."""
    how, kind, _ = PLAIN[name]
    single, ranks = results(name, 1), [results(name, 2, rank) for rank in (0, 1)]
    same_steps(ranks, single, kind)
    for rank in ranks:
        assert_close("base model", rank["disabled"], single["disabled"], rounding(kind))
        assert rank["figures"] == pytest.approx(single["figures"], rel=rounding(kind))
    for place in ("plain", "pretrained"):
        folder = results.folder / f"{place}-{how}-{kind}-{PLAIN[name][2]}"
        loaded = load_adapter(base(results.folder, kind), f"{folder}-2")  # which compares the base's weights, too
        assert all(map(torch.equal, generators(loaded), ranks[0]["generators"]))
        ours, theirs = (load_file(f"{folder}-{world}/adapter_model.safetensors") for world in (2, 1))
        assert ours.keys() == theirs.keys()
        assert (Path(f"{folder}-2") / "README.md").read_text() == (Path(f"{folder}-1") / "README.md").read_text()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_experts(results, how):
    single, ranks = results(f"experts-{how}", 1), [results(f"experts-{how}", 2, rank) for rank in (0, 1)]
    same_steps(ranks, single)
    loaded = load_adapter(mixtures.model_of(), results.folder / f"experts-{how}-2")
    assert any("experts" in path for path in adapted_paths(loaded))
    assert all(map(torch.equal, generators(loaded), ranks[0]["generators"]))


def test_processes_that_save_at_once_leave_whole_adapters(results):
    assert all(results("save-at-once", 2, rank) for rank in (0, 1))


def test_a_process_that_saves_alone_says_what_it_waits_for(results):
    """It cannot know whether the others come."""
    first, late = (results("save-late", 2, rank) for rank in (0, 1))
    assert len(first) == 1
    assert first[0].startswith("save_adapter has waited 1.5 s for other processes")
    assert "Every process has to call save_adapter" in first[0]
    assert not late
    assert load_adapter(base(results.folder, "float32"), results.folder / "late")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_accelerate(results, how):
    single, ranks = results(f"loop-{how}", 1), [results(f"loop-{how}", 2, rank) for rank in (0, 1)]
    same_losses(ranks[0]["losses"], single["losses"])
    for rank in ranks:
        assert rank["resumed"] == rank["end"]
        assert_all_close("generators", rank["generators"], single["generators"], 1e-4)
    folder = results.folder / f"loop-{how == 'fsdp'}-2-adapter"
    loaded = load_adapter(base(results.folder, "float32"), folder)
    assert all(map(torch.equal, generators(loaded), ranks[0]["generators"]))
    assert not load_file(folder / "model.safetensors").keys() - dict(loaded.named_parameters()).keys()


@pytest.mark.parametrize("kind", STATE_DICT_TYPES)
def test_accelerate_saves_states_of_adapters_only(results, kind):
    """With FSDP2; as exact as states of the whole model."""
    ranks = [results(f"loop-fsdp-{kind}", 2, rank) for rank in (0, 1)]
    for rank in ranks:
        assert rank["losses"] == results("loop-fsdp", 2)["losses"]
        assert rank["resumed"] == rank["end"]
    state = results.folder / f"loop-True-{kind}-2"
    models = [path for path in state.rglob("*") if path.is_file() and "pytorch_model_fsdp" in str(path)]
    adapter = sum(tensor.nbytes for tensor in ranks[0]["generators"])
    assert adapter <= sum(path.stat().st_size for path in models) < 3 * adapter
    assert 3 * adapter < sum(parameter.nbytes for parameter in base(results.folder, "float32").parameters())


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer(results, name):
    kind, config = TRAINERS[name]
    single, ranks = results(name, 1), [results(name, 2, rank) for rank in (0, 1)]
    folder = results.folder / f"{name}-2"
    for rank in ranks:
        same_losses(rank["losses"], single["losses"], kind)
        assert rank["angles"] == pytest.approx(single["angles"], rel=1e-2)
        assert rank["resumed"] == rank["losses"][2:]
        assert rank["best_checkpoint"].endswith("checkpoint-4")
        assert all(map(torch.equal, rank["best"], ranks[0]["best"]))
        assert not any(map(torch.equal, rank["best"], rank["last"]))
    assert_all_close("best", ranks[0]["best"], single["best"], 0.1 if "bfloat16" in kind else 1e-2)

    whole = config is None or "state_dict_type" not in config  # of a sharded checkpoint, Trainer saves no model
    for place in ["own", *(["final", "straight/checkpoint-4"] if whole else [])]:
        loaded = load_adapter(base(results.folder, kind), folder / place)
        assert all(map(torch.equal, generators(loaded), ranks[0]["best"])), place
    checkpoint = folder / "straight" / "checkpoint-2"
    kept = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("pytorch_model_fsdp*")]
    assert kept
    sizes = [sum(part.stat().st_size for part in [path, *path.glob("*")] if part.is_file()) for path in kept]
    adapter = sum(tensor.nbytes for tensor in ranks[0]["best"])
    assert max(sizes) < 3 * adapter < sum(parameter.nbytes for parameter in base(results.folder, kind).parameters())
    if config is not None and whole:
        saved = torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True)
        assert saved.keys() == load_file(checkpoint / "model.safetensors").keys()


@pytest.mark.parametrize("name", PREFERENCES)
def test_trl(results, name):
    single, ranks = results(name, 1), [results(name, 2, rank) for rank in (0, 1)]
    assert single["losses"][-1] < single["losses"][0] - 0.01
    for rank in ranks:
        assert rank["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert_all_close("generators", rank["generators"], single["generators"], 1e-2)


# ---------------------------------------------------------------------------------------------- refused


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_would_change_a_sharded_model_is_refused(mesh, tmp_path):
    model = wrap_model(nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 8)), block_size=8, modules_to_save=["1"])
    oftv2.add_adapter(model, "other", block_size=16, target_modules=["0"])
    randomize(model)
    x = torch.randn(4, 64)
    before = model(x)
    save_adapter(model, tmp_path / "before", adapter_name="default")
    fully_shard(model, mesh=mesh)
    for refused in (
        lambda: merge(model),
        lambda: oftv2.unwrap_model(model),
        lambda: oftv2.add_adapter(model, "third"),
        lambda: oftv2.delete_adapter(model, "other"),
        lambda: load_adapter(model, tmp_path / "before"),
        lambda: load_adapter(model, tmp_path / "before", adapter_name="third"),
        lambda: oftv2.hotswap_adapter(model, tmp_path / "before"),
        lambda: oftv2.average_adapters(model, ["default", "other"]),
        lambda: oftv2.reference_model(model),
    ):
        with pytest.raises(AdapterError, match=r"^Sequential is sharded \(FSDP\): \w+"):
            refused()
    with pytest.raises(AdapterError, match=r"^1\.bias is sharded \(FSDP\), so another adapter's values cannot"):
        oftv2.set_adapter(model, "other")
    with pytest.raises(AdapterError, match=r"^1\.weight is trained in full and sharded"), oftv2.disable_adapter(model):
        pass
    with pytest.raises(AdapterError, match="0: the generators are sharded"):
        model[0].merge()
    torch.testing.assert_close(model(x), before)
    save_adapter(model, tmp_path / "after", adapter_name="default")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_torch_saves_a_sharded_model_with_an_inactive_adapter_that_has_a_head(mesh, tiny_llama):
    """torch looks for a parameter under each key of a state dictionary, and what is set aside is none."""
    model = wrap_model(tiny_llama(), block_size=16, modules_to_save=["lm_head"])
    oftv2.add_adapter(model, "other", block_size=8, modules_to_save=["lm_head"])
    assert "_oftv2.other.lm_head.weight" in model.state_dict()
    fully_shard(model, mesh=mesh)
    saved = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert saved.keys() == dict(model.named_parameters()).keys()
    saved = {name: tensor.clone() for name, tensor in saved.items()}  # with one process they are the model's own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    set_model_state_dict(model, saved, options=StateDictOptions(full_state_dict=True))
    assert not any(packed.any() for packed in generators(model))


def test_a_state_dict_that_is_not_gathered_is_refused(mesh, tiny_llama, tmp_path):
    model = wrap_model(tiny_llama(), block_size=16)
    fully_shard(model, mesh=mesh)
    with pytest.raises(
        AdapterError, match=r"^model\.embed_tokens\.weight is sharded \(FSDP\), and the given state_dict"
    ):
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    model.save_pretrained(tmp_path, state_dict={})  # accelerate's answer in all processes but the first
    assert not list(tmp_path.iterdir())


def test_fsdp1_saves_within_its_own_context(mesh, tiny_llama, tmp_path):
    model = wrap_model(tiny_llama(), block_size=16)
    randomize(model)
    wanted = generators(model)
    outer = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    outer(input_ids=torch.arange(4)[None])
    with pytest.raises(AdapterError, match=r"pass the model inside it here: model\.module"):
        save_adapter(outer, tmp_path)
    with FullyShardedDataParallel.summon_full_params(outer, writeback=False):
        save_adapter(model, tmp_path)
    assert all(map(torch.equal, generators(load_adapter(tiny_llama(), tmp_path)), wanted))
    model.model.layers[0].self_attn.q_proj.generators["default"].data = torch.zeros(7)  # as a second process has it
    with pytest.raises(AdapterError, match=r"q_proj: this process has a part of the generators \(FSDP1\)"):
        save_adapter(model, tmp_path)
