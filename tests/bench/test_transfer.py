from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bench import shape, transfer, transfer_exposed, transfer_speed
from bench.client import Record
from bench.transfer import TransferOptions, exposed_table, parse_options, save, speed_table
from bench.transfer_end import (
    ALL,
    CURVE,
    IPC,
    LAYOUT,
    NO_DIGEST,
    NONE,
    RAW_TCP,
    RAW_UNIX,
    SHARED,
    TCP,
    Settings,
)
from bench.transfer_exposed import Asker, Exposed
from bench.transfer_speed import CHECKED, MEMCPY, Speed, filled, measure, plan
from cluster.errors import StartError
from cluster.model import load_config


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})


class TestFlags:
    def test_defaults(self) -> None:
        assert parse_options([]) == TransferOptions(cores=(0, 1))

    def test_all_of_them(self) -> None:
        words = "--parts speed --cores 1 0 --rounds 2 --tokens 9 --chunk-kib 1 2 --prompts 3"
        options = parse_options([*words.split(), "--output", "x"])
        assert options == TransferOptions(
            parts=("speed",),
            cores=(1, 0),
            rounds=2,
            tokens=9,
            chunk_kib=(1, 2),
            prompts=(3,),
            output="x",
        )

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["--cores", "0", "0"], "--cores"),
            (["--cores", "0", "7"], r"--cores: \[7\]"),
            (["--rounds", "0"], "--rounds"),
            (["--tokens", "0"], "--tokens"),
            (["--chunk-kib", "16385"], "--chunk-kib"),
            (["--prompts", "16384"], "--prompts"),
        ],
    )
    def test_what_cannot_work_is_refused(self, argv: list[str], says: str) -> None:
        with pytest.raises(StartError, match=says):
            parse_options(argv)


def test_every_way_is_measured_and_the_checks_are_left_out_one_by_one() -> None:
    planned = plan(Settings(SHARED, 64, (100, 200)))
    ways = [MEMCPY, RAW_UNIX, RAW_TCP, SHARED, IPC, TCP, CURVE]
    speeds, checks = planned[: len(ways)], planned[len(ways) :]
    assert [s.transport for s in speeds] == ways
    assert {(s.checks, s.chunks) for s in speeds} == {(ALL, (100, 200))}
    assert [(s.transport, s.checks) for s in checks] == [
        (way, checks) for way in (SHARED, TCP) for checks in (ALL, NO_DIGEST, NONE)
    ]
    assert {s.chunks for s in checks} == {(CHECKED,)}


@pytest.mark.parametrize(
    ("transport", "checks"),
    [
        *((SHARED, ALL), (SHARED, NONE), (TCP, NO_DIGEST), (IPC, ALL), (CURVE, ALL)),
        *((RAW_UNIX, ""), (RAW_TCP, "")),
    ],
)
async def test_a_way_is_measured_between_two_processes(transport: str, checks: str) -> None:
    settings = Settings(transport, 20, (10_000, 100_000), checks)
    speeds = await asyncio.wait_for(measure(settings, filled(20), 2), 60)
    assert [(speed.transport, speed.checks, len(speed.runs)) for speed in speeds] == [
        (transport, checks, 2)
    ] * 2
    assert [speed.chunk_bytes for speed in speeds] == [10_000, 100_000]
    assert all(speed.median > 0 for speed in speeds)


async def test_memcpy_needs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transfer_speed, "receiving")
    [speed] = await measure(Settings(MEMCPY, 20, (1000,)), filled(20), 3)
    assert len(speed.runs) == 3 and speed.median > 0


async def test_a_receiving_process_that_cannot_start_says_so() -> None:
    with pytest.raises(StartError, match="ended"):
        await measure(Settings(SHARED, -5, (1000,)), filled(20), 1)


def test_pages_are_full_of_values() -> None:
    cache = filled(20)
    assert all(cache.keys(layer).all() for layer in range(LAYOUT.layers))


SPEEDS = [
    Speed(MEMCPY, 1 << 20, "", (30.0,)),
    Speed(SHARED, 1 << 20, ALL, (5.0, 6.0, 7.0)),
    Speed(SHARED, 2 << 20, ALL, (6.0,)),
    Speed(SHARED, 2 << 20, NO_DIGEST, (8.0,)),
]


