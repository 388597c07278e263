"""Who gets in: with keys those who have them, without keys nobody from elsewhere (FAULTS 1, 2)."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from cluster import rpc
from cluster.credentials import GATEWAY, WORKER, credentials_for
from cluster.messages import Cancel
from cluster.process import EXIT_START
from cluster.wire import codec
from deploy.keys import make
from engine.tiny import TINY_DIR, questions
from tests.e2e import client
from tests.e2e.cluster import Cluster, Process, free_ports, wait_until
from tests.e2e.sockets import ESTABLISHED, LISTENS, sockets

QUESTION, ANSWER = questions()[0].turns[0]


class House(Cluster):
    """With keys; `other` is a gateway of other keys, whose door the workers try too."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        door, other_door, http, grpc = map(str, free_ports(4))
        self.join = f"127.0.0.1:{door}"
        self.other_join = f"127.0.0.1:{other_door}"
        self.other_url = f"http://127.0.0.1:{http}"
        self.ours, theirs = directory / "ours", directory / "theirs"
        make(self.ours)
        make(theirs)
        self.theirs = ("--keys", str(theirs))
        self.gateway("--keys", str(self.ours), "--join-port", door)
        ports = ("--port", http, "--grpc-port", grpc, "--join-port", other_door)
        self._start("other", ["gateway", *self.theirs, *ports])


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A cluster with keys, and at its door: a gateway and a worker of other keys, a worker of none.

    KV goes over ZeroMQ: through shared memory it would never leave the kernel's care.
    """
    with House(tmp_path_factory.mktemp("house")) as house:
        ours = ("--keys", str(house.ours), "--join", house.other_join, "--kv-transport", "zeromq")
        house.worker("prefill", *ours)
        house.worker("decode", *ours)
        house.until_joined()
        house.worker("decode", *house.theirs, name="stranger")
        house.worker("prefill", "--join", house.grpc, name="keyless")
        yield house


def test_a_house_with_keys_answers(house: House) -> None:
    body = {
        "model": house.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
    }
    answer = client.post(house.url, "/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    assert answer.body["choices"][0]["message"]["content"] == ANSWER
    listens = {one.port for one in sockets(house["decode-0"].pid) if one.state == LISTENS}
    links = [one for one in sockets(house["prefill-0"].pid) if one.state == ESTABLISHED]
    assert any(link.remote_port in listens for link in links), "KV took another way"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("stranger", "it shows no certificate of our keys"),
        ("keyless", "it closes the connection at once: compare --keys"),
    ],
)
def test_who_has_no_key_of_ours_stays_outside_and_says_why(
    house: House, name: str, told: str
) -> None:
    process = house[name]
    wait_until(lambda: told in process.stderr, f"{name} says why")
    assert process.running, "a gateway may be given the right keys while workers wait"
    assert {worker["name"] for worker in house.status()["workers"]} == {"prefill-0", "decode-0"}


def test_the_port_for_clients_takes_no_workers(house: House) -> None:
    told = f'"{house.grpc}", "reason": "this takes a certificate of worker.baton.internal'
    wait_until(lambda: told in house["keyless"].stderr, "it says why")


def test_a_gateway_of_other_keys_gets_no_workers(house: House) -> None:
    for worker in (house["prefill-0"], house["decode-0"]):
        told = f'"{house.other_join}", "reason": "it shows no certificate of our keys'
        wait_until(lambda: told in worker.stderr, f"{worker.name} says why")  # noqa: B023
    assert client.get(house.other_url, "/status").body["workers"] == []


async def test_workers_take_orders_from_gateways_of_the_house_alone(house: House) -> None:
    """G13, at the workers' own ports."""
    intruders = [
        None,
        credentials_for(GATEWAY, house.theirs[1]),
        replace(credentials_for(WORKER, str(house.ours)), role=GATEWAY),
    ]
    addresses = [worker["control_address"] for worker in house.status()["workers"]]
    for address in addresses:
        for intruder in intruders:
            async with rpc.open_channel(address, intruder) as channel:
                call = channel.stream_stream(codec.SESSION)(_cancel(), timeout=client.TIMEOUT_S)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in call:
                        pass
            refusal = "UNAVAILABLE" if intruder is not intruders[2] else "UNAUTHENTICATED"
            assert caught.value.code().name == refusal


async def _cancel() -> AsyncIterator[bytes]:
    yield codec.encode_order(Cancel("any"))


def test_every_socket_of_every_process_is_on_loopback(house: House) -> None:
    for process in house.processes.values():
        found = sockets(process.pid)
        assert found, process.name
        assert not [one for one in found if not one.local.is_loopback], process.name


@pytest.mark.parametrize(
    "words",
    [
        ("worker", "--role", "decode", "--host", "0.0.0.0"),
        ("worker", "--role", "prefill", "--host", "192.0.2.7"),
        ("gateway", "--grpc-host", "0.0.0.0", "--api-key", "k"),
        ("gateway", "--join-host", "::"),
        ("serve", "--grpc-host", "0.0.0.0", "--api-key", "k"),
        ("gateway", "--keys", "nowhere"),
    ],
)
def test_without_keys_nothing_inner_leaves_the_machine(words: list[str], tmp_path: Path) -> None:
    process = Process("process", list(words), tmp_path)
    try:
        assert process.wait() == EXIT_START
    finally:
        process.kill()
    [line] = process.stderr.splitlines()
    assert "baton keys cluster" in line


def test_damaged_weights_are_refused_before_anything_is_joined(tmp_path: Path) -> None:
    """safetensors alone would load them, and the answers would be wrong."""
    directory = shutil.copytree(TINY_DIR, tmp_path / "damaged")
    weights = bytearray((directory / "model.safetensors").read_bytes())
    weights[-1000] ^= 16
    (directory / "model.safetensors").write_bytes(weights)
    process = Process("worker", ["worker", "--model", str(directory)], tmp_path)
    try:
        assert process.wait() == EXIT_START
    finally:
        process.kill()
    line = process.stderr.splitlines()[-1]
    assert "model.safetensors: is sha256" in line and "digests.json says sha256" in line
    assert "joined" not in process.stderr
