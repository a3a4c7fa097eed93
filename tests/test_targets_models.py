"""Which modules an adapter goes on, by kinds of models: plain containers, GPT-2, shared modules, torch's encoders."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BlipConfig,
    BlipForConditionalGeneration,
    DeepseekV32Config,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LayoutLMv3Config,
    LongcatFlashConfig,
    MambaConfig,
    MambaForCausalLM,
    ReformerConfig,
    WavLMConfig,
    WavLMForCTC,
)
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer
from transformers.models.detr.modeling_detr import DetrMHAttentionMap
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAltUp
from transformers.models.layoutlmv3.modeling_layoutlmv3 import LayoutLMv3Encoder
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from conftest import adapted_paths, randomize, trainable
from oftv2 import (
    AdapterError,
    OFTConfig,
    OFTEmbedding,
    OFTLayer,
    OFTLinear,
    disable_adapter,
    merge,
    unwrap_model,
    wrap_model,
)
from small_models import mlp


def encoder(**fields):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **fields)
    return nn.TransformerEncoder(layer, 2).eval()


def test_plain_models_of_sequential_and_moduledict():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 16), "body": mlp(16, 32, 16)})
    wrap_model(model, OFTConfig(block_size=8))
    assert adapted_paths(model) == {"body.0", "body.1"}
    assert type(model["embed"]) is nn.Embedding
    wrap_model(unwrap_model(model), block_size=8, target_modules=("embed", "1"))
    assert adapted_paths(model) == {"embed", "body.1"}
    assert isinstance(model["embed"], OFTEmbedding)
    ids = torch.arange(10)
    plain = model["body"](model["embed"](ids))
    randomize(model)
    changed = model["body"](model["embed"](ids))
    assert not torch.allclose(plain, changed)
    with disable_adapter(model):
        assert torch.equal(model["body"](model["embed"](ids)), plain)


def test_gpt2s_conv1d(tiny_gpt2):
    ids = torch.arange(8)[None]
    plain = tiny_gpt2(ids).logits
    wrap_model(tiny_gpt2, block_size=8)
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert adapted_paths(tiny_gpt2) == {f"transformer.h.{i}.{name}" for i in (0, 1) for name in names}
    assert all(type(module) is OFTLinear for module in tiny_gpt2.modules() if isinstance(module, OFTLayer))
    assert torch.equal(tiny_gpt2(ids).logits, plain)
    assert tiny_gpt2.transformer.h[0].mlp.c_proj.generators["default"].shape == (8, 28)  # d is 64: the rows of (d, n)
    tiny_gpt2(ids).logits.square().sum().backward()
    gradients = [p.grad for p in tiny_gpt2.parameters() if p.requires_grad]
    assert len(gradients) == 8
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.fixture
def tiny_gpt2():
    config = GPT2Config(vocab_size=64, n_embd=16, n_inner=64, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).eval()


class Shared(nn.Module):
    """One linear layer at two paths of its own, and inside one block at two paths."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first
        self.block = nn.Sequential(nn.Linear(16, 16))
        self.again = self.block

    def forward(self, x):
        return self.again(self.block(self.second(self.first(x).tanh()).tanh()).tanh())


def test_a_shared_module_gets_one_adapter_at_all_its_paths():
    model, x = Shared(), torch.randn(5, 16)
    original, plain = model.first, model(x)
    wrap_model(model, block_size=8)
    assert adapted_paths(model) == {"first", "second", "block.0", "again.0"}
    assert model.first is model.second
    assert model.block is model.again
    assert trainable(model) == {"first.generators.default", "block.0.generators.default"}
    randomize(model, std=0.2)
    turned = model(x)
    R = torch.block_diag(*(model.first.delta().detach() + torch.eye(8)))
    S = torch.block_diag(*(model.block[0].delta().detach() + torch.eye(8)))
    y = x
    for _ in range(2):
        y = original(y @ R).tanh()
    y = model.block[0].base_layer(y @ S).tanh()
    torch.testing.assert_close(turned, model.block[0].base_layer(y @ S))
    unwrap_model(model)
    assert model.first is original
    assert model.second is original
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("path", ["first", "second"])
def test_a_shared_module_can_be_named_by_any_of_its_paths(path):
    assert adapted_paths(wrap_model(Shared(), block_size=8, target_modules=(path,))) == {"first", "second"}


