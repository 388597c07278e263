"""Part: one piece of the benchmark, run in a process of its own and never waited for too long.

A kernel that reads where it may not breaks the device for its whole process, and one that hangs
cannot be stopped from within. Findings are written down one by one: those before the end count.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.gpu.setting import Row, Rows, Setting

_PRELOADED: Final = ("torch", "triton", "numpy", "bench.gpu.setting")
_LEAVE_S: Final = 3.0


@dataclass(frozen=True)
class Later:
    """A function of this package, imported where it runs: a module that cannot be imported, for
    lack of a package, ends only the parts that need it."""

    module: str
    name: str

    def __call__(self, setting: Setting, *arguments: Any) -> Rows:
        work: Callable[..., Rows] = getattr(
            importlib.import_module(f"bench.gpu.{self.module}"), self.name
        )
        return work(setting, *arguments)


@dataclass(frozen=True)
class Part:
    """`work` and `arguments` are sent to another process. `alone`: it times, so nothing else may
    run beside it. Not in a usual run if it is `extra`."""

    name: str
    work: Callable[..., Rows]
    arguments: tuple[Any, ...] = ()
    limit_s: float = 60.0
    alone: bool = True
    extra: bool = False

    @property
    def section(self) -> str:
        return self.name.partition(".")[0]

    def matches(self, name: str) -> bool:
        """Whether it is `name` or one of what that stands for: check.decode.bf16 is of check."""
        return self.name == name or self.name.startswith(f"{name}.")


@dataclass(frozen=True)
class Found:
    """What came of a part. Without `error` it ran to its end."""

    part: Part
    rows: list[Row]
    seconds: float
    error: str = ""

    @property
    def sound(self) -> bool:
        """It ran, and nothing that was checked is off."""
        return not self.error and all(row.get("ok", True) for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "part": self.part.name,
            "ok": self.sound,
            "seconds": round(self.seconds, 2),
            "error": self.error,
            "rows": [_plain(row) for row in self.rows],
        }


class Running:
    """A part under way. `wait` once."""

    def __init__(self, part: Part, setting: Setting, limit_s: float) -> None:
        self._part = part
        self._limit_s = min(part.limit_s, limit_s)
        self._began = time.monotonic()
        self._directory = tempfile.TemporaryDirectory()
        self._file = Path(self._directory.name) / "rows"
        self._process = processes().Process(target=_run, args=(part, setting, str(self._file)))
        self._process.start()

    @property
    def over(self) -> bool:
        return not self._process.is_alive() or self._left <= 0

    @property
    def _left(self) -> float:
        return self._began + self._limit_s - time.monotonic()

    def wait(self) -> Found:
        """Its findings, once it has ended or its time is up: then it is ended."""
        self._process.join(max(0.0, self._left))
        late = self._process.is_alive()
        self.end()
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        rows: list[Row] = [json.loads(line) for line in lines if line.endswith("}")]
        errors = [row.pop("traceback") for row in rows if "traceback" in row]
        status = self._process.exitcode
        if not errors and (late or status):
            why = f"not done within {self._limit_s:.0f} s" if late else f"ended with {status}"
            errors = [why]
        self._directory.cleanup()
        found = [row for row in rows if row]
        return Found(self._part, found, time.monotonic() - self._began, "\n".join(errors))

    def end(self) -> None:
        """Idempotent. What it has started dies with it."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_LEAVE_S)
        if self._process.is_alive():
            self._process.kill()
        self._process.join(_LEAVE_S)  # one that waits for the device cannot even be killed


def processes() -> Any:
    """Where parts come from: a process that has imported what takes long, and seen no device."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def _run(part: Part, setting: Setting, path: str) -> None:
    """In the child. The status is 1 if it raised; what was found until then is in the file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    with open(path, "w", encoding="utf-8") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(_plain(row)) + "\n")
            file.flush()

        try:
            for row in part.work(setting, *part.arguments):
                write(row)
        except BaseException:
            write({"traceback": traceback.format_exc()})
            file.close()
            os._exit(1)


def _plain(value: Any) -> Any:
    """As JSON has it: a number that is none becomes a word, and fails every bound."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
