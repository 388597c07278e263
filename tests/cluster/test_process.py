from __future__ import annotations

import asyncio
import os

import pytest

from cluster import process
from cluster.errors import StartError


async def hindered(stopping: asyncio.Event) -> int:
    raise StartError("the\nreason")


def test_a_start_error_is_one_line_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert process.run(hindered) == process.EXIT_START
    assert capsys.readouterr().err == "baton: the reason\n"


def test_of_several_hindered_processes_one_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    word, told = os.pipe()
    os.write(told, b".")
    os.close(told)
    try:
        assert {process.run(hindered, word) for _ in range(3)} == {process.EXIT_START}
    finally:
        os.close(word)
    assert capsys.readouterr().err == "baton: the reason\n"
