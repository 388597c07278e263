"""`baton keys api`: what it prints is what a gateway takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import StartError
from deploy.api_keys import main
from gateway.keys import Keys


def test_the_entries_make_a_file_that_knows_the_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, shown = tmp_path / "keys.yaml", []
    flags = ["--tenant=a", "--models", "m", "m2", "--requests-per-minute=5", "--weight", "2"]
    for arguments in (flags, flags, [], ["--tenant", "1e5", "--priority", "-3"]):
        assert main(arguments) == 0
        entry, told = capsys.readouterr()
        key = told.split()[-1]
        assert key not in entry and len(key) >= 40
        shown.append(key)
        with file.open("a") as out:
            out.write(entry)
    keys = Keys(file=file)
    one, two, plain, odd = (keys.tenant([f"Bearer {key}".encode()]) for key in shown)
    assert one == two
    assert (one.name, one.models, one.requests_per_minute, one.weight) == ("a", ("m", "m2"), 5, 2.0)
    assert (plain.name, odd.name, odd.priority) == ("default", "1e5", -3)


@pytest.mark.parametrize(
    "argv", [["--weight=0"], ["--requests-per-minute=-1"], ["--tenant=a b"], ["--wat"], ["x"]]
)
def test_what_no_entry_may_say(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StartError):
        main(argv)
    assert capsys.readouterr() == ("", "")
