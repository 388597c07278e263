"""From a model directory to a Decoder with its weights: check all, then load one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from cluster.errors import BadModel, StartError
from cluster.model import DTYPES, ModelConfig, load_config
from engine.models.decoder import Decoder
from engine.weights import Checkpoint, Shape

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all), called after each tensor."""

LOAD_FORMATS: Final = ("auto", "dummy")
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
    load_format: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a Hugging Face directory; `load_format="dummy"` needs its config.json alone.

    dtype "auto" is float32 on the CPU, where half precision is emulated and slower, and the
    checkpoint's own elsewhere. Raises BadModel for the directory, StartError for the rest.
    """
    if load_format not in LOAD_FORMATS:
        raise StartError(f"load format {load_format!r} is not one of {', '.join(LOAD_FORMATS)}")
    if dtype not in ("auto", *DTYPES):
        raise StartError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    place = _device(device)
    config = load_config(directory)
    report = progress or (lambda done, total: None)
    if load_format == "dummy":
        model = _allocate(config, _dtype(dtype, config.dtype, place), place)
        _fill_random(model, seed, report)
        return LoadedModel(model, config, f"dummy:{seed}")
    checkpoint = Checkpoint(directory)
    checkpoint.require(_shapes(config), _ignored(config))
    stored = checkpoint.tensors[_EMBEDDING].dtype
    known = config.dtype or {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[stored]
    model = _allocate(config, _dtype(dtype, known, place), place)
    _fill(model, checkpoint, report)
    return LoadedModel(model, config, checkpoint.digest())


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartError(f"device {name!r} is unknown (cpu, cuda, cuda:1, ...)") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartError(f"device {name!r} is not available: torch sees no GPU")
    if device.type not in ("cpu", "cuda"):
        raise StartError(f"device {name!r} is not supported (cpu, cuda)")
    return device


def _dtype(asked: str, stored: str, device: torch.device) -> torch.dtype:
    if asked == "auto":
        asked = "float32" if device.type == "cpu" else stored or "float32"
    dtype = getattr(torch, asked)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _shapes(config: ModelConfig) -> dict[str, Shape]:
    """What the checkpoint must hold, found on the meta device: no memory is taken."""
    model = Decoder(config, torch.float32, "meta")
    return {name: tuple(part.shape) for name, part in model.checkpoint_tensors()}


def _ignored(config: ModelConfig) -> frozenset[str]:
    """Tensors of older checkpoints that follow from the configuration or from another tensor."""
    frequencies = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.layers)
    }
    return frozenset(frequencies | ({_HEAD} if config.tied else set()))


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    try:
        return Decoder(config, dtype, device).eval()
    except RuntimeError as error:  # torch has no narrower one for the CPU
        meta = Decoder(config, dtype, "meta")
        size = sum(p.numel() * p.element_size() for p in meta.parameters())
        raise StartError(f"{size / 1e9:.1f} GB of weights do not fit on {device}") from error


@torch.inference_mode()
def _fill(model: Decoder, checkpoint: Checkpoint, report: Progress) -> None:
    parts = dict(model.checkpoint_tensors())
    total = sum(checkpoint.tensors[name].bytes for name in parts)
    done = 0
    for name, part in parts.items():
        tensor = checkpoint.read(name)
        part.copy_(tensor)
        if name == _EMBEDDING and model.config.tied and _HEAD in checkpoint.tensors:
            _check_tied(checkpoint, tensor)
        del tensor  # its mapping goes before the next one is made
        done += checkpoint.tensors[name].bytes
        report(done, total)


def _check_tied(checkpoint: Checkpoint, embedding: torch.Tensor) -> None:
    """Some files hold a tied head twice. Another one would be another model."""
    info = checkpoint.tensors[_HEAD]
    if not torch.equal(checkpoint.read(_HEAD), embedding):
        raise BadModel(
            f"{info.file.name}: tensor {_HEAD!r} differs from {_EMBEDDING!r}, although config.json "
            "sets tie_word_embeddings"
        )


@torch.inference_mode()
def _fill_random(model: Decoder, seed: int, report: Progress) -> None:
    """The same weights on every device: drawn on the CPU in float32, part by part."""
    generator = torch.Generator().manual_seed(seed)
    parts = dict(model.checkpoint_tensors())
    total = sum(part.numel() * part.element_size() for part in parts.values())
    done = 0
    for name, part in parts.items():
        if name.endswith("norm.weight"):
            part.fill_(1.0)
        else:
            drawn = torch.empty(part.shape).uniform_(-1.0, 1.0, generator=generator)
            part.copy_(drawn.mul_(_DUMMY_SCALE))
        done += part.numel() * part.element_size()
        report(done, total)
