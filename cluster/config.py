"""Configuration: one frozen dataclass per process, from a YAML file and flags, checked once.

A field is a flag is a YAML key: `max_num_seqs` is `--max-num-seqs` and `max-num-seqs:`. Flags win
over the file. Names are vLLM's where vLLM has the thing. The environment is read here alone.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from cluster.errors import StartError
from cluster.messages import ROLES

Config = TypeVar("Config", bound="Common")

BUILT_IN = Path(__file__).parents[1] / "engine" / "tiny" / "model"
"""The checkpoint of baton-tiny. A path, because this package knows nothing of the engine."""


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field with what its flag needs."""
    metadata = {"help": help, **extra}
    if isinstance(default, tuple):
        return field(default=default, metadata={**metadata, "many": True})
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Common:
    """What every serving process is told."""

    model: str = option("", "checkpoint directory; empty for the built-in baton-tiny")
    max_model_len: int = option(0, "longest prompt + answer in tokens; 0 takes the model's own")
    log_level: str = option("info", "debug, info, warning or error")
    shutdown_timeout: float = option(30.0, "seconds that running requests get to finish on SIGTERM")
    die_with: int = option(0, "end at once when the process with this id dies", hidden=True)


@dataclass(frozen=True)
class GatewayConfig(Common):
    """`baton gateway`"""

    host: str = option("127.0.0.1", "address of the HTTP server")
    port: int = option(8000, "port of the HTTP server")
    grpc_host: str = option(
        "127.0.0.1", "address of the gRPC server; loopback only, it has no keys"
    )
    grpc_port: int = option(8001, "port of the gRPC server: clients and joining workers")
    served_model_name: tuple[str, ...] = option(
        (), "names that clients may use; the first is shown"
    )
    api_key: tuple[str, ...] = option((), "accept only these bearer tokens; repeatable")
    max_waiting: int = option(1024, "requests without a first token before 503")
    queue_timeout: float = option(60.0, "seconds a request waits for room before 503")
    request_timeout: float = option(600.0, "seconds a request may take altogether")
    allow_unknown_fields: bool = option(False, "ignore request fields we do not know")


@dataclass(frozen=True)
class WorkerOptions(Common):
    """What all workers of a launch share."""

    dtype: str = option("auto", "auto, float32, float16 or bfloat16")
    load_format: str = option("auto", "auto, or dummy for random weights of the model's shape")
    seed: int = option(0, "of dummy weights")
    block_size: int = option(16, "tokens per KV block; pools may differ")
    num_blocks: int = option(0, "KV blocks; 0 fills --kv-cache-memory-bytes")
    kv_cache_memory_bytes: int = option(1 << 30, "memory for KV when --num-blocks is 0")
    max_num_seqs: int = option(256, "sequences that a decode worker runs at once")
    max_num_batched_tokens: int = option(512, "tokens per step: the size of a prefill chunk")
    enable_prefix_caching: bool = option(True, "keep the KV of past prompts for shared prefixes")
    threads: int = option(1, "CPU threads of the step loop")
    lease: float = option(10.0, "seconds a promised landing waits for its KV and its start")
    chunk_bytes: int = option(2 << 20, "KV bytes that one pushed chunk aims at")
    credit_bytes: int = option(64 << 20, "unacknowledged KV bytes per link")


@dataclass(frozen=True)
class WorkerConfig(WorkerOptions):
    """`baton worker`"""

    role: str = option("both", "prefill, decode or both", choices=ROLES)
    join: tuple[str, ...] = option(("127.0.0.1:8001",), "gRPC address of a gateway; repeatable")
    name: str = option("", "unique in the cluster; empty makes one")
    host: str = option("127.0.0.1", "address of the control and data planes; loopback only")
    port: int = option(0, "port of the gRPC control plane; 0 picks a free one")
    data_port: int = option(0, "port of the KV data plane; 0 picks a free one")
    pin: tuple[int, ...] = option((), "CPU cores to stay on")


@dataclass(frozen=True)
class ServeConfig(WorkerOptions, GatewayConfig):
    """`baton serve`: a gateway and its workers on this machine"""

    log_level: str = option("warning", "debug, info, warning or error")
    prefill: int = option(1, "prefill workers")
    decode: int = option(1, "decode workers")
    both: int = option(0, "undivided workers")
    decode_block_size: int = option(0, "KV block size of decode workers, where it differs")
    start_timeout: float = option(600.0, "seconds until everything must be ready")


