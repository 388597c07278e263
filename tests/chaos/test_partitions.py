"""Partitions of a real cluster, every process in a network of its own: streams go on, tokens equal.

The gateway, two prefill and two decode workers trust each other by the keys of `baton keys`; the
client sits beside the gateway. Nothing is restarted: what was cut off comes back by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest

from deploy import keys
from tests.chaos.bad_line import Weather
from tests.chaos.namespaces import Network, why_not
from tests.e2e.client import DONE, complete, stream
from tests.e2e.cluster import Cluster
from tests.e2e.reference import prompt_of
from tests.e2e.test_cancel import COMPLETIONS

JOIN_PORT = 9001
SOON_S = 15.0
SLOW = ("--kernels", "torch", "--max-num-batched-tokens", "16", "--chunk-bytes", "4096")
Fault = AbstractContextManager[None]
HOSTS = ("gateway", "p0", "p1", "d0", "d1")


def ask(number: int, prompt: int = 3000, answer: int = 300) -> dict[str, Any]:
    """One that no prefix cache has."""
    return {
        "model": "baton-tiny",
        "prompt": prompt_of(prompt, 2000, seed=number),
        "max_tokens": answer,
        "ignore_eos": True,
        "temperature": 0,
        "return_token_ids": True,
        "return_timeline": True,
    }


HANDING_OFF, DECODING = "handing off", "decoding"


class Town:
    """A cluster whose processes live apart."""

    def __init__(self, network: Network, cluster: Cluster) -> None:
        self.network, self.cluster = network, cluster
        self.asked = 0
        self.stayed = False  # whether everybody was a member when the last answer was whole

    def disturbed(self, when: str, fault: Callable[[list[str]], Fault]) -> list[dict[str, Any]]:
        """One streamed answer, during which `fault` strikes; its tokens are those it has without.

        `fault` gets the names of the workers that serve it. Returns the timeline's recoveries.
        """
        self.asked += 1
        body, cluster = ask(self.asked), self.cluster
        before = starts(cluster.status())
        with ThreadPoolExecutor(1) as caller:
            call = caller.submit(_read, cluster.url, body)
            workers = self._busy(when)
            with fault(workers):
                told, recoveries = call.result()
                self.stayed = starts(cluster.status()) == before
        assert told == complete(cluster.url, **body)["choices"][0]["token_ids"]
        cluster.until(lambda status: starts(status) == before, "all are back", SOON_S)
        cluster.until_idle(SOON_S)
        return recoveries

    def _busy(self, when: str) -> list[str]:
        def serving(status: dict[str, Any]) -> list[str]:
            decode = "promised_blocks" if when == HANDING_OFF else "running"
            p = [
                w["name"] for w in status["workers"] if w["role"] == "prefill" and w["owned_blocks"]
            ]
            d = [w["name"] for w in status["workers"] if w["role"] == "decode" and w[decode]]
            return [*p, *d] if d and (p or when != HANDING_OFF) else []

        return serving(self.cluster.until(serving, when))


def starts(status: dict[str, Any]) -> dict[str, str]:
    """Which start of each worker is a member."""
    return {worker["name"]: worker["incarnation"] for worker in status["workers"]}


def _read(url: str, body: dict[str, Any]) -> tuple[list[int], list[dict[str, Any]]]:
    """A streamed answer's token ids, and the recoveries on its timeline."""
    with stream(url, COMPLETIONS, body) as events:
        *chunks, end = events
    assert end == DONE, end
    ids = [token for c in chunks for choice in c["choices"] for token in choice["token_ids"]]
    return ids, chunks[-1]["metrics"]["recoveries"]


