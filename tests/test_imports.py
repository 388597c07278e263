"""Imports run one way: cluster <- engine <- kvtransfer <- prefill <- decode, cluster <- gateway."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "cluster": {"cluster"},
    "engine": {"cluster", "engine"},
    "kvtransfer": {"cluster", "engine", "kvtransfer"},
    "prefill": {"cluster", "engine", "kvtransfer", "prefill"},
    "decode": {"cluster", "engine", "kvtransfer", "prefill", "decode"},
    "gateway": {"cluster", "gateway"},
    "deploy": {"cluster", "gateway", "deploy"},
    "bench": {"cluster", "engine", "kvtransfer", "prefill", "decode", "deploy", "bench"},
}
NO_TORCH = ("cluster", "gateway", "deploy")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_directions(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        ours = {name.split(".")[0] for name in imported(path)} & set(MAY_IMPORT)
        assert ours <= MAY_IMPORT[package], path


@pytest.mark.parametrize("package", NO_TORCH)
def test_no_torch_in_the_source(package: str) -> None:
    for path in sources(package):
        assert not {"torch", "transformers", "triton"} & {n.split(".")[0] for n in imported(path)}


@pytest.mark.parametrize("module", ["gateway.main", "deploy.launcher", "cluster.cli"])
def test_no_torch_at_run_time(module: str) -> None:
    """Not through any library either: the gateway starts without gigabytes of it."""
    code = (
        f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_only_the_codec_and_the_public_service_see_protobuf() -> None:
    allowed = {"cluster/wire/codec.py", "gateway/inference.py", "gateway/rpc_status.py"}
    for package in MAY_IMPORT:
        for path in sources(package):
            if path.name.endswith("_pb2.py") or str(path.relative_to(ROOT)) in allowed:
                continue
            assert not any(name.endswith("_pb2") for name in imported(path)), path
