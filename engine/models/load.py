"""From a model directory to a Decoder with its weights: check all, then load one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from cluster import digests
from cluster.errors import BadModel, StartError
from cluster.model import ModelConfig, load_config
from engine.backend import choose_ops, find_device
from engine.memory import check_weights
from engine.models.decoder import Decoder
from engine.ops import Ops, TorchOps
from engine.weights import Checkpoint, Shape

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all), called after each piece of a tensor."""

_STORED: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"
_DUMMY_SCALE: Final = 0.02


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for `forward`. The digest is the same for the same weights in any dtype."""

    model: Decoder
    config: ModelConfig
    weights_digest: str


def load_model(
    directory: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    kernels: str = "auto",
    quantization: str = "none",
    block_size: int = 16,
    load_format: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    skip_digest: bool = False,
) -> LoadedModel:
    """Load a Hugging Face directory; `load_format="dummy"` needs its config.json alone.

    Files that are not those of its digests.json are refused, if it has one (cluster/digests.py).

    dtype "auto" is float32 on the CPU, where half precision is emulated and slower, and the
    checkpoint's own elsewhere. Raises BadModel for the directory, StartError for the rest.
    """
    place = find_device(device)
    digests.verify(directory, weights=load_format == "auto", skip=skip_digest)
    config = load_config(directory)
    report = progress or (lambda done, total: None)
    checkpoint = None
    stored = config.dtype
    if load_format == "auto":
        checkpoint = Checkpoint(directory)
        checkpoint.require(_shapes(config), _ignored(config))
        stored = stored or _STORED[checkpoint.tensors[_EMBEDDING].dtype]
    chosen = _dtype(dtype, stored, place)
    ops = choose_ops(config, place, chosen, kernels, quantization, block_size)
    model = _allocate(config, ops)
    check_weights(model)
    if checkpoint is None:
        _fill_random(model, seed, report)
        return LoadedModel(model, config, _named(_dummy_digest(seed, place), quantization))
    _fill(model, checkpoint, report)
    return LoadedModel(model, config, _named(checkpoint.digest(), quantization))


def _named(digest: str, quantization: str) -> str:
    """Quantised weights are others: their KV goes to no worker that has the whole ones."""
    return digest if quantization == "none" else f"{digest}:{quantization}"


def _dtype(asked: str, stored: str, device: torch.device) -> torch.dtype:
    if asked == "auto":
        asked = "float32" if device.type == "cpu" else stored or "float32"
    dtype = getattr(torch, asked)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _shapes(config: ModelConfig) -> dict[str, Shape]:
    """What the checkpoint must hold, found on the meta device: no memory is taken."""
    model = Decoder(config, TorchOps(torch.float32, "meta"))
    return {name: part.shape for name, part in model.checkpoint_parts()}


def _ignored(config: ModelConfig) -> frozenset[str]:
    """Tensors of older checkpoints that follow from the configuration or from another tensor."""
    frequencies = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.layers)
    }
    return frozenset(frequencies | ({_HEAD} if config.tied else set()))


def _allocate(config: ModelConfig, ops: Ops) -> Decoder:
    try:
        return Decoder(config, ops).eval()
    except (RuntimeError, MemoryError) as error:  # torch has no narrower one for the CPU
        size = sum(math.prod(shape) for shape in _shapes(config).values()) * ops.dtype.itemsize
        raise StartError(
            f"about {size / 1e9:.1f} GB of weights do not fit on {ops.device}: a smaller model, "
            "or --quantization int8"
        ) from error


@torch.inference_mode()
def _fill(model: Decoder, checkpoint: Checkpoint, report: Progress) -> None:
    parts = dict(model.checkpoint_parts())
    total = sum(checkpoint.tensors[name].bytes for name in parts)
    done = 0
    for name, part in parts.items():
        for first, rows in checkpoint.read(name):
            part.fill(first, rows)
            done += rows.nbytes
            report(done, total)
            del rows  # its mapping goes before the next one is made
    if model.config.tied and _HEAD in checkpoint.tensors:
        _check_tied(checkpoint)


def _check_tied(checkpoint: Checkpoint) -> None:
    """Some files hold a tied head twice. Another one would be another model."""
    info = checkpoint.tensors[_HEAD]
    both = zip(checkpoint.read(_HEAD), checkpoint.read(_EMBEDDING), strict=True)
    if not all(torch.equal(head, embedding) for (_, head), (_, embedding) in both):
        raise BadModel(
            f"{info.file.name}: tensor {_HEAD!r} differs from {_EMBEDDING!r}, although config.json "
            "sets tie_word_embeddings"
        )


@torch.inference_mode()
def _fill_random(model: Decoder, seed: int, report: Progress) -> None:
    """Drawn part by part in float32, on the CPU unless the model is on a GPU: eight billion numbers
    take a core a minute."""
    place = _drawn_on(model.ops.device)
    generator = torch.Generator(place).manual_seed(seed)
    parts = dict(model.checkpoint_parts())
    total = 4 * sum(math.prod(part.shape) for part in parts.values())
    done = 0
    for name, part in parts.items():
        if name.endswith("norm.weight"):
            drawn = torch.ones(part.shape, device=place)
        else:
            drawn = torch.empty(part.shape, device=place).uniform_(-1.0, 1.0, generator=generator)
            drawn.mul_(_DUMMY_SCALE)
        part.fill(0, drawn)
        done += drawn.nbytes
        report(done, total)


def _drawn_on(device: torch.device) -> torch.device:
    return device if device.type == "cuda" else torch.device("cpu")


def _dummy_digest(seed: int, device: torch.device) -> str:
    """The CPU draws the same numbers everywhere, a GPU those of its kind."""
    if _drawn_on(device).type == "cpu":
        return f"dummy:{seed}"
    return f"dummy:{seed}:{torch.cuda.get_device_name(device)}"
