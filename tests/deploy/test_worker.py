from __future__ import annotations

import asyncio
import signal
import sys

LOADS_FOREVER = """
import sys, torch
from engine import worker
def load(*_):
    print("loading", flush=True)
    while True:
        torch.ones(99).sum()
worker._load = load
from deploy import worker
worker.main(["--role", "decode", "--log-level", "warning"])
"""


async def test_told_to_stop_while_weights_load_the_process_ends() -> None:
    """Cleanly, although a thread of it is inside torch for good."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        LOADS_FOREVER,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert child.stdout is not None and child.stderr is not None
    try:
        assert await child.stdout.readline() == b"loading\n"
        child.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await child.wait() == 0
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert await child.stderr.read() == b""
