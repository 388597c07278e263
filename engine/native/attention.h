// What both attention kernels are made of: 2^x, a transposition in registers, and the scale that
// turns e^x into 2^x.
#pragma once

#include <algorithm>

#include "pages.h"
#include "simd.h"

namespace attention {

using namespace simd;

// Scores are computed times log2 e, so that softmax needs 2^x alone: it has no range reduction
// that rounds, and half the instructions of e^x.
constexpr float LOG2_E = 1.44269504f;

// Below every score, and yet not -inf: -inf - -inf is no number. The maximum over no token.
constexpr float LOWEST = -1e30f;

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// 2^x for x <= 0, within 1 ulp; 0 for -inf, NaN for NaN. The polynomial is a minimax fit of
// degree 6 over [-1/2, 1/2] (2e-9 off, relatively) that is 1 at 0.
INLINE Vec exp2(Vec x) {
    x = max(splat(-200.0f), x);
    const Vec n = round(x);
    const Vec r = x - n;
    Vec p = splat(0.00015353362f);
    p = fma(p, r, splat(0.0013398875f));
    p = fma(p, r, splat(0.00961843692f));
    p = fma(p, r, splat(0.0555033237f));
    p = fma(p, r, splat(0.240226477f));
    p = fma(p, r, splat(0.693147182f));
    p = fma(p, r, splat(1.0f));
    return scale_by_power_of_2(p, n);
}

// x where lane is in [begin, end), -inf elsewhere.
#if defined(__AVX512F__)
INLINE Vec hide(Vec x, int64_t begin, int64_t end) {
    const auto below = [](int64_t n) {
        return n <= 0 ? 0u : n >= LANES ? 0xffffu : (1u << n) - 1;
    };
    const __mmask16 seen = static_cast<__mmask16>(below(end) & ~below(begin));
    return _mm512_mask_mov_ps(splat(-INFINITY), seen, x);
}

// rows[i][j] and rows[j][i] change places.
INLINE void transpose(Vec (&rows)[LANES]) {
    __m512d pairs[LANES];
    Vec quads[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1]));
        pairs[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1]));
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        quads[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i], pairs[i + 2]));
        quads[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i], pairs[i + 2]));
        quads[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i + 1], pairs[i + 3]));
        quads[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i + 1], pairs[i + 3]));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Vec a = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
        const Vec b = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
        const Vec c = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
        const Vec d = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
        rows[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
        rows[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        rows[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}
#else
INLINE Vec hide(Vec x, int64_t begin, int64_t end) {
    const auto below = [](int64_t n) { return lanes(std::clamp<int64_t>(n, 0, LANES)); };
    const Ints seen = _mm256_andnot_si256(below(begin), below(end));
    return _mm256_blendv_ps(splat(-INFINITY), x, _mm256_castsi256_ps(seen));
}

// rows[i][j] and rows[j][i] change places.
INLINE void transpose(Vec (&rows)[LANES]) {
    Vec quads[LANES];
#pragma GCC unroll 2
    for (int i = 0; i < LANES; i += 4) {
        const Vec a = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        const Vec b = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        const Vec c = _mm256_unpacklo_ps(rows[i + 2], rows[i + 3]);
        const Vec d = _mm256_unpackhi_ps(rows[i + 2], rows[i + 3]);
        quads[i] = _mm256_shuffle_ps(a, c, 0x44);
        quads[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        quads[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        quads[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
}
#endif

// One query head, times `scale`, with zeros up to a whole number of vectors.
INLINE void copy_query(const float* q, int64_t head_dim, float scale, float* to) {
    for (int64_t i = 0; i < head_dim; i += LANES)
        store(to + i, load(q + i, std::min<int64_t>(LANES, head_dim - i)) * splat(scale));
}

// out = sums / total, for one head.
INLINE void divide(const float* sums, float total, float* out, int64_t head_dim) {
    const Vec share = splat(1.0f / total);
    for (int64_t i = 0; i < head_dim; i += LANES)
        store(out + i, load(sums + i) * share, std::min<int64_t>(LANES, head_dim - i));
}

}  // namespace attention
