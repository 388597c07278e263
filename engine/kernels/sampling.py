"""sample: logits to tokens on the device, the very tokens that engine/sampler.py chooses.

Limit   memory and the noise: one read of rows * vocab float32, ~25 integer operations per token
        for Philox; what is read again is a few tiles per row.
        Roof on one H200 (4.3 TB/s measured copy): 256 rows of 151936 = 156 MB -> 36 us; below ~16
        rows four launches, five with edits.
Layout  logits [rows, vocab] float32. A row is tiles of TILE tokens, a tile is groups of GROUP.

    edit       logits += bias, / repetition, - penalties, in place, for the tokens listed
    survey     the largest score of each group (score = logit / temperature); of a row without
               filters, the largest score + noise
    cut        from those, a value below which nothing can be chosen
    shortlist  the few tokens above it, found by reading only tiles with a group above it
    finish     top-k, top-p, min-p and the draw, exactly, over the shortlist; over the whole row if
               the shortlist overflowed (a top-p close to 1 of a flat row) or proves too short

Why the tokens are the same. Noise words are integers, so the same bits. Scores are float32 by
correctly rounded operations, as in the definition; neither kernel may fuse them into others. The
definition adds noise in float64, and so does `finish`. `survey` uses float32 only to rule out:
its noise is within NOISE_ERROR of the true one, and the cut is lower by twice that and the rounding
of the sum. Masses of top-p are integers (2^-44 of the largest): sums of them depend on no order. A
top-p boundary may differ from the definition's if it lies within ~1e-12 of a token's edge, the
float64 logarithms and exponentials of two libraries in their last bit: ~1e-12 per draw.

Ties at a top-k or top-p boundary go to the lower token id.

Source  engine/sampler.py; Salmon et al. 2011 (Philox); Gumbel-max sampling.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.noise import NOISE_ERROR, noise, noise_lanes, noise_words, rough_noise
from engine.kernels.sampling_tensors import SamplingTensors
from engine.kernels.threshold import (
    LOWEST_KEY,
    NO_ID,
    TILE,
    UNIT,
    find_id,
    find_key,
    ids_of,
    key_of,
    mass_of,
    score_of,
    weigh,
)
from engine.sampler import gumbel

MAX_VOCAB: Final = 262144  # masses of so many tokens, 2^44 at most each, add up within an int64
CAPACITY: Final = 8192  # of a row's shortlist; nuclei of language models are far smaller
PROGRAMS: Final = 1056  # 8 for each of an H200's 132 multiprocessors

LAUNCH: Final[dict[str, dict[str, Any]]] = {
    "edit": {"num_warps": 4},
    "survey": {"num_warps": 8},
    "cut": {"num_warps": 8, "maxnreg": 128},
    "shortlist": {"num_warps": 4},
    "finish": {"num_warps": 4, "maxnreg": 168},
}
"""maxnreg: left alone, ptxas rounds down to where one more block fits and spills the few over."""

EXACT: Final[dict[str, Any]] = {"enable_fp_fusion": False}
"""a * b - c with one rounding would not be the definition's score."""

GROUP = tl.constexpr(64)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a logit that stands for a banned token; finite
ROUNDING = tl.constexpr(2.0**-20)  # of a float32 sum, generously


def sample_reference(logits: Tensor, how: SamplingTensors) -> Tensor:
    """As `sample`, one row after the other on the host; leaves logits as they are."""
    return torch.tensor(
        [_sample_row(row.cpu(), how, number) for number, row in enumerate(logits)],
        dtype=torch.int64,
        device=logits.device,
    )


def _sample_row(logits: Tensor, how: SamplingTensors, row: int) -> int:
    if not bool(logits.isfinite().all()):
        return -1
    edits = slice(int(how.starts[row]), int(how.starts[row + 1]))
    tokens, divisors = how.tokens[edits].cpu().long(), how.divisors[edits].cpu()
    edited = logits[tokens] + how.biases[edits].cpu()
    edited = torch.where(edited > 0, edited / divisors, edited * divisors)
    logits = logits.index_copy(0, tokens, edited - how.penalties[edits].cpu())
    temperature = float(how.temperatures[row])
    if temperature == 0:
        return int(logits.argmax())
    scores, ids = (logits / temperature).sort(descending=True, stable=True)
    top = scores[0]
    if how.top_ks[row] > 0:
        scores, ids = scores[: how.top_ks[row]], ids[: how.top_ks[row]]
    if how.top_ps[row] < 1:
        probabilities = scores.double().softmax(dim=-1)
        kept = probabilities.cumsum(dim=-1) - probabilities < how.top_ps[row].cpu()
        scores, ids = scores[kept], ids[kept]
    kept = (scores >= top + how.log_min_ps[row].cpu()) & scores.isfinite()
    scores, ids = scores[kept], ids[kept]
    if not len(ids):
        return -1
    seed = int(how.seeds[row]) & 0xFFFFFFFFFFFFFFFF
    noise = gumbel(ids.numpy(), seed, int(how.choices[row]), int(how.positions[row]))
    return int(ids[int(np.argmax(scores.double().numpy() + noise))])


