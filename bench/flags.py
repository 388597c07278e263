"""Flags: the command line of `baton bench serve` -> ServeOptions."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.options import BACKENDS, DATASETS, METRICS, ServeOptions, require
from cluster.errors import StartError

SLO_METRICS = ("ttft", "tpot", "e2el")
_DEFAULTS = ServeOptions()

_SAMPLING: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "repetition_penalty": float,
}


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """Turn `ttft:500 tpot:50` into milliseconds by metric. Raises StartError for anything else."""
    goodput: dict[str, float] = {}
    for pair in pairs:
        name, colon, value = pair.partition(":")
        require(bool(colon), f"--goodput {pair!r}: write METRIC:MILLISECONDS, as in ttft:500")
        if name not in SLO_METRICS:
            near = difflib.get_close_matches(name, SLO_METRICS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise StartError(
                f"--goodput {pair!r}: the metric must be one of {', '.join(SLO_METRICS)}{hint}"
            )
        require(name not in goodput, f"--goodput names {name} twice")
        limit = _number(value, f"--goodput {pair!r}")
        require(0 <= limit < math.inf, f"--goodput {pair!r}: the limit must be 0 or more")
        goodput[name] = limit
    return goodput


def parse_metrics(names: str) -> tuple[str, ...]:
    """Turn `ttft,itl` into metric names. Raises StartError for an unknown one."""
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        require(
            name in METRICS,
            f"--percentile-metrics: {name!r} must be one of {', '.join(METRICS)}",
        )
    return chosen


def parse_percentiles(values: str) -> tuple[float, ...]:
    """Turn `50,99.9` into numbers. Raises StartError for one outside 0..100."""
    chosen = tuple(_number(value, "--metric-percentiles") for value in values.split(","))
    for value in chosen:
        require(0 <= value <= 100, f"--metric-percentiles: {value:g} is not within 0..100")
    return chosen


def parse_metadata(pairs: Iterable[str]) -> dict[str, str]:
    """Turn `KEY=VALUE` items into a dict. Raises StartError for an item without `=`."""
    metadata: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        require(bool(equals) and bool(key.strip()), f"--metadata {pair!r}: write KEY=VALUE")
        metadata[key.strip()] = value.strip()
    return metadata


def parse_extra_body(text: str) -> dict[str, Any]:
    """Read --extra-body. Raises StartError unless it is a JSON object."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise StartError(f"--extra-body is not JSON: {error}") from None
    require(isinstance(body, dict), "--extra-body must be a JSON object")
    return dict(body)


