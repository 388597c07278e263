"""Stopwatch: how long the device takes for a call, without the host's share where that can be.

The calls are captured in a graph, which is replayed: a kernel of 3 us takes the host 30 to launch.
What is captured several times over should be calls on other data each, as the layers of a model
are: small enough, it would otherwise come from the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch

Call = Callable[[], object]

_BUDGET_S: Final = 0.12
_ROUNDS: Final = (5, 60)


class Stopwatch:
    """For one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spoil: torch.Tensor | None = None

    def seconds(self, calls: Sequence[Call], *, cold: bool = False, graph: bool = True) -> float:
        """Of one of `calls`, the median of many rounds through all of them.

        `cold`: the L2 cache holds nothing of them when a round begins.
        """
        with torch.inference_mode():
            if self._device.type != "cuda":
                return _on_cpu(calls)
            return self._on_gpu(self._once(calls, graph), cold) / len(calls)

    def _once(self, calls: Sequence[Call], graph: bool) -> Call:
        """Warm, and as one call; those that cannot be captured stay as they are."""

        def each() -> None:
            for call in calls:
                call()

        torch.cuda.synchronize(self._device)  # what the calls read is made on another stream
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            for _ in range(2):
                each()
        torch.cuda.synchronize(self._device)
        if not graph:
            return each
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                each()
        except RuntimeError as error:
            torch.cuda.synchronize(self._device)
            print(f"timed without a graph: {str(error).splitlines()[0]}", flush=True)
            return each
        return captured.replay

    def _on_gpu(self, call: Call, cold: bool) -> float:
        rough = self._round(call, 3, cold)[-1]
        count = int(min(max(_BUDGET_S / max(rough, 1e-9), _ROUNDS[0]), _ROUNDS[1]))
        return statistics.median(self._round(call, count, cold))

    def _round(self, call: Call, count: int, cold: bool) -> list[float]:
        pairs = []
        # The device gets work first, so that the host is ahead of it: an event that it has reached
        # before what follows is queued would time the host.
        for _ in range(count):
            self._chill()
        for _ in range(count):
            if cold:
                self._chill()
            began, ended = _event(), _event()
            began.record()
            call()
            ended.record()
            pairs.append((began, ended))
        torch.cuda.synchronize(self._device)
        return [began.elapsed_time(ended) / 1e3 for began, ended in pairs]

    def _chill(self) -> None:
        """Read, not write: lines that are to be written back would cost the next one time."""
        if self._spoil is None:
            size = 4 * torch.cuda.get_device_properties(self._device).L2_cache_size
            self._spoil = torch.ones(size // 4, device=self._device)
        self._spoil.sum()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _on_cpu(calls: Sequence[Call]) -> float:
    """Once: numbers without meaning, to see that it runs."""
    began = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - began) / len(calls)