@pytest.fixture
def only_in_full(chaos_full: bool) -> None:
    if not chaos_full:
        pytest.skip("one of each in the short form")


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    if reason := why_not():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("town")
    keys.make(directory / "keys")
    secret = ("--keys", str(directory / "keys"))
    with Network(HOSTS) as network, network.inside("gateway"), Cluster(directory) as cluster:
        here = network.address["gateway"]
        cluster.gateway(*secret, "--join-host", here, "--join-port", str(JOIN_PORT))
        cluster.join = f"{here}:{JOIN_PORT}"
        for name in HOSTS[1:]:
            with network.inside(name):
                role = "prefill" if name.startswith("p") else "decode"
                at = ("--host", network.address[name])
                cluster.worker(role, *SLOW, *secret, *at, name=name)
        cluster.until(lambda status: len(status["workers"]) == 4, "all joined", 120)
        yield Town(network, cluster)


def causes(recoveries: list[dict[str, Any]]) -> set[str]:
    return {recovery["cause"] for recovery in recoveries}


def test_a_pair_that_is_cut_is_shunned_and_neither_of_its_workers(town: Town) -> None:
    """The handoff goes to another pair, and both of its workers are members all the while."""
    recoveries = town.disturbed(HANDING_OFF, lambda pair: town.network.parted(*pair))
    assert [loss["cause"] for loss in recoveries] == ["transfer"]
    assert town.stayed


def test_a_decode_worker_that_the_gateway_cannot_hear(town: Town) -> None:
    """It is lost within its beats, and a member again when the cut is over: the same start."""
    recoveries = town.disturbed(DECODING, lambda used: town.network.parted("gateway", used[-1]))
    assert recoveries[0]["phase"] == "decoding"
    assert causes(recoveries) <= {"silent", "died"}
    assert not town.stayed


def test_a_bad_line(town: Town) -> None:
    """2 % lost, 2 % twice, 20 ms, out of order: right all the same."""
    weather = Weather(seed=29)
    town.disturbed(HANDING_OFF, lambda pair: town.network.bad(pair[-1], weather))
    assert min(weather.lost, weather.repeated, weather.overtaken) > 0


FULL = pytest.mark.usefixtures("only_in_full")
WAYS = pytest.mark.parametrize("way", [1, -1], ids=["there", "back"])


@FULL
@WAYS
def test_a_pair_that_is_cut_one_way(town: Town, way: int) -> None:
    recoveries = town.disturbed(HANDING_OFF, lambda pair: town.network.cut(*pair[::way]))
    assert causes(recoveries) == {"transfer"}


@FULL
@WAYS
def test_a_decode_worker_that_is_cut_one_way(town: Town, way: int) -> None:
    recoveries = town.disturbed(
        DECODING, lambda used: town.network.cut(*("gateway", used[-1])[::way])
    )
    assert recoveries[0]["phase"] == "decoding"
    assert causes(recoveries) <= {"silent", "died"}


@FULL
def test_a_prefill_worker_that_the_gateway_cannot_hear(town: Town) -> None:
    recoveries = town.disturbed(HANDING_OFF, lambda pair: town.network.parted("gateway", pair[0]))
    assert recoveries[0]["phase"] in ("prefilling", "handing_off")


@FULL
def test_a_thin_line_only_slows_down(town: Town) -> None:
    assert town.disturbed(HANDING_OFF, lambda pair: town.network.thin(pair[-1], "8mbit")) == []


@FULL
@pytest.mark.parametrize("seed", range(5))
def test_a_bad_line_only_slows_down(town: Town, seed: int) -> None:
    weather = Weather(seed)
    assert town.disturbed(HANDING_OFF, lambda pair: town.network.bad(pair[-1], weather)) == []
    assert town.stayed


@FULL
def test_bad_lines_to_everybody(town: Town) -> None:
    def everywhere(_: list[str]) -> ExitStack:
        lines = ExitStack()
        for seed, host in enumerate(HOSTS[1:]):
            lines.enter_context(town.network.bad(host, Weather(seed)))
        return lines

    assert town.disturbed(HANDING_OFF, everywhere) == []
    assert town.stayed
