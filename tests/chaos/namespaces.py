"""A network of its own for each process, and one in the middle that can be told to fail.

    gateway --- |        |          each a network namespace with one interface and 10.77.N.2;
    prefill --- | router |          the router forwards between them until told otherwise
    decode  --- |        |

Nothing of the host's own network is touched, and all of it ends with the processes that hold the
namespaces, which end with this one. Needs root, or `unshare -rn` around the test run.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.chaos.bad_line import Weather, pumped

CLONE_NEWNET = 0x40000000
HELD = "echo; read -r line; true"
"""Says when it is there, and stays until its input ends, as it does when we do."""


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    try:
        with Network(["probe"]):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces: {error}; as root, or inside of `unshare -rn`, there may be"


class Network:
    """Used as a context. `hosts` get the addresses 10.77.1.2, 10.77.2.2 and so on."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.address = {host: f"10.77.{number}.2" for number, host in enumerate(hosts, 1)}
        self._holders: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Network:
        with ExitStack() as stack:
            stack.callback(self._end)
            for name in ("router", *self.address):
                self._hold(name)
            for host, address in self.address.items():
                self._join(host, address)
            with self.inside("router"):
                Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def _hold(self, name: str) -> None:
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", HELD], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL
        )
        self._holders[name] = holder
        assert holder.stdout is not None
        if not holder.stdout.readline():
            raise OSError("`unshare --net` is not permitted")

    def _end(self) -> None:
        for holder in self._holders.values():
            assert holder.stdin is not None and holder.stdout is not None
            holder.stdin.close()
            holder.wait()
            holder.stdout.close()

    def _join(self, host: str, address: str) -> None:
        """A cable from the host to the router."""
        gate, pid = address.removesuffix("2") + "1", self._holders[host].pid
        with self.inside("router"):
            _ip(f"link add to-{host} type veth peer name eth0 netns {pid}")
            _ip(f"addr add {gate}/24 dev to-{host}")
            _ip(f"link set to-{host} up")
        with self.inside(host):
            for command in (
                "link set lo up",
                f"addr add {address}/24 dev eth0",
                "link set eth0 up",
                f"route add default via {gate}",
            ):
                _ip(command)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """The calling thread, and what it starts, is in that namespace."""
        with open("/proc/thread-self/ns/net") as before:
            with open(f"/proc/{self._holders[name].pid}/ns/net") as there:
                _enter(there.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())

    @contextmanager
    def cut(self, source: str, target: str) -> Iterator[None]:
        """What `source` sends to `target` vanishes without a word."""
        rule = f"from {self.address[source]} to {self.address[target]} blackhole"
        with self.inside("router"):
            _ip(f"rule add {rule}")
        try:
            yield
        finally:
            with self.inside("router"):
                _ip(f"rule del {rule}")

    @contextmanager
    def parted(self, one: str, other: str) -> Iterator[None]:
        """Neither hears anything of the other."""
        with self.cut(one, other), self.cut(other, one):
            yield

    @contextmanager
    def thin(self, host: str, rate: str) -> Iterator[None]:
        """What goes to the host comes at `rate`, as tc spells it."""
        with self.inside("router"):
            _run(f"tc qdisc add dev to-{host} root tbf rate {rate} burst 16kb latency 200ms")
        try:
            yield
        finally:
            with self.inside("router"), suppress(subprocess.CalledProcessError):
                _run(f"tc qdisc del dev to-{host} root")

    @contextmanager
    def bad(self, host: str, weather: Weather) -> Iterator[None]:
        """What goes to the host and what comes from it goes through `weather`."""
        device, table = f"bad-{host}", 100 + list(self.address).index(host)
        address = self.address[host]
        rules = [
            f"pref {table} iif {device} lookup main",
            f"pref {200 + table} to {address} lookup {table}",
            f"pref {200 + table} from {address} lookup {table}",
        ]
        with ExitStack() as stack:
            with self.inside("router"):
                stack.enter_context(pumped(device, weather))
                _ip(f"link set {device} up")
                _ip(f"route add default dev {device} table {table}")
                for rule in rules:
                    _ip(f"rule add {rule}")
            yield
            with self.inside("router"):
                for rule in rules:
                    _ip(f"rule del {rule}")


def _ip(command: str) -> None:
    _run(f"ip {command}")


def _run(command: str) -> None:
    """Raises CalledProcessError, OSError."""
    subprocess.run(command.split(), check=True, capture_output=True)


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
