"""``python -m oftv2 merge``: stopped, killed, and gone on with."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

import oftv2.checkpoint_merge
from merged_checkpoints import assert_same_state, fails, make_adapter, merged_in_memory, run
from oftv2.work_folder import WorkFolder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(monkeypatch, files):
    """The next merge is interrupted in the middle of a file, with so many files complete."""
    original, calls = oftv2.checkpoint_merge.merged_rows, []

    def stopping(base, adapter, piece):
        calls.append(piece)
        done = len(list((base.folder.parent / ".out.partial").glob("*.safetensors")))
        if done == files and calls:
            raise KeyboardInterrupt
        return original(base, adapter, piece)

    monkeypatch.setattr(oftv2.checkpoint_merge, "merged_rows", stopping)


@pytest.fixture
def stopped(on_disk, monkeypatch):
    """A merge that was stopped with two files complete, and what it would have come to."""
    assert run(on_disk / "base", on_disk / "adapter", on_disk / "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(on_disk / "base", on_disk / "adapter", on_disk / "out") == 130
    assert not (on_disk / "out").exists()
    partial = on_disk / ".out.partial"
    assert len(list(partial.glob("*.safetensors"))) == 2
    return on_disk, partial, contents(on_disk / "whole")


def merges(monkeypatch):
    """Counts the tensors that are rotated."""
    original, done = oftv2.checkpoint_merge.merged_rows, []
    monkeypatch.setattr(oftv2.checkpoint_merge, "merged_rows", lambda *parts: (done.append(parts), original(*parts))[1])
    return done


def test_a_stopped_merge_goes_on_after_the_last_complete_file(stopped, monkeypatch):
    folder, partial, whole = stopped
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    done = merges(monkeypatch)
    assert run(folder / "base", folder / "adapter", folder / "out") == 0
    assert 0 < len(done) < 14
    assert all((folder / "out" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert contents(folder / "out") == whole
    assert not partial.exists()


CHANGES = {
    "adapter": lambda folder: make_adapter(
        AutoModelForCausalLM, folder / "base", folder / "adapter", {"block_size": 8}
    ),
    "dtype": lambda folder: ["--dtype", "bfloat16"],
    "base": lambda folder: os.utime(next((folder / "base").glob("*.safetensors"))),
    "config": lambda folder: (folder / "base" / "config.json").write_text(
        (folder / "base" / "config.json").read_text().replace('"pad_token_id": 0', '"pad_token_id": 1')
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_work_on_anything_else_is_not_taken_up(change, stopped, monkeypatch):
    folder, _, _ = stopped
    options = change(folder) or []
    done = merges(monkeypatch)
    assert (
        run(folder / "base", folder / "adapter", folder / "out", *(options if isinstance(options, list) else [])) == 0
    )
    assert len(done) >= 14


def test_killed_and_resumed_gives_the_same_bytes(on_disk):
    assert run(on_disk / "base", on_disk / "adapter", on_disk / "whole") == 0
    program = """
import os, signal, sys
from oftv2 import checkpoint_merge
from oftv2.__main__ import main
original, files = checkpoint_merge.write_tensors, []
def write_tensors(path, entries, metadata, pieces, progress):
    def kill(size):
        if len(files) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    original(path, entries, metadata, pieces, kill)
    files.append(path)
checkpoint_merge.write_tensors = write_tensors
main(["merge", *sys.argv[1:]])
"""
    arguments = [str(on_disk / name) for name in ("base", "adapter", "out")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=on_disk)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (on_disk / "out").exists()
    assert len(list((on_disk / ".out.partial").glob("*.safetensors"))) == 2
    assert len(list((on_disk / ".out.partial").glob("*.begun"))) == 1
    assert run(*arguments) == 0
    assert contents(on_disk / "out") == contents(on_disk / "whole")


def test_two_merges_into_one_folder(on_disk, capsys):
    with WorkFolder(on_disk / "out", {}):
        assert "another process" in fails(capsys, on_disk / "base", on_disk / "adapter", on_disk / "out")
    assert run(on_disk / "base", on_disk / "adapter", on_disk / "out") == 0


def test_force_replaces_a_model_only_when_the_new_one_is_complete(on_disk, capsys, monkeypatch):
    shutil.copytree(on_disk / "base", on_disk / "out")
    (on_disk / "out" / "old.txt").write_text("old")
    before = contents(on_disk / "out")
    command = (on_disk / "base", on_disk / "adapter", on_disk / "out")
    assert "--force" in fails(capsys, *command)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert run(*command, "--force") == 130
    assert contents(on_disk / "out") == before
    assert run(*command, "--force") == 0
    assert not (on_disk / "out" / "old.txt").exists()
    expected = merged_in_memory(AutoModelForCausalLM, on_disk / "base", on_disk / "adapter")
    assert_same_state(AutoModelForCausalLM.from_pretrained(on_disk / "out"), expected)
    assert list(on_disk.glob(".*")) == []


def test_an_empty_folder_needs_no_force(on_disk):
    (on_disk / "out").mkdir()
    assert run(on_disk / "base", on_disk / "adapter", on_disk / "out") == 0
    assert (on_disk / "out" / "config.json").is_file()