def test_the_table_has_a_row_a_way_and_what_the_checks_take() -> None:
    lines = speed_table(SPEEDS).splitlines()
    assert lines[0].split() == ["GB/s,", "chunks", "of", "1", "MiB", "2", "MiB"]
    assert lines[1].split() == ["memcpy", "30.00", "-"]
    assert lines[2].split() == ["shared", "memory", "6.00", "6.00"]
    assert lines[3] == "shared memory, no digest: 8.00 GB/s, so that takes 25.0 % of it"


EXPOSED = Exposed(128, (50.0, 53.0, 99.0), (50.0, 50.0, 10.0), (2.0, 0.0, 1.0), (9.0, 9.0, 9.0))


def test_what_is_exposed_is_the_slower_prefill_and_the_tail() -> None:
    assert EXPOSED.slowed == 3.0
    assert EXPOSED.share == pytest.approx((3.0 + 1.0) / 50.0)
    assert exposed_table([EXPOSED]).splitlines()[1].split() == [
        "128", "50.00", "3.00", "1.00", "8.00%"
    ]  # fmt: skip
    assert EXPOSED.to_json()["exposed_share"] == 0.08


def test_the_model_takes_the_longest_prompt(tmp_path: Path) -> None:
    assert load_config(transfer_exposed.model(tmp_path)).max_model_len == transfer_exposed.LONGEST


class Answers:
    """In place of a Client: prefill takes 5 ms with a handoff, 4 without."""

    def __init__(self, error: str | None = None) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.error = error

    async def send(self, body: bytes, prompt_tokens: int) -> Record:
        self.bodies.append(json.loads(body))
        if self.bodies[-1]["max_tokens"] == 1:
            return Record(error=self.error, timeline_ms={"prefill": 4.0})
        return Record(itls=[0.003], timeline_ms={"prefill": 5.0, "transfer_tail": 0.5})


async def test_prompts_with_and_without_a_handoff_alternate_and_none_comes_twice() -> None:
    asker = Asker(None, "http://nowhere", "m")  # type: ignore[arg-type]
    asker._client = answers = Answers()  # type: ignore[assignment]
    found = await asker.measure(2048, 2)
    assert found == Exposed(2048, (5.0, 5.0), (4.0, 4.0), (0.5, 0.5), (3.0, 3.0))
    assert [body["max_tokens"] for body in answers.bodies] == [2, 1, 1, 2]
    prompts = [tuple(body["prompt"]) for body in answers.bodies]
    assert len(set(prompts)) == 4 and {len(prompt) for prompt in prompts} == {2048}
    assert all(0 < token < shape.CONFIG["vocab_size"] for prompt in prompts for token in prompt)


@pytest.mark.parametrize(("tokens", "pairs"), [(1, 8), (512, 4), (2049, 1)])
async def test_short_prompts_are_asked_more_often(tokens: int, pairs: int) -> None:
    asker = Asker(None, "http://nowhere", "m")  # type: ignore[arg-type]
    asker._client = Answers()  # type: ignore[assignment]
    assert len((await asker.measure(tokens, 1)).tail) == pairs


async def test_an_answer_that_failed_is_no_measurement() -> None:
    asker = Asker(None, "http://nowhere", "m")  # type: ignore[arg-type]
    asker._client = Answers("HTTP 503")  # type: ignore[assignment]
    with pytest.raises(StartError, match="7 tokens failed: HTTP 503"):
        await asker.measure(7, 1)


def test_a_part_that_was_not_measured_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def exposed(*arguments: object) -> list[Exposed]:
        return [EXPOSED]

    async def speeds(*arguments: object) -> list[Speed]:
        return SPEEDS

    monkeypatch.setattr(transfer_exposed, "measure", exposed)
    monkeypatch.setattr(transfer, "all_speeds", speeds)
    path = tmp_path / "results" / "transfer.json"
    for part in ("speed", "exposed"):
        assert transfer.main(["--parts", part, "--output", str(path)]) == 0
    saved = json.loads(path.read_text())
    assert saved["speed"]["measured"][2]["gb_per_s"] == 6.0
    assert saved["exposed"]["measured"][0]["tokens"] == 128
    assert "memcpy" in capsys.readouterr().out


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="--output"):
        save(tmp_path, {})
