"""Configuration: one frozen dataclass per process, from a YAML file and flags, checked once.

A field is a flag is a YAML key: `max_num_seqs` is `--max-num-seqs` and `max-num-seqs:`. Flags win
over the file. Names are vLLM's where vLLM has the thing. The environment is read here alone; what
it configures is the API keys, because every user of a machine can read its command lines.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_type_hints

import yaml

from cluster.errors import StartError
from cluster.messages import ROLES
from cluster.model import DTYPES
from cluster.ports import address

Config = TypeVar("Config", bound="Common")

BUILT_IN = Path(__file__).parents[1] / "engine" / "tiny" / "model"
"""The checkpoint of baton-tiny. A path, because this package knows nothing of the engine."""

API_KEYS: Final = "BATON_API_KEYS"
"""The environment variable with API keys, one a line, for when no --api-key names any."""

LOG_LEVELS: Final = ("debug", "info", "warning", "error")

MAX_BODY_BYTES: Final = 16 << 20
"""What fits into one frame of the data plane, so into one chunk."""

NOT_YAML: Final = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""What PyYAML raises for text that it cannot read: its own, and whatever a value like 2001-99-99,
`!!bool x` or ten thousand brackets makes Python raise."""

LONGEST_S: Final = 1_000_000
"""Eleven days. A timer beyond that is a slip, or infinity."""

KEY: Final = re.compile(r"[\x21-\x7e]+")
"""What an API key is: what may follow "Bearer "."""


def option(
    default: Any,
    help: str,
    *,
    minimum: float = 0,
    maximum: float = math.inf,
    choices: Sequence[str] = (),
    hidden: bool = False,
    secret: bool = False,
) -> Any:
    """A dataclass field with what its flag needs. The bounds of a number are themselves allowed.

    A secret is never put on a command line nor into an error.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "hidden": hidden,
        "secret": secret,
        "many": isinstance(default, tuple),
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Common:
    """What every serving process is told."""

    model: str = option("", "checkpoint directory; empty for the built-in baton-tiny")
    max_model_len: int = option(0, "longest prompt + answer in tokens; 0 takes the model's own")
    keys: str = option(
        "", "directory made by `baton keys cluster`: TLS and CURVE between gateways and workers"
    )
    skip_digest: bool = option(False, "load a model whose files are not those of its digests.json")
    log_level: str = option("info", "debug, info, warning or error", choices=LOG_LEVELS)
    shutdown_timeout: float = option(
        30.0, "seconds that running requests get to finish on SIGTERM", maximum=LONGEST_S
    )
    pressure_limit: float = option(
        0.85,
        "share of its memory limit, or of its file descriptors, from which on a process takes "
        "nothing new; 0 never refuses",
        maximum=1,
    )
    die_with: int = option(0, "end at once when the process with this id dies", hidden=True)
    start_word: int = option(
        0, "pipe with one byte for the process that says why nothing starts", hidden=True
    )


@dataclass(frozen=True)
class GatewayConfig(Common):
    """`baton gateway`"""

    host: str = option("127.0.0.1", "address of the HTTP server; off loopback only with API keys")
    port: int = option(8000, "port of the HTTP server", minimum=1, maximum=65535)
    grpc_host: str = option(
        "127.0.0.1", "address of the gRPC server; off loopback only with API keys and --keys"
    )
    grpc_port: int = option(
        8001,
        "port of the gRPC server: clients, and without --keys joining workers",
        minimum=1,
        maximum=65535,
    )
    join_host: str = option("127.0.0.1", "with --keys, the address where workers join")
    join_port: int = option(
        9001, "with --keys, the port where workers join", minimum=1, maximum=65535
    )
    ssl_certfile: str = option("", "certificate (PEM) with which HTTP and gRPC clients get TLS")
    ssl_keyfile: str = option("", "its key (PEM)")
    served_model_name: tuple[str, ...] = option(
        (), "names that clients may use; the first is shown"
    )
    api_key: tuple[str, ...] = option(
        (), f"accept only these bearer tokens; repeatable, or in ${API_KEYS}", secret=True
    )
    api_key_file: str = option(
        "",
        "file with bearer tokens, one a line, or with the list that `baton keys api` writes; read "
        "again when it changes",
    )
    max_waiting: int = option(1024, "requests without a first token before 503", minimum=1)
    max_queue_delay: float = option(
        10.0,
        "seconds that a request may have to wait, by what was measured, before 503; 0 is no limit",
        maximum=LONGEST_S,
    )
    queue_timeout: float = option(
        60.0, "seconds a request waits for room before 503", maximum=LONGEST_S
    )
    no_worker_timeout: float = option(
        5.0, "seconds a request waits while no worker is there before 503", maximum=LONGEST_S
    )
    request_timeout: float = option(
        600.0, "seconds a request may take altogether", minimum=0.001, maximum=LONGEST_S
    )
    allow_unknown_fields: bool = option(False, "ignore request fields we do not know")
    keep_alive_timeout: float = option(
        60.0, "seconds an HTTP connection is kept between requests", minimum=1, maximum=LONGEST_S
    )
    max_connections: int = option(
        8192, "connections that are served at once, at each of the ports", minimum=1
    )
    max_connections_per_peer: int = option(
        4096, "HTTP connections from one address; a proxy in front is one address", minimum=1
    )
    write_timeout: float = option(
        60.0,
        "seconds without reading after which a client is hung up on and its work cancelled",
        minimum=0.1,
        maximum=LONGEST_S,
    )
    reattach_timeout: float = option(
        30.0,
        "seconds that a call with an Idempotency-Key goes on without its client, and that its "
        "answer can be fetched again",
        maximum=LONGEST_S,
    )
    listen: tuple[int, ...] = option(
        (), "inherited sockets: of the port shared with siblings, and of an own one", hidden=True
    )
    sibling: tuple[str, ...] = option(
        (), "own addresses of all gateways on the shared port, this one's too", hidden=True
    )

    @property
    def scheme(self) -> str:
        return "https" if self.ssl_certfile else "http"

    @property
    def grpc_address(self) -> str:
        return address(self.grpc_host, self.grpc_port)

    @property
    def join_address(self) -> str:
        """Where workers join: with keys a port that takes nobody else, without them gRPC's."""
        return address(self.join_host, self.join_port) if self.keys else self.grpc_address


