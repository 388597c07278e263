from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import (
    API_KEYS,
    BUILT_IN,
    Common,
    GatewayConfig,
    ServeConfig,
    WorkerConfig,
    child_environment,
    flags,
    load,
    model_directory,
)
from cluster.errors import StartError


@pytest.fixture(autouse=True)
def _no_keys_around_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEYS, raising=False)


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


def test_no_message_repeats_all_of_what_was_given(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    for text in ("role: " + 900 * "x", 900 * "x" + ": 1"):
        file.write_text(text)
        with pytest.raises(StartError) as refused:
            load(WorkerConfig, ["--config", str(file)], "baton worker")
        assert "xxx..." in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--max-num-seq", "3"], "did you mean --max-num-seqs?"),
        (["--max-num-seqs", "many"], "--max-num-seqs"),
        (["--role", "cook"], "not one of prefill, decode, both"),
        (["--host", "0.0.0.0"], "--host: '0.0.0.0' is not a loopback address"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_is_wrong_is_said(argv: list[str], part: str) -> None:
    with pytest.raises(StartError, match=part.replace("?", r"\?")):
        load(WorkerConfig, argv, "baton worker")


@pytest.mark.parametrize(
    ("kind", "flag", "value", "allowed"),
    [
        (WorkerConfig, "--max-num-seqs", "-1", "at least 1"),
        (WorkerConfig, "--max-num-seqs", "0", "at least 1"),
        (WorkerConfig, "--max-num-batched-tokens", "-1", "at least 0"),
        (WorkerConfig, "--block-size", "-1", "at least 0"),
        (WorkerConfig, "--kv-cache-memory-bytes", "-1", "at least 0"),
        (WorkerConfig, "--threads", "0", "at least 1"),
        (WorkerConfig, "--lease", "0", "from 1 to 1000000"),
        (WorkerConfig, "--lease", "nan", "from 1 to 1000000"),
        (WorkerConfig, "--chunk-bytes", "0", "from 1 to 16777216"),
        (WorkerConfig, "--chunk-bytes", "16777217", "from 1 to 16777216"),
        (WorkerConfig, "--credit-bytes", "2097151", "at least --chunk-bytes 2097152"),
        (WorkerConfig, "--pin", "-1", "at least 0"),
        (WorkerConfig, "--port", "70000", "from 0 to 65535"),
        (WorkerConfig, "--dtype", "float8", "one of auto, float32, float16, bfloat16"),
        (WorkerConfig, "--load-format", "gguf", "one of auto, dummy"),
        (WorkerConfig, "--log-level", "loud", "one of debug, info, warning, error"),
        (ServeConfig, "--log-level", "loud", "one of debug, info, warning, error"),
        (ServeConfig, "--start-timeout", "0", "from 1 to"),
        (GatewayConfig, "--port", "0", "from 1 to 65535"),
        (GatewayConfig, "--max-waiting", "0", "at least 1"),
        (GatewayConfig, "--max-model-len", "1", "at least 2"),
        (GatewayConfig, "--request-timeout", "0", "from 0.001 to"),
        (GatewayConfig, "--request-timeout", "inf", "to 1000000"),
    ],
)
def test_values_that_cannot_work(kind: type[Common], flag: str, value: str, allowed: str) -> None:
    """The error names the flag, the value and what is allowed."""
    with pytest.raises(StartError) as caught:
        load(kind, [f"{flag}={value}"], "baton")
    assert caught.value.message.startswith(f"{flag}: ")
    assert value in caught.value.message and allowed in caught.value.message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("max-num-sequences: 8", "did you mean max-num-seqs"),
        ("- 1", "must map"),
        ("a: [", "not YAML"),
        ("max-num-seqs: true", "whole number"),
        ("name: 5", "a text"),
        ("threads: 1.5", "whole number"),
        ("pin: [a]", "--pin: 'a' is not a whole number"),
        ("join: []", "--join: none is given"),
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
    assert "--max-num-seqs" in text and "(default: 256)" in " ".join(text.split())
    assert "--die-with" not in text


def test_flags_rebuild_the_configuration() -> None:
    config = WorkerConfig(role="decode", join=("a:1", "b:2"), enable_prefix_caching=False, pin=(0,))
    assert load(WorkerConfig, flags(config, WorkerConfig), "baton worker") == config


def test_a_value_may_begin_like_a_flag() -> None:
    config = GatewayConfig(served_model_name=("-x", "--port"))
    assert load(GatewayConfig, flags(config, GatewayConfig), "baton gateway") == config


def test_keys_are_handed_to_children_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never on the command line, which every user of the machine can read."""
    config = load(GatewayConfig, ["--api-key=-a", "--api-key=b", "--port=9"], "baton gateway")
    arguments = flags(config, GatewayConfig)
    assert arguments == ["--port=9"]
    monkeypatch.setenv(API_KEYS, child_environment(config.api_key)[API_KEYS])
    assert load(GatewayConfig, arguments, "baton gateway") == config
    assert load(GatewayConfig, ["--api-key", "c"], "baton gateway").api_key == ("c",)
    monkeypatch.setenv(API_KEYS, child_environment()[API_KEYS])
    assert load(GatewayConfig, [], "baton gateway").api_key == ()


def test_a_key_file_is_handed_on_by_name_beside_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway reads it, again and again."""
    monkeypatch.setenv(API_KEYS, "c")
    config = load(GatewayConfig, ["--api-key-file", "keys", "--host", "0.0.0.0"], "baton gateway")
    assert (config.api_key, config.api_key_file) == (("c",), "keys")
    assert "--api-key-file=keys" in flags(config, GatewayConfig)


@pytest.mark.parametrize("text", ["api-key: 31415", "api-key: s e c 31415", "api-key: ''"])
def test_a_wrong_key_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(StartError, match="--api-key: a value is not") as caught:
        load(GatewayConfig, ["--config", str(file)], "baton gateway")
    assert "31415" not in caught.value.message


@pytest.mark.parametrize("kind", [GatewayConfig, ServeConfig])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.1.2.3", "example.org"])
def test_http_off_loopback_needs_a_key(
    kind: type[Common], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartError, match=f"--host {host} without --api-key"):
        load(kind, ["--host", host], "baton")
    load(kind, ["--host", host, "--api-key", "k"], "baton")
    monkeypatch.setenv(API_KEYS, "k")
    load(kind, ["--host", host], "baton")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    load(GatewayConfig, ["--host", host, "--grpc-host", host, "--join-host", host], "baton")
    if host != "::1":
        load(WorkerConfig, ["--host", host], "baton worker")


def test_workers_reach_each_other_over_ipv4() -> None:
    with pytest.raises(StartError, match="--host: '::1' is IPv6"):
        load(WorkerConfig, ["--host", "::1"], "baton worker")


@pytest.mark.parametrize(
    ("argv", "address"),
    [
        (["--grpc-host", "::1"], "[::1]:8001"),
        (["--join-host", "::1", "--keys", "k"], "[::1]:9001"),
        ([], "127.0.0.1:8001"),
    ],
)
def test_where_workers_join(argv: list[str], address: str) -> None:
    assert load(GatewayConfig, argv, "baton gateway").join_address == address


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
@pytest.mark.parametrize(
    ("kind", "flag"),
    [(GatewayConfig, "--join-host"), (GatewayConfig, "--grpc-host"), (WorkerConfig, "--host")],
)
def test_internal_planes_leave_the_machine_only_with_keys(
    kind: type[Common], flag: str, host: str
) -> None:
    argv = [flag, host] if kind is WorkerConfig else [flag, host, "--api-key", "k"]
    with pytest.raises(StartError, match=f"^{flag}: '{host}' .*baton keys cluster"):
        load(kind, argv, "baton")
    if kind is WorkerConfig and host in ("0.0.0.0", "::"):
        with pytest.raises(StartError, match="no address that others could reach"):
            load(kind, [*argv, "--keys", "k"], "baton")
    else:
        load(kind, [*argv, "--keys", "k"], "baton")


def test_public_grpc_off_loopback_needs_an_api_key_too() -> None:
    with pytest.raises(StartError, match=r"--grpc-host 10\.1\.2\.3 without --api-key"):
        load(GatewayConfig, ["--grpc-host", "10.1.2.3", "--keys", "k"], "baton")


def test_serve_keeps_its_workers_and_their_door_at_home() -> None:
    with pytest.raises(StartError, match="start `baton gateway` and `baton worker`"):
        load(ServeConfig, ["--keys", "k", "--join-host", "10.1.2.3"], "baton serve")


def test_a_certificate_comes_with_its_key() -> None:
    for flag in ("--ssl-certfile", "--ssl-keyfile"):
        with pytest.raises(StartError, match="one is of no use without the other"):
            load(GatewayConfig, [flag, "file"], "baton gateway")
    config = load(GatewayConfig, ["--ssl-certfile", "c", "--ssl-keyfile", "k"], "baton gateway")
    assert (config.scheme, GatewayConfig().scheme) == ("https", "http")


def test_with_keys_workers_have_a_port_of_their_own() -> None:
    assert GatewayConfig(grpc_port=7).join_address == "127.0.0.1:7"
    assert GatewayConfig(grpc_port=7, keys="k").join_address == "127.0.0.1:9001"
