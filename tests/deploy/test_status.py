from __future__ import annotations

import socket

import pytest

from cluster.errors import StartError
from deploy import chat, status

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


def test_what_is_missing_is_said() -> None:
    assert "not ready" in status.table({"model": "m", "ready": False, "workers": []})


@pytest.mark.parametrize("command", [status, chat])
def test_nothing_at_that_address(command: object) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    argv = ["--url", f"http://127.0.0.1:{port}", *(["hi"] if command is chat else [])]
    with pytest.raises(StartError, match="nothing answers"):
        command.main(argv)  # type: ignore[attr-defined]


def test_a_wrong_flag_is_one_line() -> None:
    with pytest.raises(StartError, match="--nope"):
        status.main(["--nope"])
