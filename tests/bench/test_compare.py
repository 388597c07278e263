from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench import compare, shape
from bench.client import open_session
from bench.compare_flags import CompareOptions, parse_options
from bench.stand import commands, modes
from bench.trace import LOADED, PROBES, Pace, Sizes, Writer
from bench.vocabulary import LocalVocabulary
from cluster.config import GatewayConfig, WorkerConfig, load
from cluster.errors import StartError
from cluster.model import load_config
from gateway.tokens import Tokenizer
from tests.bench.conftest import whole


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})


class TestFlags:
    def test_defaults(self) -> None:
        options = parse_options([])
        assert options.cores == (0, 1) and options.chunks == (64, 128, 256, 512)
        assert options.model is None and options.rounds == 3 and options.suffix == ""

    def test_quick_is_smaller_and_says_so(self) -> None:
        options = parse_options(["--quick", "--chat-answer", "5"])
        assert options.rounds == 1 and options.suffix == "-quick"
        assert options.sizes.long_prompt < Sizes().long_prompt
        assert options.sizes.chat_answer == 5

    def test_baton_tiny_is_not_the_default_shape(self) -> None:
        assert parse_options(["--model", ""]).model == ""

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["--cores", "0", "0"], "--cores"),
            (["--cores", "0", "7"], r"--cores: \[7\]"),
            (["--chunks", "8"], "--chunks"),
            (["--chunks", "64", "64"], "--chunks"),
            (["--rounds", "0"], "--rounds"),
            (["--rate", "-1"], "--rate"),
            (["--long-prompt", "0"], "--long-prompt"),
            (["--goodput", "itl:5"], "--goodput"),
            (["--vllm", "python"], "--vllm needs a --model"),
            (["--vllm", "python", "--model", "m", "--load-format", "dummy"], "--vllm needs"),
        ],
    )
    def test_what_cannot_work_is_refused(self, argv: list[str], says: str) -> None:
        with pytest.raises(StartError, match=says):
            parse_options(argv)


class TestModes:
    def test_every_mode_uses_both_cores_once_and_a_thread_for_each(self) -> None:
        base = WorkerConfig(model="m", load_format="dummy")
        for mode in modes((2, 5)):
            gateway, *workers = commands(mode, 128, base, 8000, 8001)
            assert gateway[0] == "gateway"
            front = load(GatewayConfig, gateway[1:], "gateway")
            assert (front.model, front.port, front.grpc_port) == ("m", 8000, 8001)
            configs = [load(WorkerConfig, words[1:], "worker") for words in workers]
            assert sorted(core for one in configs for core in one.pin) == [2, 5]
            for one in configs:
                assert one.threads == len(one.pin) and one.max_num_batched_tokens == 128
                assert one.load_format == "dummy" and one.join == ("127.0.0.1:8001",)
            assert len({one.name for one in configs}) == len(configs)

    def test_roles(self) -> None:
        roles = {mode.name: [seat.role for seat in mode.seats] for mode in modes((0, 1))}
        assert roles == {
            "pd": ["prefill", "decode"],
            "2xboth": ["both", "both"],
            "1xboth": ["both"],
        }


class TestShape:
    def test_it_is_a_model_directory_that_gateway_and_workers_read(self, tmp_path: Path) -> None:
        directory = shape.write_model(tmp_path)
        config = load_config(directory)
        tokenizer = Tokenizer.from_dir(directory)
        assert config.vocab_size == tokenizer.vocab_size and not config.tied
        assert LocalVocabulary(directory).ids == list(range(config.vocab_size))

    def test_every_token_has_a_text_of_its_own(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer.from_dir(shape.write_model(tmp_path))
        decoding = tokenizer.decoding(True, first=False)
        texts = [decoding.push(token) for token in range(tokenizer.vocab_size)]
        assert all(texts) and len(set(texts)) == len(texts)


async def test_a_phase_is_measured_whole_and_in_order(serve_script: Any) -> None:
    def script(body: dict[str, Any]) -> list[bytes]:
        return whole(*(str(token) for token in body["prompt"][: body["max_tokens"]]))

    server = await serve_script(script)
    writer = Writer(range(10, 90), Sizes(chat_prompt=4, chat_answer=3, long_prompt=9), seed=0)
    phase = writer.steady(LOADED, Pace(rate=400.0, long_every=0.01), seconds=0.02, longs=2)
    async with open_session() as session:
        found = await compare.measure(session, server.url, "m", phase)
    assert [record.text for record in found.records] == [
        "".join(map(str, ask.prompt[: ask.answer_tokens])) for ask in phase.asks
    ]
    assert [record.ok for record in found.records] == [True] * 10
    assert found.duration >= phase.asks[-1].at


async def test_the_hardware_is_described() -> None:
    found = compare.describe(CompareOptions(cores=(0, 1)))
    assert found["cores_used"] == (0, 1) and found["cpu"]
    json.dumps(found)


async def test_a_model_too_short_for_the_trace_is_refused() -> None:
    options = parse_options(["--model", "", "--long-prompt", "9000"])
    with pytest.raises(StartError, match="--long-prompt"):
        await compare.compare(options)


async def test_all_modes_answer_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command in small, on real processes of baton-tiny."""
    monkeypatch.undo()
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    sizes = Sizes(
        chat_prompt=8,
        chat_answer=6,
        long_prompt=60,
        long_answer=2,
        quiet_s=0.2,
        longs=2,
        flood_chats=2,
        flood_longs=1,
    )
    options = CompareOptions(
        model="",
        cores=(allowed[0], allowed[1]),
        chunks=(32,),
        rounds=1,
        rate=20.0,
        long_every=0.1,
        sizes=sizes,
    )
    result = await compare.compare(options)
    assert [run.mode for run in result.rounds] == ["pd", "2xboth", "1xboth"]
    for run in result.rounds:
        assert set(run.measured) == {PROBES, "quiet", LOADED, "flood"}
        for measured in run.measured.values():
            assert [record.error for record in measured.records] == [None] * len(measured.records)
            lengths = [ask.answer_tokens for ask in measured.phase.asks]
            assert [record.output_tokens for record in measured.records] == lengths
    assert result.probes_agree and result.to_json()["answers_differing"] == {}
