// From the output of the qkv projection to attention's input, in one pass: norm q and k where the
// model does (qk-norm), rotate them, write k and v to their pages.
//
//     rotate: (a, b) -> (a cos - b sin, b cos + a sin)   for the pairs (i, i + head_dim / 2)
//
// Limit   memory: one read of rows * (heads + 2 kv_heads) * head_dim floats, one write as large.
// Layout  qkv [rows, heads + 2 kv_heads, head_dim] float32: q, k, v. cos, sin [rows, head_dim / 2].
//         q [rows, heads, head_dim]. keys, values [slots, kv_heads, head_dim] in the pages' type,
//         `stride` elements from slot to slot. Weights of the norms [head_dim], or null for none.
// Source  RoFormer (Su et al. 2021); qk-norm: Qwen3.
#include "kernels.h"
#include "module.h"
#include "pages.h"
#include "rows.h"
#include "simd.h"

using namespace simd;

namespace {

struct Rotation {
    const float* cos;
    const float* sin;
    int64_t half;  // head_dim / 2
};

// What x / rms(x) multiplies with.
INLINE float inverse_rms(const float* x, int64_t size, float eps) {
    Vec squares = zero();
    for (int64_t i = 0; i < size; i += LANES) {
        const Vec a = load(x + i, std::min<int64_t>(LANES, size - i));
        squares = fma(a, a, squares);
    }
    return 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
}

template <typename T>
INLINE void rotate_part(const float* x, const float* weight, Vec scale, T* out, Rotation by,
                        int64_t i, int64_t count) {
    Vec a = load(x + i, count), b = load(x + by.half + i, count);
    if (weight) {
        a = a * scale * load(weight + i, count);
        b = b * scale * load(weight + by.half + i, count);
    }
    const Vec cos = load(by.cos + i, count), sin = load(by.sin + i, count);
    store(out + i, fnma(b, sin, a * cos), count);
    store(out + by.half + i, fma(a, sin, b * cos), count);
}

// One head: norm if there are weights, rotate, store as T.
template <typename T>
INLINE void rotate_head(const float* x, const float* weight, float eps, T* out, Rotation by) {
    const Vec scale = weight ? splat(inverse_rms(x, 2 * by.half, eps)) : zero();
    for (int64_t i = 0; i < by.half; i += LANES)
        rotate_part(x, weight, scale, out, by, i, std::min<int64_t>(LANES, by.half - i));
}

template <typename T>
INLINE void copy_head(const float* x, T* out, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, size - i);
        store(out + i, load(x + i, count), count);
    }
}

struct Step {
    const float* qkv;
    int64_t rows, heads, kv_heads, head_dim;
    const float *q_norm, *k_norm;
    float eps;
    const float *cos, *sin;
    int64_t stride;
    const int64_t* slots;
    float* q;
};

template <typename T>
void write(const Step& step, T* keys, T* values) {
    const int64_t d = step.head_dim, width = (step.heads + 2 * step.kv_heads) * d;
    rows::parallel(step.rows, width, [&](int64_t row) {
        const float* from = step.qkv + row * width;
        const int64_t half = d / 2, slot = step.slots[row] * step.stride;
        const Rotation by{step.cos + row * half, step.sin + row * half, half};
        float* q = step.q + row * step.heads * d;
        for (int64_t head = 0; head < step.heads; head++, from += d)
            rotate_head(from, step.q_norm, step.eps, q + head * d, by);
        for (int64_t head = 0; head < step.kv_heads; head++, from += d)
            rotate_head(from, step.k_norm, step.eps, keys + slot + head * d, by);
        copy_head(from, values + slot, step.kv_heads * d);
    });
}

}  // namespace

// Returns the first row whose slot is not in [0, count), before anything is written, or -1.
int64_t rope_write(const float* qkv, int64_t rows, int64_t heads, int64_t kv_heads,
                          int64_t head_dim, const float* q_norm, const float* k_norm, float eps,
                          const float* cos, const float* sin, void* keys, void* values,
                          int64_t page_type, int64_t stride, int64_t count, const int64_t* slots,
                          float* q) {
    for (int64_t row = 0; row < rows; row++)
        if (slots[row] < 0 || slots[row] >= count) return row;
    const Step step{qkv, rows, heads, kv_heads, head_dim, q_norm, k_norm, eps,
                    cos, sin,  stride, slots,    q};
    pages::with_type(page_type, [&](auto type) {
        using T = decltype(type);
        write(step, static_cast<T*>(keys), static_cast<T*>(values));
    });
    return -1;
}
KERNEL(rope_write);
