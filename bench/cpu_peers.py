"""Peer: an engine in another process, as `baton bench cpu` sees it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Final

from bench.peers.protocol import Answer, Load, Memory
from cluster.errors import StartError

OURS: Final = "baton"
MODULES: Final = {
    OURS: "bench.peers.baton_peer",
    "transformers": "bench.peers.transformers_peer",
    "openvino": "bench.peers.openvino_peer",
    "vllm": "bench.peers.vllm_peer",
    "ctranslate2": "bench.peers.ctranslate2_peer",
    "llama.cpp": "bench.peers.llama_cpp_peer",
}
PRECISIONS: Final = {
    OURS: ("fp32", "int8"),
    "transformers": ("fp32",),
    "openvino": ("fp32", "int8"),
    "vllm": ("fp32",),
    "ctranslate2": ("fp32", "int8"),
    "llama.cpp": ("fp32", "int8"),
}
_TICK: Final = os.sysconf("SC_CLK_TCK")


class PeerFailed(Exception):
    """A peer said why it could not do what it was asked, or died."""


class Peer:
    """One engine, idle unless asked. Use as a context manager: no process outlives it."""

    def __init__(self, key: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.key = key
        self.about: dict[str, str] = {}
        self._busy_s = 0.0
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=dict(environment),
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    @property
    def name(self) -> str:
        return self.about.get("name", self.key)

    def load(self, load: Load) -> None:
        """Raises PeerFailed."""
        self.about = self._ask(asdict(load))

    def prefill(self, ids: Sequence[int]) -> float:
        return float(self._ask({"do": "prefill", "ids": ids})["seconds"])

    def hold(self, prompts: Sequence[Sequence[int]]) -> None:
        self._ask({"do": "hold", "prompts": prompts})

    def decode(self, steps: int) -> float:
        return float(self._ask({"do": "decode", "steps": steps})["seconds"])

    def drop(self) -> None:
        self._ask({"do": "drop"})

    def answer(self, ids: Sequence[int], count: int) -> Answer:
        return Answer(**self._ask({"do": "answer", "ids": ids, "count": count}))

    def memory(self) -> Memory:
        return Memory(**self._ask({"do": "memory"}))

    def stray_seconds(self) -> float:
        """CPU that it has used while nobody asked it for anything: others paid for that."""
        return max(0.0, self._cpu_seconds() - self._busy_s)

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        before = self._cpu_seconds() if self.about else 0.0  # starting up is not stray
        try:
            print(json.dumps(what), file=stdin, flush=True)
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerFailed(f"its process ended with {self._process.wait()}")
        self._busy_s += self._cpu_seconds() - before
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerFailed(reply["error"])
        return reply

    def _cpu_seconds(self) -> float:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
            fields = text.rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / _TICK
        return self._busy_s


@contextmanager
def launcher() -> Iterator[Launcher]:
    """Where peers find their side of the protocol, and nothing else of ours.

    A Python that saw our whole directory would take its packages for its own.
    """
    with TemporaryDirectory(prefix="baton-peers-") as directory:
        (Path(directory) / "bench").symlink_to(Path(__file__).parent, target_is_directory=True)
        yield Launcher(directory)


class Launcher:
    def __init__(self, directory: str) -> None:
        self.directory = directory

    def start(self, key: str, python: str, threads: int) -> Peer:
        """An engine that has loaded nothing yet. Raises StartError if `python` does not run."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("OMP_")
        }
        environment["OMP_NUM_THREADS"] = str(threads)
        if key != OURS:
            environment["PYTHONPATH"] = self.directory
        try:
            return Peer(key, [python, "-m", MODULES[key]], environment)
        except OSError as error:
            raise StartError(f"{key}: cannot run {python}: {error.strerror}") from None


def pythons(given: Mapping[str, str | None]) -> dict[str, str]:
    """The Python of each peer that is given; ours and llama.cpp's side run in this one."""
    found = {OURS: sys.executable}
    for key, value in given.items():
        if value:
            found[key] = sys.executable if key == "llama.cpp" else value
    return found
