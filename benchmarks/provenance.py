"""Where and with what figures were taken, and what disturbed them. Needs torch alone."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from measure import FOLDER, Row

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def cpu_name() -> str:
    """The processor's name and the number of cores this process may use."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()} ({len(os.sched_getaffinity(0))} cores)"


def versions() -> Row:
    """Of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            # The metadata of PyPI's wheels do not tell which CUDA torch was built for.
            found[package] = torch.__version__ if package == "torch" else version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _output(command: list[str]) -> str:
    """What a program prints, in this folder; nothing where it fails, or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=FOLDER, check=False).stdout.strip()
    except OSError:
        return ""


def commit() -> str:
    """The checkout's commit, with ``-dirty`` after it where files other than results differ from it."""
    ours = ["--", "..", ":!results", ":(top,exclude)*README.md"]
    changed = _output(["git", "status", "--porcelain", "--untracked-files=no", *ours])
    return (_output(["git", "rev-parse", "--short", "HEAD"]) or "unknown") + ("-dirty" if changed else "")


def environment(device: torch.device) -> Row:
    """Where and with what figures are taken."""
    on_gpu = device.type == "cuda"
    found = {"device": torch.cuda.get_device_name(device) if on_gpu else cpu_name()}
    if on_gpu:
        found["driver"] = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {**found, "threads": torch.get_num_threads(), **versions(), "commit": commit()}


class Neighbours:
    """How much of the processors others take meanwhile: what timings are disturbed by."""

    def __init__(self) -> None:
        self._before = self._now()

    def share(self) -> float:
        """Since it was asked last, from 0 to 1; 0 where the system does not tell."""
        before, self._before = self._before, self._now()
        total, busy, own = (now - then for now, then in zip(self._before, before, strict=True))
        return round(min(1.0, max(0.0, (busy - own) / total)), 3) if total else 0.0

    def _now(self) -> tuple[float, float, float]:
        stat = Path("/proc/stat")
        if not stat.exists():
            return (0.0,) * 3
        total = stat.read_text(encoding="utf-8").split("\n")[0]
        ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in total.split()[1:9]]
        return sum(ticks), sum(ticks) - sum(ticks[3:5]), sum(os.times()[:4])  # the fourth and fifth are idle
