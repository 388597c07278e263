from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sys
from contextlib import closing
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cluster.config import GatewayConfig, ServeConfig, WorkerConfig, load
from cluster.errors import StartError
from cluster.process import EXIT_SICK, EXIT_START, Stopping
from deploy.door import Door
from deploy.launcher import Child, Launcher, children, end_all, main
from tests import virtual


def started(*argv: str) -> dict[str, list[str]]:
    return {c.name: c.arguments for c in children(load(ServeConfig, argv, "baton serve"))}


def test_one_gateway_and_the_workers_asked_for() -> None:
    names = list(started("--prefill", "2", "--decode", "1", "--both", "1"))
    assert names == ["gateway", "prefill-0", "prefill-1", "decode-0", "both-0"]


def test_every_child_gets_what_concerns_it() -> None:
    plan = started("m", "--port", "9", "--grpc-port", "10", "--block-size", "32")
    gateway = load(GatewayConfig, plan["gateway"][1:], "baton gateway")
    assert (gateway.model, gateway.port, gateway.grpc_port) == ("m", 9, 10)
    worker = load(WorkerConfig, plan["prefill-0"][1:], "baton worker")
    assert (worker.model, worker.role, worker.block_size) == ("m", "prefill", 32)
    assert worker.join == ("127.0.0.1:10",)
    assert worker.port == 0  # the gateway's port is not the workers'


def test_with_keys_workers_join_where_gateways_ask_for_them() -> None:
    argv = ["--keys", "k", "--gateways", "2", "--grpc-port", "10", "--join-port", "20"]
    with closing(Door("127.0.0.1", 0, 2)) as door:
        planned = children(load(ServeConfig, argv, "baton serve"), door)
    plan = {child.name: child.arguments for child in planned}
    gateways = [
        load(GatewayConfig, plan[f"gateway-{number}"][1:], "baton gateway") for number in range(2)
    ]
    assert [(gateway.keys, gateway.grpc_port, gateway.join_port) for gateway in gateways] == [
        ("k", 10, 20),
        ("k", 11, 21),
    ]
    worker = load(WorkerConfig, plan["decode-0"][1:], "baton worker")
    assert (worker.keys, worker.join) == ("k", ("127.0.0.1:20", "127.0.0.1:21"))


def test_pools_may_differ_in_block_size() -> None:
    plan = started("--block-size", "16", "--decode-block-size", "64")
    sizes = {
        name: load(WorkerConfig, plan[name][1:], "baton worker").block_size
        for name in ("prefill-0", "decode-0")
    }
    assert sizes == {"prefill-0": 16, "decode-0": 64}


@pytest.mark.parametrize("argv", [["--decode", "0"], ["--prefill", "0", "--decode", "0"]])
def test_a_cluster_that_could_not_answer_is_refused(argv: list[str]) -> None:
    with pytest.raises(StartError, match="nothing could answer"):
        main(argv)


def test_keys_are_given_to_the_gateway_alone_and_on_no_command_line() -> None:
    plan = children(load(ServeConfig, ["--api-key", "hush"], "baton serve"))
    assert [child.api_key for child in plan] == [("hush",), (), ()]
    assert not [word for child in plan for word in child.arguments if "hush" in word]


def test_with_a_key_file_it_asks_with_a_key_of_its_own() -> None:
    """The file may hold nothing but digests."""
    config = load(ServeConfig, ["--api-key-file", "keys"], "baton serve")
    keys = [Launcher(config)._config.api_key for _ in range(2)]
    assert [len(key) for key in keys] == [1, 1]
    assert keys[0] != keys[1]
    assert "--api-key-file=keys" in children(config)[0].arguments
    assert Launcher(ServeConfig())._config.api_key == ()


async def test_a_child_finds_its_keys_in_its_environment() -> None:
    launcher = Launcher(ServeConfig())
    await launcher._start(Child("gateway", ["gateway", "--model=nowhere"], ("hush", "hush2")))
    [child] = launcher._running.values()
    about = Path(f"/proc/{child.pid}")
    assert b"BATON_API_KEYS=hush\nhush2" in (about / "environ").read_bytes().split(b"\0")
    assert b"hush" not in (about / "cmdline").read_bytes()
    await end_all([child])


