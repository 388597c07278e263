"""Pressure: how near this process is to a limit that would end it, and when to take nothing new.

    memory       the limit of its cgroup, v2 or v1, the tightest on the way up; else the machine's
    descriptors  its RLIMIT_NOFILE

Page cache counts as free: the kernel takes it back first, and mapped weights are in it. Linux.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

POLL_S = 1.0

_UNLIMITED: Final = 1 << 60
"""No cgroup v1 has such a limit in earnest: it shows the largest number that there is."""

_V2: Final = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1: Final = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)

Reading = Callable[[], float]
"""The share in use, 0 to 1."""


class Pressure:
    """What the last look saw. Owned by the event loop; `high` may be asked from any thread.

    `limit` is the share from which on it is high; 0 is never. It is critical from halfway between
    there and all. `tell` hears of each reading.
    """

    def __init__(
        self,
        limit: float,
        tell: Callable[[str, float], None] = lambda name, share: None,
        readings: Mapping[str, Reading] | None = None,
    ) -> None:
        self._limit = limit
        self._tell = tell
        self._readings = READINGS if readings is None else readings
        self.shares = dict.fromkeys(self._readings, 0.0)

    @property
    def high(self) -> str:
        """What is short, in a word; empty if nothing is."""
        return self._beyond(self._limit)

    @property
    def critical(self) -> str:
        return self._beyond((1 + self._limit) / 2)

    def _beyond(self, share: float) -> str:
        short, most = max(self.shares.items(), key=lambda each: each[1])
        return short if self._limit and most >= share else ""

    def look(self) -> None:
        before = self.high
        for name, read in self._readings.items():
            with suppress(OSError):  # short of what a look takes: what was seen last still holds
                self.shares[name] = read()
            self._tell(name, self.shares[name])
        if self.high != before:
            shown = {name: round(share, 3) for name, share in self.shares.items()}
            log.warning("pressure is %s", "high" if self.high else "over", extra=shown)

    async def watch(self, relieve: Callable[[], None] = lambda: None) -> None:
        """Look once a second, and call `relieve` each time it is critical. Until cancelled."""
        while True:
            self.look()
            if self.critical:
                relieve()
            await asyncio.sleep(POLL_S)


def memory(root: Path = Path("/")) -> float:
    """The share of the tightest limit; of the machine's memory if no cgroup of ours has one."""
    limits = list(_of_cgroups(root)) or [_of_machine(root)]
    return max(used / max(1, limit) for limit, used in limits)


def free_bytes(root: Path = Path("/")) -> int:
    """Memory that can still be taken: within every limit, and of what the machine has left."""
    return min(limit - used for limit, used in (*_of_cgroups(root), _of_machine(root)))


def _of_cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each group with a limit."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, files = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        # In a container the path may be the host's, of which only the mount itself is to be seen.
        group = mount / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(mount) and (directory / files[0]).exists():
                yield from _of_cgroup(directory, *files)


def _of_cgroup(
    directory: Path, limit: str, usage: str, cache: tuple[str, str]
) -> Iterator[tuple[int, int]]:
    most = (directory / limit).read_text().strip()
    if most == "max" or int(most) >= _UNLIMITED:
        return
    stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    used = int((directory / usage).read_text()) - sum(int(stat.get(name, 0)) for name in cache)
    yield int(most), used


def _of_machine(root: Path) -> tuple[int, int]:
    lines = (root / "proc/meminfo").read_text().splitlines()
    sizes = {
        name: int(rest.split()[0]) << 10 for name, _, rest in (x.partition(":") for x in lines)
    }
    return sizes["MemTotal"], sizes["MemTotal"] - sizes["MemAvailable"]


def descriptors() -> float:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        return len(os.listdir("/proc/self/fd")) / limit
    except OSError:  # none is left for the look
        return 1.0


READINGS: Final[Mapping[str, Reading]] = {"memory": memory, "descriptors": descriptors}
