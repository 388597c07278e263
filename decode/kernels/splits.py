"""plan_splits: cut a step's contexts into equal shares of tiles, on the device, once a step.

A context is a run of tiles of `tile` tokens. All runs, one behind the other, are cut into slices of
equal length, wherever the cuts fall; each slice has one program of the attention kernel for every
KV head. So every program reads the same number of bytes whatever the lengths, a long context takes
as many programs as it needs, and all that the host knows, the number of slices, is fixed: a CUDA
graph replays it for any contexts.

    tiles    0 0 0 0 0 1 2 2 2 4 4 4 4 4 4 4      of segments 0, 1, 2, 4; 3 is empty
    slices   |  0    |  1    |  2    |  3    |
    pieces    0:0-3   0:4     2:2     4:3-6       segments 0, 2 and 4 are in pieces, merged later
                      1:0     4:0-2
                      2:0-1

Limit   one small launch: the layers of a step that have one window share the result.
Layout  see Splits.
Source  Stream-K, Osama et al. 2023; for attention, Lean Attention, Sanovar et al. 2024.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl

HEAD_DIMS: Final = (64, 80, 96, 128, 256)
DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
MAX_GROUP: Final = 64
"""Query heads of one KV head: they are the rows of one tile of the attention kernel."""

UNBOUNDED: Final = 2**31 - 1
"""The window of a layer that has none."""

_LEAST = 32 << 10
"""Elements of K in the smallest share, 256 tokens of 128: below that, another program costs more
(its start and its part in the merge) than it takes off the others."""


@dataclass(frozen=True, slots=True)
class Config:
    """How the attention kernel is built, for one head size on one chip."""

    tile: int
    """Tokens loaded at a time. A power of two."""
    warps: int
    stages: int
    """Of Triton's pipeline: one more than the tiles of K and of V in shared memory."""
    programs: int
    """How many a multiprocessor holds at once."""

    @property
    def registers(self) -> int:
        """For a thread, when so many programs share 64 Ki of them. The assembler is told, or it
        spills a few to fit more programs, which shared memory has no room for."""
        return min(255, (64 << 10) // (32 * self.warps * self.programs) // 8 * 8)


CONFIGS: Final[dict[tuple[int, int], Config]] = {
    # (head_dim padded to a power of two, chip): for elements of 2 bytes. Each program has
    # stages - 2 tiles on their way while it works on one: 64 KB and more for a multiprocessor,
    # twice what 33 bytes/ns (an H200's share) take in a latency of 1 us. Two programs of any
    # kernel have registers enough, and three where a tile's row is 64 long.
    (64, 80): Config(tile=64, warps=4, stages=4, programs=3),
    (128, 80): Config(tile=64, warps=4, stages=3, programs=2),
    (256, 80): Config(tile=32, warps=4, stages=3, programs=2),
    (64, 86): Config(tile=64, warps=4, stages=3, programs=2),  # and 89: 100 KB of shared memory
    (128, 86): Config(tile=32, warps=4, stages=3, programs=2),
    (256, 86): Config(tile=16, warps=4, stages=3, programs=2),
    (64, 90): Config(tile=64, warps=4, stages=4, programs=3),
    (128, 90): Config(tile=64, warps=4, stages=4, programs=2),
    (256, 90): Config(tile=32, warps=4, stages=4, programs=2),
    (64, 100): Config(tile=64, warps=4, stages=4, programs=3),
    (128, 100): Config(tile=64, warps=4, stages=4, programs=2),
    (256, 100): Config(tile=32, warps=4, stages=4, programs=2),
    (64, 120): Config(tile=64, warps=4, stages=3, programs=2),  # 100 KB again
    (128, 120): Config(tile=32, warps=4, stages=3, programs=2),
    (256, 120): Config(tile=16, warps=4, stages=3, programs=2),
}


def config_for(head_dim: int, group: int, dtype: torch.dtype, chip: int) -> Config:
    """The configuration for `chip` (10 x major + minor compute capability), or the next older."""
    known = max(c for _, c in CONFIGS if c <= chip)
    config = CONFIGS[triton.next_power_of_2(head_dim), known]
    if dtype.itemsize == 4:
        config = replace(config, tile=max(16, config.tile // 2))
    if group > 8:  # a merge holds more, and more than 16 are a larger tile of queries
        config = replace(config, programs=min(2, config.programs))
    if group > 16:
        config = replace(config, tile=max(16, config.tile // 2))
    return config


@dataclass(frozen=True, slots=True)
class Splits:
    """Who reads what, and the scratch that the pieces meet in.

    One attention launch at a time may use it: launches on one stream may share it, as the layers
    of a step do.
    """

    contexts: torch.Tensor
    """int32 [segments]: those it was planned for."""
    shares: torch.Tensor
    """int32 [slices, 5]: first segment, tiles of it that belong to the slice before, tiles in this
    slice, tiles in a full slice, context of the first segment."""
    arrivals: torch.Tensor
    """int32 [slices, kv_heads]: pieces that are done, of the segment cut at the slice's end. 0
    between launches."""
    sums: torch.Tensor
    """fp32 [2 x slices, kv_heads, group, head_dim]: weighted sums of values, one row for the
    slice's first piece, one for its last."""
    edges: torch.Tensor
    """fp32 [2 x slices, kv_heads, 2, group]: highest score of the piece, sum of its weights."""
    window: int
    config: Config

    def check(
        self, contexts: torch.Tensor, heads: int, kv_heads: int, head_dim: int, window: int
    ) -> None:
        """Raises ValueError unless it was planned for these contexts and this kind of layer."""
        mine = (self.sums.shape[2] * self.sums.shape[1], *self.sums.shape[1::2], self.window)
        asked = (heads, kv_heads, head_dim, window)
        theirs = contexts.data_ptr(), len(contexts)
        if mine != asked or theirs != (self.contexts.data_ptr(), len(self.contexts)):
            raise ValueError(
                f"splits are of {len(self.contexts)} contexts for (heads, kv_heads, head_dim,"
                f" window) {mine}, asked for {asked}; they must share the tensor of contexts"
            )


def plan_splits(
    contexts: torch.Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int,
    *,
    config: Config | None = None,
    slices: int | None = None,
) -> Splits:
    """What every attention of this step over `contexts` int32 [segments] needs, for one window.

    `window` 0 is all. Nothing waits for the device, and the contexts are read there, so that the
    call can be captured in a graph. `config` and `slices` override the choice made here, for
    tuning and tests. Raises ValueError for shapes that the kernel does not do.
    """
    check_shapes(heads, kv_heads, head_dim, dtype)
    if contexts.dtype != torch.int32 or contexts.ndim != 1 or not contexts.is_contiguous():
        raise ValueError(
            f"contexts must be int32 [segments] without gaps,"
            f" not {contexts.dtype} {list(contexts.shape)}"
        )
    if window < 0:
        raise ValueError(f"window must be 0 (all) or the tokens a query sees, not {window}")
    device = contexts.device
    check_device(device)
    chip, multiprocessors = _chip_of(device)
    group = heads // kv_heads
    config = config or config_for(head_dim, group, dtype, chip)
    least = max(1, _LEAST // (config.tile * head_dim)) if slices is None else 1
    slices = slices or max(1, multiprocessors * config.programs // kv_heads)
    splits = Splits(
        contexts=contexts,
        shares=torch.empty(slices, 5, dtype=torch.int32, device=device),
        arrivals=torch.empty(slices, kv_heads, dtype=torch.int32, device=device),
        sums=torch.empty(2 * slices, kv_heads, group, head_dim, device=device),
        edges=torch.empty(2 * slices, kv_heads, 2, group, device=device),
        window=window,
        config=config,
    )
    _plan[(slices,)](
        contexts,
        splits.shares,
        splits.arrivals,
        contexts.shape[0],
        window or UNBOUNDED,
        least,
        KV_HEADS=kv_heads,
        TILE=config.tile,
        SEGMENTS=triton.next_power_of_2(max(1, contexts.shape[0])),
        enable_fp_fusion=True,
    )
    return splits


@triton.jit(do_not_specialize=["segments", "window", "least"])
def _plan(
    contexts,
    shares,
    arrivals,
    segments,
    window,
    least,
    KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    slice_ = tl.program_id(0)
    n = tl.arange(0, SEGMENTS)
    context = tl.load(contexts + n, mask=n < segments, other=0)
    tiles = tl.cdiv(tl.minimum(context, window), TILE)
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), least)
    begin = slice_ * share
    earlier = ends <= begin
    segment = tl.sum(earlier.to(tl.int32), 0)
    mine = shares + slice_ * 5
    tl.store(mine, segment)
    tl.store(mine + 1, begin - tl.sum(tl.where(earlier, tiles, 0), 0))
    tl.store(mine + 2, tl.maximum(tl.minimum(total - begin, share), 0))
    tl.store(mine + 3, share)
    tl.store(mine + 4, tl.sum(tl.where(n == segment, context, 0), 0))
    for head in tl.static_range(KV_HEADS):
        tl.store(arrivals + slice_ * KV_HEADS + head, 0)


def check_shapes(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Raises ValueError for what the kernels do not do: ask at start-up."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim {head_dim} is none of {HEAD_DIMS}")
    if dtype not in DTYPES:
        raise ValueError(f"{dtype} is none of {DTYPES}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    if heads // kv_heads > MAX_GROUP:
        raise ValueError(f"{heads // kv_heads} query heads share a KV head: at most {MAX_GROUP}")


def check_device(device: torch.device) -> None:
    """Raises ValueError if Triton cannot run there; its interpreter runs on the CPU too."""
    if device.type != "cuda" and isinstance(_plan, triton.JITFunction):
        raise ValueError(f"the decode kernels run on CUDA devices, not on {device}")


@cache
def _chip_of(device: torch.device) -> tuple[int, int]:
    """Compute capability (10 x major + minor) and multiprocessors."""
    if device.type != "cuda":
        return 80, 4  # the interpreter's
    found = torch.cuda.get_device_properties(device)
    chip = 10 * found.major + found.minor
    if chip < 80:
        raise ValueError(f"{found.name} has compute capability {chip / 10}: at least 8.0 is needed")
    return chip, found.multi_processor_count
