"""attend_singles: attention of one new token per sequence over its paged context.

Limit   memory: keys and values of all contexts are read once. Roof on one H200 (4.3 TB/s measured
        copy): 8 sequences * 4096 tokens * 8 KV heads * 128, bf16 = 134 MB -> 31 us.
Layout  keys, values [slots, kv_heads, head_dim], slot = block * block_size + offset.
Source  FlashDecoding, Dao et al. 2023, and PagedAttention, Kwon et al. 2023, section 4.3; how the
        work is cut and where pieces meet: see splits.py.

A program walks its slice: tile after tile of one KV head, segment after segment. The programs of
all KV heads of a slice are neighbours in the grid, so that together they read whole rows of pages.
A segment that lies in one slice is written at once. Of one in several pieces, whoever comes last
merges: no second launch, and nobody ever waits for another.

The query heads of a KV head are the rows of one tile, 16 at least: the tensor cores' smallest. Most
are empty for small groups, yet cost nothing: 16 rows are 16 flop per byte read, 70 TFLOP/s at full
bandwidth. One path does for every group, a single head included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from decode.kernels.splits import UNBOUNDED, Splits, check_device, check_shapes, plan_splits

BLOCK_SIZES = (16, 32, 64)

_MERGED = 4 << 10
"""Elements of pieces that a merge holds at once: 32 registers for each of 128 threads. Its warps
lie along the heads of the group, so that less than 4 heads take as many registers as 4."""


def attend_singles_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    contexts: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    window: int,
    scale: float,
) -> torch.Tensor:
    """The definition, in float64: like attend_singles."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // keys.shape[1]
    for n, context in enumerate(contexts.tolist()):
        if not context:
            continue
        first = max(0, context - window) if window else 0
        tokens = torch.arange(first, context, device=q.device)
        slots = block_table[n][tokens // block_size].long() * block_size + tokens % block_size
        k = keys[slots].double().repeat_interleave(group, dim=1)
        v = values[slots].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,thd->ht", q[n].double(), k) * scale
        out[n] = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
    return out.to(q.dtype)


@triton.jit(do_not_specialize=["segments", "window", "table_row"])
def _attend(
    out,
    q,
    keys,
    values,
    contexts,
    table,
    shares,
    arrivals,
    sums,
    edges,
    q_row,
    slot_row,
    table_row,
    segments,
    window,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EMPTIES: tl.constexpr,
    PIECES: tl.constexpr,
):
    head = tl.program_id(0)
    slice_ = tl.program_id(1)
    mine = shares + slice_ * 5
    segment = tl.load(mine)
    skip = tl.load(mine + 1)
    todo = tl.load(mine + 2)
    share = tl.load(mine + 3)
    context = tl.load(mine + 4)
    tile = slice_ * share  # among all tiles of the step

    r = tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    in_row = (r < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    in_head = r[:, None] * HEAD_DIM + d[None, :]
    column = head * HEAD_DIM + d
    log2_scale = scale * 1.4426950408889634  # exp2 is an instruction, exp is not

    # Rows of empty segments are shared out like this: loaded here, needed at the end.
    empties = slice_ + tl.arange(0, EMPTIES) * tl.num_programs(1)
    empty = tl.load(contexts + empties, mask=empties < segments, other=1) == 0

    while todo > 0:
        # Ahead of its use, so that its way from memory is not waited for.
        following = tl.load(contexts + segment + 1, mask=segment + 1 < segments, other=0)
        span = tl.minimum(context, window)
        tiles = tl.cdiv(span, TILE)
        count = tl.minimum(todo, tiles - skip)
        if count > 0:
            long_segment = segment.to(tl.int64)
            query = q + long_segment * q_row + head * GROUP * HEAD_DIM
            queries = tl.load(query + in_head, mask=in_row, other=0.0)
            highest = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, COLUMNS], tl.float32)
            # Tiles start at the window, not at a block: slots are looked up row by row.
            first = context - span + skip * TILE
            end = tl.minimum(first + count * TILE, context)
            blocks = table + long_segment * table_row
            token = first + tl.arange(0, TILE)
            # One tile ahead: Triton pipelines loads of keys and values to full depth if no load
            # of the same iteration gives their address, and none that crosses two iterations.
            block = tl.load(blocks + token // BLOCK_SIZE, mask=token < end, other=0)
            for _ in tl.range(first, end, TILE):
                live = token < end
                slot = (block * BLOCK_SIZE + token % BLOCK_SIZE).to(tl.int64)
                element = slot[:, None] * slot_row + column[None, :]
                mask = live[:, None] & (d < HEAD_DIM)[None, :]
                k = tl.load(keys + element, mask=mask, other=0.0)
                scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * log2_scale
                scores = tl.where(live[None, :], scores, float("-inf"))
                higher = tl.maximum(highest, tl.max(scores, 1))
                fade = tl.exp2(highest - higher)
                weights = tl.exp2(scores - higher[:, None])
                total = total * fade + tl.sum(weights, 1)
                # Not written is not zero: what masked rows hold must not meet their weight of 0.
                v = tl.load(values + element, mask=mask, other=0.0)
                acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
                highest = higher
                token += TILE
                block = tl.load(blocks + token // BLOCK_SIZE, mask=token < end, other=0)

            result = out + (long_segment * KV_HEADS + head) * (GROUP * HEAD_DIM)
            if count == tiles:
                answer = (acc / total[:, None]).to(out.dtype.element_ty)
                tl.store(result + in_head, answer, mask=in_row)
            else:
                first_slice = (tile - skip) // share
                last_slice = (tile - skip + tiles - 1) // share
                piece = (2 * slice_ + (skip == 0).to(tl.int32)) * KV_HEADS + head
                tl.store(sums + piece * (GROUP * HEAD_DIM) + in_head, acc, mask=in_row)
                tl.store(edges + piece * (2 * GROUP) + r, highest, mask=r < GROUP)
                tl.store(edges + piece * (2 * GROUP) + GROUP + r, total, mask=r < GROUP)
                # Every thread's stores, then the count; acq_rel makes them seen with it.
                tl.debug_barrier()
                counter = arrivals + first_slice * KV_HEADS + head
                earlier = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
                if earlier == last_slice - first_slice:
                    _merge(
                        result,
                        sums,
                        edges,
                        first_slice,
                        last_slice,
                        head,
                        KV_HEADS,
                        GROUP,
                        HEAD_DIM,
                        COLUMNS,
                        PIECES,
                    )
                    tl.store(counter, 0)
        tile += count
        todo -= count
        segment += 1
        skip = 0
        context = following

    width: tl.constexpr = GROUP * HEAD_DIM
    e = tl.arange(0, triton.next_power_of_2(width))
    element = (empties.to(tl.int64)[:, None] * KV_HEADS + head) * width + e[None, :]
    nothing = tl.zeros([EMPTIES, triton.next_power_of_2(width)], out.dtype.element_ty)
    tl.store(out + element, nothing, mask=empty[:, None] & (e < width)[None, :])


@triton.jit
def _merge(
    result,
    sums,
    edges,
    first_slice,
    last_slice,
    head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write a segment's attention from its pieces, always in the same order."""
    ROWS: tl.constexpr = triton.next_power_of_2(GROUP)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    in_row = (r < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    in_head = r[:, None] * HEAD_DIM + d[None, :]
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(first_slice, last_slice + 1, PIECES, num_stages=1):
        n = start + tl.arange(0, PIECES)
        piece = (2 * n + (n == first_slice).to(tl.int32)) * KV_HEADS + head
        edge = edges + piece[:, None] * (2 * GROUP) + r[None, :]
        live = (n <= last_slice)[:, None] & (r < GROUP)[None, :]
        # .cg: past the L1 cache, which is not kept up to date with the other programs' stores.
        # What is not there weighs 0, and rows of nothing else still have a sum to divide by.
        peaks = tl.load(edge, mask=live, other=-3e38, cache_modifier=".cg")
        totals = tl.load(edge + GROUP, mask=live, other=1.0, cache_modifier=".cg")
        parts = tl.load(
            sums + piece[:, None, None] * (GROUP * HEAD_DIM) + in_head[None, :, :],
            mask=(n <= last_slice)[:, None, None] & in_row[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(highest, tl.max(peaks, 0))
        fade = tl.exp2(highest - higher)
        weights = tl.exp2(peaks - higher[None, :])
        total = total * fade + tl.sum(totals * weights, 0)
        acc = acc * fade[:, None] + tl.sum(parts * weights[:, :, None], 0)
        highest = higher
    answer = (acc / total[:, None]).to(result.dtype.element_ty)
    tl.store(result + in_head, answer, mask=in_row)


def attend_singles(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    contexts: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    window: int,
    scale: float,
    splits: Splits | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q [n, heads, head_dim], the last token of each segment, over its whole context.

    keys, values: [slots, kv_heads, head_dim], q's own included. contexts: int32 [n]; a row with
    context 0 is padding: nothing is read for it, its result is 0. block_table: int32 [n, width],
    wide enough for the contexts; entries past them may be anything. window: tokens a query sees,
    itself included; 0 is all. `splits`: what plan_splits made of these contexts and this window,
    for all layers of a step; made here if not given. Returns [n, heads, head_dim], which is `out`
    if given. Never waits for the device. Raises ValueError.
    """
    n, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    _check(q, keys, values, contexts, block_table, block_size)
    if out is None:
        out = torch.empty(n, heads, head_dim, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(f"out must be {q.dtype} {list(q.shape)} without gaps")
    if not n:
        return out
    if splits is None:
        splits = plan_splits(contexts, heads, kv_heads, head_dim, q.dtype, window)
    splits.check(contexts, heads, kv_heads, head_dim, window)
    slices = splits.shares.shape[0]
    _attend[(kv_heads, slices)](
        out,
        q,
        keys,
        values,
        contexts,
        block_table,
        splits.shares,
        splits.arrivals,
        splits.sums,
        splits.edges,
        q.stride(0),
        keys.stride(0),
        block_table.stride(0),
        n,
        window or UNBOUNDED,
        scale,
        **constants(heads, kv_heads, head_dim, block_size, splits.config.tile, -(-n // slices)),
        num_warps=splits.config.warps,
        num_stages=splits.config.stages,
        maxnreg=splits.config.registers,
        enable_fp_fusion=True,
    )
    return out


def constants(
    heads: int, kv_heads: int, head_dim: int, block_size: int, tile: int, empties: int
) -> dict[str, int]:
    """What the kernel is compiled for. `empties`: rows of the step for each slice, rounded up."""
    group = triton.next_power_of_2(heads // kv_heads)
    columns = triton.next_power_of_2(head_dim)
    return {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "TILE": tile,
        "ROWS": max(16, group),
        "COLUMNS": columns,
        "EMPTIES": triton.next_power_of_2(empties),
        "PIECES": max(1, _MERGED // (max(4, group) * columns)),
    }


def _check(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    contexts: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> None:
    """Raises ValueError. Layouts are demanded, not made: a copy here would cost as much."""
    n, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    check_shapes(heads, kv_heads, head_dim, q.dtype)
    check_device(q.device)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size {block_size} is none of {BLOCK_SIZES}")
    if keys.dtype != q.dtype or values.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, the pages are {keys.dtype} and {values.dtype}")
    if keys.shape[2] != head_dim or keys.shape != values.shape:
        raise ValueError(
            f"q {list(q.shape)}, keys {list(keys.shape)} and values {list(values.shape)} differ"
        )
    if keys.stride() != values.stride():
        raise ValueError(f"keys have strides {keys.stride()}, values {values.stride()}")
    for name, rows in (("q", q), ("keys", keys)):
        if rows.stride()[1:] != (head_dim, 1):
            raise ValueError(f"{name} must have no gaps within a row, strides {rows.stride()}")
    if block_table.dtype != torch.int32 or block_table.ndim != 2 or block_table.stride(1) != 1:
        raise ValueError(f"block_table must be int32 [n, width], is {block_table.dtype}")
    if len(contexts) != n or len(block_table) != n:
        raise ValueError(f"{n} rows, {len(contexts)} contexts, {len(block_table)} block tables")
    if len({x.device for x in (q, keys, values, contexts, block_table)}) > 1:
        raise ValueError("q, pages, contexts and block_table must be on one device")