@dataclass(frozen=True)
class WorkerOptions(Common):
    """What all workers of a launch share."""

    dtype: str = option("auto", "auto, float32, float16 or bfloat16", choices=("auto", *DTYPES))
    kernels: str = option(
        "auto",
        "auto, torch, native (C++ on the CPU) or triton (CUDA); auto takes the fastest",
        choices=("auto", "torch", "native", "triton"),
    )
    quantization: str = option(
        "none", "none, or int8 weights on the CPU, made at load", choices=("none", "int8")
    )
    device: str = option("cpu", "cpu, cuda or cuda:1 and so on")
    peak_tflops: float = option(0.0, "matrix rate of the device, for MFU; 0 measures it at start")
    peak_gbps: float = option(0.0, "memory rate of the device, for MBU; 0 measures it at start")
    enforce_eager: bool = option(False, "no CUDA graphs")
    profile: str = option("", "directory for a trace of some steps (Perfetto, chrome://tracing)")
    profile_steps: int = option(50, "how many steps --profile traces", minimum=1)
    load_format: str = option(
        "auto",
        "auto, or dummy for random weights of the model's shape",
        choices=("auto", "dummy"),
    )
    seed: int = option(0, "of dummy weights", maximum=2**63 - 1)
    block_size: int = option(
        0, "tokens per KV block, pools may differ; 0: 16 on a CPU, 64 on a GPU"
    )
    num_blocks: int = option(0, "KV blocks; 0 fills --kv-cache-memory-bytes")
    kv_cache_memory_bytes: int = option(
        0,
        "memory for KV when --num-blocks is 0; 0: 1 GiB on a CPU, two fifths of what the weights "
        "leave free on a GPU",
    )
    max_num_seqs: int = option(256, "sequences that a decode worker runs at once", minimum=1)
    max_num_batched_tokens: int = option(
        0, "tokens per step: the size of a prefill chunk; 0: 512 on a CPU, 2048 on a GPU"
    )
    enable_prefix_caching: bool = option(True, "keep the KV of past prompts for shared prefixes")
    threads: int = option(1, "CPU threads of the step loop", minimum=1)
    hang_timeout: float = option(
        10.0,
        "seconds after which a worker whose step loop hangs ends itself; 0 never",
        maximum=LONGEST_S,
    )
    lease: float = option(
        10.0,
        "seconds a promised landing waits for its KV and its start",
        minimum=1,
        maximum=LONGEST_S,
    )
    chunk_bytes: int = option(
        2 << 20, "KV bytes that one pushed chunk aims at", minimum=1, maximum=MAX_BODY_BYTES
    )
    credit_bytes: int = option(
        64 << 20, "unacknowledged KV bytes per link; at least --chunk-bytes", minimum=1
    )
    kv_transport: str = option(
        "auto",
        "auto, or zeromq: no memory shared between workers of one machine",
        choices=("auto", "zeromq"),
    )


