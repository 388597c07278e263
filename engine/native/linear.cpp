// Linear layers with float32 activations and float32 or bfloat16 weights: out = x W^T + bias, gated
// if the matrix is.
//
// Limit   few rows: every weight is read once, outputs * inputs * 4 (2) bytes from memory.
//         Many rows: 2 * rows * outputs * inputs flops at two FMAs of a vector a cycle.
// Layout  linear.h.
// Way     A tile of R rows x 32 columns stays in registers while it runs down the inputs: per input
//         two vectors of weights and R broadcasts feed 2 R FMAs, so loads never limit. The tiles
//         of a panel follow each other while it is in L2, a block of inputs at a time.
// Source  Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication".
#include "linear.h"

#include <array>

#include "kernels.h"
#include "module.h"
#include "simd.h"

using namespace simd;
using linear::PAIRS;
using linear::PANEL;

namespace {

constexpr int HALVES = 16 / LANES;  // a half holds columns [h L, h L + L) and the same + 16
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 14;  // 28 sums, 2 weights, 1 activation of 32 registers
#else
constexpr int TILE_ROWS = 6;  // 12, 2, 1 of 16
#endif

INLINE void load_pair(const float* at, int half, Vec& low, Vec& high) {
    low = load(at + half * LANES);
    high = load(at + 16 + half * LANES);
}

INLINE void load_pair(const bf16* at, int half, Vec& low, Vec& high) {
    const auto* words = reinterpret_cast<const Ints*>(at) + half;
#if defined(__AVX512F__)
    const Ints both = _mm512_loadu_si512(words);
    low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-0x10000)));
#else
    const Ints both = _mm256_loadu_si256(words);
    low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-0x10000)));
#endif
}

// What a tile works on: R rows of x and of its results, and `depth` inputs of one panel.
template <typename Weight>
struct Tile {
    const float* x;
    int64_t x_stride;
    const Weight* weights;
    int64_t depth;
    const char* ahead;
    int64_t ahead_step;
    const float* start;  // 32 values that the sums start from, or null: from what `sums` holds
    float* sums;
    int64_t sums_stride;
    int64_t columns;  // of the panel that exist
    float* gated;     // where gate and up go as one, or null: the sums go back to `sums`
    int64_t gated_stride;
    int64_t pairs;  // of the panel that exist
};

template <int R, typename Weight>
void run_tile(const Tile<Weight>& t) {
    for (int half = 0; half < HALVES; half++) {
        const int64_t at = half * LANES, lanes = LANES;
        const int64_t lows = std::clamp<int64_t>(t.columns - at, 0, lanes);
        const int64_t highs = std::clamp<int64_t>(t.columns - at - 16, 0, lanes);
        Vec low[R], high[R];
        each<R>([&](auto r) INLINE_BODY {
            const float* held = t.sums + r * t.sums_stride + at;
            low[r] = t.start ? load(t.start + at) : load(held, lows);
            high[r] = t.start ? load(t.start + at + 16) : load(held + 16, highs);
        });
        const Weight* weights = t.weights;
        const char* ahead = t.ahead;
        for (int64_t k = 0; k < t.depth; k++, weights += PANEL) {
            _mm_prefetch(ahead, _MM_HINT_T0);
            if (sizeof(Weight) == 4) _mm_prefetch(ahead + 64, _MM_HINT_T0);
            ahead += t.ahead_step;
            Vec w0, w1;
            load_pair(weights, half, w0, w1);
            each<R>([&](auto r) INLINE_BODY {
                const Vec x = splat(t.x[r * t.x_stride + k]);
                low[r] = fma(x, w0, low[r]);
                high[r] = fma(x, w1, high[r]);
            });
        }
        each<R>([&](auto r) INLINE_BODY {
            if (t.gated) {
                store(t.gated + r * t.gated_stride + at, gated(low[r], high[r]),
                      std::clamp<int64_t>(t.pairs - at, 0, lanes));
            } else {
                float* to = t.sums + r * t.sums_stride + at;
                store(to, low[r], lows);
                store(to + 16, high[r], highs);
            }
        });
    }
}

template <typename Weight, int... I>
constexpr auto tiles_by_rows(std::integer_sequence<int, I...>) {
    return std::array<void (*)(const Tile<Weight>&), sizeof...(I)>{run_tile<I + 1, Weight>...};
}

// 128 kB of float32 weights and a few tiles' activations share an L2 of 1 MiB. Of 256, 512 and
// 1024 the last was the fastest at 16 to 96 rows (by 10 %), and no worse above.
constexpr int64_t BLOCK = 1024;

// bias is filled up to whole panels.
template <typename Weight>
void linear_floats(const float* x, int64_t rows, int64_t inputs, const Weight* packed,
                   int64_t outputs, bool gate, const float* bias, float* out) {
    static constexpr auto run =
        tiles_by_rows<Weight>(std::make_integer_sequence<int, TILE_ROWS>{});
    const int64_t depth = rows <= TILE_ROWS ? inputs : BLOCK;
    const int64_t input_bytes = PANEL * sizeof(Weight);
    const int64_t width = gate ? outputs / 2 : outputs;
    linear::for_panels(rows, outputs, [&](int64_t panel, int64_t begin, int64_t end) {
        const int64_t column = panel * PANEL, pair = panel * PAIRS;
        // The sums of a gated block are twice as wide as `out`, which cannot hold them meanwhile.
        float* const sums = gate ? static_cast<float*>(pool::scratch(
                                       (end - begin) * PANEL * sizeof(float)))
                                 : out + begin * outputs + column;
        const int64_t sums_stride = gate ? PANEL : outputs;
        const int64_t columns = gate ? PANEL : std::min(PANEL, outputs - column);
        for (int64_t k = 0; k < inputs; k += depth) {
            const int64_t length = std::min(depth, inputs - k);
            const bool last = k + length == inputs;
            const Weight* weights = packed + column * inputs + k * PANEL;
            const Weight* next = !last ? weights + depth * PANEL
                                       : packed + (panel + 1) * PANEL * inputs;
            linear::for_tiles(begin, end, TILE_ROWS, [&](int64_t first, int64_t end_row, int64_t i,
                                                         int64_t count) {
                const auto fetch = linear::fetch(weights, next, length * input_bytes, i, count);
                run[end_row - first - 1](
                    {x + first * inputs + k, inputs, weights, length, fetch.at,
                     fetch.step / length, k == 0 ? bias + column : nullptr,
                     sums + (first - begin) * sums_stride, sums_stride, columns,
                     gate && last ? out + first * width + pair : nullptr, width, width - pair});
            });
        }
    });
}

}  // namespace

void linear_float32(const float* x, int64_t rows, int64_t inputs, const float* packed,
                    int64_t outputs, bool gate, const float* bias, float* out) {
    linear_floats(x, rows, inputs, packed, outputs, gate, bias, out);
}
KERNEL(linear_float32);

void linear_bfloat16(const float* x, int64_t rows, int64_t inputs, const bf16* packed,
                     int64_t outputs, bool gate, const float* bias, float* out) {
    linear_floats(x, rows, inputs, packed, outputs, gate, bias, out);
}
KERNEL(linear_bfloat16);
