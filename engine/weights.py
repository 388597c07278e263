"""Weights of a checkpoint: safetensors checked before they are trusted, then read piece by piece.

A piece is mapped, handed out and unmapped again, so that loading needs little more memory than the
model. The library rejects malformed files too; the checks here come first so
that the refusal names file, tensor and reason, and so that no byte is mapped on a lie.

A file is `u64 little-endian header length | JSON header | data`; the header maps each tensor to
`{dtype, shape, data_offsets: [begin, end]}`, offsets counted from the start of the data.

Source: the format description of the safetensors project.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.errors import BadModel
from cluster.fields import read_object

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER_BYTES: Final = 100_000_000
PIECE_BYTES: Final = 32 << 20

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies, as its file's header says."""

    file: Path
    dtype: str  # a key of DTYPES
    shape: Shape
    begin: int  # bytes from the start of the data
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


class Checkpoint:
    """The tensors of a model directory. Every header is checked at construction (BadModel)."""

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, TensorInfo] = _find_tensors(directory)
        self._digests: dict[str, bytes] = {}

    def require(self, shapes: Mapping[str, Shape], ignore: frozenset[str] = frozenset()) -> None:
        """Hold the tensors to those a configuration asks for. Raises BadModel.

        `ignore` names tensors that may be there but are not part of the model.
        """
        for name, shape in shapes.items():
            info = self.tensors.get(name)
            if info is None:
                files = sorted({info.file.name for info in self.tensors.values()})
                raise BadModel(f"{_listed(files)}: tensor {name!r} is missing")
            if info.shape != shape:
                reason = f"has shape {list(info.shape)}, config.json asks for {list(shape)}"
                raise BadModel(f"{info.file.name}: tensor {name!r} {reason}")
        for name, info in self.tensors.items():
            if name not in shapes and name not in ignore:
                raise BadModel(
                    f"{info.file.name}: tensor {name!r} is unexpected: the model that config.json "
                    "describes has none"
                )

    def read(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The tensor in pieces of whole rows: the first row's number, and the rows on the CPU in
        their stored dtype, a view of the mapped file.

        Drop a piece before asking for the next; the mapping goes with it. The bytes enter the
        digest. Raises BadModel.
        """
        info = self.tensors[name]
        rows, digest = info.shape[0], xxhash.xxh3_128()
        step = max(1, PIECE_BYTES * rows // max(1, info.bytes))
        for first in range(0, rows, step):
            piece = _read_rows(info, name, first, min(first + step, rows))
            digest.update(piece.reshape(-1).view(torch.uint8).numpy().data)
            yield first, piece
            del piece
        self._digests[name] = digest.digest()

    def digest(self) -> str:
        """Identifies the weights read so far, whatever files they lie in.

        blake2b over name, dtype, shape and xxh3_128 of the bytes, sorted by name.
        """
        digest = hashlib.blake2b(digest_size=32)
        for name in sorted(self._digests):
            info = self.tensors[name]
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            digest.update(self._digests[name])
        return digest.hexdigest()


def _read_rows(info: TensorInfo, name: str, first: int, end: int) -> Tensor:
    try:
        with safe_open(info.file, framework="pt") as opened:
            rows: Tensor = opened.get_slice(name)[first:end]
    except (SafetensorError, OSError) as error:
        raise BadModel(f"{info.file.name}: tensor {name!r} cannot be read: {error}") from error
    return rows


def _find_tensors(directory: Path) -> dict[str, TensorInfo]:
    """One file if there is one, else the shards of an index: the order transformers looks in."""
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    if (directory / INDEX).is_file():
        return _read_shards(directory / INDEX)
    found = sorted(
        path.name
        for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
        for path in directory.glob(pattern)
    )
    raise BadModel(
        f"{SINGLE}: missing, and so is {INDEX}; in {directory} there is "
        f"{_listed(found) if found else 'no weights file'}"
        + (", but only safetensors of those names are read" if found else "")
    )


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    placed = read_object(index).get("weight_map")
    if type(placed) is not dict or not placed:
        raise BadModel(f"{index.name}: weight_map must be an object that names tensors' files")
    for name, file in placed.items():
        # The index comes with the checkpoint: it must not reach out of its directory.
        if type(file) is not str or Path(file).name != file or not file.endswith(".safetensors"):
            raise BadModel(f"{index.name}: tensor {name!r} lies in {file!r:.80}, no file name")
    tensors: dict[str, TensorInfo] = {}
    files = sorted(set(placed.values()))
    for file in files:
        if not (index.parent / file).is_file():
            raise BadModel(f"{index.name}: file {file!r} is missing")
    for file in files:
        for name, info in read_header(index.parent / file).items():
            if name in tensors:
                raise BadModel(f"{file}: tensor {name!r} is also in {tensors[name].file.name}")
            if placed.get(name) != file:
                raise BadModel(f"{file}: tensor {name!r} is not listed for this file in the index")
            tensors[name] = info
    for name, file in placed.items():
        if name not in tensors:
            raise BadModel(f"{file}: tensor {name!r} is missing, although {index.name} lists it")
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check one file's header against itself and the file's size. Raises BadModel."""
    try:
        size = file.stat().st_size
        raw = _read_header_bytes(file, size)
    except OSError as error:
        raise BadModel(f"{file.name}: cannot be read: {error.strerror}") from error
    entries = _parse_header(file, raw)
    tensors = {
        name: _tensor_info(file, name, entry)
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    _check_layout(file, tensors, data_bytes=size - 8 - len(raw))
    return tensors


def _read_header_bytes(file: Path, size: int) -> bytes:
    if size < 8:
        raise BadModel(f"{file.name}: {size} bytes are too few for a safetensors file")
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise BadModel(f"{file.name}: header of {length} bytes is over {MAX_HEADER_BYTES}")
        if length > size - 8:
            raise BadModel(f"{file.name}: header of {length} bytes in a file of {size}: truncated")
        return opened.read(length)


def _parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                raise BadModel(f"{file.name}: tensor {name!r} is in the header twice")
            seen[name] = value
        return seen

    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadModel(f"{file.name}: header is not JSON ({error!s:.200})") from error
    if type(header) is not dict:
        raise BadModel(f"{file.name}: header must be a JSON object, not {type(header).__name__}")
    return header


def _tensor_info(file: Path, name: str, entry: object) -> TensorInfo:
    def bad(reason: str) -> BadModel:
        return BadModel(f"{file.name}: tensor {name!r} {reason}")

    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise bad(f"has dtype {dtype!r:.40}, which is not supported ({', '.join(DTYPES)})")
    if not _sizes(shape):
        raise bad(f"has shape {shape!r:.80}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"has data_offsets {offsets!r:.80}")
    begin, end = offsets
    asked = math.prod(shape) * DTYPES[dtype].itemsize
    if asked != end - begin:
        raise bad(f"has {end - begin} bytes, but {dtype} {shape!r:.80} takes {asked}")
    return TensorInfo(file, dtype, tuple(shape), begin, end)


def _sizes(value: object) -> bool:
    """A list of a few integers that fit 63 bits."""
    return (
        type(value) is list
        and len(value) <= 8
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _check_layout(file: Path, tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    """Tensors tile the data: no overlap, no hole, nothing cut off, nothing behind the last."""
    reached = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != reached:
            what = "overlaps the one before" if info.begin < reached else "leaves a hole before it"
            raise BadModel(f"{file.name}: tensor {name!r} at byte {info.begin} {what}")
        if info.end > data_bytes:
            raise BadModel(
                f"{file.name}: tensor {name!r} ends at byte {info.end} of {data_bytes}: truncated"
            )
        reached = info.end
    if reached != data_bytes:
        raise BadModel(f"{file.name}: {data_bytes - reached} bytes behind the last tensor")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