@dataclass(frozen=True)
class WorkerConfig(WorkerOptions):
    """`baton worker`"""

    role: str = option("both", "prefill, decode or both", choices=ROLES)
    join: tuple[str, ...] = option(
        ("127.0.0.1:8001",), "where a gateway lets workers join; repeatable"
    )
    name: str = option("", "unique in the cluster; empty makes one")
    host: str = option(
        "127.0.0.1", "address of the control and data planes; off loopback only with --keys"
    )
    port: int = option(0, "port of the gRPC control plane; 0 picks a free one", maximum=65535)
    data_port: int = option(0, "port of the KV data plane; 0 picks a free one", maximum=65535)
    pin: tuple[int, ...] = option((), "CPU cores to stay on")


@dataclass(frozen=True)
class ServeConfig(WorkerOptions, GatewayConfig):
    """`baton serve`: a gateway and its workers on this machine"""

    log_level: str = option("warning", "debug, info, warning or error", choices=LOG_LEVELS)
    prefill: int = option(1, "prefill workers")
    decode: int = option(1, "decode workers")
    both: int = option(0, "undivided workers")
    gateways: int = option(
        1,
        "gateway processes on --port; the second has gRPC on --grpc-port + 1, and so on",
        minimum=1,
        maximum=64,
    )
    decode_block_size: int = option(0, "KV block size of decode workers, where it differs")
    start_timeout: float = option(
        600.0, "seconds until everything must be ready", minimum=1, maximum=LONGEST_S
    )


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
    if "api_key" in kind.__dataclass_fields__ and "api_key" not in values:
        values["api_key"] = environment(API_KEYS).split()
    config = kind(**{key: _frozen(value) for key, value in values.items()})
    check(config)
    return config


def check(config: Common) -> None:
    """Raises StartError for what cannot work: the flag, its value and what is allowed."""
    hints = get_type_hints(type(config))
    for entry in fields(config):
        kind, value = hints[entry.name], getattr(config, entry.name)
        if entry.metadata["many"]:
            kind = get_args(kind)[0]
        for one in value if entry.metadata["many"] else (value,):
            _check_value(_flag(entry.name), one, kind, entry.metadata)
    _check_together(config)


def _check_value(flag: str, value: Any, kind: Any, metadata: Mapping[str, Any]) -> None:
    shown = "a value" if metadata["secret"] else _shown(repr(value))
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, _TYPES[kind]):
        raise StartError(f"{flag}: {shown} is not {_NAMES[kind]}")
    if metadata["secret"] and not KEY.fullmatch(value):
        raise StartError(f"{flag}: {shown} is not a key: visible ASCII characters without spaces")
    if metadata["choices"] and value not in metadata["choices"]:
        raise StartError(f"{flag}: {shown} is not one of {', '.join(metadata['choices'])}")
    low, high = metadata["minimum"], metadata["maximum"]
    if kind in (int, float) and not low <= value <= high:
        allowed = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise StartError(f"{flag}: {shown} is not {allowed}")


_TYPES: dict[Any, Any] = {int: int, float: (int, float), bool: bool, str: str}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _check_together(config: Common) -> None:
    """What only several values, or more than their bounds, show."""
    if config.max_model_len == 1:
        raise StartError("--max-model-len: 1 holds no prompt and answer: at least 2, or 0")
    if isinstance(config, WorkerOptions) and config.credit_bytes < config.chunk_bytes:
        raise StartError(
            f"--credit-bytes: {config.credit_bytes} is not at least --chunk-bytes "
            f"{config.chunk_bytes}: no chunk could be sent"
        )
    if isinstance(config, WorkerConfig) and not config.join:
        raise StartError("--join: none is given, and a worker without a gateway has no work")
    _check_house(config)


