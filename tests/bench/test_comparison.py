from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from bench.compare_flags import parse_options
from bench.comparison import Comparison
from bench.trace import Pace
from tests.bench.runs import run


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    modes: list[tuple[str, dict[str, Any]]] = [
        ("pd", {"loaded_ms": 11}),
        ("2xboth", {"loaded_ms": 70}),
        ("1xboth", {"loaded_ms": 90, "failures": 1}),
    ]
    return Comparison(
        options=parse_options(["--output", "somewhere.json"]),
        model="shape",
        hardware={"cpu": "one", "load_average_before": 0.1},
        date=datetime(2026, 11, 20, 12, 0),
        pace=Pace(4.0, 2.0),
        sweep=tuple(run(mode, chunk, number=0) for mode, _ in modes for chunk in (64, 128)),
        rounds=tuple(run(mode, number=n, **ms) for n in (1, 2, 3) for mode, ms in modes),
    )


def row(table: str, label: str) -> list[str]:
    [line] = [line for line in table.splitlines() if line.startswith(label)]
    return line.removeprefix(label).split()


def test_the_table_puts_each_mode_beside_its_own_quiet_figure(comparison: Comparison) -> None:
    table = comparison.table()
    assert row(table, "ITL p99 of chats, quiet (ms)") == ["10.0"] * 3
    assert row(table, "ITL p99 of chats, loaded (ms)") == ["11.0", "70.0", "90.0"]
    ratios = [line.split() for line in table.splitlines() if "loaded / quiet" in line]
    assert ratios == [["loaded", "/", "quiet", "1.10", "x", "7.00", "x", "9.00", "x"]] * 3
    assert row(table, "Failed, all rounds") == ["0", "0", "3"]
    assert row(table, "Chunk size, chosen (tokens)") == ["64"] * 3
    assert row(table, "Good chats/s, loaded") == ["0.50", "0.00", "0.00"]
    assert row(table, "Output tok/s, flood") == ["-"] * 3  # nothing was measured there
    assert "a good chat: ttft <= 50 ms, tpot <= 15 ms" in table
    assert "agree in all our modes: True" in table


def test_limits_that_are_given_win(comparison: Comparison) -> None:
    options = replace(comparison.options, goodput={"tpot": 80.0})
    table = replace(comparison, options=options).table()
    assert row(table, "Good chats/s, loaded") == ["0.50", "0.50", "0.00"]


def test_a_busy_machine_is_said_so(comparison: Comparison) -> None:
    assert "busy" not in comparison.table()
    busy = replace(comparison, hardware={"load_average_before": 2.5})
    assert "busy" in busy.table() and "2.5" in busy.table()


def test_modes_that_disagree_are_said_so(comparison: Comparison) -> None:
    odd = replace(comparison, rounds=(*comparison.rounds, run("pd", text="something else")))
    assert not odd.probes_agree
    assert "agree in all our modes: False" in odd.table()


def test_what_vllm_says_is_counted_and_does_not_make_ours_wrong(comparison: Comparison) -> None:
    theirs = run("vllm", text="something else")
    both = replace(comparison, rounds=(*comparison.rounds, theirs))
    assert both.probes_agree
    assert set(both.to_json()["answers_differing"]) == {"vllm"}
    assert "differ from the first mode's: " in both.table() and "of vllm" in both.table()


def test_json_holds_what_is_needed_to_check_and_to_repeat(comparison: Comparison) -> None:
    found = json.loads(json.dumps(comparison.to_json()))
    assert found["hardware"]["cpu"] == "one" and found["date"] == "2026-11-20 12:00:00"
    assert found["options"]["rounds"] == 3 and found["options"]["sizes"]["long_prompt"] == 1500
    assert found["pace"] == {"rate": 4.0, "long_every": 2.0}
    assert found["chosen_chunk"] == {"pd": 64, "2xboth": 64, "1xboth": 64}
    assert len(found["sweep"]) == 6 and len(found["rounds"]) == 9
    assert set(found["trace"]) == {"probes", "quiet", "loaded"}
    assert found["medians"]["pd"]["loaded"]["chat_itl_p99_ms"] == 11.0
    assert found["probes_agree"] is True and found["answers_differing"] == {}
    assert "somewhere.json" not in json.dumps(found)
