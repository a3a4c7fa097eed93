"""Every example runs as a user would run it: as a program, on its own, and what it claims is checked.

Further ways to run one are tried in this process, which has imported everything already: that is most of the time.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import oftv2
from conftest import run_script

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def start(script: str, *arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """Starts an example in an empty folder; one thread, for with these sizes a second one only gets in the way."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    """What an example printed until its end, on each stream."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == status, output + errors
    return output, errors


def run(script: str, *arguments: object, cwd: Path) -> str:
    """Runs an example to its end and returns what it printed, on both streams."""
    return "".join(finish(start(script, *arguments, cwd=cwd)))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is in an empty folder, and imports what lies beside the examples as they do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def finetune_here(here: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``finetune.py`` to its end in this process, and returns what it printed."""

    def run_here(*arguments: object) -> str:
        import finetune

        assert finetune.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run_here


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions that all have the same answer: a model that learns anything learns this."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps({"prompt": f"Is {n} a number?", "answer": "yes"}) + "\n" for n in range(80)]
    path.write_text("".join([*lines, "\n"]), encoding="utf-8")
    return path


def test_oft_learns_and_its_copies_agree(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    output = run(
        "finetune.py", "--model", tiny_model, "--data", rows, "--out", "result", "--block-size", 16, "--lr", 1e-2,
        "--steps", 60, "--held-out", 16, cwd=tmp_path,
    )  # fmt: skip
    figures = report(tmp_path / "result")
    oft = figures["methods"]["oft"]
    assert figures["before"]["exact"] == 0.0
    assert oft["after"]["exact"] == 1.0, output
    assert figures["data"] == {"name": "rows.jsonl", "training": 64, "held_out": 16}
    assert oft["training"]["steps"] == len(oft["training"]["losses"]) == 60
    assert oft["training"]["losses"][-1] < 0.2 * oft["training"]["losses"][0]
    # a layer of d inputs trains d (b − 1) / 2 numbers: per block q, k, v, o, gate, up with 64 inputs, down with 128
    assert oft["trainable_parameters"] == 2 * (6 * 64 + 128) * 15 // 2
    assert oft["checks"]["reloaded_logit_difference"] == 0.0
    assert oft["checks"]["merged_logit_difference"] < 1e-4 * oft["checks"]["largest_logit"]
    assert oft["checks"]["reloaded_same_replies"] == oft["checks"]["merged_same_replies"] == 16
    assert len(oft["layers"]) == 14
    assert all(0 < layer["rotation_angle"] < 180 for layer in oft["layers"].values())
    assert figures["arguments"]["seed"] == 0
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["machine"]["cores"] >= 1
    assert "exactly right" in output
    assert (tmp_path / "result" / "report.png").read_bytes().startswith(b"\x89PNG")
    # what was saved is an ordinary adapter
    oftv2.load_adapter(LlamaForCausalLM.from_pretrained(tiny_model), tmp_path / "result" / "oft")


def test_same_seed_same_figures(tmp_path: Path, tiny_model: Path, finetune_here) -> None:
    quick = ("--quick", "--model", tiny_model)
    process = start("finetune.py", *quick, "--seed", 1, "--out", "one", cwd=tmp_path)
    finetune_here(*quick, "--seed", 1, "--out", "two")
    finetune_here(*quick, "--seed", 2, "--out", "three")
    finish(process)
    one, two, three = (
        report(tmp_path / out)["methods"]["oft"]["training"]["losses"] for out in ("one", "two", "three")
    )
    assert one == two != three


def test_compare_puts_lora_beside_oft(tmp_path: Path, tiny_model: Path, rows: Path, finetune_here) -> None:
    output = finetune_here(
        "--quick", "--compare", "--model", tiny_model, "--data", rows, "--out", "result", "--rank", 4,
        "--targets", "q_proj", "down_proj", "--block-size", 8,
    )  # fmt: skip
    runs = report(tmp_path / "result")["methods"]
    assert list(runs) == ["oft", "lora"]
    assert runs["oft"]["trainable_parameters"] == 2 * (64 + 128) * 7 // 2
    assert runs["lora"]["trainable_parameters"] == 2 * 4 * ((64 + 64) + (128 + 64))
    for name, figures in runs.items():
        assert figures["training"]["steps"] == 10
        assert figures["checks"]["reloaded_same_replies"] == figures["checks"]["merged_same_replies"] == 8, name
    assert runs["oft"]["training"]["tokens_by_step"] == runs["lora"]["training"]["tokens_by_step"]  # the same data
    assert all(name in output for name in ("OFT", "LoRA"))
    assert load_file(tmp_path / "result" / "lora" / "adapter_model.safetensors")


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantized_base(tmp_path: Path, tiny_model: Path, rows: Path, finetune_here, quantize: str) -> None:
    finetune_here("--quick", "--quantize", quantize, "--model", tiny_model, "--data", rows, "--out", "result")
    oft = report(tmp_path / "result")["methods"]["oft"]
    assert oft["training"]["losses"][-1] < oft["training"]["losses"][0]
    assert oft["checks"]["reloaded_logit_difference"] == 0.0
    allowed = 1e-4 if quantize == "nf4" else 0.1  # int8 layers round their inputs too, which the merged layers do not
    assert oft["checks"]["merged_logit_difference"] < allowed * oft["checks"]["largest_logit"]


def test_full_finetuning_is_reloaded_exactly(tmp_path: Path, tiny_model: Path, rows: Path, finetune_here) -> None:
    finetune_here("--quick", "--method", "full", "--model", tiny_model, "--data", rows, "--out", "result")
    full = report(tmp_path / "result")["methods"]["full"]
    assert full["trainable_parameters"] == full["parameters"]
    assert full["checks"]["reloaded_logit_difference"] == 0.0


def test_ctrl_c_saves_what_there_is(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    arguments = ("--model", tiny_model, "--data", rows, "--out", "result", "--steps", 100_000)
    process = start("finetune.py", *arguments, cwd=tmp_path)
    progress = ""
    while "tokens/s" not in progress:  # the training has begun
        piece = process.stderr.read(1)
        assert piece, progress
        progress += piece
    process.send_signal(signal.SIGINT)
    output, errors = finish(process, status=130)
    assert "Interrupted after" in output
    assert "Traceback" not in errors
    oft = report(tmp_path / "result")["methods"]["oft"]
    assert oft["training"]["interrupted"]
    assert "after" not in oft
    assert (tmp_path / "result" / "report.png").is_file()
    oftv2.load_adapter(LlamaForCausalLM.from_pretrained(tiny_model), tmp_path / "result" / "oft")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "1 + 1", "answer": "2"}\n{"prompt": "1 + 2"}\n', "line 2: no field 'answer'"),
        ('{"answer": "2"}\n', "line 1: no field 'prompt' or 'question'"),
        ('{"question": "1 + 1", "answer": "2"}\n\n{"question": \n', "line 3: not valid JSON"),
        ('["1 + 1", "2"]\n', "line 1: expected an object"),
        ('{"question": "1 + 1", "answer": null}\n', "line 1: field 'answer' has to be text or a number"),
        ('{"question": " ", "answer": "2"}\n', "line 1: field 'question' is empty"),
        ('{"question": "1 + 1", "answer": 2}\n', "at least two are needed"),
        ('\ufeff{"question": "1 + 1", "answer": 2}\n', "at least two are needed"),
        ('{"question": "\udce4", "answer": 2}\n', "line 1: not in UTF-8"),
    ],
    ids=["no-answer", "no-question", "not-json", "not-object", "null", "empty", "one-row", "bom", "latin-1"],
)
def test_bad_rows_are_named(here: None, tmp_path: Path, text: str, message: str) -> None:
    from _data import DataError, read_jsonl, split

    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError) as error:
        split(read_jsonl(path), held_out=1, seed=0)
    assert message in str(error.value)


def test_no_question_is_on_both_sides(here: None) -> None:
    from _data import Example, generate, split

    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    training, held_out = split(generate("chain_sum", config, 500, seed=3), held_out=40, seed=3)
    assert len(held_out) == 40 == len({example.question for example in held_out})
    assert not {example.question for example in training} & {example.question for example in held_out}
    few = [Example(question, "1") for question in "abc"]
    assert [len(part) for part in split(few, held_out=40, seed=0)] == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--task", "juggling"], "--task juggling: not a task of reasoning-gym"),
        (["--method", "full", "--quantize", "nf4"], "quantized weights cannot be trained"),
        (["--steps", "0"], "0 is not above zero"),
        (["--block-size", "7"], "block_size"),
        (["--targets", "no_such_layer"], "no_such_layer"),
        (["--out", "/dev/null"], "File exists"),
        (["--device", "mps"], "--device mps: this PyTorch cannot use it"),
    ],
    ids=["file", "task", "full-nf4", "steps", "block-size", "targets", "out", "device"],
)
def test_mistakes_are_told_without_a_traceback(
    here: None, capsys: pytest.CaptureFixture[str], tiny_model: Path, rows: Path, arguments: list[str], message: str
) -> None:
    import finetune

    data = [] if arguments[0] in ("--data", "--task") else ["--data", str(rows)]
    try:
        status = finetune.main(["--quick", "--model", str(tiny_model), *data, *arguments])
    except SystemExit as end:  # argparse's own errors
        status = end.code
    assert status == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "finetune.py: error: " in errors


def test_terminals_and_homes_that_lack_something(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import _model
    import finetune
    from _report import write_json

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit, match="0"):
        finetune.main(["--help"])
    write_json(tmp_path / "report.json", {"out": "a\udcc3", "answer": "ü"})  # a file's name that is no text
    assert report(tmp_path) == {"out": "a\udcc3", "answer": "ü"}
    with pytest.raises(_model.ModelError, match="set OFTV2_CACHE"):
        _model.smollm2_folder(Path("/dev/null/cache"))
    for variable in ("OFTV2_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)  # nobody's, as in a container
    with pytest.raises(_model.ModelError, match="set OFTV2_CACHE"):
        _model.default_cache()


def test_default_model_is_converted_once(tmp_path: Path) -> None:
    arguments = ("finetune.py", "--quick", "--steps", 2, "--held-out", 2, "--examples", 20)
    output = run(*arguments, "--cache", "cache", "--out", "result", cwd=tmp_path)
    assert "Converted in" in output
    (folder,) = (tmp_path / "cache").iterdir()  # and nothing half done beside it
    assert (folder / "model.safetensors").is_file()
    oft = report(tmp_path / "result")["methods"]["oft"]
    assert oft["trainable_parameters"] == 30 * (6 * 576 + 1536) * 31 // 2
    assert oft["checks"]["reloaded_same_replies"] == oft["checks"]["merged_same_replies"] == 2
    assert oft["checks"]["merged_logit_difference"] < 1e-3


def test_plain_loop(tmp_path: Path) -> None:
    lines = run("plain_loop.py", tmp_path / "adapter", cwd=tmp_path).splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert losses[-1] < 0.6 * losses[0]
    assert all(t.abs().max() > 0 for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())


@pytest.mark.parametrize("script", ["plain_loop.py", "sft_trl.py", "qoft_trainer.py"])
def test_asking_for_help_is_no_run(here: None, tmp_path: Path, monkeypatch, capsys, script: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        run_script(monkeypatch, EXAMPLES / script, "--help")
    assert f"usage: {script}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_sft_trl(tmp_path: Path, tiny_model: Path) -> None:
    output = run("sft_trl.py", tiny_model, cwd=tmp_path)
    assert "Is 101 even? Answer:" in output
    saved = {path.name for path in (tmp_path / "sft-adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "checkpoint-20"} <= saved
    oftv2.load_adapter(LlamaForCausalLM.from_pretrained(tiny_model), tmp_path / "sft-adapter")


def test_qoft_trainer(tmp_path: Path, tiny_model: Path) -> None:
    output = run("qoft_trainer.py", tiny_model, cwd=tmp_path)
    assert "oft/orthogonality_error" in output
    assert "trainable params: " in output
    oftv2.load_adapter(LlamaForCausalLM.from_pretrained(tiny_model), tmp_path / "qoft-run" / "checkpoint-10")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "qoft-merged")
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
