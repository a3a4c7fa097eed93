"""Fixtures that all tests share.

The repository's root is taken off the import path: a folder ``kernels`` there would hide Hugging Face's package of that
name, and the tests are to import what is installed, whatever the working directory.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Processes of pytest-xdist, and what tests start in them, share the cores. Has to be chosen before torch is imported.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))

import hypothesis
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]

# Without a CUDA device, Triton kernels run in its interpreter, which has to be chosen before Triton is imported.
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    import interpreter

    interpreter.install()

# What takes longest, in the order in which processes of pytest-xdist begin with it: none is left alone in the end.
LONGEST = [
    "kernel_resources",
    "examples",
    "kernels_rotate_rows",
    "distributed",
    "kernels",
    "training",
    "trl",
    "gpu_check",
]

# The same examples in every run, and as long as a busy machine needs for them.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="each test with its first shape alone, in every dtype")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes out kernel tests that this machine, with or without a CUDA device, is not for; and further shapes. What
    takes longest comes first."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    left_out = [item for item in items if item.get_closest_marker("interpreter" if HAS_CUDA else "gpu")]
    if config.getoption("--quick"):
        first: dict[tuple[str, ...], pytest.Item] = {}
        left_out += [item for item in items if first.setdefault(_without_shape(item), item) is not item]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def _without_shape(item: pytest.Item) -> tuple[str, ...]:
    """What a test is called with but for numbers and shapes: the dtype, the form, the layout, and where it runs."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return (item.nodeid.partition("[")[0], *(str(p) for p in parameters if isinstance(p, (bool, str, torch.dtype))))


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)],
    ids=["interpreter", "cuda"],
)
def device(request: pytest.FixtureRequest):
    """Where Triton kernels run here, registered for that device."""
    from oftv2.kernels.register import register, unregister
    from oftv2.kernels.usable import usable

    assert usable(torch.device(request.param)), "plain torch would be compared with plain torch"
    library = register("CPU") if request.param == "cpu" else None
    yield torch.device(request.param)
    if library is not None:
        unregister(library, "CPU")


@pytest.fixture
def two_threads():
    """Sums are split between threads, however many this process was given."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes logs each cast of an int8 layer's input."""
    caplog.set_level(logging.ERROR, logger="bitsandbytes")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a tokenizer that reads bytes: loads and trains at once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from byte_tokenizer import byte_tokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_llama():
    """Makes randomly initialised two-layer Llama models with equal weights for equal arguments."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**fields):
        config = LlamaConfig(
            **{
                "vocab_size": 128,
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **fields,
            }
        )
        torch.manual_seed(1)
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def base_folder(tiny_llama, tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer, on disk as TRL expects a model."""
    from byte_tokenizer import byte_tokenizer

    tiny_llama(vocab_size=258, eos_token_id=1, bos_token_id=None).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A folder with a sharded base model and an adapter on it, and room for more."""
    from merged_checkpoints import base_and_adapter

    return base_and_adapter(tmp_path)


class OperatorCounter(TorchDispatchMode):
    """Notes the operators of this library that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "oftv2":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def graph_nodes(out: torch.Tensor) -> list[str]:
    """The names of the nodes of the graph that made ``out``."""
    found, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return [type(node).__name__ for node in found]


def record_calls(monkeypatch: pytest.MonkeyPatch, functions: dict[ModuleType, list[str]]) -> list[str]:
    """Notes the names of these functions of modules when they are called: whether a kernel was launched at all."""
    called: list[str] = []

    def recording(name: str, function: Callable) -> Callable:
        return lambda *args, **options: called.append(name) or function(*args, **options)

    for module, names in functions.items():
        for name in names:
            monkeypatch.setattr(module, name, recording(name, getattr(module, name)))
    return called


def run_script(monkeypatch: pytest.MonkeyPatch, script: Path, *arguments: object) -> None:
    """As ``python script`` runs it, but in this process, where torch is imported already."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def command_fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error of a call of ``python -m oftv2`` that fails and prints nothing else."""
    from oftv2.__main__ import main

    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def randomize(model: torch.nn.Module, std: float = 0.05, seed: int = 3) -> None:
    """Gives every adapter of a model random generators."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".generators." in name or name.startswith("generators."):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def build(make, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model with the same weights every time."""
    torch.manual_seed(11)
    return make().to(dtype).eval()


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every trainable parameter other values, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trainable(model: torch.nn.Module) -> set[str]:
    """The names of the parameters that train."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_paths(model: torch.nn.Module) -> set[str]:
    """All paths of the adapted layers."""
    from oftv2 import OFTLayer

    return {path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, OFTLayer)}


def block_sizes(model: torch.nn.Module) -> dict[str, int]:
    """The adapted layers' block sizes, by path."""
    from oftv2 import OFTLayer

    return {path: layer.rotation.block_size for path, layer in model.named_modules() if isinstance(layer, OFTLayer)}


def snapshot(model: torch.nn.Module) -> dict[str, dict]:
    """All that a refused call must not change: the modules themselves, flags, hooks, attributes and values."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "modules": {path: (id(module), type(module), module.training) for path, module in modules.items()},
        "hooks": {
            path: [[id(hook) for hook in hooks.values()] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
            for path, m in modules.items()
        },
        "attributes": {path: sorted(module.__dict__) for path, module in modules.items()},
        "parameters": {
            name: (id(p), p.requires_grad, p.dtype, p.data_ptr())
            for name, p in model.named_parameters(remove_duplicate=False)
        },
        "values": {name: value.double().numpy().tobytes() for name, value in model.state_dict().items()},
    }


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """‖actual − expected‖ ≤ relative · ‖expected‖, in float64."""
    error = torch.linalg.vector_norm(actual.double() - expected.double())
    scale = torch.linalg.vector_norm(expected.double())
    assert error <= relative * scale + 1e-300, f"{name}: relative error {error / scale:.2e} > {relative:.0e}"