@pytest.mark.parametrize("path", ["first", "second"])
def test_excluding_one_path_of_a_shared_module_excludes_the_module(path):
    assert adapted_paths(wrap_model(Shared(), block_size=8, exclude_modules=(path,))) == {"block.0", "again.0"}


@pytest.mark.parametrize(
    ("where", "mask"),
    [("encoder", False), ("encoder", True), ("layer", False), ("layer", True), ("nested", False)],
    ids=["encoder", "encoder-padded", "layer", "layer-padded", "nested"],
)
def test_torchs_fused_encoder_does_not_bypass_the_adapter(where, mask):
    model = nn.Sequential(encoder()) if where == "nested" else encoder() if where == "encoder" else encoder().layers[0]
    nested = [module.use_nested_tensor for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    x = torch.randn(3, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    arguments = {"src_key_padding_mask": padding} if mask else {}
    kept = ~padding if mask else torch.ones(3, 5, dtype=torch.bool)

    def run(fast):
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(fast)
        try:
            with torch.no_grad():
                return model(x, **arguments)[kept]
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)

    plain = run(fast=True)
    wrap_model(model, block_size=8)
    assert {path.rsplit(".", 1)[-1] for path in adapted_paths(model)} == {"linear1", "linear2"}  # no out_proj
    torch.testing.assert_close(run(fast=True), plain)
    randomize(model, std=0.3)
    model.eval()  # what is written through .data shows after a change of mode
    slow = run(fast=False)
    assert (slow - plain).abs().max() > 0.05
    torch.testing.assert_close(run(fast=True), slow)
    merge(model)
    torch.testing.assert_close(run(fast=True), slow)
    after = [module.use_nested_tensor for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    assert after == nested


def mamba():
    sizes = {"hidden_size": 16, "state_size": 8, "num_hidden_layers": 1, "time_step_rank": 8}
    return MambaForCausalLM(MambaConfig(vocab_size=32, **sizes)), torch.arange(8)[None]


def wavlm():
    convolutions = {"conv_dim": (16,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embeddings": 4}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = WavLMConfig(vocab_size=32, num_conv_pos_embedding_groups=2, mask_time_prob=0, **sizes, **convolutions)
    return WavLMForCTC(config), torch.randn(1, 400)


@pytest.mark.parametrize(
    ("make", "read", "fewest"),
    [(mamba, ["dt_proj"], 3), (wavlm, ["q_proj", "k_proj", "v_proj", "out_proj"], 3)],
    ids=["mamba", "wavlm"],
)
def test_layers_whose_weights_are_read_and_that_are_never_called(make, read, fewest):
    model, inputs = make()
    wrap_model(model, block_size=8)
    assert len(adapted_paths(model)) >= fewest
    assert not {path.rsplit(".", 1)[-1] for path in adapted_paths(model)} & set(read)
    model.train()(inputs).logits.square().sum().backward()
    adapted = [layer.generators["default"] for layer in model.modules() if isinstance(layer, OFTLayer)]
    assert all(generators.grad is not None and generators.grad.any() for generators in adapted)
    for name in read:
        with pytest.raises(AdapterError, match=rf"{name}: (MambaMixer|WavLMAttention) reads this layer's weight"):
            wrap_model(make()[0], block_size=8, target_modules=[name])


def names_of_leaves(model):
    return {path.rpartition(".")[2] for path in adapted_paths(model)}


def test_layers_of_sparse_attention_that_only_select_are_left_out():
    sizes = {"hidden_size": 16, "q_lora_rank": 16, "index_head_dim": 8, "index_n_heads": 2, "qk_rope_head_dim": 4}
    indexer = DeepseekV32Indexer(DeepseekV32Config(**sizes), 0)
    model = nn.ModuleDict({"indexer": indexer, "o_proj": nn.Linear(16, 16)})
    assert adapted_paths(wrap_model(model, block_size=8)) == {"o_proj"}
    assert names_of_leaves(wrap_model(unwrap_model(model), block_size=8, target_modules=["wk"])) == {"wk"}


def router():
    config = LongcatFlashConfig(hidden_size=16, n_routed_experts=4, zero_expert_num=0, num_experts_per_tok=1)
    return LongcatFlashTopkRouter(config)


@pytest.mark.parametrize(
    ("make", "called"),
    [
        (router, set()),
        (lambda: DetrMHAttentionMap(16, 2), {"q_proj"}),
        (lambda: Gemma3nTextAltUp(Gemma3nTextConfig(hidden_size=16)), {"modality_router", "prediction_coefs"}),
        (lambda: LSHSelfAttention(ReformerConfig(hidden_size=16, attention_head_size=8, num_attention_heads=2)), set()),
        (lambda: LayoutLMv3Encoder(LayoutLMv3Config(hidden_size=16, num_hidden_layers=0)), set()),
    ],
    ids=["longcat", "detr", "gemma3n", "reformer", "layoutlm"],
)
def test_other_layers_that_are_read(make, called):
    model = nn.ModuleDict({"reader": make(), "other": nn.Linear(16, 16)})
    assert names_of_leaves(wrap_model(model, block_size=8, adjust_block_size=True)) == {"other", *called}


def test_the_heads_of_models_inside_a_model_are_left_frozen():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 32, "encoder_hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    config = BlipConfig(text_config={**sizes, **text, "pad_token_id": 0}, vision_config={**sizes, "image_size": 16})
    model = wrap_model(BlipForConditionalGeneration(config), block_size=8)
    assert "text_decoder.cls.predictions.decoder" not in adapted_paths(model)
    assert "text_decoder.cls.predictions.transform.dense" in adapted_paths(model)


def test_an_encoder_behind_its_embeddings_has_no_heads():
    """DINOv3's encoder has the name under which a model with a head has its body."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = wrap_model(DINOv3ViTModel(DINOv3ViTConfig(**sizes)), block_size=8)
    assert all(".generators." in name for name in trainable(model))


class ThroughAList(nn.Module):
    """As Mask2Former's heads go through their layers."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)]
        for i, layer in enumerate(self.layers):
            self.add_module(str(i), layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_list_of_a_modules_own_that_it_calls_its_layers_by():
    model, x = ThroughAList(), torch.randn(3, 16)
    plain, before = model(x), list(model.layers)
    randomize(wrap_model(model, block_size=8))
    turned = model(x)
    assert not torch.allclose(turned, plain)
    turned.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    unwrap_model(model)
    assert [*map(id, model.layers)] == [*map(id, before)]
    randomize(wrap_model(model, block_size=8))
    merge(model)
    torch.testing.assert_close(model(x), turned)


def test_a_layer_tied_to_a_head_that_trains_is_not_rotated():
    """D-FINE's and DINO's decoders hold the box heads a second time, as other modules with the same weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
    model.bert.again = nn.Linear(16, 2)
    model.bert.again.weight = model.classifier.weight
    assert "bert.again" not in adapted_paths(wrap_model(model, block_size=8))
    assert model.classifier.weight.requires_grad


def test_what_is_trained_in_full_by_one_of_its_paths_is_not_rotated():
    model = wrap_model(Shared(), block_size=8, modules_to_save=["first"], target_modules=["second", "again.0"])
    assert adapted_paths(model) == {"block.0", "again.0"}
    assert {"first.weight", "first.bias"} < trainable(model)
