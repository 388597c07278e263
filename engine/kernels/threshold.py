"""Finding a threshold among scores in Triton without sorting, for use within other kernels.

Scores are float32, -inf where a token is banned. They are read as integer keys in the same order,
and a key is searched that the scores from it up reach a number (top-k) or a probability mass
(top-p). Masses are integers too, in units of 2^-44 of the largest score's: their sums do not depend
on the order of adding, and 2^18 of them fit.

Limit   each pass reads all scores once, from L2 or L1; a search takes eleven passes at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(1024)
PIVOTS = tl.constexpr(8)  # with 16 the searches spill in some versions of Triton
LOWEST_KEY = tl.constexpr(-2139095040)  # of the lowest finite score; that of -inf is one less
NO_ID = tl.constexpr(0x7FFFFFFF)
UNIT = tl.constexpr(2.0**44)


@triton.jit
def key_of(score):
    """An int32 for each float32, in the same order; both zeros have one."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(key):
    """The float32 that has this key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(score, top):
    """exp(score - top) as an integer, in units of 2^-44."""
    return (tl.exp(score.to(tl.float64) - top.to(tl.float64)) * UNIT + 0.5).to(tl.int64)


@triton.jit
def weight_of(score, top, MASS: tl.constexpr):
    return mass_of(score, top) if MASS else (score > float("-inf")).to(tl.int64)


@triton.jit
def find_key(scores, count, top, need, most, MASS: tl.constexpr):
    """The largest key such that the scores from it up weigh at least `need`; LOWEST_KEY if none.

    Or a lower one, if they weigh no more than `most`. A search with PIVOTS pivots at a time:
    eleven passes at most, whatever the range of scores.
    """
    low = tl.full([], LOWEST_KEY, tl.int64)
    high = key_of(top).to(tl.int64)
    weight_of_low = tl.full([], 1 << 62, tl.int64)
    while (low < high) & (weight_of_low > most):
        step = (high - low + PIVOTS - 1) // PIVOTS
        pivots = tl.minimum(low + step * (1 + tl.arange(0, PIVOTS).to(tl.int64)), high)
        reached = tl.zeros([PIVOTS], tl.int64)
        for first in range(0, count, TILE):
            at = tl.arange(0, TILE) + first
            score = tl.load(scores + at, mask=at < count, other=float("-inf"))
            above = key_of(score)[None, :] >= pivots.to(tl.int32)[:, None]
            weight = weight_of(score, top, MASS)
            reached += tl.sum(tl.where(above, weight[None, :], 0), axis=1)
        enough = reached >= need
        low = tl.maximum(low, tl.max(tl.where(enough, pivots, low), axis=0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, pivots - 1), axis=0))
        lightest = tl.min(tl.where(enough, reached, 1 << 62), axis=0)
        weight_of_low = tl.minimum(weight_of_low, lightest)
    return low


@triton.jit
def weigh(scores, count, top, key, MASS: tl.constexpr):
    """What the scores above `key` weigh together, and how many are equal to it."""
    above = tl.zeros([], tl.int64)
    equal = tl.zeros([], tl.int64)
    for first in range(0, count, TILE):
        at = tl.arange(0, TILE) + first
        score = tl.load(scores + at, mask=at < count, other=float("-inf"))
        keys = key_of(score).to(tl.int64)
        above += tl.sum(tl.where(keys > key, weight_of(score, top, MASS), 0), axis=0)
        equal += tl.sum((keys == key).to(tl.int64), axis=0)
    return above, equal


@triton.jit
def ids_of(listed_ids, length, at):
    """The token ids of the entries `at`: of a list of this length; 0 is the row itself."""
    return tl.where(length > 0, tl.load(listed_ids + at, mask=at < length, other=NO_ID), at)


@triton.jit
def find_id(scores, listed_ids, length, count, key, nth):
    """The `nth` lowest id (from 1) of those whose score has this key."""
    low = tl.zeros([], tl.int32)
    high = tl.full([], 0x3FFFF, tl.int32)
    while low < high:
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = tl.minimum(low + step * (1 + tl.arange(0, PIVOTS)) - 1, high)
        reached = tl.zeros([PIVOTS], tl.int32)
        for first in range(0, count, TILE):
            at = tl.arange(0, TILE) + first
            score = tl.load(scores + at, mask=at < count, other=float("-inf"))
            tied = key_of(score).to(tl.int64) == key
            ids = tl.where(tied, ids_of(listed_ids, length, at), NO_ID)
            reached += tl.sum((ids[None, :] <= pivots[:, None]).to(tl.int32), axis=1)
        low = tl.maximum(low, tl.max(tl.where(reached >= nth, low, pivots + 1), axis=0))
        high = tl.minimum(high, tl.min(tl.where(reached >= nth, pivots, high), axis=0))
    return high
