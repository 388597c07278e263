// SwiGLU's gate: silu(gate) * up, with silu(x) = x / (1 + e^-x).
//
// Limit   memory: 2 reads and 1 write of rows * inner floats; some 20 instructions for each vector.
// Layout  gate_up [rows, 2 * inner], gates first; out [rows, inner], both float32.
// Error   e^-x within 2 ulp, silu within 4.
// Source  Shazeer 2020, "GLU variants improve transformer".
#include "kernels.h"
#include "module.h"
#include "rows.h"
#include "simd.h"

using namespace simd;

namespace {

INLINE Vec gated(Vec gate, Vec up) { return gate / (splat(1.0f) + exp(zero() - gate)) * up; }

// A row is wide: cut it, so that one row also has work for several threads.
constexpr int64_t CUT = 4096;

}  // namespace

void swiglu(const float* gate_up, float* out, int64_t rows, int64_t inner) {
    const int64_t cuts = (inner + CUT - 1) / CUT;
    rows::parallel(rows * cuts, 3 * std::min(inner, CUT), [=](int64_t part) {
        const int64_t row = part / cuts, begin = part % cuts * CUT;
        const int64_t size = std::min(CUT, inner - begin);
        const float* gate = gate_up + row * 2 * inner + begin;
        const float* up = gate + inner;
        float* to = out + row * inner + begin;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) store(to + i, gated(load(gate + i), load(up + i)));
        if (const int64_t rest = size - i; rest > 0)
            store(to + i, gated(load(gate + i, rest), load(up + i, rest)), rest);
    });
}
KERNEL(swiglu);