def load(kind: type[Config], argv: Sequence[str], prog: str) -> Config:
    """Parse flags over an optional `--config` YAML file. Raises StartError with what to change."""
    parser = _parser(kind, prog)
    try:
        known, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise StartError(str(error)) from None
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise StartError(_unknown("flag", unknown[0].split("=")[0], flags))
    given = {key: value for key, value in vars(known).items() if value is not None}
    positional = given.pop("model_directory", None)
    values = _read_yaml(kind, given.pop("config")) if "config" in given else {}
    values.update(given)
    if positional is not None:
        values["model"] = positional
    try:
        config = kind(**{key: _frozen(value) for key, value in values.items()})
    except TypeError as error:
        raise StartError(str(error)) from None
    check(config)
    return config


def check(config: Common) -> None:
    """Raises StartError for values that cannot work, with the flag's name."""
    hints = get_type_hints(type(config))
    for entry in fields(config):
        value = getattr(config, entry.name)
        flag = _flag(entry.name)
        kind = hints[entry.name]
        wrong_type = (
            (kind is bool and not isinstance(value, bool))
            or (
                kind in (int, float)
                and (isinstance(value, bool) or not isinstance(value, int | float))
            )
            or (kind is int and not isinstance(value, int))
            or (kind is str and not isinstance(value, str))
        )
        if wrong_type:
            raise StartError(f"{flag}: {value!r} is not {_name(kind)}")
        if kind in (int, float) and value < 0:
            raise StartError(f"{flag}: must not be negative, is {value}")
        choices = entry.metadata.get("choices")
        if choices and value not in choices:
            raise StartError(f"{flag}: {value!r} is not one of {', '.join(choices)}")
        if entry.name.endswith("port") and value > 65535:
            raise StartError(f"{flag}: {value} is not a port")
    for name in ("grpc_host",) if isinstance(config, GatewayConfig) else ("host",):
        if getattr(config, name, "127.0.0.1") not in ("127.0.0.1", "localhost", "::1"):
            raise StartError(
                f"{_flag(name)}: this plane has no authentication yet, so it stays on loopback"
            )


def flags(config: Common, kind: type[Common]) -> list[str]:
    """The command line that makes a `kind` from the fields it shares with `config`."""
    arguments: list[str] = []
    for entry in fields(kind):
        value = getattr(config, entry.name, entry.default)
        if value == entry.default:
            continue
        if isinstance(value, bool):
            arguments.append(_flag(entry.name) if value else _flag("no_" + entry.name))
        elif isinstance(value, tuple):
            arguments += [word for item in value for word in (_flag(entry.name), str(item))]
        else:
            arguments += [_flag(entry.name), str(value)]
    return arguments


def _parser(kind: type[Common], prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=kind.__doc__, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("model_directory", nargs="?", metavar="MODEL", help="same as --model")
    parser.add_argument("--config", type=Path, help="YAML file with these flags as keys")
    hints = get_type_hints(kind)
    for entry in fields(kind):
        hidden = entry.metadata.get("hidden", False)
        default = (
            " ".join(map(str, entry.default)) if isinstance(entry.default, tuple) else entry.default
        )
        text = f"{entry.metadata['help']} (default: {default if default != '' else 'none'})"
        settings: dict[str, Any] = {"help": argparse.SUPPRESS if hidden else text}
        if hints[entry.name] is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif entry.metadata.get("many"):
            settings |= {"action": "extend", "nargs": "+", "type": get_args(hints[entry.name])[0]}
        else:
            settings["type"] = hints[entry.name]
        if not settings.get("action") or entry.metadata.get("many"):
            settings["metavar"] = entry.name.upper()
        parser.add_argument(_flag(entry.name), default=None, **settings)
    return parser


def _read_yaml(kind: type[Common], path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"--config {path}: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError as error:
        raise StartError(f"--config {path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise StartError(f"--config {path}: must map flag names to values")
    names = {entry.name: entry for entry in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise StartError(
                f"{path}: " + _unknown("key", str(key), [n.replace("_", "-") for n in names])
            )
        many = names[name].metadata.get("many")
        values[name] = [value] if many and not isinstance(value, list) else value
    return values


def _unknown(what: str, given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"unknown {what} {given}" + (f"; did you mean {near[0]}?" if near else "")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(get_origin(kind) or kind, str(kind))


def model_directory(config: Common) -> Path:
    """Where the checkpoint is. Raises StartError when there is no such directory."""
    if not config.model:
        return BUILT_IN
    path = Path(config.model)
    if not path.is_dir():
        raise StartError(f"model {config.model}: no such directory")
    return path


def environment(name: str, default: str = "") -> str:
    """The only door to the environment."""
    return os.environ.get(name, default)
