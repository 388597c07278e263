"""Every kernel of engine/kernels as shipped, compiled for the chips we name: nothing spills."""

from __future__ import annotations

from typing import Any

import pytest

from engine.kernels import argmax, move_kv, norm, rope_write, sampling, swiglu
from engine.kernels.compile import Compiled, compile_ahead
from tests.engine.kernels.interpreter import compiled

pytestmark = [compiled, pytest.mark.parametrize("arch", [80, 90, 100])]

ROW = {
    "logits": "*fp32",
    "stride": "i32",
    "vocab": "i32",
    "seeds": "*i64",
    "choices": "*i32",
    "positions": "*i32",
    "temperatures": "*fp32",
    "top_ks": "*i32",
    "top_ps": "*fp64",
    "log_min_ps": "*fp32",
}


def launch(kernel: str) -> dict[str, Any]:
    return sampling.LAUNCH[kernel] | sampling.EXACT


def fits(made: Compiled) -> None:
    assert made.local_bytes == 0
    assert made.registers * made.threads <= 65536


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("hidden", [1024, 4096, 8192, norm.MAX_HIDDEN])
def test_norm(arch: int, hidden: int, add: bool) -> None:
    names = ("x", "residual", "weight", "out")
    signature = {
        **dict.fromkeys(names, "*bf16"),
        "x_stride": "i32",
        "residual_stride": "i32",
        "eps": "fp32",
    }
    shape = norm.configuration(hidden)
    warps = shape.pop("num_warps")
    made = compile_ahead(
        norm.norm_kernel,
        signature,
        {"HIDDEN": hidden, "ADD": add, **shape},
        arch,
        num_warps=warps,
        aligned=("x_stride", "residual_stride"),
    )
    fits(made)
    assert ".v4.b32" in made.ptx  # 16 bytes at a time


def test_swiglu(arch: int) -> None:
    made = compile_ahead(
        swiglu.swiglu_kernel,
        {"gate_up": "*bf16", "out": "*bf16", "stride": "i32"},
        {"INNER": 14336, "BLOCK": swiglu.CONFIGURATION["BLOCK"]},
        arch,
        num_warps=swiglu.CONFIGURATION["num_warps"],
        aligned=("stride",),
    )
    fits(made)
    assert ".v4.b32" in made.ptx


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "qk_norm"),
    [
        (32, 8, 128, False),
        (16, 8, 128, True),
        (14, 2, 64, False),
        (64, 8, 128, True),
        (32, 32, 80, False),
        (32, 8, 96, False),
        (16, 16, 256, True),
    ],
)
def test_rope_write(arch: int, heads: int, kv_heads: int, d: int, qk_norm: bool) -> None:
    pointers = ("qkv", "q_norm", "k_norm", "q_out", "keys", "values")
    strides = ("qkv_stride", "angle_stride", "keys_stride", "values_stride")
    signature = {
        **dict.fromkeys(pointers, "*bf16"),
        "cos": "*fp32",
        "sin": "*fp32",
        "slots": "*i64",
        "eps": "fp32",
        **dict.fromkeys(strides, "i32"),
    }
    shape = rope_write.configuration(heads, kv_heads, d)
    warps = shape.pop("num_warps")
    constants = {"HEADS": heads, "KV_HEADS": kv_heads, "D": d, "NORM": qk_norm, **shape}
    made = compile_ahead(
        rope_write.rope_write_kernel, signature, constants, arch, num_warps=warps, aligned=strides
    )
    fits(made)


@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_argmax(arch: int, dtype: str) -> None:
    signature = {
        "logits": dtype,
        "best": "*fp32",
        "best_at": "*i32",
        "stride": "i32",
        "vocab": "i32",
        "blocks_each": "i32",
    }
    fits(
        compile_ahead(
            argmax.scan_kernel,
            signature,
            {"BLOCK": argmax.SCAN["BLOCK"]},
            arch,
            num_warps=argmax.SCAN["num_warps"],
            aligned=("stride", "vocab"),
        )
    )
    signature = {"best": "*fp32", "best_at": "*i32", "tokens": "*i64", "parts": "i32"}
    fits(compile_ahead(argmax.choose_kernel, signature, {"BLOCK": 128}, arch, num_warps=1))


@pytest.mark.parametrize("to_wire", [True, False])
@pytest.mark.parametrize("integer", ["*i16", "*i32"])
@pytest.mark.parametrize("run", [128, 1024, 960])
def test_move_kv(arch: int, run: int, integer: str, to_wire: bool) -> None:
    strides = ("layer_stride", "kind_stride", "slot_stride")
    signature = {
        "pages": integer,
        "wire": integer,
        "slots": "*i64",
        "tokens": "i32",
        "first": "i32",
        **dict.fromkeys(strides, "i64"),
    }
    shape = move_kv.configuration(run)
    warps = shape.pop("num_warps")
    made = compile_ahead(
        move_kv.move_kernel,
        signature,
        {"RUN": run, "TO_WIRE": to_wire, **shape},
        arch,
        num_warps=warps,
        aligned=(*strides, "first"),
    )
    fits(made)
    assert made.ptx.count(".v4.b32") >= 2


def test_edit(arch: int) -> None:
    signature = {
        "logits": "*fp32",
        "stride": "i32",
        "starts": "*i32",
        "tokens": "*i32",
        "biases": "*fp32",
        "divisors": "*fp32",
        "penalties": "*fp32",
    }
    fits(compile_ahead(sampling.edit_kernel, signature, {}, arch, **launch("edit")))


def test_survey(arch: int) -> None:
    signature = ROW | {
        "maxima": "*fp32",
        "part_tops": "*fp32",
        "part_masses": "*fp64",
        "groups": "i32",
        "tiles_each": "i32",
    }
    made = compile_ahead(
        sampling.survey_kernel,
        signature,
        {},
        arch,
        **launch("survey"),
        aligned=("stride", "vocab"),
    )
    fits(made)
    assert "ld.global.v4.b32" in made.ptx


def test_cut(arch: int) -> None:
    names = ("temperatures", "top_ks", "top_ps", "log_min_ps")
    signature = {
        **{name: ROW[name] for name in names},
        "maxima": "*fp32",
        "tops": "*fp32",
        "cuts": "*fp32",
        "counts": "*i32",
        "groups": "i32",
    }
    fits(compile_ahead(sampling.cut_kernel, signature, {}, arch, **launch("cut")))


def test_shortlist(arch: int) -> None:
    signature = ROW | {
        "maxima": "*fp32",
        "cuts": "*fp32",
        "counts": "*i32",
        "listed": "*fp32",
        "listed_ids": "*i32",
        "groups": "i32",
        "tiles_each": "i32",
    }
    constants = {"ROOM": sampling.CAPACITY}
    fits(
        compile_ahead(sampling.shortlist_kernel, signature, constants, arch, **launch("shortlist"))
    )


def test_finish(arch: int) -> None:
    signature = ROW | {
        "tops": "*fp32",
        "part_tops": "*fp32",
        "part_masses": "*fp64",
        "counts": "*i32",
        "listed": "*fp32",
        "listed_ids": "*i32",
        "tokens": "*i64",
        "parts": "i32",
    }
    constants = {"ROOM": sampling.CAPACITY, "PARTS": 256}
    fits(compile_ahead(sampling.finish_kernel, signature, constants, arch, **launch("finish")))
