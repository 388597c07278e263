from __future__ import annotations

import socket
from typing import Any

import pytest

from cluster.errors import StartError
from deploy import api_keys, chat, digest, keys, status

WORKER = {
    "name": "decode-0",
    "role": "decode",
    "incarnation": "00ff",
    "draining": False,
    "running": 1,
    "waiting": 2,
    "queued_tokens": 3,
    "free_blocks": 4,
    "cached_blocks": 5,
    "promised_blocks": 6,
    "owned_blocks": 7,
    "blocks": 22,
    "block_size": 16,
}


def test_the_table_lines_up() -> None:
    other = WORKER | {"name": "a-worker-with-a-long-name", "draining": True}
    text = status.table({"model": "m", "ready": True, "workers": [WORKER, other]})
    head, titles, *rows = text.splitlines()
    assert head == "model m: ready"
    column = titles.index("state")
    assert [row[column:].split()[0] for row in rows] == ["up", "draining"]
    assert rows[0].split()[-8:] == ["1", "2", "3", "4", "5", "6", "7", "22", "16"][-8:]


def test_of_several_gateways_it_says_which_one_speaks() -> None:
    several = {"gateway": "127.0.0.1:5", "gateways": ["127.0.0.1:4", "127.0.0.1:5"]}
    text = status.table({"model": "m", "ready": True, "workers": [], **several})
    assert text.splitlines()[0] == "model m: ready (as seen by 127.0.0.1:5, one of 2 gateways)"


def test_what_is_missing_is_said() -> None:
    assert "not ready" in status.table({"model": "m", "ready": False, "workers": []})


@pytest.mark.parametrize("command", [status, chat])
def test_nothing_at_that_address(command: object) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    argv = ["--url", f"http://127.0.0.1:{port}", *(["hi"] if command is chat else [])]
    with pytest.raises(StartError, match="nothing answers"):
        command.main(argv)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [status, chat, keys, api_keys, digest])
def test_a_wrong_flag_is_one_line(command: Any) -> None:
    with pytest.raises(StartError, match="--nope"):
        command.main(["--nope", "directory"])
