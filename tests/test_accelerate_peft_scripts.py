"""``accelerate_peft`` on scripts as they stand: by an environment variable, and by ``python -m oftv2 run``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft.tuners.oft import OFTModel

from accelerated_pairs import LINEAR, linear
from oftv2.__main__ import main
from oftv2.peft_acceleration import accelerate_all_if_asked
from peers import peft_model

SCRIPT = """
import json, sys, warnings
FIRST_IMPORT
early = "peft" in sys.modules
import peft, torch
from torch import nn

def model(**fields):
    config = peft.OFTConfig(oft_block_size=4, target_modules=["0", "1"], **fields)
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), config)

def kinds(model):
    return sorted({type(module).__module__ for module in model.modules() if "oft" in type(module).__module__})

trained = model(init_weights=False)
trained.save_pretrained(sys.argv[1])
base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
loaded = peft.PeftModel.from_pretrained(base, sys.argv[1], low_cpu_mem_usage=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    left = [kinds(model(num_cayley_neumann_terms=1)) for _ in range(2)]
print(json.dumps({
    "kinds": kinds(trained), "loaded": kinds(loaded), "left": left, "early": early, "argv": sys.argv[1:],
    "warnings": [str(warning.message) for warning in caught], "name": __name__, "path": sys.path[0],
    "y": loaded(torch.ones(3, 8)).shape,
}))
sys.exit(3)
"""
OURS, PEFTS = ["oftv2.peft_layers"], ["peft.tuners.oft.layer", "peft.tuners.oft.model"]
WAYS = {
    "variable": ("import oftv2", {"OFTV2_ACCELERATE_PEFT": "1"}, [sys.executable]),
    "run": ("", {}, [sys.executable, "-m", "oftv2", "run"]),
}


@pytest.mark.parametrize(("first", "variables", "command"), WAYS.values(), ids=WAYS.keys())
def test_script_runs_as_it_stands(first: str, variables: dict[str, str], command: list[str], tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT.replace("FIRST_IMPORT", first))
    environment = {name: value for name, value in os.environ.items() if name != "OFTV2_ACCELERATE_PEFT"}
    result = subprocess.run(
        [*command, "scripts/train.py", "adapter", "--lr", "1"],
        env={**environment, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 3, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["argv"] == ["adapter", "--lr", "1"]
    assert found["name"] == "__main__"
    assert Path(found["path"]).resolve() == (tmp_path / "scripts").resolve()
    assert found["y"] == [3, 2]
    assert not found["early"]  # nobody but the script imports peft
    # the tuner keeps its class here: it is PEFT's method for making layers that is another
    assert found["kinds"] == found["loaded"] == [*OURS, PEFTS[1]]
    assert found["left"] == [PEFTS, PEFTS]  # a series that is the identity
    about = [text for text in found["warnings"] if "PEFT's own stays" in text]
    assert len(about) == 1
    assert "0, and all like it: adapter 'default': num_cayley_neumann_terms=1" in about[0]


def test_run_leaves_peft_alone_where_the_variable_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(OFTModel, "_create_and_replace", OFTModel._create_and_replace)  # put back afterwards
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OFTV2_ACCELERATE_PEFT", "0")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("FIRST_IMPORT", ""))
    with pytest.raises(SystemExit):
        main(["run", str(script), str(tmp_path / "adapter")])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["kinds"] == found["loaded"] == PEFTS
    assert found["left"] == [PEFTS, PEFTS]
    assert not [text for text in found["warnings"] if "PEFT's own stays" in text]


def test_variable_with_peft_imported_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OFTModel, "_create_and_replace", OFTModel._create_and_replace)  # put back afterwards
    for value, module in {"0": "peft.tuners.oft.layer", "1": "oftv2.peft_layers"}.items():
        monkeypatch.setenv("OFTV2_ACCELERATE_PEFT", value)
        accelerate_all_if_asked()
        assert type(peft_model(linear(), **LINEAR).base_model.model[0]).__module__ == module


def test_run_without_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.py"]) == 2
    assert "there is no script nowhere.py" in capsys.readouterr().err
