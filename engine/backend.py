"""Which kernels a worker computes with: decided once, at the start, with a reason.

device   kernels="auto"
cuda     triton
cpu      native where the C++ kernels were built and this CPU runs them, else torch
"""

from __future__ import annotations

import logging

import torch

from cluster.errors import StartError
from cluster.model import ModelConfig
from engine import native
from engine.ops import Ops, TorchOps

log = logging.getLogger(__name__)


def find_device(name: str) -> torch.device:
    """Raises StartError for a device that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartError(f"device {name!r} is unknown (cpu, cuda, cuda:1, ...)") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartError(f"device {name!r} is not available: torch sees no GPU")
    if device.type not in ("cpu", "cuda"):
        raise StartError(f"device {name!r} is not supported (cpu, cuda)")
    return device


def choose_ops(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str = "auto",
    quantization: str = "none",
    block_size: int = 16,
) -> Ops:
    """Raises StartError where kernels, device, dtype and the model's shape do not go together. What
    each may be is the configuration's to say (cluster/config.py)."""
    if kernels == "auto":
        kernels = _best(config, device)
    if quantization != "none" and kernels != "native":
        raise StartError(
            f"--quantization {quantization} needs --kernels native, and this worker has {kernels}"
            + (f": {native.why_not()}" if not native.available() else "")
        )
    if kernels == "native":
        return _native_ops(config, device, dtype, quantization)
    if kernels == "triton":
        return _triton_ops(config, device, dtype, block_size)
    if device.type != "cpu":
        raise StartError("--kernels torch: its attention is for the CPU, take triton")
    return TorchOps(dtype, device)


def _best(config: ModelConfig, device: torch.device) -> str:
    if device.type == "cuda":
        return "triton"
    import importlib.util

    if not all(
        importlib.util.find_spec(f"engine.native.{m}") for m in ("linear", "ops", "attention")
    ):
        return "torch"
    reason = native.why_not()
    if not reason:
        from engine.native.backend import unfit

        reason = unfit(config)
    if reason:
        log.warning("plain torch kernels, several times slower", extra={"reason": reason})
        return "torch"
    return "native"


def _native_ops(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, quantization: str
) -> Ops:
    from engine.native.backend import NativeOps, unfit

    reason = "they run on the CPU alone" if device.type != "cpu" else ""
    reason = reason or native.why_not() or unfit(config)
    if reason:
        raise StartError(f"--kernels native: {reason}")
    if quantization == "int8":
        return NativeOps(dtype, "int8")
    return NativeOps(dtype, "bfloat16" if dtype is torch.bfloat16 else "float32")


def _triton_ops(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, block_size: int
) -> Ops:
    try:
        from engine.kernels.backend import TritonOps, unfit
    except ImportError as error:
        raise StartError(f"--kernels triton: {error}") from None
    reason = "they run on a GPU alone: --device cuda" if device.type != "cuda" else ""
    reason = reason or unfit(config, dtype, block_size)
    if reason:
        raise StartError(f"--kernels triton: {reason}")
    return TritonOps(dtype, device)
