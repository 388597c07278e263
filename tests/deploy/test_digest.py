from __future__ import annotations

from pathlib import Path

import pytest

from cluster.digests import DIGESTS
from cluster.errors import StartError
from deploy.digest import main


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_written_and_then_checked(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(directory)]) == 0
    assert "1 files, 2 bytes" in capsys.readouterr().out
    assert main([str(directory), "--check"]) == 0
    assert "all files are those" in capsys.readouterr().out
    (directory / "config.json").write_text("[]")
    with pytest.raises(StartError, match=r"config\.json: is sha256"):
        main([str(directory), "--check"])


def test_nothing_to_check_is_no_success(directory: Path) -> None:
    with pytest.raises(StartError, match=f"no {DIGESTS}"):
        main([str(directory), "--check"])


def test_what_is_not_there_is_named(directory: Path) -> None:
    with pytest.raises(StartError, match="nowhere: no such directory"):
        main([str(directory / "nowhere")])


def test_what_cannot_be_written_is_named(directory: Path) -> None:
    (directory / DIGESTS).mkdir()
    with pytest.raises(StartError, match=f"{DIGESTS}: Is a directory"):
        main([str(directory)])
