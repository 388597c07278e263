// RMSNorm, alone and fused with the residual it follows.
//
//     residual += x;  normed = residual / sqrt(mean(residual^2) + eps) * weight
//
// Limit   memory: 2 reads and 2 writes of rows * hidden floats (alone: 1 and 1). A row stays in L1
//         between the sum and the product, so each byte crosses the memory bus once.
// Layout  x, residual, normed [rows, hidden], weight [hidden], all float32.
// Source  Zhang and Sennrich 2019.
#include "kernels.h"
#include "module.h"
#include "rows.h"
#include "simd.h"

using namespace simd;

namespace {

// normed may be x. Two sums, because one chain of additions waits for itself.
INLINE void norm_row(const float* x, const float* weight, float* normed, int64_t size, float eps) {
    Vec even = zero(), odd = zero();
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        const Vec a = load(x + i), b = load(x + i + LANES);
        even = fma(a, a, even);
        odd = fma(b, b, odd);
    }
    for (; i < size; i += LANES) {
        const Vec a = load(x + i, std::min<int64_t>(LANES, size - i));
        even = fma(a, a, even);
    }
    const float mean = sum(even + odd) / static_cast<float>(size);
    const Vec scale = splat(1.0f / std::sqrt(mean + eps));
    for (i = 0; i + LANES <= size; i += LANES)
        store(normed + i, load(x + i) * scale * load(weight + i));
    if (const int64_t rest = size - i; rest > 0)
        store(normed + i, load(x + i, rest) * scale * load(weight + i, rest), rest);
}

INLINE void add_row(const float* x, float* residual, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(residual + i, load(residual + i) + load(x + i));
    if (const int64_t rest = size - i; rest > 0)
        store(residual + i, load(residual + i, rest) + load(x + i, rest), rest);
}

}  // namespace

static void rms_norm(const float* x, const float* weight, float* normed, int64_t rows,
                     int64_t hidden, float eps) {
    rows::parallel(rows, hidden, [=](int64_t row) {
        norm_row(x + row * hidden, weight, normed + row * hidden, hidden, eps);
    });
}
KERNEL(rms_norm);

void add_rms_norm(const float* x, float* residual, const float* weight, float* normed,
                         int64_t rows, int64_t hidden, float eps) {
    rows::parallel(rows, 2 * hidden, [=](int64_t row) {
        float* sum = residual + row * hidden;
        add_row(x + row * hidden, sum, hidden);
        norm_row(sum, weight, normed + row * hidden, hidden, eps);
    });
}
KERNEL(add_rms_norm);
