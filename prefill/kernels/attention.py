"""attend_prompts: causal attention of prompt chunks over paged keys and values.

Limit   arithmetic, two products: 4 * heads * head_dim flops for each pair of a row and a key it
        sees. Roof on one H200 (790 TFLOP/s measured in matmuls): one prompt of 8192 tokens,
        32 heads, head_dim 128, bf16 = 0.55 TFLOP -> 696 us.
Layout  q, out [rows, heads, head_dim]; keys, values [slots, kv_heads, head_dim], a row is read as
        one piece; slot = block * block_size + offset. A tile is BLOCK_M (row, head) pairs of the
        heads that share a KV head, so that keys are loaded once for the whole group and chunks
        that are shorter than a tile still fill it.
Source  FlashAttention-2, Dao 2023, section 3 (online softmax, rows over programs);
        PagedAttention, Kwon et al. 2023, section 4.3 (keys through a block table).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

HEAD_DIMS: Final = (64, 80, 96, 128, 256)
DTYPES: Final = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_LOG2_E: Final = 1.4426950408889634
_NO_WINDOW: Final = 2**31 - 1


def attend_prompts_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    contexts: Tensor,
    block_table: Tensor,
    block_size: int,
    window: int,
    scale: float,
) -> Tensor:
    """The definition, one segment after the other, computed in the dtype of `q`."""
    out = torch.empty_like(q)
    group = q.shape[1] // keys.shape[1]
    for number, context in enumerate(contexts.tolist()):
        rows = slice(int(starts[number]), int(starts[number + 1]))
        key = torch.arange(context, device=q.device)
        slots = block_table[number, key // block_size].long() * block_size + key % block_size
        k = keys[slots].to(q.dtype).repeat_interleave(group, 1)
        v = values[slots].to(q.dtype).repeat_interleave(group, 1)
        row = torch.arange(context - rows.stop + rows.start, context, device=q.device)
        seen = key <= row[:, None]
        if window:
            seen &= key > row[:, None] - window
        scores = torch.einsum("rhd,khd->hrk", q[rows], k) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hrk,khd->rhd", weights, v)
    return out


@dataclass(frozen=True)
class Config:
    """How one program works. Which are shipped, and why, stands at CONFIGS."""

    block_m: int
    """(row, head) pairs in a tile."""
    block_n: int
    """Keys in a step."""
    warps: int
    stages: int
    """Steps whose keys and values are in shared memory or on their way there."""
    short: bool = False
    """For a step whose longest chunk fits one tile."""
    descriptors: bool = False
    """The copy engine fetches the tiles of keys: needs block_size >= block_n."""


CONFIGS: Final[dict[tuple[int, int], tuple[Config, ...]]] = {
    (80, 64): (Config(64, 64, 4, 3, short=True), Config(128, 64, 8, 3)),
    (80, 128): (Config(64, 64, 4, 3, short=True), Config(128, 64, 8, 3)),
    (80, 256): (Config(64, 32, 8, 3),),
    (90, 64): (
        Config(64, 64, 4, 3, short=True),
        Config(128, 64, 8, 3, descriptors=True),
        Config(128, 128, 8, 3),
    ),
    (90, 128): (
        Config(64, 64, 4, 3, short=True),
        Config(128, 128, 8, 3, descriptors=True),
        Config(128, 64, 8, 3, descriptors=True),
        Config(128, 128, 8, 3),
    ),
    (90, 256): (
        Config(64, 64, 8, 2, short=True),
        Config(128, 64, 8, 2, descriptors=True),
        Config(128, 64, 8, 2),
    ),
    (100, 64): (
        Config(64, 64, 4, 3, short=True),
        Config(128, 64, 8, 3, descriptors=True),
        Config(128, 128, 8, 3),
    ),
    (100, 128): (
        Config(64, 64, 8, 3, short=True),
        Config(128, 64, 8, 3, descriptors=True),
        Config(128, 64, 8, 3),
    ),
    (100, 256): (Config(64, 64, 8, 2, descriptors=True), Config(64, 64, 8, 2)),
}
"""By (compute capability, head_dim rounded up to a power of two); the first that fits is taken.

Chosen from the compiler's output for sm_80, sm_90 and sm_100, not yet by timing on a device:
- None spills; 128 x 128 does on sm_100 with head_dim 128 (56 to 104 bytes), 4 warps do everywhere.
- block_m 128 where it fits: a tile of 64 asks the L2 cache for 64 bytes per clock and SM at full
  tensor rate, about twice what it gives. Short chunks have no use for 128.
