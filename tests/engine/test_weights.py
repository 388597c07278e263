"""safetensors files that lie: each is refused with file, tensor and reason (FAULTS 3.3, row 12)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cluster.errors import BadModel
from engine import weights
from engine.models.load import load_model
from engine.weights import INDEX, MAX_HEADER_BYTES, SINGLE, Checkpoint, read_header
from tests.checkpoints import build

GATE = "model.layers.1.mlp.gate_proj.weight"
Header = dict[str, Any]


def _split(raw: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _join(header: Header | bytes, data: bytes) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def _edited(edit: Callable[[Header], None]) -> Callable[[bytes], bytes]:
    def mutate(raw: bytes) -> bytes:
        header, data = _split(raw)
        edit(header)
        return _join(header, data)

    return mutate


def _shift(header: Header, by: int) -> None:
    begin, end = header[GATE]["data_offsets"]
    header[GATE]["data_offsets"] = [begin + by, end + by]


def _named_twice(raw: bytes) -> bytes:
    header, data = _split(raw)
    entry = json.dumps({GATE: header[GATE]})[1:-1]
    return _join((json.dumps(header)[:-1] + ", " + entry + "}").encode(), data)


MUTATIONS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in the length": (lambda raw: raw[:5], "5 bytes are too few"),
    "cut in the header": (lambda raw: raw[:200], "header of .* truncated"),
    "cut before the data": (lambda raw: raw[: len(raw) - len(_split(raw)[1])], "truncated"),
    "cut by one byte": (lambda raw: raw[:-1], "tensor .* truncated"),
    "header longer than the file": (
        lambda raw: struct.pack("<Q", len(raw)) + raw[8:],
        "header of .* truncated",
    ),
    "offsets past the end": (
        _edited(lambda h: _shift(h, 1 << 40)),
        "tensor .* leaves a hole",
    ),
    "offsets overlap": (_edited(lambda h: _shift(h, -64)), "tensor .* overlaps"),
    "offsets reversed": (
        _edited(lambda h: h[GATE]["data_offsets"].reverse()),
        f"tensor '{GATE}' has data_offsets",
    ),
    "negative offsets": (
        _edited(lambda h: h[GATE].update(data_offsets=[-64, 0])),
        f"tensor '{GATE}' has data_offsets",
    ),
    "wrong dtype": (
        _edited(lambda h: h[GATE].update(dtype="F16")),
        f"tensor '{GATE}' has 15360 bytes, but F16",
    ),
    "unknown dtype": (
        _edited(lambda h: h[GATE].update(dtype="F31")),
        f"tensor '{GATE}' has dtype 'F31'",
    ),
    "quantised dtype": (
        _edited(lambda h: h[GATE].update(dtype="F8_E4M3")),
        f"tensor '{GATE}' has dtype 'F8_E4M3', which is not supported",
    ),
    "wrong shape": (
        _edited(lambda h: h[GATE].update(shape=[80, 49])),
        f"tensor '{GATE}' has 15360 bytes, but F32",
    ),
    "shape of the same size": (
        _edited(lambda h: h[GATE]["shape"].reverse()),
        rf"tensor '{GATE}' has shape \[48, 80\], config.json asks for \[80, 48\]",
    ),
    "shape not of integers": (
        _edited(lambda h: h[GATE].update(shape=[80.0, 48])),
        f"tensor '{GATE}' has shape",
    ),
    "entry without a shape": (
        _edited(lambda h: h[GATE].pop("shape")),
        f"tensor '{GATE}' must have exactly",
    ),
    "entry not an object": (
        _edited(lambda h: h.update({GATE: 7})),
        f"tensor '{GATE}' must have exactly",
    ),
    "duplicate name": (_named_twice, f"tensor '{GATE}' is in the header twice"),
    "missing tensor": (_edited(lambda h: h.update(gone=h.pop(GATE))), f"'{GATE}' is missing"),
    "unexpected tensor": (
        _edited(lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
        "tensor 'extra' is unexpected",
    ),
    "not JSON": (lambda raw: _join(b"{" * 100, _split(raw)[1]), "header is not JSON"),
    "not an object": (lambda raw: _join(b"[1]", _split(raw)[1]), "header must be a JSON object"),
    "deep nesting": (lambda raw: _join(b"[" * 99999, b""), "header is not JSON"),
    "zero length": (lambda raw: b"", "0 bytes are too few"),
    "empty header": (lambda raw: _join(b"", _split(raw)[1]), "header is not JSON"),
    "header over 100 MB": (
        lambda raw: struct.pack("<Q", MAX_HEADER_BYTES + 1) + raw[8:],
        "header of 100000001 bytes is over",
    ),
    "trailing bytes": (lambda raw: raw + b"\0", "1 bytes behind the last tensor"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("good"))


@pytest.fixture
def directory(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_refused(name: str, directory: Path) -> None:
    mutate, message = MUTATIONS[name]
    file = directory / SINGLE
    load_model(directory)
    file.write_bytes(mutate(file.read_bytes()))
    with pytest.raises(BadModel, match=rf"^model\.safetensors: .*{message}") as refused:
        load_model(directory)
    assert "\n" not in str(refused.value)


def test_tensors_are_read_as_they_were_written(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    wanted = load_file(directory / SINGLE)
    assert checkpoint.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(whole(checkpoint, name), tensor)


def whole(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return torch.cat([rows.clone() for _, rows in checkpoint.read(name)])


def test_a_large_tensor_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = torch.arange(70).reshape(10, 7).float()
    save_file({"x": wanted}, tmp_path / SINGLE)
    at_once, in_pieces = Checkpoint(tmp_path), Checkpoint(tmp_path)
    assert [first for first, _ in at_once.read("x")] == [0]
    monkeypatch.setattr(weights, "PIECE_BYTES", 3 * 7 * 4 + 1)
    assert [first for first, _ in in_pieces.read("x")] == [0, 3, 6, 9]
    assert torch.equal(whole(in_pieces, "x"), wanted)
    assert in_pieces.digest() == at_once.digest()
    monkeypatch.setattr(weights, "PIECE_BYTES", 1)  # less than a row
    assert len(list(in_pieces.read("x"))) == 10


def test_a_header_of_any_length_is_read(tmp_path: Path) -> None:
    """The format does not align its data."""
    values = torch.arange(3, dtype=torch.float32)
    for padding in range(8):
        entry = {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
        raw = json.dumps(entry).encode() + b" " * padding
        (tmp_path / SINGLE).write_bytes(_join(raw, values.numpy().tobytes()))
        assert torch.equal(whole(Checkpoint(tmp_path), "x"), values)


def test_the_digest_is_of_the_weights_not_of_the_files(good: Path, tmp_path: Path) -> None:
    one = load_model(good)
    sharded = load_model(build("llama", tmp_path / "sharded", max_shard_size="40KB"))
    assert (tmp_path / "sharded" / INDEX).is_file()
    assert one.weights_digest == sharded.weights_digest
    assert one.weights_digest == load_model(good, dtype="bfloat16").weights_digest
    other = load_model(build("llama", tmp_path / "other", seed=1))
    half = load_model(build("llama", tmp_path / "half", dtype="float16"))
    assert len({one.weights_digest, other.weights_digest, half.weights_digest}) == 3


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_one_flipped_bit_changes_the_digest(place: float, directory: Path) -> None:
    before = load_model(directory).weights_digest
    file = directory / SINGLE
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start + int(place * (len(raw) - 1 - start))] ^= 1
    file.write_bytes(raw)
    assert load_model(directory).weights_digest != before


def test_frequencies_in_an_old_checkpoint_are_passed_over(directory: Path) -> None:
    tensors = load_file(directory / SINGLE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, directory / SINGLE)
    load_model(directory)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".gguf"])
def test_other_weight_formats_are_refused_by_name(suffix: str, directory: Path) -> None:
    (directory / SINGLE).rename(directory / f"pytorch_model{suffix}")
    with pytest.raises(BadModel, match=rf"there is pytorch_model\{suffix}, but only safetensors"):
        load_model(directory)


def test_no_weights_at_all(directory: Path) -> None:
    (directory / SINGLE).unlink()
    with pytest.raises(BadModel, match="no weights file"):
        load_model(directory)


def _shards(directory: Path) -> tuple[Path, dict[str, str]]:
    tensors = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    placed = {}
    for file, listed in halves.items():
        save_file({name: tensors[name] for name in listed}, directory / file)
        placed |= dict.fromkeys(listed, file)
    return directory / INDEX, placed


def _index(path: Path, placed: object) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def test_an_index_is_held_to_its_files(directory: Path) -> None:
    path, placed = _shards(directory)
    _index(path, placed)
    load_model(directory)
    name = "model.norm.weight"
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[placed[name]]
    bad: list[tuple[object, str]] = [
        (None, f"{INDEX}: weight_map must be an object"),
        ({}, f"{INDEX}: weight_map must be an object"),
        ({**placed, name: 3}, f"{INDEX}: tensor '{name}' lies in 3"),
        ({**placed, name: "../a.safetensors"}, f"{INDEX}: tensor '{name}' lies in '../a"),
        ({**placed, name: "c.safetensors"}, f"{INDEX}: file 'c.safetensors' is missing"),
        ({**placed, name: other}, f"{placed[name]}: tensor '{name}' is not listed"),
        ({**placed, "new": "a.safetensors"}, "a.safetensors: tensor 'new' is missing"),
        ({k: v for k, v in placed.items() if k != name}, f"{placed[name]}: tensor '{name}' is not"),
    ]
    for value, message in bad:
        _index(path, value)
        with pytest.raises(BadModel) as refused:
            load_model(directory)
        assert str(refused.value).startswith(message)
    path.write_text("{")
    with pytest.raises(BadModel, match=f"^{INDEX}: not JSON"):
        load_model(directory)


def test_a_tensor_in_two_shards(directory: Path) -> None:
    path, placed = _shards(directory)
    _index(path, placed)
    both = load_file(directory / "b.safetensors") | {"model.norm.weight": torch.ones(48)}
    first = load_file(directory / "a.safetensors") | {"model.norm.weight": torch.ones(48)}
    save_file(both, directory / "b.safetensors")
    save_file(first, directory / "a.safetensors")
    _index(path, placed | {"model.norm.weight": "a.safetensors"})
    with pytest.raises(BadModel, match=r"^b\.safetensors: tensor 'model.norm.weight' is also in a"):
        load_model(directory)


_NUMBER = st.integers(-4, 40) | st.integers() | st.none() | st.floats() | st.text(max_size=2)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "?"]) | _NUMBER,
        "shape": st.lists(st.integers(0, 4) | _NUMBER, max_size=3) | _NUMBER,
        "data_offsets": st.lists(st.integers(0, 32) | _NUMBER, max_size=3) | _NUMBER,
    }
)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=3), _ENTRY | _NUMBER, max_size=3) | _NUMBER,
    st.binary(max_size=32),
)
def test_any_header_is_read_whole_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes
) -> None:
    file = tmp_path_factory.mktemp("header", numbered=True) / SINGLE
    file.write_bytes(_join(json.dumps(header).encode(), data))
    try:
        tensors = read_header(file)
    except BadModel as refused:
        assert str(refused).startswith("model.safetensors: ")
    else:
        assert sum(info.bytes for info in tensors.values()) == len(data)
        for name, info in tensors.items():
            if info.shape:  # as all that a model has
                pieces = [rows.shape for _, rows in Checkpoint(file.parent).read(name)]
                assert sum(shape[0] for shape in pieces) == info.shape[0]
                assert all(tuple(shape[1:]) == info.shape[1:] for shape in pieces)
