from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.client import Client, open_session
from bench.serve import find_model
from bench.trace import CHAT, Ask
from bench.vllm_proxy import Proxy
from bench.vllm_stand import servers, vllm_modes
from cluster.config import WorkerConfig
from tests.bench.conftest import whole


def test_it_has_the_same_cores_and_a_thread_for_each() -> None:
    undivided, apart = vllm_modes((2, 5))
    base = WorkerConfig(model="m", max_num_seqs=200)
    [one] = servers(undivided, 64, base, "v/python")
    assert {"2,5", "OMP_NUM_THREADS=2", "v/python", "m"} < set(one.command)
    assert "--kv-transfer-config" not in one.command
    two = servers(apart, 64, base, "v/python")
    assert [server.command[2] for server in two] == ["2", "5"]
    assert all({"OMP_NUM_THREADS=1", "--kv-transfer-config"} < set(s.command) for s in two)


@pytest.mark.parametrize(("chunk", "sequences"), [(64, "64"), (512, "200")])
def test_no_more_sequences_than_a_step_has_tokens(chunk: int, sequences: str) -> None:
    base = WorkerConfig(model="m", max_num_seqs=200)
    [server] = servers(vllm_modes((0, 1))[0], chunk, base, "v/python")
    words = server.command
    assert words[words.index("--max-num-batched-tokens") + 1] == str(chunk)
    assert words[words.index("--max-num-seqs") + 1] == sequences


def test_what_is_json_stays_json_when_ports_are_filled_in() -> None:
    roles = []
    for server in servers(vllm_modes((0, 1))[1], 64, WorkerConfig(model="m"), "v/python"):
        filled = [word.format(port=1, inner=2) for word in server.command]
        told = json.loads(filled[filled.index("--kv-transfer-config") + 1])
        roles.append((told["kv_connector"], told["kv_role"]))
    assert roles == [("NixlConnector", "kv_producer"), ("NixlConnector", "kv_consumer")]


async def test_the_proxy_asks_one_for_the_place_and_the_other_for_the_answer(
    serve_script: Any,
) -> None:
    place = {"remote_host": "there"}
    prefill = await serve_script(lambda _: web.json_response({"kv_transfer_params": place}))
    decode = await serve_script(whole("a", "b"))
    ask = Ask(0.0, CHAT, (5, 6), 2)
    async with TestServer(Proxy(prefill.url, decode.url).app()) as proxy, open_session() as own:
        client = Client(own, str(proxy.make_url("/v1/completions")), timeout=9.0, keep_text=True)
        record = await client.send(ask.body("m"), 2)
        assert await find_model(own, str(proxy.make_url("")).rstrip("/"), None)
    assert record.ok and record.text == "ab" and len(record.itls) == 1
    [first], [second] = prefill.bodies, decode.bodies
    assert first["prompt"] == [5, 6] and first["max_tokens"] == 1 and not first["stream"]
    assert first["kv_transfer_params"]["do_remote_decode"] and "stream_options" not in first
    assert second == {**json.loads(ask.body("m")), "kv_transfer_params": place}


async def test_the_proxy_passes_on_why_there_is_no_first_token(serve_script: Any) -> None:
    refusal = web.Response(status=503, text="full")
    prefill, decode = [await serve_script(lambda _: refusal) for _ in range(2)]
    async with TestServer(Proxy(prefill.url, decode.url).app()) as proxy, open_session() as own:
        url = proxy.make_url("/v1/completions")
        async with own.post(url, json={"prompt": [1]}) as reply:
            assert (reply.status, await reply.text()) == (503, "full")
    assert decode.bodies == []
