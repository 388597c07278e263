"""A line that loses, repeats, delays and overtakes packets: a TUN device and a thread as its pump.

The kernel has nothing of the kind here (no netem). Packets that are routed into the device are read
by the pump, and those that it lets through come out of the same device later.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

_TUNSETIFF: Final = 0x400454CA
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_PACKET: Final = 65536


@dataclass
class Weather:
    """What happens to each packet by itself, and how often it has. Equal seeds, equal weather."""

    seed: int
    loss: float = 0.02
    twice: float = 0.02
    delay_s: float = 0.02
    jitter_s: float = 0.005
    """Packets sent closer together than this may overtake each other."""

    lost: int = 0
    repeated: int = 0
    overtaken: int = 0


@contextmanager
def pumped(device: str, weather: Weather) -> Iterator[None]:
    """The device is there, in the caller's namespace, and packets come through it by `weather`.

    Raises OSError where there are no TUN devices.
    """
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    woken, wake = os.pipe()
    try:
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
        pump = threading.Thread(target=_pump, args=(tun, woken, weather), name=device)
        pump.start()
        try:
            yield
        finally:
            os.close(wake)
            pump.join()
    finally:
        os.close(woken)
        os.close(tun)


def _pump(tun: int, ended: int, weather: Weather) -> None:
    """Until the other end of `ended` is closed."""
    chance = random.Random(weather.seed)
    under_way: list[tuple[float, int, bytes]] = []  # when it comes out, its number, the packet
    read = newest = 0
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([tun, ended], [], [], wait)
        if ended in ready:
            return
        if tun in ready:
            packet, now = os.read(tun, _PACKET), time.monotonic()
            copies = 0 if chance.random() < weather.loss else 1 + (chance.random() < weather.twice)
            weather.lost += not copies
            weather.repeated += copies == 2
            for _ in range(copies):
                read += 1
                late = chance.uniform(-weather.jitter_s, weather.jitter_s)
                heapq.heappush(under_way, (now + weather.delay_s + late, read, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, number, packet = heapq.heappop(under_way)
            weather.overtaken += number < newest
            newest = max(newest, number)
            os.write(tun, packet)
