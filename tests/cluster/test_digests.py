"""What digests.json says, and what then is refused (FAULTS 3.3, row 13)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import digests
from cluster.config import BUILT_IN
from cluster.digests import DIGESTS, verify, write
from cluster.errors import BadModel


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, content in (
        ("config.json", b"{}"),
        ("chat_template.jinja", b"{{ x }}"),
        ("model-1.safetensors", b"one"),
        ("model-2.safetensors", b""),
        ("README.md", b"read me"),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "original.json").mkdir()  # no file, whatever its name
    write(tmp_path)
    return tmp_path


def stated(directory: Path) -> dict[str, dict[str, object]]:
    return dict(json.loads((directory / DIGESTS).read_text()))


def test_it_names_what_is_read_and_nothing_else(directory: Path) -> None:
    found = stated(directory)
    assert list(found) == [
        *("chat_template.jinja", "config.json", "model-1.safetensors", "model-2.safetensors")
    ]
    assert found["config.json"] == {
        "bytes": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    verify(directory)


def test_writing_again_takes_the_files_as_they_are(directory: Path) -> None:
    (directory / "config.json").write_text("{1}")
    write(directory)
    verify(directory)


def test_without_it_nothing_is_compared(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json: is sha256 4f53.* of 2"),
        (lambda d: (d / "model-1.safetensors").write_text("one!"), r"model-1.*of 4 bytes.*of 3"),
        (lambda d: (d / "model-2.safetensors").unlink(), r"model-2\.safetensors: missing"),
        (lambda d: (d / "model.safetensors").touch(), r"model\.safetensors: .* does not know it"),
        (lambda d: (d / "generation_config.json").touch(), r"generation_config\.json: .* not know"),
        (lambda d: (d / DIGESTS).write_text("{"), r"digests\.json"),
        (lambda d: (d / DIGESTS).write_text("[]"), r"digests\.json"),
        (lambda d: _state(d, "config.json", 7), r"config\.json: .* says 7"),
        (lambda d: _state(d, "config.json", {"sha256": "x"}), r"config\.json: .* says \{'sha256'"),
        (lambda d: _state(d, "../../etc/passwd", {}), r"\.\./\.\./etc/passwd: missing"),
    ],
)
def test_what_differs_is_refused_in_one_line(
    directory: Path, change: Callable[[Path], object], reason: str
) -> None:
    change(directory)
    with pytest.raises(BadModel, match=reason) as caught:
        verify(directory)
    assert caught.value.message.endswith("; --skip-digest loads it all the same")
    assert "\n" not in caught.value.message


def _state(directory: Path, name: str, value: object) -> None:
    (directory / DIGESTS).write_text(json.dumps({**stated(directory), name: value}))


def test_it_may_be_loaded_all_the_same_and_the_log_says_so(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "config.json").write_text("[]")
    verify(directory, skip=True)
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "config.json: is sha256" in record.reason  # type: ignore[attr-defined]


def test_a_gateway_needs_no_weights_and_compares_the_rest(directory: Path) -> None:
    (directory / "model-1.safetensors").write_text("damaged")
    (directory / "model-2.safetensors").unlink()
    verify(directory, weights=False)
    (directory / "chat_template.jinja").write_text("{{ y }}")
    with pytest.raises(BadModel, match="chat_template"):
        verify(directory, weights=False)


def test_a_file_that_cannot_be_read_is_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error", "model-1.safetensors")

    monkeypatch.setattr(digests, "_measured", broken)
    with pytest.raises(BadModel, match=r"model-1\.safetensors: cannot be read: Input/output"):
        verify(directory)


def test_the_built_in_model_is_what_was_shipped() -> None:
    assert (BUILT_IN / DIGESTS).is_file()
    verify(BUILT_IN)
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= stated(BUILT_IN).keys()
