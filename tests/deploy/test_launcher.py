from __future__ import annotations

import pytest

from cluster.config import GatewayConfig, ServeConfig, WorkerConfig, load
from cluster.errors import StartError
from deploy.launcher import children, main


def started(*argv: str) -> dict[str, list[str]]:
    return {c.name: c.arguments for c in children(load(ServeConfig, argv, "baton serve"))}


def test_one_gateway_and_the_workers_asked_for() -> None:
    names = list(started("--prefill", "2", "--decode", "1", "--both", "1"))
    assert names == ["gateway", "prefill-0", "prefill-1", "decode-0", "both-0"]


def test_every_child_gets_what_concerns_it() -> None:
    plan = started("m", "--port", "9", "--grpc-port", "10", "--api-key", "k", "--block-size", "32")
    gateway = load(GatewayConfig, plan["gateway"][1:], "baton gateway")
    assert (gateway.model, gateway.port, gateway.grpc_port, gateway.api_key) == ("m", 9, 10, ("k",))
    worker = load(WorkerConfig, plan["prefill-0"][1:], "baton worker")
    assert (worker.model, worker.role, worker.block_size) == ("m", "prefill", 32)
    assert worker.join == ("127.0.0.1:10",)
    assert worker.port == 0  # the gateway's port is not the workers'


def test_pools_may_differ_in_block_size() -> None:
    plan = started("--decode-block-size", "64")
    sizes = {
        name: load(WorkerConfig, plan[name][1:], "baton worker").block_size
        for name in ("prefill-0", "decode-0")
    }
    assert sizes == {"prefill-0": 16, "decode-0": 64}


@pytest.mark.parametrize("argv", [["--decode", "0"], ["--prefill", "0"]])
def test_a_cluster_that_could_not_answer_is_refused(argv: list[str]) -> None:
    with pytest.raises(StartError, match="nothing could answer"):
        main(argv)
