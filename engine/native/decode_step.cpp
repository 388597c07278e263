// A decoder's step for sequences with one new token each, from token ids to logits, in one call.
//
// Why     A kernel of a small model takes 1 to 20 us and the Python around it 10, more where the
//         weights have just swept the caches; after each the step thread waits its turn for the
//         interpreter with an event loop that is busy with the token before.
// Way     What engine/models/decoder.py says, by the same kernels in the same order: equal to the
//         last bit.
// Layout  tokens, positions, slots [rows] int64; cos, sin [positions, head_dim / 2], a table;
//         contexts, blocks as in pages.h; logits [rows, vocab] float32. The model is words of 64
//         bits as decode_step.py writes them.
#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>

#include "kernels.h"
#include "module.h"

namespace {

enum Storage : int64_t { FLOAT32, BFLOAT16, INT8, UNPACKED };

struct Matrix {
    Storage storage;
    int64_t inputs, outputs;
    const void* weights;
    const float* bias;
    const float* scales;
    const int32_t* sums;

    template <typename Weight>
    const Weight* as() const { return static_cast<const Weight*>(weights); }

    void multiply(const float* x, int64_t rows, float* out, bool gate = false) const {
        if (storage == FLOAT32)
            linear_float32(x, rows, inputs, as<float>(), outputs, gate, bias, out);
        else if (storage == BFLOAT16)
            linear_bfloat16(x, rows, inputs, as<simd::bf16>(), outputs, gate, bias, out);
        else
            linear_int8(x, rows, inputs, as<int8_t>(), scales, sums, outputs, gate, bias, out);
    }

    void look_up(const int64_t* ids, int64_t count, float* out) const {
        if (storage == FLOAT32) rows_float32(ids, count, inputs, as<float>(), out);
        else if (storage == BFLOAT16) rows_bfloat16(ids, count, inputs, as<simd::bf16>(), out);
        else if (storage == INT8) rows_int8(ids, count, inputs, as<int8_t>(), scales, out);
        else
            for (int64_t i = 0; i < count; i++)
                std::copy_n(as<float>() + ids[i] * inputs, inputs, out + i * inputs);
    }
};

struct Layer {
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;
    Matrix qkv, o, gate_up, down;
    void *keys, *values;
    int64_t window;
};

struct Model {
    int64_t layers, heads, kv_heads, head_dim;
    Matrix embedding, head;
    const float* norm;
    int64_t page_type, stride, slots, block_size;
    Layer layer[1];  // the first of them
};
static_assert(sizeof(Layer) == 35 * sizeof(int64_t) && sizeof(Model) == (23 + 35) * sizeof(int64_t),
              "as decode_step.py writes them");

// Room for floats, each part of it from the beginning of a cache line on.
class Room {
public:
    Room(int64_t rows, std::initializer_list<int64_t> widths) {
        int64_t floats = 0;
        for (const int64_t width : widths) floats += whole_lines(rows * width);
        memory.reset(static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))));
        if (!memory) throw std::bad_alloc();
        next = memory.get();
    }

    float* take(int64_t floats) {
        float* const taken = next;
        next += whole_lines(floats);
        return taken;
    }

private:
    static int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory;
    float* next;
};

}  // namespace

// Returns the first row whose token, position, slot, context or blocks do not exist, or -1.
static int64_t decode_step(const Model* model, float eps, float scale, int64_t rows,
                           const int64_t* tokens, const int64_t* positions, const float* cos_table,
                           const float* sin_table, int64_t angles, const int64_t* slots,
                           const int32_t* contexts, const int32_t* blocks, int64_t width,
                           float* logits) {
    const Model& m = *model;
    const int64_t hidden = m.embedding.inputs, half = m.head_dim / 2, queries = m.heads * m.head_dim;
    const int64_t projected = m.layer->qkv.outputs, inner = m.layer->down.inputs;
    for (int64_t row = 0; row < rows; row++) {
        if (tokens[row] < 0 || tokens[row] >= m.embedding.outputs) return row;
        if (positions[row] < 0 || positions[row] >= angles) return row;
    }
    Room room(rows, {hidden, hidden, hidden, half, half, projected, queries, queries, inner});
    float* const x = room.take(rows * hidden);
    float* const residual = room.take(rows * hidden);
    float* const normed = room.take(rows * hidden);
    float* const cos = room.take(rows * half);
    float* const sin = room.take(rows * half);
    float* const qkv = room.take(rows * projected);
    float* const q = room.take(rows * queries);
    float* const attended = room.take(rows * queries);
    float* const gated = room.take(rows * inner);
    m.embedding.look_up(tokens, rows, x);
    for (int64_t row = 0; row < rows; row++) {
        std::copy_n(cos_table + positions[row] * half, half, cos + row * half);
        std::copy_n(sin_table + positions[row] * half, half, sin + row * half);
    }
    std::fill_n(residual, rows * hidden, 0.0f);
    for (const Layer* layer = m.layer; layer < m.layer + m.layers; layer++) {
        add_rms_norm(x, residual, layer->attention_norm, normed, rows, hidden, eps);
        layer->qkv.multiply(normed, rows, qkv);
        int64_t wrong = rope_write(qkv, rows, m.heads, m.kv_heads, m.head_dim, layer->q_norm,
                                   layer->k_norm, eps, cos, sin, layer->keys, layer->values,
                                   m.page_type, m.stride, m.slots, slots, q);
        if (wrong >= 0) return wrong;
        wrong = attend_singles(q, rows, m.heads, m.kv_heads, m.head_dim, layer->keys,
                               layer->values, m.page_type, m.stride, m.slots, contexts, blocks,
                               width, m.block_size, layer->window, scale, attended);
        if (wrong >= 0) return wrong;
        layer->o.multiply(attended, rows, x);
        add_rms_norm(x, residual, layer->mlp_norm, normed, rows, hidden, eps);
        layer->gate_up.multiply(normed, rows, gated, true);
        layer->down.multiply(gated, rows, x);
    }
    add_rms_norm(x, residual, m.norm, normed, rows, hidden, eps);
    m.head.multiply(normed, rows, logits);
    return -1;
}
KERNEL(decode_step);
