from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import StartError
from engine import loop
from engine.profile import Trace
from tests.engine.test_loop import Runner, Stage


def test_a_trace_of_so_many_steps(tmp_path: Path) -> None:
    stage = Stage()
    stage.left = 4
    file = tmp_path / "traces" / "worker.json"
    steps = loop.Steps(*Trace(file, 2).of(stage, Runner()))
    assert steps.step()
    assert not file.exists()
    assert steps.step()
    events = json.loads(file.read_text())["traceEvents"]
    names = [event["name"] for event in events]
    for part in ("make_room", "batch", "launch", "outcome", "accept"):
        assert names.count(part) == 2, part
    written = file.read_bytes()
    assert steps.step() and steps.step() and not steps.step()
    assert file.read_bytes() == written
    assert stage.left == 0


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"--profile .*file"):
        Trace(tmp_path / "file" / "worker.json", 1)
