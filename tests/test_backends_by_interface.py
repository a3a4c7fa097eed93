"""Layers that do not run on a CPU, as stand-ins with the class names, attributes and formats of their libraries.

AutoAWQ 0.2.9, AQLM 1.1.7, GPTQModel 7.7; transformers' own FP8 layers are its real classes, whose kernels want a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from conftest import randomize
from oftv2 import (
    AdapterError,
    OFTConfig,
    QuantOFTLinear,
    explain,
    load_adapter,
    merge,
    reference,
    save_adapter,
    wrap_model,
)
from oftv2.backends import find_backend
from other_backends import B, adapted, rotation_of
from quantized import relative


def library_class(name: str, module: str) -> type[nn.Module]:
    """A layer class that says it comes from a library, multiplies by ``exact`` and lets gradients through."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x @ self.exact.to(x.dtype).T

    return type(name, (nn.Module,), {"__module__": module, "forward": forward})


def standing_in(name: str, module: str, exact: Tensor) -> nn.Module:
    layer = library_class(name, module)()
    layer.out_features, layer.in_features = exact.shape
    layer.bias, layer.exact = None, exact
    return layer


def autoawq() -> nn.Module:
    codes, zeros = torch.randint(0, 16, (128, 96)), torch.randint(0, 16, (4, 96))
    scales = torch.rand(4, 96).half()
    layer = standing_in(
        "WQLinear_GEMM",
        "awq.modules.linear.gemm",
        torch.stack([(codes[i] - zeros[i // 32]) * scales[i // 32].double() for i in range(128)], 1),
    )

    def pack(values: Tensor) -> Tensor:
        words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
        for column in range(words.shape[1]):
            for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, column] |= values[:, column * 8 + place] << (4 * i)
        return torch.where(words >= 2**31, words - 2**32, words).int()

    layer.w_bit, layer.group_size = 4, 32
    for name, value in {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}.items():
        layer.register_buffer(name, value)
    return layer


def aqlm(called: bool = False, in_group: int = 8, out_group: int = 2, books: int = 2) -> nn.Module:
    n, d = 96, 128
    codes = torch.randint(0, 256, (n // out_group, d // in_group, books))
    codebooks, scales = torch.randn(books, 256, out_group, in_group), torch.rand(n // out_group, 1, 1, 1)
    exact = torch.zeros(n, d, dtype=torch.float64)
    for row in range(n // out_group):
        for column in range(d // in_group):
            block = sum(codebooks[book, codes[row, column, book]].double() for book in range(books))
            place = slice(row * out_group, (row + 1) * out_group), slice(column * in_group, (column + 1) * in_group)
            exact[place] = block * scales[row, 0, 0, 0].double()
    layer = standing_in("QuantizedLinear", "aqlm.inference", exact)
    signed = torch.where(codes >= 128, codes - 256, codes).to(torch.int8)
    layer.codes = nn.Parameter(signed.permute(1, 0, 2).contiguous() if called else signed, requires_grad=False)
    layer.codebooks, layer.scales = (nn.Parameter(t, requires_grad=False) for t in (codebooks, scales))
    layer.codebook_size, layer.gemv_op = 256, (object() if called else None)
    return layer


def fp8_blocks(block: tuple[int, int] | None = (64, 48)) -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(128, 96, block_size=block)
    layer.weight = nn.Parameter(torch.randn(96, 128).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(torch.rand(layer.weight_scale_inv.shape) + 0.1, requires_grad=False)
    scale = layer.weight_scale_inv.double()
    layer.exact = layer.weight.double() * (
        scale
        if block is None
        else torch.stack([torch.stack([scale[i // block[0], j // block[1]] for j in range(128)]) for i in range(96)])
    )
    return layer


class TestReadable:
    @pytest.mark.parametrize(
        "make",
        [autoawq, aqlm, lambda: aqlm(called=True), lambda: aqlm(in_group=16, out_group=1, books=1)],
        ids=["awq", "aqlm", "aqlm-reordered", "aqlm-one-book"],
    )
    def test_trains_and_merges(self, make) -> None:
        base = make()
        assert find_backend(base) is not None
        model = wrap_model(nn.Sequential(nn.Linear(32, 128), base), block_size=B)
        assert type(model[1]) is QuantOFTLinear
        model(torch.randn(2, 5, 32)).sum().backward()
        assert model[1].generators["default"].grad.any()
        layer, x = adapted(base), torch.randn(2, 7, 128)
        before = layer(x).detach()
        assert "no ordinary weight" in explain(layer, 4096).impossible["weight"]
        with pytest.raises(AdapterError, match=r"^proj: .* cannot quantize a merged weight again without"):
            merge(layer, unload=False, requantize=True)
        assert not layer.merged
        layer.merge()
        assert relative(layer.base_layer.weight, reference.merge_weight(base.exact, rotation_of(layer))) < 1e-6
        assert relative(layer(x).detach(), before) < 1e-6
        layer.unmerge()
        assert layer.base_layer is base

    @pytest.mark.parametrize("block", [(64, 48), (32, 128), None], ids=str)
    def test_fine_grained_fp8(self, block: tuple[int, int] | None) -> None:
        """Its kernel does not run here; the weight is read without it, and the default merge never is in 8 bit."""
        base = fp8_blocks(block)
        model = wrap_model(nn.Sequential(nn.Linear(32, 128), base), block_size=B)
        randomize(model)
        wanted = reference.merge_weight(base.exact, rotation_of(model[1]))
        merge(model)
        assert type(model[1]) is nn.Linear
        assert model[1].weight.dtype == torch.float32
        assert relative(model[1].weight, wanted) < 1e-6


class TestRefused:
    def test_compressed_fp8_kernels_are_for_inference(self) -> None:
        from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

        base = CompressedTensorsFP8Linear(128, 96)
        base.weight = nn.Parameter(torch.randn(96, 128).to(torch.float8_e4m3fn), requires_grad=False)
        base.weight_scale.data.uniform_(0.5, 1)
        with pytest.raises(AdapterError, match=r"^1: this CompressedTensorsFP8Linear .*load it with dequantize=True"):
            wrap_model(nn.Sequential(nn.Linear(32, 128), base), block_size=B)
        layer = adapted(base)  # a bare adapter, as load_adapter makes one to answer with
        exact = base.weight.double() * base.weight_scale.double().view(96, 1)
        layer.merge()
        assert relative(layer.base_layer.weight, reference.merge_weight(exact, rotation_of(layer))) < 1e-6

    @pytest.mark.parametrize(
        ("name", "module"),
        [
            ("BaseQuantLinear", "gptqmodel.nn_modules.qlinear"),
            ("WQLinear_GEMV", "awq.modules.linear.gemv"),
        ],
    )
    def test_repacked_weights_train_and_cannot_be_merged(self, name: str, module: str, tmp_path) -> None:
        def make() -> nn.Module:
            torch.manual_seed(0)
            base = standing_in(name, module, torch.randn(96, 128))
            base.register_buffer("qweight", torch.zeros(8, 96, dtype=torch.int32))
            return nn.Sequential(nn.Linear(32, 128), base)

        model = wrap_model(make(), block_size=B)
        assert type(model[1]) is QuantOFTLinear
        randomize(model)
        x = torch.randn(5, 32)
        y = model(x)
        y.sum().backward()
        with pytest.raises(AdapterError, match=f"^1: no way is known to read the weight of a {name}; known: bitsand"):
            merge(model)
        assert not model[0].merged
        save_adapter(model, tmp_path)
        assert torch.equal(load_adapter(make(), tmp_path)(x), y)

    def test_a_weight_of_one_byte_is_never_rotated(self) -> None:
        """nn.Linear of a library that is not known, with codes for a weight: called as it is, never merged."""

        class Narrow(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return x @ (self.weight.float() / 127).T

        base = Narrow(64, 32, bias=False)
        base.weight = nn.Parameter(torch.randint(-127, 128, (32, 64), dtype=torch.int8), requires_grad=False)
        layer = wrap_model(nn.Sequential(base), block_size=B)[0]
        assert type(layer) is QuantOFTLinear
        assert layer.forms(torch.float32, gradient=True) == ("input",)
        with pytest.raises(AdapterError, match="no way is known to read the weight of a Narrow"):
            layer.merge()

    def test_a_bias_that_is_no_parameter_does_not_train(self) -> None:
        base = autoawq()
        base.register_buffer("bias_", torch.zeros(96))
        base.bias = base.bias_
        with pytest.raises(AdapterError, match="would train nothing"):
            wrap_model(nn.Sequential(base), OFTConfig(block_size=B, bias="oft_only"))
