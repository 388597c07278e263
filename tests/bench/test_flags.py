from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench.flags import build_parser, parse_goodput, parse_options
from bench.options import ServeOptions
from cluster.errors import StartError


def test_no_flags_is_the_default_run() -> None:
    options = parse_options([])
    # Random prompts always run to their full length.
    assert options == ServeOptions(ignore_eos=True)
    assert options.url == "http://127.0.0.1:8000/v1/completions"
    assert (options.num_prompts, options.request_rate) == (1000, math.inf)
    assert options.sampling == {"temperature": 0.0}


def test_server_address() -> None:
    assert parse_options(["--host", "::1", "--port", "9"]).base_url == "http://[::1]:9"
    given = parse_options(["--base-url", "https://x/", "--backend", "openai-chat", "--port", "9"])
    assert given.url == "https://x/v1/chat/completions"


def test_every_kind_of_value() -> None:
    line = (
        "--goodput ttft:500 tpot:50.5 --percentile-metrics ttft,itl --metric-percentiles 50,99.9 "
        "--metadata a=1 b=x=y --top-p 0.9 --top-k 4 --request-rate inf --burstiness 0.5 "
        '--extra-body {"user":"me"} --save-result --result-dir out --timeline'
    )
    options = parse_options(line.split())
    assert options.goodput == {"ttft": 500.0, "tpot": 50.5}
    assert options.percentile_metrics == ("ttft", "itl")
    assert options.metric_percentiles == (50.0, 99.9)
    assert options.metadata == {"a": "1", "b": "x=y"}
    assert options.sampling == {"temperature": 0.0, "top_p": 0.9, "top_k": 4}
    assert options.extra_body == {"user": "me"}
    assert options.save_result and options.timeline and options.result_dir == Path("out")


def test_general_lengths_reach_every_data_set() -> None:
    options = parse_options(["--input-len", "7", "--output-len", "9"])
    assert options.random_input_len == 7
    assert options.random_output_len == options.prefix_repetition_output_len == 9
    assert options.custom_output_len == options.sharegpt_output_len == 9


def test_other_data_may_end_by_itself() -> None:
    assert not parse_options(["--dataset-name", "prefix_repetition"]).ignore_eos
    assert parse_options(["--dataset-name", "prefix_repetition", "--ignore-eos"]).ignore_eos


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--goodput ttft", "METRIC:MILLISECONDS"),
        ("--goodput itl:5", "must be one of ttft, tpot, e2el"),
        ("--goodput tppt:5", "did you mean tpot?"),
        ("--goodput ttft:fast", "'fast' is not a number"),
        ("--goodput ttft:nan", "not a number"),
        ("--goodput ttft:-1", "0 or more"),
        ("--goodput ttft:1 ttft:2", "twice"),
        ("--percentile-metrics ttft,latency", "'latency' must be one of"),
        ("--metric-percentiles 101", "within 0..100"),
        ("--metric-percentiles 9,,5", "not a number"),
        ("--metadata key", "KEY=VALUE"),
        ("--extra-body [1]", "JSON object"),
        ("--extra-body {", "not JSON"),
        ("--base-url localhost:8000", "http://"),
        ("--endpoint /v1/chat/completions", "openai-chat"),
        ("--backend openai-chat --endpoint /v1/completions", "openai-chat"),
        ("--dataset-name custom", "needs --dataset-path"),
        ("--dataset-path x.jsonl", "not for random"),
        ("--random-range-ratio 1", "[0, 1)"),
        ("--custom-output-len 0", "-1"),
        ("--num-prompts 0", "--num-prompts must be at least 1"),
        ("--dataset-name prefix_repetition --num-prompts 3", "num-prefixes 10"),
        ("--request-rate 0", "--request-rate"),
        ("--request-rate nan", "--request-rate"),
        ("--burstiness -1", "--burstiness"),
        ("--max-concurrency 0", "--max-concurrency"),
        ("--request-timeout 0", "--request-timeout"),
    ],
)
def test_wrong_values_say_the_fix(flags: str, message: str) -> None:
    with pytest.raises(StartError) as raised:
        parse_options(flags.split())
    assert message in str(raised.value)


def test_goodput_of_nothing() -> None:
    assert parse_goodput([]) == {}


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--num-prompt", "3"])
    assert "--num-prompt" in capsys.readouterr().err


def test_help_shows_the_defaults() -> None:
    text = " ".join(build_parser().format_help().split())
    assert "requests to send (default: 1000)" in text


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(parse_options(["--api-key", "secret"]))
