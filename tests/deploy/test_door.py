from __future__ import annotations

import socket

import pytest

from cluster.config import GatewayConfig, ServeConfig, WorkerConfig, load
from cluster.errors import StartError
from deploy.door import Door
from deploy.launcher import children


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_every_gateway_has_a_share_of_the_port_and_one_of_its_own() -> None:
    port = free_port()
    door = Door("127.0.0.1", port, 3)
    numbers = [number for which in range(3) for number in door.sockets(which)]
    assert len(set(numbers)) == 6 and len(set(door.addresses)) == 3
    for address in (f"127.0.0.1:{port}", *door.addresses):
        host, _, at = address.partition(":")
        socket.create_connection((host, int(at))).close()
    door.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_that_is_taken_is_refused(reuse: bool) -> None:
    with (
        socket.create_server(("127.0.0.1", 0), reuse_port=reuse) as other,
        pytest.raises(StartError, match=r"\(Address already in use\): choose another --port"),
    ):
        Door("127.0.0.1", other.getsockname()[1], 2)


def test_several_gateways_know_each_other_and_every_worker_joins_them_all() -> None:
    door = Door("127.0.0.1", free_port(), 2)
    config = load(ServeConfig, ["--gateways", "2", "--grpc-port", "9000"], "baton serve")
    plan = children(config, door)
    assert [child.name for child in plan] == ["gateway-0", "gateway-1", "prefill-0", "decode-0"]
    for number in (0, 1):
        assert plan[number].sockets == door.sockets(number)
        told = load(GatewayConfig, plan[number].arguments[1:], "baton gateway")
        assert told.grpc_port == 9000 + number
        assert (told.listen, told.sibling) == (door.sockets(number), door.addresses)
    for child in plan[2:]:
        worker = load(WorkerConfig, child.arguments[1:], "baton worker")
        assert worker.join == ("127.0.0.1:9000", "127.0.0.1:9001")
        assert child.sockets == ()
    door.close()
