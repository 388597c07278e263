"""A locked door before a real cluster: keys, odd HTTP, crowds, and what processes leave behind."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.wire import codec
from cluster.wire import inference_pb2 as wire
from tests.e2e.client import Answer, at_once, request
from tests.e2e.cluster import Cluster, wait_until
from tests.gateway.transport import ALIAS, KEY, KEY_FILE, NARROW_KEY, SLOW_KEY, check, exchanges

COMPLETIONS = "/v1/completions"
HOST = "127.0.0.1"
GOOD = {"model": "baton-tiny", "prompt": "Hello", "max_tokens": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_text(KEY_FILE)
    return file


@pytest.fixture(scope="module")
def locked(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    talkative = ("--log-level", "info")
    with Cluster(tmp_path_factory.mktemp("locked")) as cluster:
        cluster.headers = {"Authorization": f"Bearer {KEY}"}
        names = ("--served-model-name", "baton-tiny", ALIAS)
        cluster.gateway("--api-key-file", str(file), *names, *talkative)
        for role in ("prefill", "decode"):
            cluster.worker(role, *talkative)
        cluster.until_joined()
        yield cluster
        cluster.until_idle(2)


def ask(
    cluster: Cluster, key: str = KEY, headers: dict[str, str] | None = None, **body: Any
) -> Answer:
    headers = {"Authorization": f"Bearer {key}", **(headers or {})}
    return request(cluster.url, "POST", COMPLETIONS, {**GOOD, **body}, headers)


def test_every_row_about_keys_heads_and_connections(locked: Cluster) -> None:
    for exchange in exchanges("baton-tiny"):
        asyncio.run(check(HOST, locked.http_port, exchange))
        assert ask(locked).status == 200, str(exchange)


def test_a_key_is_in_force_soon_and_out_of_it_too(locked: Cluster, file: Path) -> None:
    before = file.read_text()
    file.write_text("a-new-key\n" + KEY + "\n")
    wait_until(lambda: ask(locked, "a-new-key").status == 200, "the new key is taken")
    assert ask(locked, NARROW_KEY).status == 401
    file.write_text(before)
    wait_until(lambda: ask(locked, NARROW_KEY, model=ALIAS).status == 200, "the old one again")
    assert ask(locked, "a-new-key").status == 401


def test_tenants_share_no_cached_prefix(locked: Cluster) -> None:
    def cached(key: str) -> int:
        answer = ask(locked, key, model=ALIAS, prompt=[7] * 200, max_tokens=1)
        assert answer.status == 200, answer.body
        return int((answer.body["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0))

    assert cached(KEY) == 0
    assert cached(KEY) > 100
    assert cached(NARROW_KEY) == 0


def test_a_rate_is_a_keys_whoever_it_says_it_is(locked: Cluster) -> None:
    """Neither new connections nor the addresses that a client makes up are new clients."""
    answers = [
        ask(
            locked,
            SLOW_KEY,
            {"X-Forwarded-For": f"10.0.0.{number}", "X-Real-IP": f"10.1.0.{number}"},
        )
        for number in range(20)
    ]
    refused = [answer for answer in answers if answer.status != 200]
    assert len(refused) >= 16
    for answer in refused:
        assert answer.status == 429
        assert answer.body["error"]["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    with grpc.insecure_channel(locked.grpc) as channel:
        call = channel.unary_unary("/baton.v1.Inference/Generate")
        asked = wire.GenerateRequest(model="baton-tiny", prompt="Hello", max_tokens=2)
        with pytest.raises(grpc.RpcError) as caught:
            metadata = (("authorization", f"Bearer {SLOW_KEY}"),)
            call(asked.SerializeToString(), metadata=metadata, timeout=30)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 1 <= int(dict(caught.value.trailing_metadata())["retry-after"]) <= 60
    assert ask(locked).status == 200


def test_one_label_on_many_requests(locked: Cluster) -> None:
    """Ids that count inside are our own: a client's are told back and mean nothing."""
    label = {"X-Request-Id": "the-same"}

    def one(number: int) -> tuple[int, str, str, list[int]]:
        answer = ask(
            locked, headers=label, prompt=[number + 3] * 5, max_tokens=3, return_token_ids=True
        )
        [choice] = answer.body["choices"]
        return answer.status, answer.headers["x-request-id"], answer.body["id"], choice["token_ids"]

    answers = at_once([partial(one, number) for number in range(100)], 50)
    assert {(status, label) for status, label, _, _ in answers} == {(200, "the-same")}
    assert len({own for _, _, own, _ in answers}) == 100
    again = at_once([partial(one, number) for number in range(100)], 1)
    assert [tokens for *_, tokens in again] == [tokens for *_, tokens in answers]


def test_special_tokens_in_a_prompt_are_text(locked: Cluster) -> None:
    path = "/tokenize"
    headers = locked.headers
    for text in ("<|end|>", "</s>", "<s>", "<|im_start|>", "<|user|>"):
        body = {"prompt": text, "add_special_tokens": False}
        tokens = request(locked.url, "POST", path, body, headers).body["tokens"]
        assert len(tokens) > 1, text
        assert ask(locked, prompt=text).status == 200


