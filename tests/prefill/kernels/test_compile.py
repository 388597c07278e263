"""Every shipped configuration of attend_prompts, compiled for the chips it is for."""

from __future__ import annotations

import pytest
import torch
import triton

from engine.kernels.compile import SHARED_BYTES, Compiled, compile_ahead
from prefill.kernels.attention import (
    CONFIGS,
    DTYPES,
    HEAD_DIMS,
    Config,
    attend_prompts,
    attend_tile,
    check,
    choose,
)
from tests.engine.kernels.interpreter import compiled

pytestmark = compiled


def compile_tile(
    arch: int, head_dim: int, config: Config, dtype: str, group: int = 4, block_size: int = 0
) -> Compiled:
    padded = triton.next_power_of_2(head_dim)
    page = f"tensordesc<{dtype}[{config.block_n}, {padded}]>" if config.descriptors else f"*{dtype}"
    strides = ("q_row", "q_head", "kv_slot", "kv_head", "out_row", "out_head")
    integers = ("segments", "width", "window", *strides)
    return compile_ahead(
        attend_tile,
        {"q": f"*{dtype}", "keys": page, "values": page, "out": f"*{dtype}"}
        | dict.fromkeys(("starts", "contexts", "block_table"), "*i32")
        | dict.fromkeys(integers, "i32")
        | {"scale": "fp32"},
        {
            "HEAD_DIM": head_dim,
            "PADDED_DIM": padded,
            "GROUP": group,
            "BLOCK_SIZE": block_size or (config.block_n if config.descriptors else 16),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "DESCRIPTORS": config.descriptors,
        },
        arch,
        config.warps,
        config.stages,
        aligned=strides,
    )


def assert_fits(made: Compiled, arch: int) -> None:
    assert made.local_bytes == 0
    assert made.shared_bytes <= SHARED_BYTES[arch]


SHIPPED = [
    pytest.param(arch, head_dim, config, id=f"sm_{arch}-{head_dim}-{number}")
    for (arch, padded), configs in CONFIGS.items()
    for head_dim in HEAD_DIMS
    if triton.next_power_of_2(head_dim) == padded
    for number, config in enumerate(configs)
    if head_dim == padded or not config.descriptors
]


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("arch, head_dim, config", SHIPPED)
def test_shipped(arch: int, head_dim: int, config: Config, dtype: str) -> None:
    made = compile_tile(arch, head_dim, config, dtype)
    assert_fits(made, arch)
    # The chip's own way to multiply, and loads that pass the registers by.
    assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in made.ptx
    assert ("cp.async.bulk.tensor" if config.descriptors else "cp.async.cg") in made.ptx


@pytest.mark.parametrize("group, block_size", [(1, 16), (7, 16), (8, 32), (4, 64)])
def test_other_groups_and_blocks(group: int, block_size: int) -> None:
    config = choose(90, 128, 16, pairs=4096)
    assert_fits(compile_tile(90, 128, config, "bf16", group, block_size), 90)


def test_there_is_a_configuration_for_everything_promised() -> None:
    for arch in SHARED_BYTES:
        for head_dim in HEAD_DIMS:
            for block_size in (16, 32, 64, 128):
                for pairs in (1, 64, 65, 10**6):
                    config = choose(arch, head_dim, block_size, pairs)
                    assert config.block_m == 64 or pairs > 64
                    assert not config.short or pairs <= config.block_m
                    assert not config.descriptors or block_size >= config.block_n


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head_dim": 72}, "head_dim 72"),
        ({"kv_heads": 5}, "32 query heads cannot share 5"),
        ({"block_size": 24}, "block_size 24"),
        ({"block_size": 8}, "block_size 8"),
        ({"dtype": torch.float32}, "neither bfloat16 nor float16"),
        ({"arch": 75}, r"7\.5 is none of 8\.0, 9\.0, 10\.0"),
    ],
)
def test_what_it_does_not_do(change: dict[str, object], message: str) -> None:
    good = {
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": torch.bfloat16,
        "block_size": 16,
        "arch": 90,
    }
    check(**good)
    with pytest.raises(ValueError, match=message):
        check(**good | change)


def test_a_device_without_kernels_is_refused() -> None:
    q, pages = torch.zeros(1, 2, 64), torch.zeros(2, 16, 1, 64)
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="not on cpu"):
        attend_prompts(q, *pages, torch.tensor([0, 1]), one, one[None], 16, 0, 1.0, longest=1)
