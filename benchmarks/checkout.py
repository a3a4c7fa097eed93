"""Makes this checkout's package importable without installing it."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_folder() -> str:
    """A folder from which this checkout imports as if it were installed: ``oftv2`` with ``kernels`` inside."""
    folder = Path(tempfile.mkdtemp(prefix="oftv2-"))
    (folder / "oftv2").mkdir()
    for source in (ROOT / "oftv2").glob("*"):
        if source.suffix in (".py", ".typed"):
            (folder / "oftv2" / source.name).symlink_to(source)
    (folder / "oftv2" / "kernels").symlink_to(ROOT / "kernels")
    return str(folder)


def make_importable() -> None:
    """Lets ``import oftv2`` find this checkout, where no installed package is found."""
    if importlib.util.find_spec("oftv2") is None:
        sys.path.insert(0, package_folder())
