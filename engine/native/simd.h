// Vectors of floats that read like scalars: + - * / are the compiler's own on these types.
//
// One header for every instruction set; LANES is 16 with AVX-512 and 8 with AVX2. Weights and KV
// pages may be bfloat16 or float16; they become float32 when they are loaded. `count` arguments say
// how many lanes exist: the others load as 0, are not stored, and no byte of theirs is touched.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define INLINE inline __attribute__((always_inline))

namespace simd {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

#if defined(__AVX512F__)
using Vec = __m512;
using Ints = __m512i;
constexpr int LANES = 16;

INLINE __mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

INLINE Vec zero() { return _mm512_setzero_ps(); }
INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE Vec load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), p); }
INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
INLINE void store(float* p, Vec x, int64_t count) { _mm512_mask_storeu_ps(p, lanes(count), x); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }   // a * b + c
INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
// If either is NaN the second is returned.
INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
INLINE Vec round(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
INLINE float sum(Vec x) { return _mm512_reduce_add_ps(x); }
INLINE float maximum(Vec x) { return _mm512_reduce_max_ps(x); }
INLINE Vec scale_by_power_of_2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

INLINE Vec widen(__m256i halves, bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
INLINE Vec widen(__m256i halves, fp16) { return _mm512_cvtph_ps(halves); }
template <typename Half>
INLINE Vec load(const Half* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Half{});
}
template <typename Half>
INLINE Vec load(const Half* p, int64_t count) {
    return widen(_mm256_maskz_loadu_epi16(lanes(count), p), Half{});
}

// Round to nearest even; a NaN stays one.
INLINE __m256i narrow(Vec x, bf16) {
    const Ints bits = _mm512_castps_si512(x);
    const Ints odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const Ints rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const Ints kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
INLINE __m256i narrow(Vec x, fp16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
template <typename Half>
INLINE void store(Half* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, Half{}));
}
template <typename Half>
INLINE void store(Half* p, Vec x, int64_t count) {
    _mm256_mask_storeu_epi16(p, lanes(count), narrow(x, Half{}));
}

#else
using Vec = __m256;
using Ints = __m256i;
constexpr int LANES = 8;

INLINE Ints lanes(int64_t count) {
    const Ints index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index);
}

INLINE Vec zero() { return _mm256_setzero_ps(); }
INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE Vec load(const float* p, int64_t count) { return _mm256_maskload_ps(p, lanes(count)); }
INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
INLINE void store(float* p, Vec x, int64_t count) { _mm256_maskstore_ps(p, lanes(count), x); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }   // a * b + c
INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
// If either is NaN the second is returned.
INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
INLINE Vec round(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT); }
INLINE float sum(Vec x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
INLINE float maximum(Vec x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
// In two factors, so that results below the normal range and above the largest come out right.
INLINE Vec scale_by_power_of_2(Vec x, Vec n) {
    const Ints whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    const auto power = [](Ints of) {
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(of, _mm256_set1_epi32(127)), 23));
    };
    return x * power(half) * power(_mm256_sub_epi32(whole, half));
}

INLINE Vec widen(__m128i halves, bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
INLINE Vec widen(__m128i halves, fp16) { return _mm256_cvtph_ps(halves); }
template <typename Half>
INLINE Vec load(const Half* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Half{});
}
template <typename Half>
INLINE Vec load(const Half* p, int64_t count) {
    Half all[LANES] = {};
    std::memcpy(all, p, static_cast<size_t>(count) * sizeof(Half));
    return load(all);
}

// Round to nearest even; a NaN stays one.
INLINE __m128i narrow(Vec x, bf16) {
    const Ints bits = _mm256_castps_si256(x);
    const Ints odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const Ints rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const Vec nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const Ints kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000),
                                         _mm256_castps_si256(nan));
    const Ints halves = _mm256_srli_epi32(kept, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
INLINE __m128i narrow(Vec x, fp16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
template <typename Half>
INLINE void store(Half* p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, Half{}));
}
template <typename Half>
INLINE void store(Half* p, Vec x, int64_t count) {
    Half all[LANES];
    store(all, x);
    std::memcpy(p, all, static_cast<size_t>(count) * sizeof(Half));
}
#endif

// e^x, within 2 ulp of the exact value; 0 far below, inf far above, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, e^r by a polynomial, 2^n by the exponent.
// Source: the expf of the Cephes library (Moshier).
INLINE Vec exp(Vec x) {
    x = min(splat(89.0f), max(splat(-104.0f), x));
    const Vec n = round(x * splat(1.44269504f));
    Vec r = fnma(n, splat(0.693359375f), x);
    r = fnma(n, splat(-2.12194440e-4f), r);
    Vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    return scale_by_power_of_2(p, n);
}

// silu(gate) * up, with silu(x) = x / (1 + e^-x), within 4 ulp.
INLINE Vec gated(Vec gate, Vec up) { return gate / (splat(1.0f) + exp(zero() - gate)) * up; }

// One element, for the ends that fill no vector.
INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
INLINE float to_float(fp16 x) { return _cvtsh_ss(x.bits); }

// Calls body(0) ... body(N - 1) with constants, written out before anything else is optimised.
// Arrays of vectors stay in registers that way; of a loop, even an unrolled one, gcc 12 spills them.
// The body is a lambda marked INLINE_BODY.
#define INLINE_BODY __attribute__((always_inline))
template <typename Body, int... I>
INLINE void each_of(const Body& body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int N, typename Body>
INLINE void each(const Body& body) {
    each_of(body, std::make_integer_sequence<int, N>{});
}

}  // namespace simd