@triton.jit
def scaled(logit, temperature):
    """float32 as in the definition; -inf for a banned token."""
    allowed = logit > LOWEST
    score = tl.div_rn(tl.where(allowed, logit, 0.0), temperature + tl.zeros_like(logit))
    return tl.where(allowed, score, float("-inf"))


@triton.jit
def edit_kernel(logits, stride, starts, tokens, biases, divisors, penalties):
    row = tl.program_id(0).to(tl.int64)
    last = tl.load(starts + row + 1)
    step = tl.num_programs(1) * TILE
    for first in range(tl.load(starts + row) + tl.program_id(1) * TILE, last, step):
        at = tl.arange(0, TILE) + first
        inside = at < last
        token = tl.load(tokens + at, mask=inside, other=0)
        divisor = tl.load(divisors + at, mask=inside, other=1.0)
        raw = tl.load(logits + row * stride + token, mask=inside, other=0.0)
        sound = tl.abs(raw) < float("inf")
        logit = tl.where(sound, raw, 0.0) + tl.load(biases + at, mask=inside, other=0.0)
        logit = tl.where(logit > 0, tl.div_rn(logit, divisor), logit * divisor)
        logit -= tl.load(penalties + at, mask=inside, other=0.0)
        logit = tl.where(logit == float("-inf"), LOWEST, logit)
        # A broken logit stays one: a ban must not hide it from the survey.
        tl.store(logits + row * stride + token, tl.where(sound, logit, raw), mask=inside)


