from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bench import serve
from bench.serve import Report, ServeOptions, main, paced, run
from cluster.errors import StartError
from tests.bench.conftest import CUT, DONE, ScriptedServer, chunk, event, usage, whole


def options(url: str, **fields: Any) -> ServeOptions:
    small = {"num_prompts": 4, "random_input_len": 5, "random_output_len": 3, "disable_tqdm": True}
    return ServeOptions(base_url=url, **(small | fields))


async def bench(server: ScriptedServer, **fields: Any) -> Report:
    return await run(options(server.url, **fields))


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class TestPaced:
    async def test_sleeps_until_each_arrival(self) -> None:
        time, sent = FakeTime(), list[tuple[int, float]]()
        await paced([0.5, 0.5, 2.0], lambda i: sent.append((i, time.now)), time.clock, time.sleep)
        assert sent == [(0, 100.5), (1, 100.5), (2, 102.0)]
        assert time.slept == [0.5, 1.5]

    async def test_catches_up_without_shifting_the_rest(self) -> None:
        time, sent = FakeTime(), list[tuple[int, float]]()

        def slow(index: int) -> None:
            sent.append((index, time.now))
            time.now += 1.2 if index == 0 else 0.0

        await paced([0.0, 1.0, 2.0], slow, time.clock, time.sleep)
        assert sent == [(0, 100.0), (1, 101.2), (2, 102.0)]


async def test_a_whole_run(serve_script: Any) -> None:
    server = await serve_script(lambda body: whole("a", "b", "c", prompt=len(body["prompt"])))
    report = await bench(server)
    numbers = report.summary
    assert (numbers.completed, numbers.failed) == (4, 0)
    assert (numbers.total_input, numbers.total_output) == (20, 12)
    assert report.model == "scripted/model"
    assert [body["model"] for body in server.bodies] == ["scripted/model"] * 4
    assert {body["max_tokens"] for body in server.bodies} == {3}
    assert sum(len(record.itls) for record in report.records) == 8
    assert report.duration > 0


async def test_the_same_seed_sends_the_same_load(serve_script: Any) -> None:
    server = await serve_script(whole("a"))
    for seed in (1, 1, 2):
        await bench(server, seed=seed, max_concurrency=1)
    first, again, other = (server.bodies[at : at + 4] for at in (0, 4, 8))
    assert first == again != other


async def test_records_keep_the_order_of_the_load(serve_script: Any) -> None:
    server = await serve_script(lambda body: whole("x", prompt=sum(body["prompt"])))
    one_by_one = await bench(server, max_concurrency=1)
    sums = [sum(body["prompt"]) for body in server.bodies]
    assert [record.prompt_tokens for record in one_by_one.records] == sums
    at_once = await bench(server)
    assert [record.prompt_tokens for record in at_once.records] == sums


async def test_failures_are_counted_and_the_run_goes_on(serve_script: Any) -> None:
    broken = event({"error": {"message": "worker lost"}})
    scripts: Iterator[Any] = iter(
        [
            whole("a"),
            web.json_response({"error": {"message": "busy"}}, status=503),
            [chunk("a"), broken, DONE],
            [chunk("a"), CUT],
            [chunk("a")],
            whole("b"),
        ]
    )
    server = await serve_script(lambda body: next(scripts))
    report = await bench(server, num_prompts=6, max_concurrency=1)
    assert (report.summary.completed, report.summary.failed) == (2, 4)
    assert [record.ok for record in report.records] == [True, False, False, False, False, True]
    errors = [str(record.error) for record in report.records]
    assert errors[1] == "HTTP 503: busy" and errors[2] == "error event: worker lost"
    assert "cut" in errors[4]
    assert report.summary.total_output == 2


async def test_max_concurrency_is_never_passed(serve_script: Any) -> None:
    server = await serve_script(whole(*"abcdef"))
    report = await bench(server, num_prompts=12, max_concurrency=3)
    assert report.summary.completed == 12
    assert server.most_open <= 3
    assert report.summary.max_concurrent_requests <= 3


async def test_arrivals_follow_the_rate(serve_script: Any) -> None:
    server = await serve_script(whole("a"))
    time = FakeTime()
    await run(options(server.url, request_rate=2.0), clock=time.clock, sleep=time.sleep)
    assert sum(time.slept) == pytest.approx(2.0)  # 4 requests at 2 a second


async def test_warm_ups_are_not_measured_and_warm_no_measured_prompt(serve_script: Any) -> None:
    server = await serve_script(whole("a"))
    report = await bench(server, num_warmups=2, max_concurrency=1)
    assert len(server.bodies) == 6 and len(report.records) == 4
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == 6


