from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

import pytest

from cluster import pressure
from cluster.pressure import Pressure
from tests import virtual


class Machine:
    """The files that tell of memory, under a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/self/cgroup", "0::/\n")
        self.write("proc/meminfo", "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 300 kB\n")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def v2(self, group: str, limit: str, used: int, cache: int = 0) -> None:
        self.write(f"sys/fs/cgroup{group}/memory.max", f"{limit}\n")
        self.write(f"sys/fs/cgroup{group}/memory.current", f"{used}\n")
        stat = f"anon 5\ninactive_file {cache}\nactive_file {cache}\n"
        self.write(f"sys/fs/cgroup{group}/memory.stat", stat)

    def v1(self, group: str, limit: int, used: int, cache: int = 0) -> None:
        directory = f"sys/fs/cgroup/memory{group}"
        self.write(f"{directory}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{directory}/memory.usage_in_bytes", f"{used}\n")
        stat = f"inactive_file 1\ntotal_inactive_file {cache}\ntotal_active_file {cache}\n"
        self.write(f"{directory}/memory.stat", stat)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_machine_where_no_cgroup_limits(machine: Machine) -> None:
    assert pressure.memory(machine.root) == pytest.approx(0.7)
    machine.v2("", "max", 10)
    assert pressure.memory(machine.root) == pytest.approx(0.7)


def test_the_tightest_limit_on_the_way_up_without_the_page_cache(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/house/room\n")
    machine.v2("/house/room", "1000", 500, cache=100)
    assert pressure.memory(machine.root) == pytest.approx(0.3)
    machine.v2("/house", "1000", 900)
    assert pressure.memory(machine.root) == pytest.approx(0.9)


def test_cgroup_v1(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "5:cpu:/\n4:memory:/room\n0::/\n")
    machine.v1("", 9223372036854771712, 900)
    assert pressure.memory(machine.root) == pytest.approx(0.7)  # that is no limit
    machine.v1("/room", 1000, 500, cache=100)
    assert pressure.memory(machine.root) == pytest.approx(0.3)


def test_a_container_that_sees_only_its_own_part(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "4:memory:/docker/1234\n")
    machine.v1("", 1000, 400)
    assert pressure.memory(machine.root) == pytest.approx(0.4)


def test_what_can_still_be_taken(machine: Machine) -> None:
    """Within every limit. What was read from files, as weights are, can be taken."""
    assert pressure.free_bytes(machine.root) == 300 << 10
    machine.write("proc/self/cgroup", "0::/house/room\n")
    machine.v2("/house/room", "100000", 90000, cache=40000)
    assert pressure.free_bytes(machine.root) == 90000
    machine.v2("/house", "100000", 70000)
    assert pressure.free_bytes(machine.root) == 30000
    machine.write("proc/self/cgroup", "4:memory:/room\n")
    machine.v1("/room", 50000, 40000, cache=5000)
    assert pressure.free_bytes(machine.root) == 20000


def test_a_statistic_without_page_cache(machine: Machine) -> None:
    machine.v2("", "1000", 400)
    machine.write("sys/fs/cgroup/memory.stat", "anon 5\n")
    assert pressure.memory(machine.root) == pytest.approx(0.4)


def test_the_readings_of_this_process() -> None:
    assert 0 < pressure.memory() < 1
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = pressure.descriptors()
    extra = [os.dup(2) for _ in range(5)]
    assert (pressure.descriptors() - before) * limit == pytest.approx(5)
    for number in extra:
        os.close(number)


def test_with_no_descriptor_left_for_the_look() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = Pressure(0.9)
    now.look()
    seen = now.shares["memory"]
    lowest = os.dup(2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        now.look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(lowest)
    assert now.shares == {"memory": seen, "descriptors": 1.0}


def test_from_where_on_it_is_high_and_critical(caplog: pytest.LogCaptureFixture) -> None:
    shares = {"memory": 0.5, "descriptors": 0.1}
    readings = {"memory": lambda: shares["memory"], "descriptors": lambda: shares["descriptors"]}
    heard: list[tuple[str, float]] = []
    now = Pressure(0.8, lambda *each: heard.append(each), readings)
    told = []
    for shares["memory"] in (0.79, 0.8, 0.89, 0.9, 0.5):
        now.look()
        told.append((now.high, now.critical))
    assert told == [("", ""), ("memory", ""), ("memory", ""), ("memory", "memory"), ("", "")]
    assert heard[:2] == [("memory", 0.79), ("descriptors", 0.1)]
    assert [record.getMessage() for record in caplog.records] == [
        "pressure is high",
        "pressure is over",
    ]


def test_a_limit_of_nothing_is_never_reached() -> None:
    never = Pressure(0, readings={"memory": lambda: 1.0})
    never.look()
    assert (never.high, never.critical) == ("", "")


def test_it_relieves_for_as_long_as_it_is_critical() -> None:
    shares = iter([0.5, 0.95, 0.95, 0.5])
    relieved = []

    async def main() -> None:
        now = Pressure(0.85, readings={"memory": lambda: next(shares)})
        clock = asyncio.get_running_loop().time
        with pytest.raises(RuntimeError, match="StopIteration"):
            await now.watch(lambda: relieved.append(clock()))

    virtual.run(main())
    assert relieved == [1.0, 2.0]
