"""The file of results: one JSON object a line, written by any number of processes at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator
from pathlib import Path

from study_plan import Row

RESULTS = Path(__file__).parent / "results" / "study-cpu.jsonl"


def read(path: Path) -> list[Row]:
    """The finished runs; a last line that a crash cut off is left out, and its run is done again."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}, line {number}: not valid JSON ({error}); remove the line") from None
    return rows


def append(path: Path, row: Row) -> None:
    """Adds one line; writers take turns, and a line that was cut off is dropped first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


@contextlib.contextmanager
def claim(path: Path, key: str) -> Iterator[bool]:
    """Whether the run is this process's to do; the claim ends with the block, or with the process."""
    folder = path.with_name(path.name + ".claims")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / re.sub(r"[^\w.=-]", "_", key)).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
