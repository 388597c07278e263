"""Checkpoints and clusters that several tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import build
from tests.e2e.cluster import Cluster, serving

Checkpoint = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """checkpoint("qwen3") is a directory with a small random model of that architecture."""
    built: dict[str, Path] = {}

    def get(name: str, **overrides: Any) -> Path:
        key = name + "".join(f"-{field}-{value}" for field, value in sorted(overrides.items()))
        if key not in built:
            built[key] = build(name, tmp_path_factory.mktemp("models") / key, **overrides)
        return built[key]

    return get


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The built-in model on one prefill and one decode worker."""
    with serving(tmp_path_factory.mktemp("tiny")) as cluster:
        yield cluster
