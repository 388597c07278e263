from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """As most shells have it, only fewer. The hard limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_it_may_have_as_many_descriptors_as_the_hard_limit_lets_it(few_descriptors: int) -> None:
    async def look(stopping: asyncio.Event) -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    assert process.run(look) == few_descriptors


def test_a_full_disk_behind_its_output_does_not_change_how_it_ends() -> None:
    words = "import sys; from cluster.process import leave, say; say('ready', sys.stdout); leave(3)"
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run([sys.executable, "-c", words], stdout=full, stderr=full)
    assert ended.returncode == 3
