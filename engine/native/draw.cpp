// The token with the highest score + Gumbel noise: one draw from softmax(scores).
//
// Limit   arithmetic: ten rounds of Philox and two logarithms for each token that could still win;
//         memory, one read of the scores, where the distribution is peaked and few can.
// Layout  scores [count] float32; ids [count] int64, or null where token i is number i. Noise is a
//         function of (seed, choice, position, token): Philox block token / 4, word token % 4.
// Source  Salmon et al. 2011 (Philox-4x32-10); the definition is `draw` in engine/sampler.py.
//
// Noise in float32 only rules tokens out; who comes within MARGIN of the best so far is computed in
// double, as the definition does. No noise exceeds MOST, so scores far below cost no noise at all.
#include <algorithm>
#include <cmath>
#include <limits>

#include "module.h"
#include "simd.h"

namespace {

constexpr int COUNTERS = 16;
constexpr int64_t SPAN = 4 * COUNTERS;  // tokens looked at together
constexpr double MOST = 22.88;          // -log(-log(1 - 2^-33))
constexpr float MARGIN = 1e-3f;         // of rough noise, whose error is below 1e-5, and its sum

struct Place {
    uint32_t key[2];
    uint32_t position, choice;
};

// Words [4][N] of the Philox blocks first ... first + N - 1. Plain loops: the compiler's vectors.
template <int N>
INLINE void philox(uint64_t first, const Place& at, uint32_t (&words)[4][N]) {
    uint32_t key0 = at.key[0], key1 = at.key[1];
    for (int i = 0; i < N; i++) {
        words[0][i] = static_cast<uint32_t>(first + i);
        words[1][i] = at.position;
        words[2][i] = at.choice;
        words[3][i] = 0;
    }
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < N; i++) {
            const uint64_t left = uint64_t{words[0][i]} * 0xD2511F53u;
            const uint64_t right = uint64_t{words[2][i]} * 0xCD9E8D57u;
            words[0][i] = static_cast<uint32_t>(right >> 32) ^ words[1][i] ^ key0;
            words[2][i] = static_cast<uint32_t>(left >> 32) ^ words[3][i] ^ key1;
            words[1][i] = static_cast<uint32_t>(right);
            words[3][i] = static_cast<uint32_t>(left);
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

INLINE double noise_of(uint32_t word) {
    return -std::log(-std::log((word + 0.5) / 4294967296.0));
}

// ln x of a positive normal number, within 1e-6 of it or 1e-6 times it, whichever is larger.
// Source: the logf of the Cephes library (Moshier).
INLINE float rough_log(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x) - 0x3f3504f3u;  // sqrt(1/2)
    const int32_t exponent = static_cast<int32_t>(bits) >> 23;
    const uint32_t low = (bits & 0x007fffffu) + 0x3f3504f3u;
    const float r = __builtin_bit_cast(float, low) - 1.0f;
    float p = 7.0376836292e-2f;
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    const float square = r * r;
    return p * r * square - 0.5f * square + r + 0.69314718f * static_cast<float>(exponent);
}

// -ln u = -ln(1 - v): near u = 1, which is where high noise comes from, only v has enough digits.
INLINE float rough_noise(uint32_t word) {
    const bool high = word >> 31;
    const uint32_t near = high ? ~word : word;
    const float part = (static_cast<float>(static_cast<int32_t>(near)) + 0.5f) * 0x1p-32f;
    const float series = part * (1.0f + part * (0.5f + part * (1.0f / 3 + part * 0.25f)));
    const float direct = -rough_log(high ? 1.0f - part : part);
    return -rough_log(high && part < 0.01f ? series : direct);
}

struct Best {
    double value = -std::numeric_limits<double>::infinity();
    int64_t at = -1;

    INLINE void take(double other, int64_t where) {
        if (other > value || (other == value && where < at)) value = other, at = where;
    }
};

INLINE bool candidate(float score, float least) {
    return score >= least && std::isfinite(score);
}

void look(const float* scores, int64_t first, int64_t count, float least, const Place& place,
          Best& best) {
    float highest = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < count; i++) highest = scores[i] > highest ? scores[i] : highest;
    if (highest + MOST < best.value || highest < least) return;
    uint32_t words[4][COUNTERS];
    philox(static_cast<uint64_t>(first) / 4, place, words);
    float rough[4][COUNTERS];
    for (int word = 0; word < 4; word++)
        for (int i = 0; i < COUNTERS; i++) rough[word][i] = rough_noise(words[word][i]);
    for (int64_t i = 0; i < count; i++) {
        if (!candidate(scores[i], least)) continue;
        const int64_t block = i / 4, word = i % 4;
        if (scores[i] + rough[word][block] + MARGIN < best.value) continue;
        best.take(scores[i] + noise_of(words[word][block]), first + i);
    }
}

}  // namespace

// Where in scores the drawn token is; -1 if none is finite and at least `least`. `likely` is the
// place of a high score, looked at first.
static int64_t draw(const float* scores, const int64_t* ids, int64_t count, int64_t likely,
                    float least, uint32_t seed_low, uint32_t seed_high, int64_t choice,
                    int64_t position) {
    const Place place{{seed_low, seed_high}, static_cast<uint32_t>(position),
                      static_cast<uint32_t>(choice)};
    Best best;
    if (ids) {
        for (int64_t i = 0; i < count; i++) {
            if (!candidate(scores[i], least) || scores[i] + MOST < best.value) continue;
            uint32_t words[4][1];
            philox(static_cast<uint64_t>(ids[i]) / 4, place, words);
            best.take(scores[i] + noise_of(words[ids[i] % 4][0]), i);
        }
        return best.at;
    }
    const int64_t start = likely / SPAN * SPAN;
    look(scores + start, start, std::min(SPAN, count - start), least, place, best);
    for (int64_t first = 0; first < count; first += SPAN)
        look(scores + first, first, std::min(SPAN, count - first), least, place, best);
    return best.at;
}
KERNEL(draw);
