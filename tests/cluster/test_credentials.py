from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cluster import credentials
from cluster.credentials import GATEWAY, WORKER, credentials_for
from cluster.errors import StartError
from deploy.keys import DAYS, make
from tests.credentials import made


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make(tmp_path / "keys")
    return tmp_path / "keys"


def test_without_a_directory_there_are_none() -> None:
    assert credentials_for(WORKER, "") is None


def test_a_role_reads_only_what_is_its_own(directory: Path) -> None:
    for name in ("worker.pem", "worker.key", "kv-sender.key", "kv-receiver.key"):
        (directory / name).unlink()
    gateway = credentials_for(GATEWAY, str(directory))
    assert gateway is not None and gateway.kv_sender == gateway.kv_receiver == b""
    with pytest.raises(StartError, match=r"worker\.pem: No such file.*baton keys cluster"):
        credentials_for(WORKER, str(directory))


def test_each_role_expects_the_other(tmp_path: Path) -> None:
    gateway, worker = made(tmp_path)
    assert (gateway.peer, worker.peer) == ("worker.baton.internal", "gateway.baton.internal")


def test_they_show_in_no_log(tmp_path: Path) -> None:
    _, worker = made(tmp_path)
    assert repr(worker) == str(worker) == "Credentials('worker')"


@pytest.mark.parametrize("name", ["ca.pem", "worker.pem", "worker.key"])
def test_what_is_no_pem_is_named(directory: Path, name: str) -> None:
    (directory / name).write_text("nothing")
    with pytest.raises(StartError, match=r"worker\.pem, worker\.key, ca\.pem: cannot be read"):
        credentials_for(WORKER, str(directory))


@pytest.mark.parametrize("secret", ["", "x" * 39, "x" * 41, '"' * 40])
def test_what_is_no_curve_key_is_named(directory: Path, secret: str) -> None:
    (directory / "kv-sender.key").write_text(secret)
    with pytest.raises(StartError, match=r"kv-sender\.key: is not a CURVE key"):
        credentials_for(WORKER, str(directory))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("worker.key", r"worker\.key is not the key of worker\.pem"),
        ("ca.pem", r"worker\.pem was not signed by ca\.pem"),
    ],
)
def test_files_of_two_clusters_do_not_mix(
    directory: Path, tmp_path: Path, name: str, reason: str
) -> None:
    make(tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, directory / name)
    with pytest.raises(StartError, match=reason):
        credentials_for(WORKER, str(directory))


def test_certificates_end(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + timedelta(days=DAYS + 1)

    monkeypatch.setattr(credentials, "datetime", Later)
    with pytest.raises(StartError, match="make new keys"):
        credentials_for(GATEWAY, str(directory))
