"""Runs PEFT's own test suite with ``oftv2.accelerate_peft`` switched on: a plugin for pytest.

From an unpacked source of the PEFT that is installed (``pip download --no-deps --no-binary :all: peft==0.21.2``; its
archive lacks ``tests/conftest.py`` and ``tests/__init__.py``, which the repository has), with diffusers and
parameterized installed:

    PYTHONPATH=path/to/oftv2/tests python -m pytest -p accelerated_peft -o addopts= tests/test_custom_models.py \
        -k "OFT and not BOFT and not PSOFT"

The other files with cases of OFT (decoder, encoder-decoder and feature extraction models, sequence classification,
quantization, Stable Diffusion, vision models, ``torch.compile``) take tiny models from the Hub. With transformers 5.23,
whose deprecations PEFT's own settings turn into errors, their tests of models fail without this plugin too, unless
``"ignore:.*gradient_checkpointing.*:FutureWarning"`` goes into the ``filterwarnings`` of its ``pyproject.toml``.

The outcome of every test is to be the one without ``-p accelerated_peft``. The last line tells how many calls of PEFT's
rotations ran on the operators of this library; a run with none fails.
"""

from __future__ import annotations

import functools
import os

import pytest

os.environ["OFTV2_ACCELERATE_PEFT"] = "1"

from oftv2 import peft_layers  # after the variable, which importing oftv2 reads

calls = {"oftv2": 0, "PEFT": 0}


def _counted(name: str, function):
    @functools.wraps(function)
    def count(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return count


peft_layers.AcceleratedRotation.generators = _counted("oftv2", peft_layers.AcceleratedRotation.generators)
peft_layers.OFTRotationModule.forward = _counted("PEFT", peft_layers.OFTRotationModule.forward)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"rotations of PEFT's computed by oftv2: {calls['oftv2']}, by PEFT: {calls['PEFT']}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.testscollected and not calls["oftv2"]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
