"""A folder that appears in one step when it is complete; whoever is stopped before that can go on later."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from .adapter_file import write_atomically
from .errors import AdapterError

_IDENTITY = ".inputs.json"


class WorkFolder:
    """A context in which a folder is built as ``.NAME.partial``, beside the place that it gets in the end.

    Args:
        out (Path): the folder to be.
        inputs (dict): what the content is made from, in JSON's types. Work that a stopped process left behind is taken
            up where these are equal, and else thrown away.

    Attributes:
        path (Path): where to write.

    Raises:
        AdapterError: another process is at it.
    """

    def __init__(self, out: Path, inputs: dict[str, Any]) -> None:
        self.out, self.inputs = out, json.loads(json.dumps(inputs))
        self.path = out.parent / f".{out.name}.partial"
        self._lock = -1

    def __enter__(self) -> WorkFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it if this process dies
            if not self.path.is_dir() or os.stat(self.path).st_ino != os.fstat(self._lock).st_ino:
                raise BlockingIOError  # it was finished just now, and is no longer the folder under this name
        except BlockingIOError as error:
            os.close(self._lock)
            raise AdapterError(
                f"another process is writing {self.out}: wait for it, or choose another folder"
            ) from error
        if self._inputs_before() != self.inputs:
            for path in self.path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_atomically(self.path / _IDENTITY, json.dumps(self.inputs).encode())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._lock)

    def finish(self) -> None:
        """Puts the folder in its place; what was there is replaced, and removed only then."""
        (self.path / _IDENTITY).unlink()
        old = self.out.parent / f".{self.out.name}.old"
        replaces = self.out.is_dir() and any(self.out.iterdir())
        if replaces:
            if old.exists():
                shutil.rmtree(old)
            os.rename(self.out, old)
        try:
            os.rename(self.path, self.out)
        except OSError:
            if replaces:
                os.rename(old, self.out)
            raise
        if old.exists():
            shutil.rmtree(old)

    def _inputs_before(self) -> Any:
        try:
            return json.loads((self.path / _IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
