"""ServeOptions: what `baton bench serve` is told, under the flag names of `vllm bench serve`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import StartError

METRICS = ("ttft", "tpot", "itl", "e2el")
DATASETS = ("random", "custom", "sharegpt", "prefix_repetition")
BACKENDS = ("openai", "vllm", "openai-chat")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """One benchmark run. Checked when made: raises StartError with a message that says the fix.

    Lengths count tokens, times are seconds, `goodput` holds milliseconds per metric.
    `sampling` are body fields sent with every request; `extra_body` wins over all others.
    """

    base_url: str = "http://127.0.0.1:8000"
    backend: str = "openai"
    endpoint: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    api_key: str | None = field(default=None, repr=False)
    request_timeout: float = 3600.0

    dataset_name: str = "random"
    dataset_path: Path | None = None
    num_prompts: int = 1000
    num_warmups: int = 0
    seed: int = 0
    disable_shuffle: bool = False
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128
    custom_output_len: int = 256
    sharegpt_output_len: int | None = None

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None

    ignore_eos: bool = False
    sampling: dict[str, float] = field(default_factory=lambda: {"temperature": 0.0})
    extra_body: dict[str, Any] = field(default_factory=dict)
    timeline: bool = False

    goodput: dict[str, float] = field(default_factory=dict)
    percentile_metrics: tuple[str, ...] = METRICS
    metric_percentiles: tuple[float, ...] = (99.0,)
    save_result: bool = False
    save_detailed: bool = False
    append_result: bool = False
    result_dir: Path = Path(".")
    result_filename: str | None = None
    label: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        require(self.base_url.startswith(("http://", "https://")), "--base-url needs http://")
        require(self.backend in BACKENDS, f"--backend must be one of {', '.join(BACKENDS)}")
        is_chat_path = self.path.endswith("/chat/completions")
        require(
            self.path.endswith("/completions") and is_chat_path == self.is_chat,
            f"--backend {self.backend} does not fit --endpoint {self.path}: openai is for "
            "/v1/completions, openai-chat for /v1/chat/completions",
        )
        self._check_data()
        require(self.request_rate > 0, "--request-rate must be greater than 0 (or inf)")
        require(self.burstiness > 0, "--burstiness must be greater than 0")
        require(self.request_timeout > 0, "--request-timeout must be greater than 0")
        require(
            self.max_concurrency is None or self.max_concurrency > 0,
            "--max-concurrency must be greater than 0",
        )

    def _check_data(self) -> None:
        require(
            self.dataset_name in DATASETS, f"--dataset-name must be one of {', '.join(DATASETS)}"
        )
        from_file = self.dataset_name in ("custom", "sharegpt")
        require(
            not from_file or self.dataset_path is not None,
            f"--dataset-name {self.dataset_name} needs --dataset-path",
        )
        require(
            from_file or self.dataset_path is None,
            f"--dataset-path is a file for custom or sharegpt, not for {self.dataset_name}",
        )
        require(0 <= self.random_range_ratio < 1, "--random-range-ratio must be in [0, 1)")
        require(
            self.custom_output_len > 0 or self.custom_output_len == -1,
            "--custom-output-len must be at least 1, or -1 for each line's own output_tokens",
        )
        require(
            self.dataset_name != "prefix_repetition"
            or self.num_prompts >= self.prefix_repetition_num_prefixes,
            f"--num-prompts {self.num_prompts} is less than --prefix-repetition-num-prefixes "
            f"{self.prefix_repetition_num_prefixes}",
        )
        at_least = {
            "num_prompts": 1,
            "num_warmups": 0,
            "random_input_len": 0,
            "random_output_len": 1,
            "random_prefix_len": 0,
            "prefix_repetition_prefix_len": 0,
            "prefix_repetition_suffix_len": 1,
            "prefix_repetition_num_prefixes": 1,
            "prefix_repetition_output_len": 1,
            "sharegpt_output_len": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            require(value is None or value >= least, f"{flag} must be at least {least}")

    @property
    def is_chat(self) -> bool:
        return self.backend == "openai-chat"

    @property
    def path(self) -> str:
        return self.endpoint or ("/v1/chat/completions" if self.is_chat else "/v1/completions")

    @property
    def url(self) -> str:
        return self.base_url.rstrip("/") + self.path


def require(condition: bool, message: str) -> None:
    """Raise StartError with `message` unless the condition holds."""
    if not condition:
        raise StartError(message)
