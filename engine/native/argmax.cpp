// The greedy token of each row of logits, and whether the row is sound: one pass for both.
//
// Limit   memory: one read of rows * vocab floats.
// Layout  logits [rows, vocab] float32, chosen [rows] int64: the lowest index among equals, or -1
//         for a row with a NaN or an infinity.
#include <limits>
#include <vector>

#include "module.h"
#include "pool.h"
#include "rows.h"
#include "simd.h"

using namespace simd;

namespace {

// What one thread looks at: a vocabulary in tens of parts, each well above the hand-over.
constexpr int64_t PART = 16384;

struct Best {
    float value = -std::numeric_limits<float>::infinity();
    int64_t index = 0;
    bool sound = true;
};

// Comparisons that wait for each other's result; this many at a time keep the loads busy.
constexpr int CHAINS = 4;

#if defined(__AVX512F__)
INLINE Ints same(int index) { return _mm512_set1_epi32(index); }
INLINE void take_larger(Vec& best, Ints& where, Vec x, Ints at) {
    const __mmask16 larger = _mm512_cmp_ps_mask(x, best, _CMP_GT_OQ);
    best = _mm512_mask_mov_ps(best, larger, x);
    where = _mm512_mask_mov_epi32(where, larger, at);
}
#else
INLINE Ints same(int index) { return _mm256_set1_epi32(index); }
INLINE void take_larger(Vec& best, Ints& where, Vec x, Ints at) {
    const Vec larger = _mm256_cmp_ps(x, best, _CMP_GT_OQ);
    best = _mm256_blendv_ps(best, x, larger);
    where = _mm256_blendv_epi8(where, at, _mm256_castps_si256(larger));
}
#endif

Best best_of(const float* logits, int64_t count) {
    Best found;
    const auto take = [&](float value, int64_t index, float flag) {
        if (flag != 0.0f) found.sound = false;  // true of a NaN as well
        if (value > found.value || (value == found.value && index < found.index))
            found.value = value, found.index = index;
    };
    constexpr int64_t STRIDE = CHAINS * LANES;
    const int64_t whole = count / STRIDE * STRIDE;
    if (whole) {
        found.index = count;
        Vec best[CHAINS], unsound[CHAINS];
        Ints where[CHAINS];
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++)
            best[c] = splat(found.value), unsound[c] = zero(), where[c] = same(0);
        for (int64_t i = 0; i < whole; i += STRIDE) {
            const Ints at = same(static_cast<int>(i));
#pragma GCC unroll 4
            for (int c = 0; c < CHAINS; c++) {
                const Vec x = load(logits + i + c * LANES);
                unsound[c] = fma(x, zero(), unsound[c]);  // x * 0 is 0, or NaN for NaN and infinity
                take_larger(best[c], where[c], x, at);
            }
        }
        for (int c = 0; c < CHAINS; c++) {
            float values[LANES], flags[LANES];
            int32_t at[LANES];
            store(values, best[c]);
            store(flags, unsound[c]);
            std::memcpy(at, &where[c], sizeof at);
            for (int lane = 0; lane < LANES; lane++)
                take(values[lane], at[lane] + c * LANES + lane, flags[lane]);
        }
    }
    for (int64_t i = whole; i < count; i++) take(logits[i], i, logits[i] * 0.0f);
    return found;
}

}  // namespace

static void argmax(const float* logits, int64_t* chosen, int64_t rows, int64_t vocab) {
    const int64_t parts = (vocab + PART - 1) / PART;
    std::vector<Best> best(static_cast<size_t>(rows * parts));
    rows::parallel(rows * parts, std::min(vocab, PART), [&](int64_t task) {
        const int64_t begin = task % parts * PART;
        best[task] = best_of(logits + task / parts * vocab + begin, std::min(PART, vocab - begin));
        best[task].index += begin;
    });
    for (int64_t row = 0; row < rows; row++) {
        const Best* part = &best[row * parts];
        const Best* largest = part;
        bool sound = true;
        for (int64_t i = 0; i < parts; i++) {
            sound = sound && part[i].sound;
            if (part[i].value > largest->value) largest = &part[i];
        }
        chosen[row] = sound ? largest->index : -1;
    }
}
KERNEL(argmax);