@triton.jit(do_not_specialize=["tiles_each"])
def survey_kernel(
    logits,
    stride,
    vocab,
    seeds,
    choices,
    positions,
    temperatures,
    top_ks,
    top_ps,
    log_min_ps,
    maxima,
    part_tops,
    part_masses,
    groups,
    tiles_each,
):
    """maxima [rows, groups]; part_tops, part_masses [rows, parts]: the largest score of a part and
    the sum of exp(score - it), of rows that need it."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, top_k = tl.load(temperatures + row), tl.load(top_ks + row)
    top_p, log_min_p = tl.load(top_ps + row), tl.load(log_min_ps + row)
    seed, choice, position = tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row)
    drawn = temperature > 0
    divisor = tl.where(drawn, temperature, 1.0)
    noisy = drawn & (top_k <= 0) & (top_p >= 1) & (log_min_p == float("-inf"))
    weighed = drawn & (top_k <= 0) & (top_p < 1)
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.zeros([], tl.float64)
    # Four tokens to a row of the tile: the four words of one Philox block, in one thread.
    block = tl.arange(0, TILE // 4)[:, None]
    lane = tl.arange(0, 4)[None, :]
    group = tl.arange(0, TILE // GROUP)
    for tile in range(part * tiles_each, (part + 1) * tiles_each):
        at = block * 4 + lane + tile * TILE
        inside = at < vocab
        logit = tl.load(logits + row * stride + at, mask=inside, other=LOWEST)
        score = scaled(logit, divisor)
        value = score
        if noisy:
            blocks = (block + tile * (TILE // 4)).to(tl.uint32)
            value += rough_noise(noise_lanes(blocks, lane, seed, choice, position))
        value = tl.where(tl.abs(logit) < float("inf"), value, float("inf"))
        best = tl.max(tl.reshape(tl.max(value, axis=1), [TILE // GROUP, GROUP // 4]), axis=1)
        group_at = group + tile * (TILE // GROUP)
        tl.store(maxima + row * groups + group_at, best, mask=group_at < groups)
        if weighed:
            before, top = top, tl.maximum(top, tl.max(best, axis=0))
            if tl.abs(top) < float("inf"):
                rescaled = mass * tl.exp(before.to(tl.float64) - top.to(tl.float64))
                each = tl.exp(score.to(tl.float64) - top.to(tl.float64))
                mass = rescaled + tl.sum(tl.sum(each, axis=1), axis=0)
    tl.store(part_tops + row * parts + part, top)
    tl.store(part_masses + row * parts + part, mass)


@triton.jit
def cut_kernel(temperatures, top_ks, top_ps, log_min_ps, maxima, tops, cuts, counts, groups):
    """tops, cuts [rows]: the largest value, and what can be chosen is not below; NaN if nothing.

    counts [rows] are set to 0.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k = tl.load(temperatures + row), tl.load(top_ks + row)
    top_p, log_min_p = tl.load(top_ps + row), tl.load(log_min_ps + row)
    row_maxima = maxima + row * groups
    best = tl.full([TILE], float("-inf"), tl.float32)
    for first in range(0, groups, TILE):
        at = tl.arange(0, TILE) + first
        each = tl.load(row_maxima + at, mask=at < groups, other=float("-inf"))
        best = tl.maximum(best, each)
    top = tl.max(best, axis=0)
    cut = tl.full([], float("nan"), tl.float32)
    if tl.abs(top) < float("inf"):
        key = tl.full([], LOWEST_KEY, tl.int64)
        if top_k > 0:
            # At least top_k scores lie above the top_k-th largest maximum.
            need = top_k.to(tl.int64)
            key = find_key(row_maxima, groups, top, need, need + need // 2, MASS=False)
        elif (top_p < 1) & (log_min_p == float("-inf")):
            # The maxima's own nucleus, a little larger, guesses the row's. `finish` proves it.
            whole, _ = weigh(row_maxima, groups, top, LOWEST_KEY - 1, MASS=True)
            part = whole.to(tl.float64) * (1 - top_p)
            need = (whole.to(tl.float64) - 0.5 * part).to(tl.int64)
            most = (whole.to(tl.float64) - 0.4 * part).to(tl.int64)
            key = find_key(row_maxima, groups, top, need, most, MASS=True)
        cut = score_of(key)
        if temperature <= 0:
            cut = top
        elif (top_k <= 0) & (top_p >= 1) & (log_min_p == float("-inf")):
            cut = top - (2 * NOISE_ERROR + tl.abs(top) * ROUNDING)
        elif (top_k <= 0) | (top_p >= 1):
            # What min-p drops does not count for top-k or top-p alone; of both, top-p's whole does.
            cut = tl.maximum(cut, top + log_min_p)
    tl.store(tops + row, top)
    tl.store(cuts + row, cut)
    tl.store(counts + row, 0)


@triton.jit(do_not_specialize=["tiles_each"])
def shortlist_kernel(
    logits,
    stride,
    vocab,
    seeds,
    choices,
    positions,
    temperatures,
    top_ks,
    top_ps,
    log_min_ps,
    maxima,
    cuts,
    counts,
    listed,
    listed_ids,
    groups,
    tiles_each,
    ROOM: tl.constexpr,
):
    """listed, listed_ids [rows, ROOM]: scores and token ids, in no order; counts [rows], which may
    pass ROOM."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, top_k = tl.load(temperatures + row), tl.load(top_ks + row)
    top_p, log_min_p = tl.load(top_ps + row), tl.load(log_min_ps + row)
    seed, choice, position = tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row)
    drawn = temperature > 0
    divisor = tl.where(drawn, temperature, 1.0)
    noisy = drawn & (top_k <= 0) & (top_p >= 1) & (log_min_p == float("-inf"))
    cut = tl.load(cuts + row)
    group = tl.arange(0, TILE // GROUP)
    lane = tl.arange(0, TILE)
    for tile in range(part * tiles_each, (part + 1) * tiles_each):
        group_at = group + tile * (TILE // GROUP)
        inside = group_at < groups
        best = tl.load(maxima + row * groups + group_at, mask=inside, other=float("-inf"))
        if tl.max(best, axis=0) >= cut:
            at = lane + tile * TILE
            logit = tl.load(logits + row * stride + at, mask=at < vocab, other=LOWEST)
            score = scaled(logit, divisor)
            value = score
            if noisy:
                value += rough_noise(noise_words(at, seed, choice, position))
            chosen = (value >= cut) & (score > float("-inf"))
            place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            place += tl.atomic_add(counts + row, tl.sum(chosen.to(tl.int32), axis=0))
            room = chosen & (place < ROOM)
            tl.store(listed + row * ROOM + place, score, mask=room)
            tl.store(listed_ids + row * ROOM + place, at, mask=room)


@triton.jit(do_not_specialize=["parts"])
def finish_kernel(
    logits,
    stride,
    vocab,
    seeds,
    choices,
    positions,
    temperatures,
    top_ks,
    top_ps,
    log_min_ps,
    tops,
    part_tops,
    part_masses,
    counts,
    listed,
    listed_ids,
    tokens,
    parts,
    ROOM: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k = tl.load(temperatures + row), tl.load(top_ks + row)
    top_p, log_min_p = tl.load(top_ps + row), tl.load(log_min_ps + row)
    seed, choice, position = tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row)
    top = tl.load(tops + row)
    token = tl.full([], -1, tl.int32)
    if tl.abs(top) < float("inf"):
        drawn = temperature > 0
        whole = tl.zeros([], tl.float64)  # what the probabilities that top-p adds up are divided by
        if drawn & (top_k <= 0) & (top_p < 1):
            part = tl.arange(0, PARTS)
            there = part < parts
            largest = tl.load(part_tops + row * parts + part, mask=there, other=float("-inf"))
            masses = tl.load(part_masses + row * parts + part, mask=there, other=0.0)
            whole = (
                tl.sum(masses * tl.exp(largest.to(tl.float64) - top.to(tl.float64)), axis=0) * UNIT
            )
        count = tl.load(counts + row)
        is_list = count <= ROOM
        ids = listed_ids + row * ROOM
        if is_list & (whole > 0):
            held, _ = weigh(listed + row * ROOM, count, top, LOWEST_KEY - 1, MASS=True)
            # With min-p, what is not listed is below it and cannot be chosen.
            is_list = (held.to(tl.float64) >= top_p * whole) | (log_min_p > float("-inf"))
        if is_list:
            scores = listed + row * ROOM
            length = count
        else:
            scores = logits + row * stride
            length = count * 0
            count = vocab
            for first in range(0, count, TILE):
                at = tl.arange(0, TILE) + first
                logit = tl.load(scores + at, mask=at < count, other=LOWEST)
                score = scaled(logit, tl.where(drawn, temperature, 1.0))
                tl.store(scores + at, score, mask=at < count)
            tl.debug_barrier()  # other threads read them

        # Kept: keys above `key`, and of those equal to it the ids up to `last`.
        key = tl.full([], LOWEST_KEY - 1, tl.int64)
        last = tl.full([], NO_ID, tl.int32)
        allowed = tl.full([], NO_ID, tl.int64)  # of those equal to it, how many
        if (top_k > 0) & (top_k < count):
            key = find_key(scores, count, top, top_k.to(tl.int64), 0, MASS=False)
            above, equal = weigh(scores, count, top, key, MASS=False)
            allowed = top_k.to(tl.int64) - above
            if allowed < equal:
                last = find_id(scores, ids, length, count, key, allowed.to(tl.int32))
        if drawn & (top_p < 1):
            if top_k > 0:
                above, equal = weigh(scores, count, top, key, MASS=True)
                tied = tl.minimum(allowed, equal) * mass_of(
                    score_of(tl.maximum(key, LOWEST_KEY)), top
                )
                whole = (above + tied).to(tl.float64)
            # A token is kept while what lies before it weighs less than this, rounded up.
            need = -tl.floor(-(top_p * whole)).to(tl.int64)
            need = tl.maximum(need, 1)
            nucleus = find_key(scores, count, top, need, 0, MASS=True)
            if nucleus >= key:
                above, equal = weigh(scores, count, top, nucleus, MASS=True)
                each = tl.maximum(mass_of(score_of(nucleus), top), 1)
                fitting = (need - above + each - 1) // each
                if nucleus == key:
                    fitting = tl.minimum(fitting, allowed)
                key = nucleus
                last = tl.full([], NO_ID, tl.int32)
                if fitting < equal:
                    last = find_id(scores, ids, length, count, key, fitting.to(tl.int32))

        best = tl.full([TILE], float("-inf"), tl.float64)
        best_id = tl.full([TILE], NO_ID, tl.int32)
        for first in range(0, count, TILE):
            at = tl.arange(0, TILE) + first
            score = tl.load(scores + at, mask=at < count, other=float("-inf"))
            token_id = ids_of(ids, length, at)
            keys = key_of(score).to(tl.int64)
            kept = (keys > key) | ((keys == key) & (token_id <= last))
            kept &= (tl.abs(score) < float("inf")) & (score >= top + log_min_p)
            value = score.to(tl.float64)
            if drawn:
                value += noise(noise_words(token_id, seed, choice, position))
            value = tl.where(kept, value, float("-inf"))
            better = (value > best) | ((value == best) & (token_id < best_id) & kept)
            best = tl.where(better, value, best)
            best_id = tl.where(better, token_id, best_id)
        highest = tl.max(best, axis=0)
        found = tl.min(tl.where((best == highest) & (best_id < NO_ID), best_id, NO_ID), axis=0)
        token = tl.where(found < NO_ID, found, -1)
    tl.store(tokens + row, token.to(tl.int64))


def sample(logits: Tensor, how: SamplingTensors) -> Tensor:
    """Choose a token for each row of logits [rows, vocab] float32, which is overwritten.

    Returns int64 [rows] on the device, -1 for a row that holds a NaN or an infinity. Any mixture of
    greedy, free and filtered rows. Launches depend on the shapes alone and wait for nothing.
    Raises ValueError for what the kernels do not do.
    """
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.stride(-1) != 1:
        raise ValueError(
            f"logits must be float32 [rows, vocab], contiguous rows, got {logits.dtype}"
        )
    rows, vocab = logits.shape
    if not 0 < vocab <= MAX_VOCAB:
        raise ValueError(f"vocab must be 1 to {MAX_VOCAB}, is {vocab}")
    if len(how.seeds) != rows or how.seeds.device != logits.device:
        raise ValueError(
            f"{rows} rows on {logits.device}, parameters of {len(how.seeds)} elsewhere"
        )
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return tokens
    tiles = triton.cdiv(vocab, TILE.value)
    tiles_each = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // rows)))
    parts = triton.cdiv(tiles, tiles_each)
    groups = triton.cdiv(vocab, GROUP.value)
    maxima = torch.empty((rows, groups), dtype=torch.float32, device=device)
    part_tops = torch.empty((rows, parts), dtype=torch.float32, device=device)
    part_masses = torch.empty((rows, parts), dtype=torch.float64, device=device)
    # Two, for Triton compiles a kernel anew where a pointer is not aligned to 16 bytes.
    tops, cuts = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    listed = torch.empty((rows, CAPACITY), dtype=torch.float32, device=device)
    listed_ids = torch.empty((rows, CAPACITY), dtype=torch.int32, device=device)
    row_parameters = (
        how.seeds,
        how.choices,
        how.positions,
        how.temperatures,
        how.top_ks,
        how.top_ps,
        how.log_min_ps,
    )
    source = (logits, logits.stride(0))
    if len(how.tokens):
        edits = (how.starts, how.tokens, how.biases, how.divisors, how.penalties)
        edit_kernel[(rows, max(1, min(8, PROGRAMS // rows)))](
            *source, *edits, **LAUNCH["edit"], **EXACT
        )
    survey_kernel[(rows, parts)](
        *source,
        vocab,
        *row_parameters,
        maxima,
        part_tops,
        part_masses,
        groups,
        tiles_each,
        **LAUNCH["survey"],
        **EXACT,
    )
    cut_kernel[(rows,)](
        *row_parameters[3:], maxima, tops, cuts, counts, groups, **LAUNCH["cut"], **EXACT
    )
    shortlist_kernel[(rows, parts)](
        *source,
        vocab,
        *row_parameters,
        maxima,
        cuts,
        counts,
        listed,
        listed_ids,
        groups,
        tiles_each,
        ROOM=CAPACITY,
        **LAUNCH["shortlist"],
        **EXACT,
    )
    finish_kernel[(rows,)](
        *source,
        vocab,
        *row_parameters,
        tops,
        part_tops,
        part_masses,
        counts,
        listed,
        listed_ids,
        tokens,
        parts,
        ROOM=CAPACITY,
        PARTS=triton.next_power_of_2(tiles),  # the most there are, for any number of rows
        **LAUNCH["finish"],
        **EXACT,
    )
    return tokens
