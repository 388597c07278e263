from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import (
    BUILT_IN,
    GatewayConfig,
    ServeConfig,
    WorkerConfig,
    flags,
    load,
    model_directory,
)
from cluster.errors import StartError


def test_defaults() -> None:
    config = load(GatewayConfig, [], "baton gateway")
    assert (config.port, config.grpc_port, config.host) == (8000, 8001, "127.0.0.1")
    assert model_directory(config) == BUILT_IN


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text(
        "max-num-seqs: 8\nblock_size: 64\njoin: 127.0.0.1:9\nenable-prefix-caching: no\n"
    )
    config = load(WorkerConfig, ["--config", str(file), "--block-size", "32"], "baton worker")
    assert (config.max_num_seqs, config.block_size, config.join) == (8, 32, ("127.0.0.1:9",))
    assert config.enable_prefix_caching is False


def test_the_model_may_be_positional(tmp_path: Path) -> None:
    assert load(ServeConfig, [str(tmp_path)], "baton serve").model == str(tmp_path)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--max-num-seq", "3"], "did you mean --max-num-seqs?"),
        (["--max-num-seqs", "many"], "--max-num-seqs"),
        (["--max-num-seqs", "-1"], "must not be negative"),
        (["--role", "cook"], "not one of prefill, decode, both"),
        (["--port", "70000"], "not a port"),
        (["--host", "0.0.0.0"], "loopback"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_is_wrong_is_said(argv: list[str], part: str) -> None:
    with pytest.raises(StartError, match=part.replace("?", r"\?")):
        load(WorkerConfig, argv, "baton worker")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("max-num-sequences: 8", "did you mean max-num-seqs"),
        ("- 1", "must map"),
        ("a: [", "not YAML"),
        ("max-num-seqs: true", "whole number"),
        ("name: 5", "a text"),
        ("threads: 1.5", "whole number"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(StartError, match=part):
        load(WorkerConfig, ["--config", str(file)], "baton worker")


def test_missing_model_directory(tmp_path: Path) -> None:
    config = load(WorkerConfig, [str(tmp_path / "none")], "baton worker")
    with pytest.raises(StartError, match="no such directory"):
        model_directory(config)


def test_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        load(WorkerConfig, ["--help"], "baton worker")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "--max-num-batched-tokens" in text and "(default: 512)" in " ".join(text.split())
    assert "--die-with" not in text


def test_flags_rebuild_the_configuration() -> None:
    config = WorkerConfig(role="decode", join=("a:1", "b:2"), enable_prefix_caching=False, pin=(0,))
    assert load(WorkerConfig, flags(config, WorkerConfig), "baton worker") == config