- block_n 128 where it fits: rescaling acc and fetching block numbers cost the same for any block_n,
  642 instructions per warp for 128 keys against 816 for two times 64 (sm_90, head_dim 128).
- 3 stages where shared memory allows: with 2, the next keys are asked for only after the second
  product has started, and 64 KB take longer than that product.
- Descriptors first: the copy engine computes the addresses, 529 instructions instead of 642 and
  31 registers less. With head_dim 64 and block_n 64 that leaves 126: two programs share an SM.
"""


@triton.jit
def fold(queries, k, v, position, lane, first, edges, window, scale, maximum, total, acc):
    """One step of the online softmax: keys from `first` on join maximum, total and acc.

    `edges` are the tile's first and last position: most steps lie wholly inside what all rows see.
    """
    scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
    # A real branch, not a select: elsewhere 228 of 870 instructions are jumped over.
    if (first + k.shape[0] > edges[0] + 1) | (first <= edges[1] - window):
        # One unsigned comparison: 0 <= position - key < window.
        back = (position[:, None] - (first + lane)[None, :]).to(tl.uint32, bitcast=True)
        scores = tl.where(back < window.to(tl.uint32), scores, float("-inf"))
    peak = tl.maximum(maximum, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - peak[:, None])
    fade = tl.exp2(maximum - peak)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return peak, total, acc


# Nothing that changes from step to step may have it compiled again.
@triton.jit(
    do_not_specialize=["segments", "width", "window"],
    do_not_specialize_on_alignment=["starts", "contexts", "block_table"],
)
def attend_tile(
    q,
    keys,
    values,
    out,
    starts,
    contexts,
    block_table,
    segments,
    width,
    window,
    scale,
    q_row,
    q_head,
    kv_slot,
    kv_head,
    out_row,
    out_head,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One tile of one segment and one KV head. `scale` includes log2(e): exponents are of 2."""
    head = tl.program_id(0)
    # The last rows see most keys: they go first, so that the device is full to the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)

    # Segment i has the tiles from starts[i] * GROUP // BLOCK_M + i on, sometimes one too many.
    segment = -1
    for offset in range(0, segments, 32):
        number = offset + tl.arange(0, 32)
        begins = tl.load(starts + number, mask=number < segments, other=0)
        before = (begins * GROUP // BLOCK_M + number <= tile) & (number < segments)
        segment += tl.sum(before.to(tl.int32))
    start = tl.load(starts + segment)
    pairs = (tl.load(starts + segment + 1) - start) * GROUP
    top = (tile - segment - start * GROUP // BLOCK_M) * BLOCK_M
    if top >= pairs:
        return

    context = tl.load(contexts + segment)
    prefix = context - pairs // GROUP
    block_table += tl.cast(segment, tl.int64) * width
    pair = top + tl.arange(0, BLOCK_M)
    position = prefix + tl.minimum(pair, pairs - 1) // GROUP  # padding sees what the last row sees
    first_row = prefix + top // GROUP
    last_row = prefix + (tl.minimum(top + BLOCK_M, pairs) - 1) // GROUP
    edges = (first_row, last_row)

    dim = tl.arange(0, PADDED_DIM)
    inside = (dim < HEAD_DIM)[None, :]
    q += (start + pair // GROUP).to(tl.int64)[:, None] * q_row
    q += (head * GROUP + pair % GROUP)[:, None] * q_head + dim[None, :]
    queries = tl.load(q, mask=(pair < pairs)[:, None] & inside, other=0.0)
    if not DESCRIPTORS:
        keys += head.to(tl.int64) * kv_head
        values += head.to(tl.int64) * kv_head

    # Steps start at a block's border. Those that end within the context need no mask for loading;
    # the slots after it may hold anything, a NaN too, so the step that reaches beyond stands apart.
    begin = tl.maximum(first_row - window + 1, 0) // BLOCK_SIZE * BLOCK_SIZE
    end = begin + tl.cdiv(last_row + 1 - begin, BLOCK_N) * BLOCK_N
    stop = tl.minimum(end, begin + (context - begin) // BLOCK_N * BLOCK_N)

    # Finite, so that a row that sees nothing of a step gets exp2(-inf - maximum) = 0, not NaN.
    maximum = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    lane = tl.arange(0, BLOCK_N)
    done = begin
    if DESCRIPTORS:
        block = tl.load(block_table + begin // BLOCK_SIZE)
    else:
        block = tl.load(block_table + tl.minimum(begin + lane, last_row) // BLOCK_SIZE)
    for first in tl.range(begin, stop, BLOCK_N):
        # The next step's block numbers are fetched now: nobody waits for them.
        ahead = tl.minimum(first + BLOCK_N, stop - BLOCK_N)
        if DESCRIPTORS:
            slot = block * BLOCK_SIZE + first % BLOCK_SIZE
            block = tl.load(block_table + ahead // BLOCK_SIZE)
            k = keys.load([slot, head * HEAD_DIM])
            v = values.load([slot, head * HEAD_DIM])
        else:
            slot = block * BLOCK_SIZE + lane % BLOCK_SIZE
            if BLOCK_SIZE > BLOCK_N:
                slot += first % BLOCK_SIZE
            block = tl.load(block_table + ahead // BLOCK_SIZE + lane // BLOCK_SIZE)
            at = slot.to(tl.int64)[:, None] * kv_slot + dim[None, :]
            if HEAD_DIM == PADDED_DIM:
                k = tl.load(keys + at)
                v = tl.load(values + at)
            else:
                k = tl.load(keys + at, mask=inside, other=0.0)
                v = tl.load(values + at, mask=inside, other=0.0)
        maximum, total, acc = fold(
            queries, k, v, position, lane, first, edges, window, scale, maximum, total, acc
        )
        done = first + BLOCK_N
    if done < end:
        key = done + lane
        written = key < context
        if DESCRIPTORS:
            slot = tl.load(block_table + done // BLOCK_SIZE) * BLOCK_SIZE + done % BLOCK_SIZE
            k = keys.load([slot, head * HEAD_DIM])
            v = values.load([slot, head * HEAD_DIM])
            v = tl.where(written[:, None], v, 0.0)
        else:
            block = tl.load(block_table + key // BLOCK_SIZE, mask=written, other=0)
            slot = block * BLOCK_SIZE + key % BLOCK_SIZE
            at = slot.to(tl.int64)[:, None] * kv_slot + dim[None, :]
            k = tl.load(keys + at, mask=written[:, None] & inside, other=0.0)
            v = tl.load(values + at, mask=written[:, None] & inside, other=0.0)
        maximum, total, acc = fold(
            queries, k, v, position, lane, done, edges, window, scale, maximum, total, acc
        )

    # Computed again, and from the loop's result so that the compiler cannot keep the first ones:
    # that would hold 33 registers through the loop.
    pair = top + (done - stop) + tl.arange(0, BLOCK_M)
    out += (start + pair // GROUP).to(tl.int64)[:, None] * out_row
    out += (head * GROUP + pair % GROUP)[:, None] * out_head + dim[None, :]
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out, result, mask=(pair < pairs)[:, None] & inside)


def check(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, block_size: int, arch: int
) -> None:
    """Raises ValueError, with the reason, for a model or a device that the kernel does not do.

    `arch` is what `arch_of` says of the device. To be called when a worker starts.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim {head_dim} is none of {HEAD_DIMS}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size {block_size} is not a power of two of at least 16")
    if dtype not in DTYPES:
        raise ValueError(f"{dtype} is neither bfloat16 nor float16")
    if (arch, 64) not in CONFIGS:
        known = ", ".join(f"{known / 10}" for known, dim in CONFIGS if dim == 64)
        raise ValueError(f"compute capability {arch / 10} is none of {known}")


def choose(arch: int, head_dim: int, block_size: int, pairs: int) -> Config:
    """The shipped Config for chunks of at most `pairs` rows x heads that share a KV head."""
    padded = triton.next_power_of_2(head_dim)
    for config in CONFIGS[arch, padded]:
        if config.short and pairs > config.block_m:
            continue
        # A descriptor's tile cannot be wider than a head, nor reach over a block's end.
        if config.descriptors and (head_dim != padded or block_size < config.block_n):
            continue
        return config
    raise AssertionError(f"no configuration for {arch}, {head_dim}")


def attend_prompts(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    contexts: Tensor,
    block_table: Tensor,
    block_size: int,
    window: int,
    scale: float,
    longest: int,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """What each row sees of its sequence; its own keys and values are in the pages already.

    q [rows, heads, head_dim], packed: segment i has rows starts[i] .. starts[i + 1] - 1, the last
    of its first contexts[i] tokens, `longest` rows at most. keys, values [slots, kv_heads,
    head_dim]; starts [segments + 1], contexts [segments] and block_table [segments, width] are
    int32, and only a context's own blocks are looked up. `window` counts the tokens that a row
    sees, itself included; 0 is all.

    Returns `out` or a new tensor like q; rows after the last segment's are not written. Reads no
    device value on the host, so it can be captured in a graph. Nothing is copied. `config` is for
    tuning. Raises ValueError for what it does not do.
    """
    interpreted = not isinstance(attend_tile, triton.JITFunction)
    rows, heads, head_dim = q.shape
    slots, kv_heads, _ = keys.shape
    segments = block_table.shape[0]
    out = torch.empty_like(q) if out is None else out
    arch = 90 if interpreted else arch_of(q.device)
    if not interpreted:
        check(heads, kv_heads, head_dim, q.dtype, block_size, arch)
    _check_tensors(q, keys, values, out, starts, contexts, block_table)
    if scale <= 0 or window < 0 or not 0 <= longest <= rows:
        raise ValueError(f"scale {scale}, window {window} or longest {longest} is out of range")
    if rows == 0 or segments == 0:
        return out

    group = heads // kv_heads
    config = config or choose(arch, head_dim, block_size, longest * group)
    padded = triton.next_power_of_2(head_dim)
    pages: tuple[Tensor | TensorDescriptor, ...] = (keys, values)
    if config.descriptors:
        pages = tuple(
            TensorDescriptor(
                page,
                shape=[slots, kv_heads * head_dim],
                strides=[page.stride(0), 1],
                block_shape=[config.block_n, head_dim],
            )
            for page in (keys, values)
        )
    attend_tile[(kv_heads, rows * group // config.block_m + segments)](
        q,
        *pages,
        out,
        starts,
        contexts,
        block_table,
        segments,
        block_table.stride(0),
        window or _NO_WINDOW,
        scale * _LOG2_E,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        out.stride(0),
        out.stride(1),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        GROUP=group,
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        DESCRIPTORS=config.descriptors,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return out


@functools.cache
def arch_of(device: torch.device) -> int:
    """The compute capability whose machine code the device runs, 10 x major + minor.

    Raises ValueError for what is no CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"attend_prompts runs on CUDA devices, not on {device}")
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + (minor if major == 8 else 0)  # 8.6 and 8.9 have less shared memory than 8.0


def _check_tensors(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    starts: Tensor,
    contexts: Tensor,
    block_table: Tensor,
) -> None:
    if len({tensor.dtype for tensor in (q, keys, values, out)}) > 1:
        raise ValueError(
            f"q is {q.dtype}, keys {keys.dtype}, values {values.dtype}, out {out.dtype}"
        )
    if values.shape != keys.shape or values.stride() != keys.stride():
        raise ValueError(
            f"values {tuple(values.shape)} are not laid out as keys {tuple(keys.shape)}"
        )
    if out.shape != q.shape or keys.shape[2] != q.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, keys {tuple(keys.shape)} and out {tuple(out.shape)} do not match"
        )
    if q.shape[1] % keys.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {keys.shape[1]} KV heads evenly")
    if {q.stride(2), out.stride(2), keys.stride(2)} != {1} or keys.stride(1) != keys.shape[2]:
        raise ValueError(
            "q, out, keys and values must be contiguous along head_dim, pages along heads"
        )
    if keys.data_ptr() % 16 or values.data_ptr() % 16 or keys.stride(0) * keys.itemsize % 16:
        raise ValueError("keys and values must be aligned to 16 bytes")
    if {starts.dtype, contexts.dtype, block_table.dtype} != {torch.int32}:
        raise ValueError("starts, contexts and block_table must be int32")
    segments = contexts.shape[0]
    if starts.shape != (segments + 1,) or block_table.shape[0] != segments:
        raise ValueError(
            f"{tuple(starts.shape)} starts and block_table {tuple(block_table.shape)} do not fit "
            f"{segments} contexts"
        )
    if not (starts.is_contiguous() and contexts.is_contiguous()) or block_table.stride(1) != 1:
        raise ValueError("starts, contexts and the rows of block_table must be contiguous")
    tensors = (keys, values, out, starts, contexts, block_table)
    if any(tensor.device != q.device for tensor in tensors):
        raise ValueError(f"every tensor must be on {q.device}, as q is")
