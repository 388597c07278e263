from __future__ import annotations

import asyncio
import faulthandler
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from engine import watchdog
from tests import virtual

HANGS = {
    "without the GIL": "time.sleep(1e6)",
    "with the GIL": "re.match('(a+)+$', 'a' * 64 + 'b')",
}

SCRIPT = """
import asyncio, re, threading, time
from engine import watchdog

watched = threading.Event()

def step_loop():
    watched.wait()
    {hang}

async def main():
    threading.Thread(target=step_loop, daemon=True).start()
    watching = asyncio.create_task(watchdog.watch(lambda: 1, 0.2))
    await asyncio.sleep(0)
    watched.set()
    await watching

asyncio.run(main())
"""


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_a_process_that_hangs_ends_with_its_stacks(hang: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(hang=hang)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("Timeout") and "in step_loop" in ended.stderr


class Timer:
    """faulthandler's, which writes down when it was set, for how long and when cancelled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        monkeypatch.setattr(faulthandler, "dump_traceback_later", self._set)
        monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", self._cancel)

    def _set(self, timeout: float, exit: bool, file: int) -> None:
        assert exit and file == 2
        self.calls.append((virtual.clock(), timeout))

    def _cancel(self) -> None:
        self.calls.append("cancelled")

    def watch(self, pulse: Callable[[], int], timeout: float, seconds: float) -> list[Any]:
        async def main() -> None:
            watching = asyncio.create_task(watchdog.watch(pulse, timeout))
            await asyncio.sleep(seconds)
            watching.cancel()

        virtual.run(main())
        return self.calls


def test_it_is_set_anew_as_long_as_the_loop_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    def moves_for_a_second() -> int:
        return int(min(virtual.clock(), 1.0) * 10)

    calls = Timer(monkeypatch).watch(moves_for_a_second, 10.0, 4.0)
    assert calls == [(0.0, 10.0), (0.5, 10.0), (1.0, 10.0), "cancelled"]


def test_it_can_be_left_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Timer(monkeypatch).watch(lambda: 1, 0.0, 4.0) == []
