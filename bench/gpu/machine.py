"""What is here, and what it reaches: the two limits that everything else is held against."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any, Final

import torch

from bench.gpu.setting import Limits, Row, Rows, Setting
from bench.gpu.stopwatch import Stopwatch

COPY: Final = "copy, bytes read and written"
PRODUCT: Final = "matrix product"

_PACKAGES: Final = ("torch", "triton", "transformers", "numpy")


def machine(setting: Setting) -> Rows:
    """Random data: on zeros a product is faster, for the chip then draws less power."""
    yield {"what": "versions", **_versions(setting)}
    watch = Stopwatch(setting.place)
    yield from _bytes(setting, watch)
    yield _products(setting, watch)


def _bytes(setting: Setting, watch: Stopwatch) -> Rows:
    source = torch.empty(setting.sizes.copied // 4, device=setting.place)
    source.normal_(generator=setting.random())
    target = torch.empty_like(source)
    seconds = watch.seconds([lambda: target.copy_(source)])
    yield _rate(COPY, seconds, 2 * source.nbytes, "GB/s", 1e9)
    yield _rate("read, bytes", watch.seconds([source.sum]), source.nbytes, "GB/s", 1e9)


def _products(setting: Setting, watch: Stopwatch) -> Row:
    side, half = setting.sizes.square, torch.bfloat16 if setting.on_gpu else torch.float32
    a, b = (
        torch.randn((side, side), generator=setting.random(n), device=setting.place).to(half)
        for n in range(2)
    )
    out = torch.empty_like(a)
    seconds = watch.seconds([lambda: torch.mm(a, b, out=out)])
    return _rate(f"{PRODUCT} {side}^3 {half}", seconds, 2 * side**3, "TFLOP/s", 1e12)


def limits_of(rows: list[Row]) -> Limits:
    """What `machine` found; what it did not, as it was."""
    found = {row["what"]: row["rate"] for row in rows if "rate" in row}
    product = next((rate for what, rate in found.items() if what.startswith(PRODUCT)), None)
    usual = Limits()
    return Limits(found.get(COPY, usual.copy), product or usual.products)


def _rate(what: str, seconds: float, count: float, unit: str, size: float) -> Row:
    return {
        "what": what,
        "us": seconds * 1e6,
        "rate": count / seconds,
        unit: count / seconds / size,
    }


def _versions(setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.release()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not there"
    if setting.on_gpu:
        about = torch.cuda.get_device_properties(setting.place)
        found |= {
            "device": about.name,
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "memory_gb": round(about.total_memory / 1e9, 1),
            "l2_mb": round(about.L2_cache_size / 1e6, 1),
            "cuda": torch.version.cuda,
        }
    return found
