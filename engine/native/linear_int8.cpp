// Linear layers with int8 weights and activations quantised on the way in: out = x W^T + bias.
//
//     out[r, n] = float(sum of q[r, k] w[n, k]) * x_scale[r] * w_scale[n] + bias[n]
//
// and gated after that if the matrix is.
//
// w = round(W / w_scale), w_scale[n] = max |W[n]| / 127, made when the matrix is packed.
// q = round(x * 127 / max |x[r]|), x_scale[r] = max |x[r]| / 127, made here; a row below 1e-30 is
// zero, one with a NaN or an infinity is NaN in all outputs. Sums of integers are exact, so every
// instruction set gives the same bits.
//
// Limit   few rows: outputs * inputs bytes. Many rows: 2 * rows * outputs * inputs operations;
//         VNNI does four times as many a cycle as float32 FMAs, the others twice (AVX-512) as
//         many or as many (AVX2).
// Layout  linear.h. Activations as the dot product takes them: with VNNI bytes with 128 added,
//         because it multiplies unsigned by signed, taken back by 128 * sums[n]; without it
//         int16, the even inputs of four first, because maddubs would saturate.
// Way     that of linear.cpp, except that the inputs are not cut: a panel takes a quarter of the
//         room, and partial sums would have to be integers.
#include <array>

#include "kernels.h"
#include "linear.h"
#include "module.h"
#include "simd.h"

using namespace simd;
using linear::PAIRS;
using linear::PANEL;