async def test_timeline_is_asked_for_and_summed_up(serve_script: Any) -> None:
    def script(body: dict[str, Any]) -> list[bytes]:
        phases = {"timeline_ms": {"queue": 1.0, "prefill": 4.0}} if body["return_timeline"] else {}
        return [chunk("a", "length"), usage(5, 1, metrics=phases), DONE]

    report = await bench(await serve_script(script), timeline=True)
    assert report.to_json()["mean_prefill_ms"] == 4.0
    assert "Mean queue (ms):" in report.table()


async def test_chat(serve_script: Any) -> None:
    def delta(content: str, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
        return event({"choices": [choice]})

    server = await serve_script(
        [delta("hel"), delta("lo", "stop"), usage(8, 2), DONE], tokenizes=True
    )
    report = await bench(server, backend="openai-chat", save_detailed=True)
    assert report.summary.completed == 4
    assert {record.text for record in report.records} == {"hello"}
    # /tokenize of this server counts characters: the text has as many as tokens were asked for.
    assert {len(body["messages"][0]["content"]) for body in server.bodies} == {5}


async def test_cancelling_the_run_sends_no_more(serve_script: Any) -> None:
    server = await serve_script(whole("a"))
    waiting = asyncio.Event()

    async def forever(seconds: float) -> None:
        waiting.set()
        await asyncio.Event().wait()

    running = asyncio.create_task(run(options(server.url, request_rate=1.0), sleep=forever))
    await waiting.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert server.bodies == []


async def cli(server: ScriptedServer, *flags: str) -> int:
    common = ["--num-prompts", "3", "--input-len", "4", "--output-len", "2", "--disable-tqdm"]
    return await asyncio.to_thread(main, ["--base-url", server.url, *common, *flags])


class TestMain:
    async def test_table_and_file(
        self, serve_script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        server = await serve_script(whole("a", "b"))
        flags = ["--save-result", "--save-detailed", "--goodput", "ttft:60000"]
        code = await cli(
            server, *flags, "--result-dir", str(tmp_path), "--result-filename", "r.json"
        )
        assert code == 0
        out = capsys.readouterr().out
        assert out.startswith("============ Serving Benchmark Result ============\n")
        result = json.loads((tmp_path / "r.json").read_text())
        assert result["completed"] == 3 and result["generated_texts"] == ["ab"] * 3
        assert result["request_goodput"] == result["request_throughput"]

    async def test_one_success_is_0_and_none_is_1(self, serve_script: Any) -> None:
        answers: Iterator[Any] = iter(
            [whole("a"), web.Response(status=500), web.Response(status=500)]
        )
        assert await cli(await serve_script(lambda body: next(answers))) == 0
        assert await cli(await serve_script(lambda body: web.Response(status=500))) == 1

    async def test_file_that_cannot_be_written(
        self, serve_script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("")
        flags = ("--save-result", "--result-dir", str(tmp_path / "file"))
        assert await cli(await serve_script(whole("a")), *flags) == 1
        assert "cannot save the result" in capsys.readouterr().err

    def test_unreachable_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            assert main(["--port", str(port)]) == 1
        expected = f"http://127.0.0.1:{port}: cannot connect: connection refused"
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line

    def test_silent_server_is_given_up(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serve, "_REACH_TIMEOUT", 0.01)
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            assert main(["--port", str(silent.getsockname()[1])]) == 1
        assert "no answer within" in capsys.readouterr().err

    def test_wrong_flag_is_2(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--goodput", "ttft"]) == 2
        assert capsys.readouterr().err.startswith("baton bench serve: --goodput")


class TestFindModel:
    @pytest.mark.parametrize("listing", [{"data": []}, {}, [1], {"data": [{"name": "x"}]}])
    async def test_no_model_listed(
        self, serve_script: Any, monkeypatch: pytest.MonkeyPatch, listing: Any
    ) -> None:
        async def models(self: ScriptedServer, request: web.Request) -> web.Response:
            return web.json_response(listing)

        monkeypatch.setattr(ScriptedServer, "models", models)
        server = await serve_script(whole("a"))
        with pytest.raises(StartError, match="lists no model"):
            await bench(server)
        assert (await bench(server, model="mine")).model == "mine"

    async def test_refused_listing_matters_only_without_a_model(
        self, serve_script: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def models(self: ScriptedServer, request: web.Request) -> web.Response:
            return web.Response(status=401)

        monkeypatch.setattr(ScriptedServer, "models", models)
        server = await serve_script(whole("a"))
        with pytest.raises(StartError, match="HTTP 401"):
            await bench(server)
        assert (await bench(server, model="mine")).summary.completed == 4