def _check_house(config: Common) -> None:
    """Loopback on every plane, until there are keys for those who come from elsewhere."""
    inner: tuple[str, ...] = ()
    if isinstance(config, GatewayConfig):
        inner = ("join_host", "grpc_host")
    elif isinstance(config, WorkerConfig):
        inner = ("host",)
    for name in inner:
        host = getattr(config, name)
        if not config.keys and not _on_loopback(host):
            raise StartError(
                f"{_flag(name)}: {host!r} is not a loopback address: gateways and workers leave "
                "this machine only with --keys, which `baton keys cluster DIR` makes"
            )
    if isinstance(config, WorkerConfig) and config.host in ("", "0.0.0.0", "::"):
        raise StartError(
            f"--host: {config.host!r} is no address that others could reach: give this machine's"
        )
    if isinstance(config, WorkerConfig) and ":" in config.host:
        raise StartError(f"--host: {config.host!r} is IPv6: workers reach each other over IPv4")
    if isinstance(config, GatewayConfig) and not (config.api_key or config.api_key_file):
        for name in ("host", "grpc_host"):
            if not _on_loopback(getattr(config, name)):
                raise StartError(
                    f"{_flag(name)} {getattr(config, name)} without --api-key would answer "
                    "everybody: give --api-key or --api-key-file, or a loopback address"
                )
    if isinstance(config, GatewayConfig) and bool(config.ssl_certfile) != bool(config.ssl_keyfile):
        raise StartError("--ssl-certfile and --ssl-keyfile: one is of no use without the other")
    if isinstance(config, ServeConfig) and not _on_loopback(config.join_host):
        raise StartError(
            f"--join-host: {config.join_host!r} is not a loopback address, and those of `baton "
            "serve` reach nobody else: start `baton gateway` and `baton worker` on each machine"
        )


def _on_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def flags(config: Common, kind: type[Common]) -> list[str]:
    """The command line that makes a `kind` from the fields that it shares with `config`."""
    arguments: list[str] = []
    for entry in fields(kind):
        value = getattr(config, entry.name, entry.default)
        if value == entry.default or entry.metadata["secret"]:
            continue
        if isinstance(value, bool):
            arguments.append(_flag(entry.name) if value else _flag("no_" + entry.name))
        else:  # in one word: a value of its own might begin with "-" and look like a flag
            items = value if isinstance(value, tuple) else (value,)
            arguments += [f"{_flag(entry.name)}={item}" for item in items]
    return arguments


def child_environment(api_key: Sequence[str] = ()) -> dict[str, str]:
    """Our own environment for a child process, with these keys in place of ours."""
    return {**os.environ, API_KEYS: "\n".join(api_key)}


def _parser(kind: type[Common], prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=kind.__doc__, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("model_directory", nargs="?", metavar="MODEL", help="same as --model")
    parser.add_argument("--config", type=Path, help="YAML file with these flags as keys")
    hints = get_type_hints(kind)
    for entry in fields(kind):
        default = (
            " ".join(map(str, entry.default)) if isinstance(entry.default, tuple) else entry.default
        )
        text = f"{entry.metadata['help']} (default: {default if default != '' else 'none'})"
        settings: dict[str, Any] = {"help": argparse.SUPPRESS if entry.metadata["hidden"] else text}
        if hints[entry.name] is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif entry.metadata["many"]:
            settings |= {"action": "extend", "nargs": "+", "type": get_args(hints[entry.name])[0]}
        else:
            settings["type"] = hints[entry.name]
        if hints[entry.name] is not bool:
            settings["metavar"] = entry.name.upper()
        parser.add_argument(_flag(entry.name), default=None, **settings)
    return parser


def _read_yaml(kind: type[Common], path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"--config {path}: {getattr(error, 'strerror', error)}") from None
    except NOT_YAML as error:
        raise StartError(f"--config {path}: not YAML: {str(error).partition(chr(10))[0]}") from None
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
        many = names[name].metadata["many"]
        values[name] = [value] if many and not isinstance(value, list) else value
    return values


def _unknown(what: str, given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"unknown {what} {_shown(given)}" + (f"; did you mean {near[0]}?" if near else "")


def _shown(text: str, most: int = 100) -> str:
    return text if len(text) <= most else text[:most] + "..."


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
