"""A writer stopped at any moment leaves the old adapter or the new one, and a later save leaves no leftovers."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from oftv2 import AdapterError, load_adapter, save_adapter, wrap_model
from oftv2.adapter_file import write_atomically

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
VECTORS = torch.randn(3, 16, generator=torch.Generator().manual_seed(7))


def test_threads_that_save_at_once_do_not_write_to_one_file(tmp_path, monkeypatch):
    barrier, fsync = Barrier(2), os.fsync

    def together(file):
        if not os.path.isdir(f"/proc/self/fd/{file}"):
            barrier.wait(10)  # both have written, and neither has put its file in place
        fsync(file)

    monkeypatch.setattr(os, "fsync", together)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write_atomically, [tmp_path / "file"] * 2, [b"one" * 100, b"two"]))
    assert (tmp_path / "file").read_bytes() in (b"one" * 100, b"two")
    assert os.listdir(tmp_path) == ["file"]


# Saves the adapter "new" over a copy of "old" again and again, killed by SIGKILL at the n-th file system call: before
# it, after it, or after a half of what it was to write. One forked child for each n.
WRITER = """
import builtins, io, itertools, json, os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from torch import nn
from oftv2 import load_adapter, save_adapter

work = Path(sys.argv[1])
torch.manual_seed(1)
model = load_adapter(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), work / "new")
calls = {"open", "write", "flush", "fsync", "replace", "rename", "unlink", "remove", "mkdir", "close"}

def kill(note):
    (work / "log").open("a").write(note + "\\n")
    os.kill(os.getpid(), signal.SIGKILL)

def stop_at(n):
    count = itertools.count()
    def watch(frame, event, function):
        if not event.startswith("c_") or getattr(function, "__name__", "") not in calls:
            return
        if next(count) == n:
            sys.setprofile(None)
            kill(f"{event} {function.__name__}")
    sys.setprofile(watch)

