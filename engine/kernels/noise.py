"""The noise of sampling in Triton: the bits of engine/sampler.py's, for use within other kernels.

Limit   ~25 integer operations and two logarithms per token; Triton's own Philox-4x32-10.
Source  Salmon et al. 2011 (Philox); engine/sampler.py, the definition.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOISE_ERROR = tl.constexpr(1e-3)  # of rough_noise: 1e-4 and what a GPU's logarithm adds


@triton.jit
def noise_words(tokens, seed, choice, position):
    """The noise word of each token: lane token % 4 of the Philox block token // 4."""
    blocks, lane = (tokens >> 2).to(tl.uint32), tokens & 3
    return noise_lanes(blocks, lane, seed, choice, position)


@triton.jit
def noise_lanes(blocks, lane, seed, choice, position):
    """Word `lane` of each of `blocks`, which may have another shape that broadcasts with it."""
    w0, w1, w2, w3 = tl.philox(
        seed, blocks, position.to(tl.uint32), choice.to(tl.uint32), tl.zeros_like(blocks)
    )
    low = tl.where(lane == 0, w0, w1)
    high = tl.where(lane == 2, w2, w3)
    return tl.where(lane < 2, low, high)


@triton.jit
def rough_noise(words):
    """-log(-log((word + 1/2) / 2^32)) within NOISE_ERROR, in float32."""
    near_one = words >= 0xE0000000
    x = (tl.where(near_one, words ^ 0xFFFFFFFF, words).to(tl.float32) + 0.5) * 2.0**-32
    # The inner logarithm of 1 - x by its series: of 1 - x rounded to float32 the largest noise,
    # which decides, would have lost all its digits.
    series = x * (1.0 + x * (1 / 2 + x * (1 / 3 + x * (1 / 4 + x / 5))))
    return -tl.log(tl.where(near_one, series, -tl.log(x)))


@triton.jit
def noise(words):
    """The same, in float64, as the definition has it."""
    return -tl.log(-tl.log((words.to(tl.float64) + 0.5) * 2.0**-32))
