"""What ships compiles for its chips, spills nothing and fits as often as its configuration says."""

from __future__ import annotations

import re

import pytest
import torch

from decode.kernels.attention import _attend, constants
from decode.kernels.splits import CONFIGS, HEAD_DIMS, _plan, config_for
from engine.kernels.compile import Compiled, compile_ahead
from tests.engine.kernels.interpreter import compiled

pytestmark = compiled

REGISTERS = 64 << 10
SHARED = {80: 164 << 10, 86: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
"""Of a multiprocessor; each block takes 1 KB more than it asks for."""
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def compile_attend(
    chip: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    group: int = 4,
    block_size: int = 16,
    empties: int = 1,
) -> Compiled:
    """As the launcher would launch it; checked for what holds of every configuration."""
    config = config_for(head_dim, group, dtype, chip)
    pointers = {
        **dict.fromkeys(("out", "q", "keys", "values"), f"*{TYPES[dtype]}"),
        **dict.fromkeys(("contexts", "table", "shares", "arrivals"), "*i32"),
        **dict.fromkeys(("sums", "edges"), "*fp32"),
    }
    numbers = dict.fromkeys(("q_row", "slot_row", "table_row", "segments", "window"), "i32")
    made = compile_ahead(
        _attend,
        {**pointers, **numbers, "scale": "fp32"},
        constants(8 * group, 8, head_dim, block_size, config.tile, empties),
        chip,
        config.warps,
        config.stages,
        aligned=("q_row", "slot_row"),
        maxnreg=config.registers,
    )
    registers = -(-made.registers // 8) * 8 * made.threads
    assert made.local_bytes == 0
    assert registers * config.programs <= REGISTERS
    assert (made.shared_bytes + 1024) * config.programs <= SHARED[chip]
    return made


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("chip", [80, 90, 100])
def test_every_configuration(chip: int, head_dim: int, dtype: torch.dtype) -> None:
    compile_attend(chip, head_dim, dtype)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("chip", [86, 120])
def test_chips_with_less_shared_memory(chip: int, head_dim: int) -> None:
    compile_attend(chip, head_dim)


@pytest.mark.parametrize("group", [1, 2, 7, 8, 16, 20, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_groups(head_dim: int, group: int) -> None:
    compile_attend(90, head_dim, group=group)


@pytest.mark.parametrize("block_size", [32, 64])
def test_block_sizes(block_size: int) -> None:
    compile_attend(90, 128, block_size=block_size)


def test_many_rows_for_few_slices() -> None:
    compile_attend(90, 128, empties=32)


def test_keys_and_values_come_ahead_of_their_use() -> None:
    """Triton gives pipelining up in silence when it does not like a loop."""
    config = config_for(128, 4, torch.bfloat16, 90)
    made = compile_attend(90, 128)
    tile_bytes = config.tile * 128 * 2
    assert made.shared_bytes >= (config.stages - 1) * 2 * tile_bytes
    waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", made.ptx)]
    assert max(waits) == 2 * (config.stages - 2)  # groups still on their way: K and V of each tile


def test_pieces_are_stored_before_they_are_counted() -> None:
    ptx = compile_attend(90, 128).ptx
    before, counted, _ = ptx.partition("atom.global.gpu.acq_rel.add")
    assert counted
    stored = before.rindex("st.global")
    assert "bar.sync" in before[stored:]
    assert "atom" not in before


def test_the_plan() -> None:
    made = compile_ahead(
        _plan,
        {
            **dict.fromkeys(("contexts", "shares", "arrivals"), "*i32"),
            **dict.fromkeys(("segments", "window", "least"), "i32"),
        },
        {"KV_HEADS": 8, "TILE": 64, "SEGMENTS": 1024},
        90,
    )
    assert made.local_bytes == 0


def test_a_chip_gets_the_configuration_of_the_next_older() -> None:
    assert config_for(128, 4, torch.float16, 89) == CONFIGS[128, 86]
    assert config_for(80, 4, torch.float16, 103) == CONFIGS[128, 100]
    assert config_for(256, 4, torch.float16, 121) == CONFIGS[256, 120]