def build_parser() -> argparse.ArgumentParser:
    """The command line; --help shows every default, and ServeOptions is where they stand."""
    parser = argparse.ArgumentParser(
        prog="baton bench serve",
        description="Measure an OpenAI-compatible server: TTFT, TPOT, ITL, E2EL and goodput.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_server_flags(parser.add_argument_group("server"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_traffic_flags(parser.add_argument_group("traffic"))
    _add_sampling_flags(parser.add_argument_group("sampling"))
    _add_result_flags(parser.add_argument_group("results"))
    defaults = {
        field.name: getattr(_DEFAULTS, field.name)
        for field in dataclasses.fields(ServeOptions)
        if field.name not in ("base_url", "sampling", "goodput", "metadata")
    }
    parser.set_defaults(**defaults)
    return parser


def parse_options(argv: list[str]) -> ServeOptions:
    """Parse the command line. Raises StartError; SystemExit for --help and unknown flags."""
    flags = vars(build_parser().parse_args(argv))
    host, port = flags.pop("host"), flags.pop("port")
    if flags["base_url"] is None:
        flags["base_url"] = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    input_len, output_len = flags.pop("input_len"), flags.pop("output_len")
    if input_len is not None:
        flags["random_input_len"] = input_len
    if output_len is not None:
        for name in ("random", "prefix_repetition", "custom", "sharegpt"):
            flags[f"{name}_output_len"] = output_len
    # Random prompts end wherever the model likes; only a fixed length makes runs comparable.
    flags["ignore_eos"] = flags["ignore_eos"] or flags["dataset_name"] == "random"
    chosen = {name: flags.pop(name) for name in _SAMPLING}
    flags["sampling"] = {name: value for name, value in chosen.items() if value is not None}
    flags["goodput"] = parse_goodput(flags["goodput"])
    flags["metadata"] = parse_metadata(flags["metadata"])
    return ServeOptions(**flags)


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--base-url", help="server, instead of --host and --port")
    add("--host", default="127.0.0.1", help="server's host")
    add("--port", type=int, default=8000, help="server's port")
    add("--endpoint", help="path; /v1/completions, or /v1/chat/completions for openai-chat")
    add("--backend", choices=BACKENDS, help="vllm is another name for openai")
    add("--model", help="model name; the server's first model if not given")
    add("--tokenizer", help="directory with a tokenizer.json; else the server's /tokenize is used")
    add("--api-key", help="sent as a bearer token")
    add("--request-timeout", type=float, help="seconds until a request fails")


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset-name", choices=DATASETS, help="what to ask")
    add("--dataset-path", type=Path, help="JSONL (custom, sharegpt) or JSON (sharegpt) file")
    add("--num-prompts", type=int, help="requests to send")
    add("--num-warmups", type=int, help="unmeasured requests sent before")
    add("--seed", type=int, help="of prompts and arrivals")
    add("--disable-shuffle", action="store_true", help="keep a file's order")
    add("--input-len", type=int, help="same as --random-input-len")
    add("--output-len", type=int, help="output length for whichever data set is used")
    add("--random-input-len", type=int, help="prompt tokens after the prefix")
    add("--random-output-len", type=int, help="output tokens")
    add("--random-range-ratio", type=float, help="lengths vary by +- this share")
    add("--random-prefix-len", type=int, help="tokens that all prompts share")
    add("--prefix-repetition-prefix-len", type=int, help="tokens per prefix")
    add("--prefix-repetition-suffix-len", type=int, help="tokens per suffix")
    add("--prefix-repetition-num-prefixes", type=int, help="different prefixes")
    add("--prefix-repetition-output-len", type=int, help="output tokens")
    add("--custom-output-len", type=int, help="-1: each line's output_tokens")
    add("--sharegpt-output-len", type=int, help="output tokens; the answer's own if not given")


def _add_traffic_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--request-rate", type=float, help="requests per second; inf: at once")
    add("--burstiness", type=float, help="1: Poisson; less: bursts; more: evener")
    add("--max-concurrency", type=int, help="requests in flight at most")


def _add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    for name, kind in _SAMPLING.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=_DEFAULTS.sampling.get(name),
            help="sent with every request",
        )
    add = group.add_argument
    add("--ignore-eos", action="store_true", help="always on for random data")
    add("--extra-body", type=parse_extra_body, help="JSON object merged into every request")
    add("--timeline", action="store_true", help="ask Baton for each request's time per phase")


def _add_result_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="ttft, tpot, e2el limits")
    add("--percentile-metrics", type=parse_metrics, help="metrics to report")
    add("--metric-percentiles", type=parse_percentiles, help="percentiles to report")
    add("--save-result", action="store_true", help="write a JSON file")
    add("--save-detailed", action="store_true", help="with every request's times and text in it")
    add("--append-result", action="store_true", help="append to the JSON file as a new line")
    add("--result-dir", type=Path, help="where the file goes")
    add("--result-filename", help="its name; made from label, rate, model and date if not given")
    add("--label", help="first part of the file's name; the backend if not given")
    add("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="kept in the JSON file")
    add("--disable-tqdm", action="store_true", help="no progress bar")


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    require(not math.isnan(value), f"{where}: {text!r} is not a number")
    return value
