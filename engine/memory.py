"""What fits: memory that is free before a worker takes its own."""

from __future__ import annotations

import logging

import torch

from cluster import pressure
from cluster.errors import StartError
from engine.models.decoder import Decoder

log = logging.getLogger(__name__)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device; of the host also within its cgroups' limits."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch only keeps, for tensors to come, can be taken
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return pressure.free_bytes()


def check_weights(model: Decoder) -> None:
    """Raises StartError for weights that do not fit, before any is read: later the kernel would
    end the process without a word. A GPU has said so by now, when they were allocated."""
    if model.ops.device.type == "cuda":
        return
    free, size = free_bytes(model.ops.device), model.bytes
    if size > free:
        raise StartError(
            f"{size / 1e9:.1f} GB of weights do not fit on {model.ops.device}, which has "
            f"{free / 1e9:.1f} GB left: a smaller model or --dtype, or --quantization int8"
        )


def check_blocks(blocks: int, block_bytes: int, device: torch.device) -> None:
    """Raises StartError for a KV cache that does not fit, with what does."""
    fit = max(0, free_bytes(device) - (64 << 20)) // block_bytes
    if blocks > fit:
        raise StartError(
            f"{blocks} KV blocks of {block_bytes} bytes do not fit on {device}, but {fit} do: "
            f"--num-blocks {fit}, or --kv-cache-memory-bytes {fit * block_bytes}"
        )


def warn_of_pressure(size: int, limit: float, device: torch.device) -> None:
    """Of a KV cache of so many bytes that leaves too little, once it is full, to take anything new:
    its pages are taken when they are first written."""
    used = pressure.memory()
    full = used + (1 - used) * size / max(1, free_bytes(device))
    if device.type == "cpu" and 0 < limit < full:
        log.warning(
            "a full KV cache will hold up new requests: less --kv-cache-memory-bytes, or a higher "
            "--pressure-limit",
            extra={"memory": round(full, 3), "limit": limit},
        )
