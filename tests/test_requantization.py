"""The benchmark of requantization: its updates, its sums, and that it runs."""

from __future__ import annotations

import pytest
import requantization
import torch

from conftest import ROOT, run_script


@pytest.fixture
def weights() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (torch.randn(32, 192), torch.randn(32, 192)) for name in ("a", "b")}


@pytest.mark.parametrize("make", [requantization.oft_update, requantization.lora_update], ids=["oft", "lora"])
@pytest.mark.parametrize("number", [2, 48])
def test_updates_have_the_size_asked_for_and_lower_the_loss(make, number: int) -> None:
    weight, gradient = torch.randn(32, 192), torch.randn(32, 192)
    for along, size in [(None, 0.01), (gradient, 0.01), (gradient, 0.2)]:
        update = make(weight, along, number, seed=0)
        merged = requantization.of_size(update, weight, size)
        assert (merged - weight).norm() / weight.norm() == pytest.approx(size, rel=2e-4)
        if along is not None:
            assert ((merged - weight) * gradient).sum() < 0
        if make is requantization.oft_update:
            assert merged.norm() == pytest.approx(weight.norm().item(), rel=1e-3)


def test_table(weights, capsys: pytest.CaptureFixture[str]) -> None:
    args = requantization.parse(
        ["--block-sizes", "16", "48", "--ranks", "4", "--sizes", "0.1", "--updates", "random", "adam"]
    )
    rows = requantization.measure(weights, args)
    assert len(rows) == 2 * 2 * 2 * 2 * 1 * 3
    table = requantization.summarize(rows, "LoRA r=4")
    assert [row["samples"] for row in table] == [2] * (len(rows) // 2)
    for row in table:
        low, high = (0.06, 0.12) if row["format"] == "nf4" else (0.002, 0.01)
        assert low < row["error"] < high
        assert 0.7 < row["kept"] < 1.2
        assert (row["before"] < 1e-6) == (row["base"] == "quantized")
        if row["method"] == "LoRA r=4":
            assert (row["over_lora"], row["over_lora_sd"]) == (1, 0)
    first = table[0]
    mine = [
        row for row in rows if all(row[key] == first[key] for key in ("format", "base", "update", "size", "method"))
    ]
    assert first["error"] == pytest.approx(sum(row["error"] for row in mine) / 2, abs=1e-5)
    requantization.show(table, "LoRA r=4")
    assert "nf4, quantized base (quantized as it is: 0.00%), random update of 10.0%" in capsys.readouterr().out


def test_options_are_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_script(monkeypatch, ROOT / "benchmarks" / "requantization.py", "--help")
    assert "straddle" in capsys.readouterr().out
