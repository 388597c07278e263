// What all linear kernels share: how a matrix is packed, and how the work is cut.
//
// W [outputs, inputs] lies as [outputs / 32][inputs][32], so that one input's weights of a panel of
// 32 outputs are one or two vectors; the last panel is filled with zeros. By storage:
//   float32   column c at c.
//   bfloat16  columns c and c + 16 share a 32-bit word, c in the low half: a shift and a mask
//             make two float vectors of one load.
//   int8      four inputs side by side, [outputs / 32][inputs / 4][32][4], zeros past the last:
//             what a dot product of bytes takes.
//
// A gated matrix is two, G above U, and its product silu(x G^T) * (x U^T), SwiGLU's first half. 16
// outputs of G and the same of U share a panel: a tile then ends with gates and ups in registers,
// and what it writes is half as wide. Source: Shazeer 2020, "GLU variants improve transformer".
#pragma once

#include <algorithm>
#include <cstdint>

#include "pool.h"

namespace linear {

constexpr int64_t PANEL = 32, PAIRS = PANEL / 2;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cut rows x outputs into tasks, and run them on the pool: a run of panels for few rows, one panel
// and a block of rows for many. `each(panel, row_begin, row_end)` goes through its tiles with
// `for_tiles`.
//
// A run, because a thread that reads ahead past the end of its panel should read what is its own:
// at 28 kB a panel (int8, 896 inputs) 4 kB for another thread are a seventh of the bandwidth. The
// number of runs is a multiple of the threads, else the last ones leave some idle.
template <typename Each>
void for_panels(int64_t rows, int64_t outputs, const Each& each) {
    constexpr int64_t TASK_ROWS = 280;  // 20 tiles: a fetched panel is used often enough
    constexpr int64_t RUNS = 4, LONGEST = 16;  // a thread; panels
    const int64_t panels = ceil_div(outputs, PANEL), blocks = ceil_div(rows, TASK_ROWS);
    const int64_t threads = pool::threads();
    const int64_t runs = std::max(RUNS, ceil_div(panels, LONGEST * threads)) * threads;
    const int64_t columns = blocks > 1 ? panels : std::min(panels, runs);
    pool::parallel_for(columns * blocks, [&](int64_t i) {
        const int64_t block = i % blocks, column = i / blocks;  // neighbours share a panel
        const int64_t last = panels * (column + 1) / columns;
        for (int64_t panel = panels * column / columns; panel < last; panel++)
            each(panel, rows * block / blocks, rows * (block + 1) / blocks);
    });
}

// What a tile fetches into the cache while it computes: from `at` on, `step` bytes in all.
struct Fetch {
    const char* at;
    int64_t step;
};

// A tile that is alone waits for memory and runs 4 KiB ahead of itself, which is twice as fast as
// leaving it to the hardware at 8 to 14 rows on one Zen 5 core. Several share a block of weights
// and each fetches its part of the next one, so that reading and computing overlap.
template <typename Weight>
Fetch fetch(const Weight* block, const Weight* next, int64_t bytes, int64_t index, int64_t count) {
    if (count == 1) return {reinterpret_cast<const char*>(block) + 4096, bytes};
    return {reinterpret_cast<const char*>(next) + bytes * index / count, bytes / count};
}

// Cut [begin, end) into tiles of at most `most` rows, as even as can be.
template <typename Tile>
void for_tiles(int64_t begin, int64_t end, int64_t most, const Tile& tile) {
    const int64_t rows = end - begin, count = ceil_div(rows, most);
    for (int64_t i = 0; i < count; i++)
        tile(begin + rows * i / count, begin + rows * (i + 1) / count, i, count);
}

}  // namespace linear
