// Packing: weights as checkpoints store them into the panels of linear.h, and rows back again.
//
// Limit   a load's memory traffic; it runs once per matrix at start-up. A row is whole, so its
//         int8 scale is known when it is packed.
#include "kernels.h"
#include "linear.h"
#include "module.h"
#include "simd.h"

using namespace simd;
using linear::PAIRS;
using linear::PANEL;

namespace {

enum Source : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

template <typename Body>
void with_source(int64_t source, const void* weight, const Body& body) {
    if (source == FLOAT32) body(static_cast<const float*>(weight));
    else if (source == BFLOAT16) body(static_cast<const bf16*>(weight));
    else body(static_cast<const fp16*>(weight));
}

void narrow_into(float x, float& to) { to = x; }
void narrow_into(float x, bf16& to) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    to.bits = static_cast<uint16_t>((x != x ? 0x7fc00000u : rounded) >> 16);
}

// Where column c of a panel stands among the 32 of one input.
template <typename Weight>
int64_t place(int64_t c) {
    return sizeof(Weight) == 2 ? c % 16 * 2 + c / 16 : c;
}

// Calls row(i, panel, column) for each of `rows` rows, the first of which is the matrix's row
// `first`; of a gated matrix they are all G's or all U's, `gates` each. A task is a panel, so that
// no two threads write to one cache line.
template <typename Row>
void for_rows(int64_t first, int64_t rows, int64_t gates, const Row& row) {
    const int64_t width = gates ? PAIRS : PANEL;  // of a panel, for these rows
    const int64_t column = gates && first >= gates ? PAIRS : 0;
    const int64_t from = gates && first >= gates ? first - gates : first;
    const int64_t panel = from / width, last = linear::ceil_div(from + rows, width);
    pool::parallel_for(last - panel, [&](int64_t i) {
        const int64_t begin = std::max(from, (panel + i) * width);
        const int64_t end = std::min(from + rows, (panel + i + 1) * width);
        for (int64_t r = begin; r < end; r++) row(r - from, r / width, column + r % width);
    });
}

template <typename Weight>
void pack(const void* weight, int64_t source, int64_t rows, int64_t inputs, int64_t first,
          int64_t gates, Weight* packed) {
    with_source(source, weight, [&](const auto* from) {
        for_rows(first, rows, gates, [&](int64_t r, int64_t panel, int64_t c) {
            Weight* to = packed + panel * inputs * PANEL + place<Weight>(c);
            for (int64_t k = 0; k < inputs; k++)
                narrow_into(to_float(from[r * inputs + k]), to[k * PANEL]);
        });
    });
}

template <typename Weight>
void unpack(const int64_t* ids, int64_t count, int64_t inputs, const Weight* packed, float* out) {
    pool::parallel_for(count, [&](int64_t i) {
        const int64_t panel = ids[i] / PANEL, c = ids[i] % PANEL;
        const Weight* from = packed + panel * inputs * PANEL + place<Weight>(c);
        for (int64_t k = 0; k < inputs; k++) out[i * inputs + k] = to_float(from[k * PANEL]);
    });
}

void pack_float32(const void* weight, int64_t source, int64_t rows, int64_t inputs, int64_t first,
                  int64_t gates, float* packed) {
    pack(weight, source, rows, inputs, first, gates, packed);
}
KERNEL(pack_float32);

void pack_bfloat16(const void* weight, int64_t source, int64_t rows, int64_t inputs,
                   int64_t first, int64_t gates, bf16* packed) {
    pack(weight, source, rows, inputs, first, gates, packed);
}
KERNEL(pack_bfloat16);

// For each row, where its column stands among all panels': scales = largest magnitude / 127, NaN
// where the row has a NaN or an infinity; sums = sum of the row's int8 values.
void pack_int8(const void* weight, int64_t source, int64_t rows, int64_t inputs, int64_t first,
               int64_t gates, int8_t* packed, float* scales, int32_t* sums) {
    const int64_t quads = linear::ceil_div(inputs, 4);
    with_source(source, weight, [&](const auto* from) {
        for_rows(first, rows, gates, [&](int64_t r, int64_t panel, int64_t c) {
            const auto* row = from + r * inputs;
            float largest = 0;
            bool finite = true;
            for (int64_t k = 0; k < inputs; k++) {
                largest = std::max(largest, std::fabs(to_float(row[k])));
                finite &= std::isfinite(to_float(row[k]));
            }
            const float inverse = !finite || largest < 1e-30f ? 0.0f : 127.0f / largest;
            int8_t* to = packed + (panel * quads * PANEL + c) * 4;
            int32_t sum = 0;
            for (int64_t k = 0; k < inputs; k++) {
                const float scaled = finite ? std::nearbyintf(to_float(row[k]) * inverse) : 0.0f;
                const auto value = static_cast<int8_t>(scaled);
                to[k / 4 * PANEL * 4 + k % 4] = value;
                sum += value;
            }
            scales[panel * PANEL + c] = finite ? largest / 127.0f : std::nanf("");
            sums[panel * PANEL + c] = sum;
        });
    });
}
KERNEL(pack_int8);

}  // namespace

void rows_float32(const int64_t* ids, int64_t count, int64_t inputs, const float* packed,
                  float* out) {
    unpack(ids, count, inputs, packed, out);
}
KERNEL(rows_float32);

void rows_bfloat16(const int64_t* ids, int64_t count, int64_t inputs, const bf16* packed,
                   float* out) {
    unpack(ids, count, inputs, packed, out);
}
KERNEL(rows_bfloat16);

void rows_int8(const int64_t* ids, int64_t count, int64_t inputs, const int8_t* packed,
               const float* scales, float* out) {
    const int64_t quads = linear::ceil_div(inputs, 4);
    pool::parallel_for(count, [&](int64_t i) {
        const int64_t panel = ids[i] / PANEL, c = ids[i] % PANEL;
        const int8_t* from = packed + (panel * quads * PANEL + c) * 4;
        for (int64_t k = 0; k < inputs; k++)
            out[i * inputs + k] = from[k / 4 * PANEL * 4 + k % 4] * scales[ids[i]];
    });
}
KERNEL(rows_int8);
