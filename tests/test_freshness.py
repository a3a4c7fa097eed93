"""A stale rotation is the worst bug this library could have: every way in which generators change must show at once."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import nn

from conftest import randomize
from oftv2 import AdapterError, OFTConfig, OFTEmbedding, OFTLinear, disable_adapter, reference, wrap_model
from oftv2 import adapter as adapter_module


@pytest.fixture
def layer() -> OFTLinear:
    layer = OFTLinear(nn.Linear(64, 16), OFTConfig(block_size=16))
    randomize(layer)
    return layer.eval()


NEW = torch.full((4, 120), 0.02)
X = torch.linspace(-1, 1, 5 * 64).view(5, 64)


def expected(layer: OFTLinear) -> torch.Tensor:
    Q = reference.skew(layer.generators[layer.active].detach().double(), 16)
    weight, bias = layer.weight.double(), layer.bias.double()
    return reference.oft_linear(X.double(), reference.cayley_neumann(Q, 4), weight, bias)


def check(layer: OFTLinear) -> None:
    with torch.no_grad():
        torch.testing.assert_close(layer(X).double(), expected(layer), rtol=1e-5, atol=1e-5)


def optimizer_step(layer):
    optimizer = torch.optim.AdamW([layer.generators["default"]], lr=0.01)
    layer(X).square().sum().backward()
    optimizer.step()


CHANGES = {
    "optimizer step in eval mode": optimizer_step,
    "copy_ under no_grad": lambda layer: layer.generators["default"].requires_grad_(False).copy_(NEW),
    "in-place arithmetic": lambda layer: layer.generators["default"].requires_grad_(False).mul_(2),
    "another tensor by .data": lambda layer: setattr(layer.generators["default"], "data", NEW.clone()),
    "another parameter": lambda layer: layer.generators.update({"default": nn.Parameter(NEW.clone())}),
    "load_state_dict": lambda layer: layer.load_state_dict({**layer.state_dict(), "generators.default": NEW.clone()}),
    "load_state_dict(assign=True)": lambda layer: layer.load_state_dict(
        {**layer.state_dict(), "generators.default": NEW.clone()}, assign=True
    ),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "a write by .data, then train() and eval()": lambda layer: (
        layer.generators["default"].data.fill_(0.02),
        layer.train(),
        layer.eval(),
    ),
    "to(float64)": lambda layer: layer.double().float(),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(
        torch.full((480,), 0.02), [layer.generators["default"]]
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_shows_in_the_next_eval_forward(layer, change):
    for _ in range(2):  # the second one comes from the cache
        check(layer)
    change(layer)
    check(layer)
    change(layer)
    check(layer)


def test_write_through_data_shows_in_the_next_training_forward(layer):
    layer.train()
    check(layer)
    layer.generators["default"].data.fill_(0.03)
    check(layer)


def test_training_by_the_attribute_is_training(layer):
    check(layer)
    layer.training = True
    layer.generators["default"].data.fill_(0.03)
    check(layer)


def test_write_through_data_under_checkpointing_and_accumulation(layer):
    layer.train()
    for value in (0.01, 0.02, 0.03):
        layer.generators["default"].data.fill_(value)
        out = torch.utils.checkpoint.checkpoint(layer, X, use_reentrant=False)
        torch.testing.assert_close(out.double(), expected(layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), copy.copy],
    ids=["deepcopy", "pickle", "copy"],
)
def test_duplicates_do_not_share_a_rotation(layer, duplicate):
    check(layer)
    other = duplicate(layer)
    check(other)
    if duplicate is not copy.copy:
        other.generators["default"].data.fill_(0.02)
        other.eval()
        check(other)
        check(layer)


def test_torch_save_and_load(layer):
    check(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    check(torch.load(buffer, weights_only=False))


def test_rotation_is_built_once_in_eval_and_at_every_step_in_training(layer, monkeypatch):
    calls = []
    monkeypatch.setattr(layer, "_check_divergence", lambda *_: None)  # which would take them too
    original = type(layer.rotation).effective  # what every rotation is made of
    monkeypatch.setattr(type(layer.rotation), "effective", lambda self, g: calls.append(1) or original(self, g))
    with torch.no_grad():
        for _ in range(3):
            layer(X)
    assert len(calls) == 1
    layer.train()
    for _ in range(3):
        layer(X)
    assert len(calls) == 4
    layer.eval()(X)  # a gradient may be asked for: built anew, with its graph
    assert len(calls) == 5


def test_eval_forward_with_gradients_trains(layer):
    check(layer)
    layer(X).sum().backward()
    assert layer.generators["default"].grad.any()


def test_inference_mode_leaves_nothing_that_autograd_refuses(layer):
    with torch.inference_mode():
        layer(X)
    layer.generators["default"].requires_grad_(False)
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    check(layer)


def test_disabled_layer_is_the_base_layer():
    model = nn.Sequential(nn.Linear(64, 16))
    wrap_model(model, block_size=16)
    randomize(model)
    rotated = model(X)
    with disable_adapter(model):
        assert torch.equal(model(X), model[0].base_layer(X))
        with disable_adapter(model):
            assert torch.equal(model(X), model[0].base_layer(X))
        assert torch.equal(model(X), model[0].base_layer(X))
    assert torch.equal(model(X), rotated)


def test_disable_ends_with_an_exception():
    model = nn.Sequential(nn.Linear(64, 16))
    wrap_model(model, block_size=16)
    randomize(model)
    rotated = model(X)

    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert torch.equal(model(X), rotated)


def test_a_second_thread_does_not_disable_what_one_has_disabled():
    """The one that leaves last would restore what it found: the base model, for good."""
    model = wrap_model(nn.Sequential(nn.Linear(8, 8)), block_size=4)

    def disabled() -> bool:
        with disable_adapter(model):
            return not model[0].enabled

    with ThreadPoolExecutor(1) as other:
        with disable_adapter(model):
            with pytest.raises(AdapterError, match="another thread is within disable_adapter"):
                other.submit(disabled).result()
            assert disabled()
            assert not model[0].enabled
        assert model[0].enabled
        assert other.submit(disabled).result()


def test_a_second_thread_does_not_slip_in_while_one_disables(monkeypatch):
    model = wrap_model(nn.Sequential(nn.Linear(8, 8)), block_size=4)
    begun, tried = Event(), Event()

    def slowly(*_: object) -> None:
        if not begun.is_set():
            begun.set()
            tried.wait(10)

    def disabled() -> bool:
        with disable_adapter(model):
            return not model[0].enabled

    monkeypatch.setattr(adapter_module, "refuse_partitioned", slowly)
    with ThreadPoolExecutor(1) as other:
        first = other.submit(disabled)
        begun.wait(10)
        try:
            with pytest.raises(AdapterError, match="another thread is within disable_adapter"):
                disabled()
        finally:
            tried.set()
        assert first.result()
    assert model[0].enabled


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_generators_stay_in_float32(self, layer, dtype):
        values = layer.generators["default"].detach().clone()
        for moved in (layer.to(dtype), layer.half(), layer.bfloat16()):
            assert moved.generators["default"].dtype == torch.float32
            assert torch.equal(moved.generators["default"], values)
        assert layer.weight.dtype == torch.bfloat16

    def test_their_gradients_too(self, layer):
        layer(X).sum().backward()
        grad = layer.generators["default"].grad.clone()
        layer.bfloat16()
        assert layer.generators["default"].grad.dtype == torch.float32
        assert torch.equal(layer.generators["default"].grad, grad)

    def test_double_and_back(self, layer):
        assert layer.double().generators["default"].dtype == torch.float64
        assert layer.half().generators["default"].dtype == torch.float32
        assert OFTLinear(nn.Linear(64, 4).double()).generators["default"].dtype == torch.float64

    def test_generators_written_in_16_bit_by_others_still_work(self, layer):
        layer.generators["default"].data = layer.generators["default"].data.bfloat16()
        check(layer)
        layer.train()(X).sum().backward()
        assert layer.generators["default"].grad.dtype == torch.bfloat16

    def test_meta_device(self):
        with torch.device("meta"):
            model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 16))
        wrap_model(model, target_modules=["0", "1"], block_size=16)
        assert model(torch.empty(3, dtype=torch.long, device="meta")).shape == (3, 16)
        model.to_empty(device="cpu")  # leaves what was in the memory, but for generators
        for module in (model[0].base_layer, model[1].base_layer):
            module.reset_parameters()
        assert isinstance(model[0], OFTEmbedding)
        assert not any(packed.any() for layer in model for packed in layer.generators.values())
        ids = torch.tensor([1, 2])
        assert torch.equal(model(ids), model[1].base_layer(model[0].base_layer(ids)))


def test_a_kept_rotation_in_16_bit_is_as_fresh_as_the_one_it_is_made_from(layer):
    """Kernels for few tokens read Δ in the activations' dtype; it is cast once."""
    with torch.no_grad():
        first = layer.delta(torch.bfloat16)
        assert first.dtype == torch.bfloat16
        assert torch.equal(first, layer.delta().bfloat16())
        assert layer.delta(torch.bfloat16) is first
        layer.generators["default"].requires_grad_(False).mul_(2)
        assert torch.equal(layer.delta(torch.bfloat16), layer.delta().bfloat16())
        assert not torch.equal(layer.delta(torch.bfloat16), first)


def test_another_tensor_at_the_same_address_is_not_taken_for_the_old_one(layer):
    """Allocators hand out the same memory again, and a tensor put in by ``.data`` leaves the version as it was."""
    generators = layer.generators["default"]
    check(layer)
    for i in range(100):
        generators.data = torch.full((4, 120), 0.0005 * i)
        if i % 7 == 0:
            check(layer)
        held = layer._cache._made_of[0][1].data_ptr()
        assert (generators.data_ptr() == held) == layer._cache.is_of([generators])
    check(layer)
