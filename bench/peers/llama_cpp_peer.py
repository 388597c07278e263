"""llama.cpp: timed by its own `llama-batched-bench`, asked for tokens through its server.

The benchmark draws its own token ids, which costs the same, and does not choose tokens, which costs
it nothing. Each call loads the model anew; loading is not in the times.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.peers.protocol import Answer, Load, Memory, serve

_FILES = {"fp32": "f32.gguf", "int8": "q8_0.gguf"}
_START_S = 60.0


class LlamaCppEngine:
    """Programs of one build, found beside the one that is given."""

    def __init__(self, load: Load) -> None:
        self._bench = Path(load.options["llama_bench"]).resolve()
        self._directory = self._bench.parent
        self._model = Path(load.model).parent / _FILES[load.precision]
        if not self._model.is_file():
            raise FileNotFoundError(f"{self._model.name} is not beside the model")
        self._threads = str(load.threads)
        self._context = 0
        self._sequences = 0
        self._memory = Memory(0, 0)
        self._version = _version(self._directory / "llama-server")

    def describe(self) -> dict[str, str]:
        settings = f"{self._model.stem}, f16 KV, batch 2048, micro-batch 512"
        return {"name": "llama.cpp", "version": self._version, "settings": settings}

    def prefill(self, ids: Sequence[int]) -> float:
        return float(self._run(len(ids), 1, 1)["t_pp"])

    def hold(self, prompts: Sequence[Sequence[int]]) -> None:
        self._sequences = len(prompts)
        self._context = len(prompts[0])

    def decode(self, steps: int) -> float:
        return float(self._run(self._context, steps, self._sequences)["t_tg"])

    def drop(self) -> None:
        self._sequences = 0

    def answer(self, ids: Sequence[int], count: int) -> Answer:
        """With keys and values in float32, unlike the timings: they are faster in float16."""
        with self._server() as url:
            body = {
                "prompt": list(ids),
                "n_predict": count,
                "temperature": 0,
                "ignore_eos": True,
                "return_tokens": True,
                "cache_prompt": False,
            }
            return Answer(_post(f"{url}/completion", body)["tokens"])

    def memory(self) -> Memory:
        """At most, of the last program that ran: it is gone, so there is no resident figure."""
        return self._memory

    def _run(self, prompt: int, steps: int, sequences: int) -> dict[str, Any]:
        """One prompt, its keys and values copied to each sequence, then `steps` for all."""
        command = [
            *(str(self._directory / "llama-batched-bench"), "-m", str(self._model)),
            *("-t", self._threads, "-tb", self._threads, "-b", "2048", "-ub", "512"),
            *("-c", str(sequences * (prompt + steps + 8)), "-pps", "--output-format", "jsonl"),
            *("-npp", str(prompt), "-ntg", str(steps), "-npl", str(sequences)),
        ]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * 1024
        self._memory = Memory(peak, peak)
        for line in output.splitlines():
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"llama-batched-bench ended with {process.returncode} and no result")

    @contextlib.contextmanager
    def _server(self) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [
            *(str(self._directory / "llama-server"), "-m", str(self._model), "--no-webui"),
            *("--host", "127.0.0.1", "--port", str(port), "-t", self._threads),
            *("-np", "1", "-c", "4096", "-ctk", "f32", "-ctv", "f32"),
        ]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                url = f"http://127.0.0.1:{port}"
                _until_ready(url, process)
                yield url
            finally:
                process.terminate()


def _version(server: Path) -> str:
    """What it says of itself."""
    told = subprocess.run([server, "--version"], capture_output=True, text=True, check=True)
    return (told.stderr + told.stdout).partition("version:")[2].strip().splitlines()[0]


def _until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with {process.returncode}")
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(f"{url}/health", timeout=5),
        ):
            return
        time.sleep(0.1)
    raise TimeoutError("llama-server is not ready")


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return dict(json.load(response))


if __name__ == "__main__":
    serve(LlamaCppEngine)
