"""The round in which nothing happens but that every core is busy: nobody may be taken for lost."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from bench.chaos.scene import Round, Scene

_BURN: Final = """
import os
parent = os.getppid()
while os.getppid() == parent:
    sum(range(1_000_000))
"""


async def busy(scene: Scene, seconds: float) -> Round:
    """As many processes that only burn time as there are cores, beside steady traffic."""
    async with scene.round("busy") as found:
        traffic = scene.traffic()
        found.runs = traffic.runs
        async with _burning(os.cpu_count() or 1), traffic.flowing():
            await asyncio.sleep(seconds)
    found.require(not found.recoveries, f"moved for nothing: {dict(found.recoveries)}")
    found.judge()
    found.facts["seconds with every core busy"] = seconds
    found.facts["load average at the end"] = round(os.getloadavg()[0], 1)
    return found


@asynccontextmanager
async def _burning(count: int) -> AsyncIterator[None]:
    burners = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", _BURN) for _ in range(count)
    ]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            await burner.wait()