namespace {

constexpr int HALVES = 16 / LANES;

#if defined(__AVX512VNNI__)
using Quad = uint32_t;  // four activations, 128 added to each
constexpr int TILE_ROWS = 14;  // 28 sums, 2 weights, 1 activation of 32 registers
constexpr int OFFSET = 128;
#elif defined(__AVX512F__)
using Quad = uint64_t;
constexpr int TILE_ROWS = 12;  // 24, 4, 2
constexpr int OFFSET = 0;
#else
using Quad = uint64_t;
constexpr int TILE_ROWS = 4;  // 8, 4, 2 of 16
constexpr int OFFSET = 0;
#endif

#if defined(__AVX512F__)
INLINE Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Ints even_bytes(Ints x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
INLINE Ints odd_bytes(Ints x) { return _mm512_srai_epi16(x, 8); }
INLINE Ints load_ints(const void* at) { return _mm512_loadu_si512(at); }
INLINE Ints dot_pairs(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
INLINE Vec to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
INLINE Ints to_ints(Vec x) { return _mm512_cvtps_epi32(x); }
INLINE Vec magnitude(Vec x) { return _mm512_abs_ps(x); }
#else
INLINE Ints splat_int(int32_t x) { return _mm256_set1_epi32(x); }
INLINE Ints even_bytes(Ints x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
INLINE Ints odd_bytes(Ints x) { return _mm256_srai_epi16(x, 8); }
INLINE Ints load_ints(const void* at) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}
INLINE Ints dot_pairs(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
INLINE Vec to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
INLINE Ints to_ints(Vec x) { return _mm256_cvtps_epi32(x); }
INLINE Vec magnitude(Vec x) { return _mm256_andnot_ps(splat(-0.0f), x); }
#endif

// Integers of 32 bits, not Ints: as __m512i of 64-bit ones gcc 12 moves each sum twice a step.
typedef int32_t Sums __attribute__((vector_size(sizeof(Ints))));
INLINE Sums load_sums(const int32_t* at) { return reinterpret_cast<Sums>(load_ints(at)); }

// Four weights of a vector of columns, ready for any number of rows.
struct Weights {
#if defined(__AVX512VNNI__)
    Ints bytes;
    INLINE explicit Weights(const void* at) : bytes(load_ints(at)) {}
    INLINE Sums dot(Quad x, Sums sum) const {
        return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(
            reinterpret_cast<Ints>(sum), splat_int(static_cast<int32_t>(x)), bytes));
    }
#else
    Ints even, odd;
    INLINE explicit Weights(const void* at)
        : even(even_bytes(load_ints(at))), odd(odd_bytes(load_ints(at))) {}
    INLINE Sums dot(Quad x, Sums sum) const {
        sum += reinterpret_cast<Sums>(dot_pairs(even, splat_int(static_cast<int32_t>(x))));
        return sum + reinterpret_cast<Sums>(dot_pairs(odd, splat_int(static_cast<int32_t>(x >> 32))));
    }
#endif
};

// The next LANES activations from their integers.
INLINE void store_activations(Ints q, Quad* to) {
#if defined(__AVX512VNNI__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm512_cvtepi32_epi8(_mm512_add_epi32(q, splat_int(OFFSET))));
#elif defined(__AVX512F__)
    const __m256i words = _mm256_shufflelo_epi16(_mm512_cvtepi32_epi16(q), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_shufflehi_epi16(words, 0xd8));
#else
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    words = _mm_shufflelo_epi16(words, 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shufflehi_epi16(words, 0xd8));
#endif
}

// Quantise one row; returns its scale.
float quantise(const float* x, int64_t inputs, Quad* to) {
    Vec largest = zero(), poison = zero();
    for (int64_t k = 0; k < inputs; k += LANES) {
        const Vec each = load(x + k, std::min<int64_t>(LANES, inputs - k));
        largest = max(magnitude(each), largest);
        poison = fma(each, zero(), poison);
    }
    const bool finite = sum(poison) == 0.0f;
    const float most = maximum(largest);
    const Vec inverse = splat(!finite || most < 1e-30f ? 0.0f : 127.0f / most);
    for (int64_t k = 0; k < inputs; k += LANES) {
        const Vec each = load(x + k, std::min<int64_t>(LANES, inputs - k));
        store_activations(to_ints(each * inverse), to + k / 4);
    }
    return finite ? most / 127.0f : std::nanf("");
}

struct Tile {
    const Quad* x;
    int64_t x_stride;
    const float* x_scales;
    const int8_t* weights;
    int64_t quads;
    const char* ahead;
    int64_t ahead_step;
    const int32_t* sums;  // the panel's 32, as are the next two
    const float* scales;
    const float* bias;
    float* out;
    int64_t out_stride;
    int64_t columns;  // of `out` from there on
    bool gate;
};

template <int R>
void run_tile(const Tile& t) {
    for (int half = 0; half < HALVES; half++) {
        const int64_t at = half * LANES;
        const Sums start[2] = {load_sums(t.sums + at) * -OFFSET, load_sums(t.sums + at + 16) * -OFFSET};
        Sums low[R], high[R];
        each<R>([&](auto r) INLINE_BODY { low[r] = start[0], high[r] = start[1]; });
        const int8_t* weights = t.weights + at * 4;
        const char* ahead = t.ahead;
        for (int64_t q = 0; q < t.quads; q++, weights += PANEL * 4) {
            _mm_prefetch(ahead, _MM_HINT_T0);
            _mm_prefetch(ahead + 64, _MM_HINT_T0);
            ahead += t.ahead_step;
            const Weights w0(weights), w1(weights + 64);
            each<R>([&](auto r) INLINE_BODY {
                const Quad x = t.x[r * t.x_stride + q];
                low[r] = w0.dot(x, low[r]);
                high[r] = w1.dot(x, high[r]);
            });
        }
        const Vec scale[2] = {load(t.scales + at), load(t.scales + at + 16)};
        const Vec bias[2] = {load(t.bias + at), load(t.bias + at + 16)};
        each<R>([&](auto r) INLINE_BODY {
            const Vec mine = splat(t.x_scales[r]);
            float* to = t.out + r * t.out_stride + at;
            const int64_t lanes = LANES, lows = std::clamp<int64_t>(t.columns - at, 0, lanes);
            const Vec first = to_floats(reinterpret_cast<Ints>(low[r])) * mine * scale[0] + bias[0];
            const Vec second =
                to_floats(reinterpret_cast<Ints>(high[r])) * mine * scale[1] + bias[1];
            if (t.gate) {
                store(to, gated(first, second), lows);
            } else {
                store(to, first, lows);
                store(to + 16, second, std::clamp<int64_t>(t.columns - at - 16, 0, lanes));
            }
        });
    }
}

template <int... I>
constexpr auto tiles_by_rows(std::integer_sequence<int, I...>) {
    return std::array<void (*)(const Tile&), sizeof...(I)>{run_tile<I + 1>...};
}

}  // namespace

// scales, sums and bias are filled up to whole panels.
void linear_int8(const float* x, int64_t rows, int64_t inputs, const int8_t* packed,
                 const float* scales, const int32_t* sums, int64_t outputs, bool gate,
                 const float* bias, float* out) {
    static constexpr auto run = tiles_by_rows(std::make_integer_sequence<int, TILE_ROWS>{});
    const int64_t quads = linear::ceil_div(inputs, 4);
    // An odd number of cache lines, so that the rows of a tile do not meet in a set of L1.
    const int64_t stride = (linear::ceil_div(inputs, 128) * 128 + 64) / 4;
    const int64_t scale_bytes = linear::ceil_div(rows, 16) * 64;
    auto* x_scales = static_cast<float*>(
        pool::scratch(scale_bytes + rows * stride * sizeof(Quad)));
    auto* quantised = reinterpret_cast<Quad*>(reinterpret_cast<char*>(x_scales) + scale_bytes);
    const int64_t share = std::max<int64_t>(1, 16384 / inputs);  // rows worth handing over
    pool::parallel_for(linear::ceil_div(rows, share), [&](int64_t i) {
        for (int64_t r = i * share; r < std::min(rows, (i + 1) * share); r++)
            x_scales[r] = quantise(x + r * inputs, inputs, quantised + r * stride);
    });
    const int64_t panel_bytes = quads * PANEL * 4;
    const int64_t width = gate ? outputs / 2 : outputs;
    linear::for_panels(rows, outputs, [&](int64_t panel, int64_t begin, int64_t end) {
        const int64_t column = panel * PANEL, to = gate ? panel * PAIRS : column;
        const int8_t* weights = packed + panel * panel_bytes;
        const int8_t* next = packed + (panel + 1) * panel_bytes;
        linear::for_tiles(begin, end, TILE_ROWS, [&](int64_t first, int64_t last, int64_t i,
                                                     int64_t count) {
            const auto fetch = linear::fetch(weights, next, panel_bytes, i, count);
            run[last - first - 1]({quantised + first * stride, stride, x_scales + first, weights,
                                   quads, fetch.at, fetch.step / quads, sums + column, scales + column,
                                   bias + column, out + first * width + to, width, width - to,
                                   gate});
        });
    });
}
KERNEL(linear_int8);