def stop_in_write(n):
    count, original = itertools.count(), builtins.open
    class Half(io.FileIO):
        def write(self, data):
            if next(count) == n:
                super().write(bytes(data)[: len(data) // 2])
                kill("half write")
            return super().write(data)
    builtins.open = lambda path, mode="r", *args, **kwargs: (
        Half(path, mode) if "b" in mode and "w" in mode else original(path, mode, *args, **kwargs)
    )

for start in ("old", "empty"):
    for stop in (stop_at, stop_in_write):
        for n in itertools.count():
            folder = work / f"{start}-{stop.__name__}-{n:03}"
            if start == "old":
                shutil.copytree(work / "old", folder)
            child = os.fork()
            if child == 0:
                stop(n)
                save_adapter(model, folder)
                os._exit(0)
            if os.waitpid(child, 0)[1] == 0:
                break
"""


def build():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).eval()


def adapter(value):
    model = wrap_model(build(), block_size=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)
    return model


@torch.no_grad()
def answer(folder):
    return load_adapter(build(), folder)(VECTORS)


@pytest.fixture
def saved(tmp_path):
    """Folders with an old adapter and a new one, and what models answer with them."""
    folders = [save_adapter(adapter(value), tmp_path / name) for name, value in (("old", 0.1), ("new", 0.3))]
    answers = [answer(folder) for folder in folders]
    assert not torch.allclose(*answers)
    return tmp_path, *answers


def leftovers(folder):
    return sorted(set(os.listdir(folder)) - set(FILES))


def test_a_killed_writer_leaves_the_old_adapter_or_the_new_one(saved):
    work, old, new = saved
    subprocess.run([sys.executable, "-c", WRITER, str(work)], check=True, timeout=120, cwd=work)
    points = (work / "log").read_text().splitlines()
    for call in ("open", "write", "fsync", "replace"):
        assert any(point.endswith(f"c_call {call}") for point in points), f"never stopped before {call}"
        assert any(point.endswith(f"c_return {call}") for point in points), f"never stopped after {call}"
    assert points.count("half write") >= 4  # two files, over an old adapter and into a new folder

    found = {"old": 0, "new": 0}
    for folder in sorted(work.glob("old-*")):
        result = answer(folder)
        assert torch.equal(result, old) or torch.equal(result, new), folder.name
        found["old" if torch.equal(result, old) else "new"] += 1
    assert min(found.values()) >= 3, found

    for folder in sorted(work.glob("empty-*")):
        try:
            assert torch.equal(answer(folder), new), folder.name
        except AdapterError:  # no adapter yet
            assert not (folder / FILES[2]).exists()

    model = load_adapter(build(), work / "old")
    killed = [folder for folder in sorted(work.iterdir()) if folder.is_dir() and "-stop_" in folder.name]
    assert any(leftovers(folder) for folder in killed)
    for folder in killed:
        save_adapter(model, folder)
        assert sorted(os.listdir(folder)) == FILES, folder.name
        assert torch.equal(answer(folder), old)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


class FullFile(io.FileIO):
    """Takes a few bytes before the disk is full."""

    def write(self, data):
        super().write(bytes(data)[:100])
        full()


FAILURES = {
    "write": ("builtins.open", lambda path, *_, **__: FullFile(path, "w")),
    "open": ("builtins.open", full),
    "fsync": ("os.fsync", full),
    "replace": ("os.replace", full),
}


@pytest.mark.parametrize(("name", "replacement"), FAILURES.values(), ids=FAILURES.keys())
def test_a_full_disk_leaves_the_old_adapter_and_no_leftovers(saved, monkeypatch, name, replacement):
    work, old, new = saved
    model = load_adapter(build(), work / "new")
    with monkeypatch.context() as patch:
        patch.setattr(name, replacement)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(model, work / "old")
    assert sorted(os.listdir(work / "old")) == FILES
    assert torch.equal(answer(work / "old"), old)
    save_adapter(model, work / "old")
    assert sorted(os.listdir(work / "old")) == FILES
    assert torch.equal(answer(work / "old"), new)


def test_an_error_at_any_call_leaves_the_old_adapter_or_the_new_one(saved):
    work, old, new = saved
    calls = {"open", "write", "flush", "fsync", "replace", "unlink", "close"}
    model = load_adapter(build(), work / "new")
    before = (work / "old" / FILES[2]).read_bytes()
    for n in range(200):
        (work / "old" / FILES[2]).write_bytes(before)
        remaining = [n]

        def watch(frame, event, function, remaining=remaining):
            if event == "c_call" and getattr(function, "__name__", "") in calls:
                if remaining[0] == 0:
                    sys.setprofile(None)
                    full()
                remaining[0] -= 1

        sys.setprofile(watch)
        try:
            save_adapter(model, work / "old")
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 (the save may also succeed)
        finally:
            sys.setprofile(None)
        result = answer(work / "old")
        assert torch.equal(result, old) or torch.equal(result, new), n
        if remaining[0] > 0:
            break
    assert 10 < n < 199
    assert torch.equal(result, new)
    assert sorted(os.listdir(work / "old")) == FILES


def test_an_unwritable_folder_is_an_error_and_nothing_changes(saved):
    work, old, _ = saved
    (work / "file").write_text("mine")
    with pytest.raises((AdapterError, OSError), match="file"):
        save_adapter(adapter(0.2), work / "file")
    assert (work / "file").read_text() == "mine"
    assert torch.equal(answer(work / "old"), old)


def test_two_processes_may_save_into_one_folder_at_once(saved, monkeypatch):
    work, _, new = saved
    model = load_adapter(build(), work / "new")
    original, process = os.fsync, os.getpid()
    nested = []

    def other_writer_meanwhile(descriptor):
        original(descriptor)
        if not nested:
            nested.append(True)
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: process + 1)
                save_adapter(model, work / "old")

    monkeypatch.setattr(os, "fsync", other_writer_meanwhile)
    save_adapter(model, work / "old")
    assert nested
    assert sorted(os.listdir(work / "old")) == FILES
    assert torch.equal(answer(work / "old"), new)
    json.loads((work / "old" / FILES[1]).read_text())