def test_two_thousand_idle_connections(locked: Cluster) -> None:
    limits = Path(f"/proc/{locked['gateway'].pid}/limits").read_text()
    files = int(re.search(r"Max open files\s+(\d+)", limits)[1])  # type: ignore[index]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle = []
    try:
        while len(idle) < min(2000, files // 2):
            idle.append(socket.create_connection((HOST, locked.http_port), timeout=30))
        for _ in range(20):
            assert ask(locked).status == 200
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# What is left behind.

MARKER = "zebra-in-the-attic"
FORGED = 'x\n{"level": "critical", "event": "forged"}'


def test_garbage_over_grpc_is_a_line_in_a_log_at_most(locked: Cluster) -> None:
    """G1, at every door: none of these asks for a key here."""
    processes = list(locked.processes.values())
    before = {process: len(process.stderr) for process in processes}
    workers = [worker["control_address"] for worker in locked.status()["workers"]]
    mirror = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    public = (codec.JOIN, mirror, "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")
    for address, paths in (
        (locked.grpc, public),
        *((worker, [codec.SESSION]) for worker in workers),
    ):
        with grpc.insecure_channel(address) as channel:
            for path in paths:
                for junk in (b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0b" * 1000):
                    with pytest.raises(grpc.RpcError) as caught:
                        list(channel.stream_stream(path)(iter([junk]), timeout=30))
                    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (address, path)
    assert ask(locked).status == 200
    for process, length in before.items():
        new = process.stderr[length:]
        assert "traceback" not in new.lower(), process.name
        refused = new.count('"call refused"')
        assert refused == (6 if process is processes[0] else 3), process.name


def test_logs_name_the_request_and_never_the_prompt(locked: Cluster) -> None:
    """With a request of every kind and ending."""
    before = {process: len(process.stderr) for process in locked.processes.values()}
    marked = {"X-Request-Id": "find-me"}
    assert ask(locked, prompt=MARKER, headers=marked).status == 200
    assert ask(locked, prompt=MARKER, stream=True).status == 200
    assert ask(locked, prompt=[MARKER, 5]).status == 400
    assert ask(locked, prompt=MARKER * 10_000).status == 400
    assert ask(locked, prompt=MARKER, model=FORGED).status == 404
    assert ask(locked, prompt=MARKER, **{FORGED: 1}).status == 400
    assert ask(locked, key=MARKER).status == 401
    messages = [{"role": "user", "content": MARKER}]
    chat = {"model": "baton-tiny", "messages": messages, "max_tokens": 2, "user": MARKER}
    path = "/v1/chat/completions"
    assert request(locked.url, "POST", path, chat, locked.headers).status == 200
    with grpc.insecure_channel(locked.grpc) as channel:
        call = channel.unary_unary("/baton.v1.Inference/Generate")
        asked = wire.GenerateRequest(model="baton-tiny", prompt=MARKER, max_tokens=2)
        metadata = (("authorization", f"Bearer {KEY}"), ("x-request-id", "find-me-too"))
        call(asked.SerializeToString(), metadata=metadata, timeout=30)

    def lines() -> list[dict[str, Any]]:
        return [
            json.loads(line)  # none is anything but JSON
            for process, length in before.items()
            for line in process.stderr[length:].splitlines()
        ]

    def told(label: str) -> list[dict[str, Any]]:
        return [line for line in lines() if line.get("request_id") == label]

    wait_until(lambda: told("find-me-too"), "the last call is in the log")
    [http] = told("find-me")
    assert (http["event"], http["handler"], http["status"]) == ("http request", COMPLETIONS, 200)
    for line in lines():
        assert MARKER not in json.dumps(line)
        assert line["event"] != "forged"
        if line["event"] in ("http request", "grpc request", "request failed"):
            assert re.fullmatch(r"[\x21-\x7e]{1,128}", line["request_id"]), line


WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|\b(creat|mkdir|rename|unlink|link|symlink|truncate)")
HARMLESS = ("/dev/null", "/dev/shm/", "/memfd:", "/proc/", "/sys/")


def test_serving_writes_no_file(locked: Cluster, file: Path, tmp_path: Path) -> None:
    """Whatever is asked: what names a file names none here."""

    def serve() -> None:
        for model in ("../../etc/passwd", "/etc/passwd", FORGED):
            assert ask(locked, model=model).status == 404
        assert ask(locked, cache_salt="../../x").status == 200
        assert ask(locked, stream=True).status == 200
        path = "/v1/models/../../etc/passwd"
        assert request(locked.url, "GET", path, headers=locked.headers).status == 404

    serve()
    for process in locked.processes.values():
        assert not written_files(process.pid), process.name
    if shutil.which("strace") is None:
        return
    traces = {}
    for process in locked.processes.values():
        trace = tmp_path / f"{process.name}.trace"
        words = ["strace", "-f", "-qq", "-e", "trace=file,ftruncate", "-o", str(trace)]
        traces[trace] = subprocess.Popen([*words, "-p", str(process.pid)])
    try:
        wait_until(lambda: all(map(traced, (p.pid for p in locked.processes.values()))), "traced")
        serve()
        looked = tmp_path / "gateway.trace"  # at the key file, now and then
        wait_until(lambda: str(file) in looked.read_text(), "something is seen at all")
    finally:
        for tracer in traces.values():
            tracer.send_signal(signal.SIGINT)
            tracer.wait(30)
    seen = [line for trace in traces for line in trace.read_text().splitlines()]
    wrote = [line for line in seen if WRITES.search(line)]
    assert not [line for line in wrote if not any(path in line for path in HARMLESS)]


def traced(pid: int) -> bool:
    return "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text()


def written_files(pid: int) -> list[str]:
    """Regular files that a process has open for writing, besides its stdout and stderr."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
            flags = int(Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split()[3], 8)
        except FileNotFoundError:
            continue
        regular = target.startswith("/") and not target.startswith(HARMLESS)
        if int(entry.name) > 2 and regular and flags & 3:
            found.append(target)
    return found
