"""The watchdog: ends a process whose step loop hangs, even one that holds the GIL for ever.

faulthandler's timer is a C thread that needs no GIL. It is set anew whenever the step loop has
moved; a loop that has not for so long is not going to: every thread's stack is written to stderr
and the process ends with status 1. Gateways have left it long before; this is what frees its
device and has it started again.

The timer cannot tell a hang from a SIGSTOP that is longer than itself: such a process ends as soon
as it goes on.
"""

from __future__ import annotations

import asyncio
import faulthandler
from collections.abc import Callable

LOOK_S = 0.5
STDERR = 2


async def watch(pulse: Callable[[], int], timeout: float) -> None:
    """Until cancelled; `pulse` moves while the step loop lives. A timeout of 0 watches nothing."""
    if not timeout:
        return
    seen = None
    try:
        while True:
            now = pulse()
            if now != seen:
                faulthandler.dump_traceback_later(timeout, exit=True, file=STDERR)
            seen = now
            await asyncio.sleep(LOOK_S)
    finally:
        faulthandler.cancel_dump_traceback_later()