async def test_a_bad_start_is_told_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The gateway and both workers hit upon it, and the launcher adds nothing."""
    missing = str(tmp_path / "missing")
    assert await Launcher(ServeConfig(model=missing)).serve(Stopping()) == EXIT_START
    [line] = capfd.readouterr().err.splitlines()
    assert line == f"baton: model {missing}: no such directory"


class Dying(Launcher):
    """Whose worker lives for these times, one after the other."""

    def __init__(self, *lifetimes: float) -> None:
        super().__init__(ServeConfig())
        self._lifetimes = iter(lifetimes)
        self.started: list[float] = []
        self.hindered = 0  # how many starts fail

    async def _start(self, child: Child, word: int = 0) -> None:
        self.started.append(virtual.clock())
        if self.hindered:
            self.hindered -= 1
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    async def _end_of(self, child: Child) -> tuple[Child, int]:
        await asyncio.sleep(next(self._lifetimes))
        return child, EXIT_SICK

    async def keep(self) -> None:
        child = Child("worker", [])
        with pytest.raises(RuntimeError, match="StopIteration"):
            await self._keep(child, asyncio.create_task(self._end_of(child)))


def test_a_worker_that_keeps_dying_waits_longer_each_time_up_to_half_a_minute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And not at all longer once one start has held."""
    launcher = Dying(100, *[0.0] * 7, 100, 0.0)
    virtual.run(launcher.keep())
    pauses = [100.0 + pause for pause in (1, 3, 7, 15, 31, 61, 91, 121)]
    assert launcher.started == [*pauses, 322.0, 324.0]
    assert "baton: worker ended with status 70" in capsys.readouterr().err


def test_what_cannot_be_started_now_is_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    """For want of memory, above all, of which the worker may have died."""
    launcher = Dying(100, 100)
    launcher.hindered = 2
    virtual.run(launcher.keep())
    assert launcher.started == [101.0, 103.0, 107.0, 208.0]
    said = "baton: worker cannot be started: Cannot allocate memory\n"
    assert capsys.readouterr().err.count(said) == 2


@pytest.mark.parametrize(
    ("typed", "found", "shown"),
    [
        (".venv/bin/baton", None, ".venv/bin/baton"),
        ("/here/.venv/bin/baton", "/usr/bin/baton", "/here/.venv/bin/baton"),
        ("/usr/bin/baton", "/usr/bin/baton", "baton"),
        ("/here/cluster/cli.py", None, "baton"),
    ],
)
def test_it_shows_the_command_that_works_in_the_readers_shell(
    typed: str,
    found: str | None,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [typed, "serve"])
    monkeypatch.setattr(shutil, "which", lambda name: found)
    Launcher(ServeConfig())._announce("m", "")
    ready, ask = capsys.readouterr().out.splitlines()
    assert ready == "Baton is ready: http://127.0.0.1:8000  pools: 1 prefill + 1 decode  model: m"
    assert ask == f"Ask it: {shown} chat --url http://127.0.0.1:8000 'What is a landing?'"


async def test_a_gateway_that_refuses_is_not_called_ready(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def status(request: web.Request) -> web.Response:
        return web.json_response({"model": "m", "workers": [{}, {}]})

    async def ready(request: web.Request) -> web.Response:
        return web.json_response(
            {"error": {"message": "The server is short of memory."}}, status=503
        )

    app = web.Application()
    app.add_routes([web.get("/status", status), web.get("/ready", ready)])
    launcher = Launcher(ServeConfig())
    async with TestServer(app) as server:
        launcher._announce(*await launcher._until_ready([str(server.make_url("")).rstrip("/")], 2))
    told, _ = capsys.readouterr().out.splitlines()
    assert told.startswith("Baton is up, but refuses requests: The server is short of memory. http")
