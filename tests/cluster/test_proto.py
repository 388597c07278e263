"""The committed stubs are what the committed contract compiles to."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "proto").rglob("*.proto"))


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_stubs_are_current(path: Path, tmp_path: Path) -> None:
    name = str(path.relative_to(ROOT / "proto"))
    out = tmp_path / "set"
    assert protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--descriptor_set_out={out}", name]) == 0
    compiled = FileDescriptorSet.FromString(out.read_bytes()).file[0]
    stub = import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
    committed = FileDescriptorProto.FromString(stub.DESCRIPTOR.serialized_pb)
    committed.ClearField("source_code_info")
    for field in [f for m in compiled.message_type for f in m.field]:
        field.ClearField("json_name")  # protoc fills it in, generated code leaves it out
    for message in compiled.message_type:
        for nested in message.nested_type:
            for field in nested.field:
                field.ClearField("json_name")
    assert compiled == committed


def test_there_are_contracts() -> None:
    assert {path.stem for path in PROTOS} >= {"control", "inference"}
