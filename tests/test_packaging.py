"""What gets installed: the wheel's content, and an import that is light, quiet and needs torch alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from conftest import ROOT

TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"}
TOP_LEVEL |= {"oftv2", "kernels", "tests", "benchmarks", "examples"}
OPTIONAL = ("triton", "transformers", "accelerate", "bitsandbytes", "peft", "datasets", "kernels")

BLOCK = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
USE = """
import tempfile, torch, oftv2
from torch import nn
build = lambda: torch.manual_seed(0) and nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
model = oftv2.wrap_model(build(), block_size=4, init="normal")
x = torch.ones(2, 16)
model(x).sum().backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
with tempfile.TemporaryDirectory() as folder:
    oftv2.save_adapter(model, folder)
    assert torch.equal(oftv2.load_adapter(build(), folder)(x), model(x))
expected = model(x)
torch.testing.assert_close(oftv2.merge(model)(x), expected)
"""


def run(*command, cwd, **options):
    """Runs a command to its end; where it fails, the test shows what it printed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def python(program, *, cwd, executable=sys.executable):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return run(executable, "-c", program, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree, as a fresh checkout would be."""
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    copy = tmp_path_factory.mktemp("source")
    for file in files:
        if (ROOT / file).is_file():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
    return copy


def build_package(source, folder, *options):
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), *options, ".", cwd=source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel, built from the sdist."""
    return build_package(source, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The interpreter of a fresh environment with nothing but the wheel installed, and its site-packages.

    Dependencies come from the tests' own site-packages, as a plain path: editable installs there are out of reach.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    executable = str(folder / "bin" / "python")
    site = folder / sysconfig.get_path("purelib", vars={"base": ""}).lstrip("/")
    assert site.is_dir()
    run(sys.executable, "-m", "pip", "--python", executable, "install", "-q", "--no-deps", str(wheel), cwd=folder)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return executable, site


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"oftv2/{path.name}" for path in (ROOT / "oftv2").glob("*.py")}
    kernels = {f"oftv2/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert modules
    assert kernels
    information = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert set(names) - information == modules | kernels | {"oftv2/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in information)


def test_nothing_of_the_source_lies_outside_of_the_packages_folders():
    below = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/__init__.py") if ".venv" not in path.parts}
    assert below == {"oftv2", "kernels"}
    for package in ("oftv2", "kernels"):  # sub-folders would not be installed
        assert [path.name for path in (ROOT / package).iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_the_wheel_is_the_same_without_the_sdist(wheel, source, tmp_path):
    direct = build_package(source, tmp_path, "--wheel")
    with zipfile.ZipFile(direct) as one, zipfile.ZipFile(wheel) as two:
        assert sorted(one.namelist()) == sorted(two.namelist())
        for name in one.namelist():
            if name.startswith("oftv2/"):
                assert one.read(name) == two.read(name), name


def test_what_is_installed_does_not_depend_on_the_working_directory(installed, tmp_path):
    executable, site = installed
    program = """
import importlib.util, json, oftv2, oftv2.kernels
spec = importlib.util.find_spec("kernels")
print(json.dumps([oftv2.__file__, oftv2.kernels.__file__, spec and spec.origin, oftv2.__version__]))
"""
    expected = [str(site / "oftv2" / "__init__.py"), str(site / "oftv2" / "kernels" / "__init__.py")]
    output = json.loads(python(program, cwd=tmp_path, executable=executable).stdout)
    assert output[:2] == expected
    assert output[2] is None or not output[2].startswith(str(site))
    assert output[3] == "0.1.0"
    script = tmp_path / "script.py"
    script.write_text(program)
    at_root = run(executable, str(script), cwd=ROOT)
    assert json.loads(at_root.stdout) == output
    assert not (site / "kernels").exists()
    assert (site / "oftv2" / "py.typed").exists()


def test_the_source_folder_in_place_of_the_installed_library_says_so(installed, source):
    command = [installed[0], "-c", "import oftv2"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "ImportError: this oftv2 is the source folder of a checkout" in done.stderr
    assert "pip install -e ." in done.stderr


def test_a_package_named_kernels_is_found_in_the_checkout_too(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from .layer import Mode\n")
    (tmp_path / "kernels" / "layer.py").write_text("Mode = 'of the other package'\n")
    program = "import kernels; from kernels.layer import Mode; print(Mode, kernels.Mode)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout == "of the other package of the other package\n", done.stderr
    assert run(sys.executable, "-c", "import kernels; print(kernels.__file__)", cwd=ROOT).stdout == (
        f"{ROOT / 'kernels' / '__init__.py'}\n"
    )


def test_an_installed_library_works(installed, tmp_path):
    done = python(USE, cwd=tmp_path, executable=installed[0])
    assert done.stdout == ""


def test_it_works_with_torch_and_safetensors_alone(installed, tmp_path):
    done = python(
        "import warnings\nwarnings.simplefilter('ignore')\n" + BLOCK + USE, cwd=tmp_path, executable=installed[0]
    )
    assert done.stdout == ""


def test_pip_sees_no_dependency_but_the_declared_ones(installed, tmp_path):
    program = "from importlib.metadata import requires; print([r for r in requires('oftv2') if 'extra ==' not in r])"
    requirements = python(program, cwd=tmp_path, executable=installed[0]).stdout
    for name in ("torch", "safetensors", "triton"):
        assert name in requirements
    for name in set(OPTIONAL) - {"triton"}:
        assert name not in requirements


def test_import_is_light(tmp_path):
    program = """
import time, sys, json, torch
before, start = set(sys.modules), time.perf_counter()
import oftv2
seconds = time.perf_counter() - start
import torch.cuda
print(json.dumps([seconds, torch.cuda.is_initialized(), sorted(set(sys.modules) - before)]))
"""
    runs = [json.loads(python(program, cwd=tmp_path).stdout) for _ in range(3)]
    assert min(seconds for seconds, _, _ in runs) < 0.5  # the least disturbed one
    for _, initialized, modules in runs:
        assert not initialized
        loaded = {name.partition(".")[0] for name in modules}
        assert loaded.isdisjoint({"transformers", "accelerate", "bitsandbytes", "peft", "datasets", "kernels"})


def test_public_names_exist_and_are_sorted():
    import oftv2

    assert sorted(oftv2.__all__) == list(oftv2.__all__)
    assert all(hasattr(oftv2, name) for name in oftv2.__all__)
    assert f'version = "{oftv2.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_top_level_of_the_repository():
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    names = {file.partition("/")[0] for file in files if (ROOT / file).exists()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL
