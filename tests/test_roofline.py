"""The formulas of the roofline, counted by hand for one small shape, and the committed table."""

from __future__ import annotations

import pytest

import kernel_costs
from conftest import ROOT, run_script
from kernel_costs import Cost, Machine

# T = 8 tokens, d = 64 inputs, n = 128 outputs, b = 16: r = 4 blocks. By hand, in elements:
# x 512, y 1024, W 8192, Δ 4 · 256 = 1024, generators 4 · 120 = 480; 2 bytes each in 16 bit, 4 in float32.
X, Y, W, DELTA, GENERATORS = 512, 1024, 8192, 1024, 480
PRODUCT, ROTATION = 131072, 16384  # 2 · 8 · 64 · 128 and 2 · 8 · 64 · 16
NF4 = 4096 + 128 + 4 + 1088  # codes, a byte for each of 128 groups of 64, one float32 for up to 256 of those, tables


@pytest.mark.parametrize(
    ("cost", "bytes_", "flops"),
    [
        (kernel_costs.matmul(8, 64, 128), 2 * (X + W + Y), PRODUCT),
        (kernel_costs.rotate_forward(8, 64, 16), 2 * (X + X) + 4 * DELTA, ROTATION),
        (kernel_costs.rotate_forward(8, 64, 16, group=3), 2 * (X + 3 * X) + 12 * DELTA, 3 * ROTATION),
        (kernel_costs.rotate_backward(8, 64, 16, splits=5), 2 * (X + X + X) + 4 * DELTA * (1 + 5), 2 * ROTATION),
        (kernel_costs.rotate_backward(8, 64, 16, 2, splits=1), 2 * (X + 2 * X + X) + 16 * DELTA, 4 * ROTATION),
        (kernel_costs.rotate_matmul(8, 64, 128, 16), 2 * (X + W + Y) + 4 * DELTA, PRODUCT + ROTATION),
        (kernel_costs.rotate_matmul(8, 64, 128, 16, tile=64), 2 * (X + W + Y) + 4 * DELTA, PRODUCT + 2 * ROTATION),
        (kernel_costs.nf4_dequantize(64, 128), NF4 + 2 * W, 8192),
        (kernel_costs.nf4_dequantize_rotate(64, 128, 16), NF4 + 2 * W + 4 * DELTA, 8192 + 262144),
        (kernel_costs.nf4_matmul(8, 64, 128), NF4 + 2 * (X + Y), PRODUCT),
        (kernel_costs.nf4_rotate_matmul(8, 64, 128, 16), NF4 + 2 * (X + Y) + 4 * DELTA, PRODUCT + ROTATION),
        (kernel_costs.weight_forward(64, 128, 16), 2 * (W + W) + 4 * DELTA, 262144),
        (kernel_costs.weight_delta_grad(8, 64, 16, splits=3), 2 * (X + X) + 12 * DELTA, ROTATION),
        # three products of 2 · 16³ a block for k = 4; four for the gradient (see the test of products)
        (kernel_costs.cayley_forward(64, 16), 4 * GENERATORS + 4 * DELTA, 4 * 3 * 8192),
        (kernel_costs.cayley_backward(64, 16, splits=2), 8 * DELTA + 8 * GENERATORS, 4 * 4 * 8192),
    ],
)
def test_counted_by_hand(cost, bytes_, flops):
    assert cost == Cost(bytes_, flops)


def test_lora_counted_by_hand():
    """r = 16: A 1024 and B 2048 elements, x Aᵀ 128; products of 2 · 8 · 64 · 16 and 2 · 8 · 128 · 16."""
    forward = kernel_costs.lora_forward(8, 64, 128)
    assert forward == [
        Cost(2 * (X + 1024 + 128), 16384),
        Cost(2 * (128 + 2048 + Y), 32768),
        Cost(2 * (Y + Y), 1024),
    ]
    backward = kernel_costs.lora_backward(8, 64, 128)
    assert sum(cost.bytes for cost in backward) == 2 * (2 * Y + X + 3 * X + 4 * 128 + 2 * 1024 + 2 * 2048)
    assert sum(cost.flops for cost in backward) == 2 * 16384 + 2 * 32768 + 512


@pytest.mark.parametrize(("terms", "forward", "backward"), [(2, 2, 2), (3, 2, 3), (4, 3, 4), (5, 3, 5), (6, 4, 6)])
def test_products_of_the_cayley_transform(terms, forward, backward):
    assert kernel_costs.cayley_forward(16, 16, terms).flops == forward * 2 * 16**3
    assert kernel_costs.cayley_backward(16, 16, terms).flops == backward * 2 * 16**3


def test_what_the_forms_cost_beyond_the_frozen_layer():
    """Input form 4Td and 6Td bytes and 6Tdb FLOPs; weight form 4nd, 4nd + 4Td and 4ndb + 2Tdb; but for Δ and sums."""
    T, d, n, b = 8192, 4096, 1024, 32
    small = kernel_costs.delta_bytes(d, b)
    forward, backward = kernel_costs.rotate_forward(T, d, b), kernel_costs.rotate_backward(T, d, b, splits=1)
    assert (forward.bytes - small, backward.bytes - 2 * small) == (4 * T * d, 6 * T * d)
    assert forward.flops + backward.flops == 6 * T * d * b
    weight, grad = kernel_costs.weight_forward(d, n, b), kernel_costs.weight_delta_grad(T, d, b, splits=1)
    assert (weight.bytes - small, grad.bytes - small) == (4 * n * d, 4 * T * d)
    assert 2 * weight.flops + grad.flops == 4 * n * d * b + 2 * T * d * b


def test_the_bound_is_the_larger_of_the_two_times():
    machine = Machine("slow", bytes_per_second=1e6, flops_per_second=1e9)
    assert Cost(3, 2000).microseconds(machine) == pytest.approx(3)
    assert Cost(3, 5000).microseconds(machine) == pytest.approx(5)
    assert kernel_costs.microseconds([Cost(3, 2000), Cost(3, 5000)], machine) == pytest.approx(8)


@pytest.fixture
def run_tool(monkeypatch, capsys):
    def run(*arguments):
        run_script(monkeypatch, ROOT / "benchmarks" / "roofline.py", *arguments)
        return capsys.readouterr().out

    return run


def test_committed_table_is_what_the_formulas_give(run_tool, tmp_path):
    run_tool("--out", tmp_path / "roofline.csv")
    committed = ROOT / "benchmarks" / "results" / "roofline.csv"
    again = f"python benchmarks/roofline.py --out {committed.relative_to(ROOT)}"
    assert (tmp_path / "roofline.csv").read_text() == committed.read_text(), again


def test_markdown(run_tool):
    lines = run_tool("--markdown", "--only", "Llama-3-8B q, o .* 8192 rotate forward").splitlines()
    assert lines[0].startswith("| model | projection | tokens | kernel | bytes | flops | us H200 | over frozen H200 |")
    assert lines[2].startswith("| Llama-3-8B | q, o 4096→4096 | 8192 | rotate forward | 134.7 MB | 2.147 G | 28.07 |")
    assert len(lines) == 3
    with pytest.raises(SystemExit, match="matches no row"):
        run_tool("--only", "nothing")
