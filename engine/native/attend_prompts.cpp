// Prefill attention: chunks of prompts, packed, over keys and values in pages.
//
// Limit   arithmetic: 4 * heads * head_dim operations for each pair of a query and a token it sees;
//         16 more instructions for each vector of scores (softmax).
// Layout  q, out [rows, heads, head_dim] float32, segment i in rows starts[i] .. starts[i + 1] - 1,
//         which are the last tokens of its context; pages and block table as in pages.h.
// Way     A task is a tile of query tokens, with all query heads of one KV head; its rows are
//         (token, head). It goes over the tokens it sees in tiles of KEYS: copies keys (transposed)
//         and values out of the pages into L2, then for every ROWS rows scores, softmax and values
//         in registers and L1. Tiles that no row sees are never touched, and in the tiles where
//         sight ends each ROWS rows stop where theirs does. Tiles of keys lie at fixed positions
//         and rows do not mix, so a result does not depend on how a prompt was cut into chunks.
// Source  FlashAttention-2 (Dao 2023).
#include <vector>

#include "attention.h"
#include "module.h"
#include "pool.h"

using namespace attention;

namespace {

constexpr int64_t KEYS = 64;
// Accumulators of the products: 6 x 4 of 32 registers, 6 x 2 of 16.
constexpr int ROWS = 6;
constexpr int COLUMNS = LANES == 16 ? 4 : 2;
// Rows of a task: enough that copying a tile of keys costs nothing, few enough for L2 and balance.
constexpr int64_t TASK_ROWS = 240;

struct Step {
    const float* q;
    float* out;
    const int32_t* starts;
    pages::Table table;
    int64_t heads, kv_heads, head_dim, padded, stride, window;
    float scale;

    int64_t group() const { return heads / kv_heads; }
    int64_t tokens(int64_t segment) const { return starts[segment + 1] - starts[segment]; }
    // The first token that the token at `position` sees.
    int64_t first(int64_t position) const {
        return window ? std::max<int64_t>(0, position - window + 1) : 0;
    }
};

// Query tokens `begin` .. `end` - 1, as positions in their sequence, and one KV head.
struct Task {
    int64_t segment, kv_head, begin, end, cost;
};

// What a task works in; rows are padded to whole ROWS.
struct Scratch {
    int64_t* places;  // [KEYS]
    float* keys;      // [padded, KEYS]
    float* values;    // [KEYS, padded]
    float* scores;    // [ROWS, KEYS]
    float* q;         // [rows, padded]
    float* sums;      // [rows, padded]
    float* total;     // [rows, LANES], to be added up over the lanes
    float* largest;   // [rows]

    Scratch(int64_t rows, int64_t padded) {
        const int64_t floats =
            2 * KEYS * padded + ROWS * KEYS + rows * (2 * padded + LANES + 1);
        places = static_cast<int64_t*>(pool::scratch(
            sizeof(int64_t) * KEYS + sizeof(float) * static_cast<size_t>(floats)));
        keys = reinterpret_cast<float*>(places + KEYS);
        values = keys + padded * KEYS;
        scores = values + KEYS * padded;
        q = scores + ROWS * KEYS;
        sums = q + rows * padded;
        total = sums + rows * padded;
        largest = total + rows * LANES;
    }
};

// A [ROWS, depth] x B [depth, C vectors], added to what `sums` holds.
template <int C>
INLINE void multiply(Vec (&sums)[ROWS][C], const float* a, int64_t a_stride, const float* b,
                     int64_t b_stride, int64_t depth) {
    for (int64_t k = 0; k < depth; k++) {
        Vec column[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) column[c] = load(b + k * b_stride + c * LANES);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            const Vec x = splat(a[row * a_stride + k]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sums[row][c] = fma(x, column[c], sums[row][c]);
        }
    }
}

// Calls body(std::integral_constant<int, vectors>, first) for the vectors [begin, end).
template <typename Body>
INLINE void by_columns(int64_t begin, int64_t end, const Body& body) {
    for (; end - begin >= COLUMNS; begin += COLUMNS)
        body(std::integral_constant<int, COLUMNS>{}, begin * LANES);
    if constexpr (COLUMNS == 4) {
        if (end - begin == 3) body(std::integral_constant<int, 3>{}, begin * LANES);
        if (end - begin == 2) body(std::integral_constant<int, 2>{}, begin * LANES);
    }
    if (end - begin == 1) body(std::integral_constant<int, 1>{}, begin * LANES);
}

// Rows of q times the tile's keys, for the vectors [begin, end) of tokens.
void score(const Scratch& work, const float* q, int64_t padded, int64_t begin, int64_t end) {
    by_columns(begin, end, [&](auto columns, int64_t token) {
        Vec sums[ROWS][columns];
        for (int row = 0; row < ROWS; row++)
            for (int c = 0; c < columns; c++) sums[row][c] = zero();
        multiply<columns>(sums, q, padded, work.keys + token, KEYS, padded);
        for (int row = 0; row < ROWS; row++)
            for (int c = 0; c < columns; c++)
                store(work.scores + row * KEYS + token + c * LANES, sums[row][c]);
    });
}

// The largest of `largest` and one row's scores; scores that the row must not see become -inf.
INLINE float hide_and_find_largest(float* scores, int64_t begin, int64_t end, int64_t seen_from,
                                   int64_t seen_to, float largest) {
    Vec most = splat(largest);
    for (int64_t i = begin; i < end; i += LANES) {
        Vec score = load(scores + i);
        if (i < seen_from || i + LANES > seen_to) {
            score = hide(score, seen_from - i, seen_to - i);
            store(scores + i, score);
        }
        most = max(most, score);
    }
    return maximum(most);
}

// One row's scores to weights, not yet divided by their total.
INLINE void soften(float* scores, int64_t begin, int64_t end, float largest, float shrink,
                   float* total) {
    Vec sums = load(total) * splat(shrink);
    for (int64_t i = begin; i < end; i += LANES) {
        const Vec weight = exp2(load(scores + i) - splat(largest));
        store(scores + i, weight);
        sums = sums + weight;
    }
    store(total, sums);
}

// sums = sums * shrink + weights x values, over the tokens [begin, end) of the tile.
void add_values(const Scratch& work, float* sums, const float (&shrink)[ROWS], int64_t padded,
                int64_t begin, int64_t end) {
    by_columns(0, padded / LANES, [&](auto columns, int64_t i) {
        Vec held[ROWS][columns];
        for (int row = 0; row < ROWS; row++)
            for (int c = 0; c < columns; c++)
                held[row][c] = load(sums + row * padded + i + c * LANES) * splat(shrink[row]);
        multiply<columns>(held, work.scores + begin, KEYS, work.values + begin * padded + i, padded,
                          end - begin);
        for (int row = 0; row < ROWS; row++)
            for (int c = 0; c < columns; c++)
                store(sums + row * padded + i + c * LANES, held[row][c]);
    });
}

// Copy a tile out of the pages: keys transposed, both with zeros where there is no element.
template <typename T>
void copy_tile(const Step& step, const Scratch& work, const T* keys, const T* values,
               int64_t count) {
    const int64_t d = step.head_dim;
    for (int64_t token = 0; token < KEYS && token < round_up(count, LANES); token += LANES)
        for (int64_t i = 0; i < d; i += LANES) {
            Vec part[LANES];
            for (int64_t lane = 0; lane < LANES; lane++)
                part[lane] = token + lane < count
                                 ? load(keys + work.places[token + lane] + i,
                                        std::min<int64_t>(LANES, d - i))
                                 : zero();
            transpose(part);
            for (int64_t lane = 0; lane < LANES; lane++)
                store(work.keys + (i + lane) * KEYS + token, part[lane]);
        }
    for (int64_t token = 0; token < count; token++)
        for (int64_t i = 0; i < d; i += LANES)
            store(work.values + token * step.padded + i,
                  load(values + work.places[token] + i, std::min<int64_t>(LANES, d - i)));
}

// All rows of a task against the tile of keys that begins at token `at` and holds `count`.
void attend_tile(const Step& step, const Scratch& work, const Task& task, int64_t rows, int64_t at,
                 int64_t count) {
    const int64_t group = step.group(), padded = step.padded;
    for (int64_t row = 0; row < rows; row += ROWS) {
        const auto position = [&](int64_t r) { return std::min(task.begin + r / group, task.end - 1); };
        const int64_t from = std::max<int64_t>(0, step.first(position(row)) - at);
        const int64_t to = std::min(count, position(row + ROWS - 1) + 1 - at);
        if (from >= to) continue;
        const int64_t begin = from / LANES, end = (to + LANES - 1) / LANES;
        score(work, work.q + row * padded, padded, begin, end);
        float largest[ROWS], shrink[ROWS];  // now; and by how much earlier sums shrink for it
        for (int64_t r = 0; r < ROWS; r++) {
            const int64_t self = position(row + r);
            largest[r] = hide_and_find_largest(
                work.scores + r * KEYS, begin * LANES, end * LANES, step.first(self) - at,
                std::min(count, self + 1 - at), work.largest[row + r]);
        }
        store(shrink, exp2(load(work.largest + row, ROWS) - load(largest, ROWS)), ROWS);
        std::copy_n(largest, ROWS, work.largest + row);
        for (int64_t r = 0; r < ROWS; r++)
            soften(work.scores + r * KEYS, begin * LANES, end * LANES, largest[r], shrink[r],
                   work.total + (row + r) * LANES);
        add_values(work, work.sums + row * padded, shrink, padded, from, to);
    }
}

template <typename T>
void attend(const Step& step, const Task& task, const T* keys, const T* values) {
    const int64_t group = step.group(), d = step.head_dim, padded = step.padded;
    const int64_t used = (task.end - task.begin) * group, rows = round_up(used, ROWS);
    const Scratch work(rows, padded);
    // The segment's rows are its last tokens.
    const int64_t row_of_position_0 = step.starts[task.segment + 1] - step.table.contexts[task.segment];
    const auto offset = [&](int64_t r) {
        const int64_t token = row_of_position_0 + task.begin + r / group;
        return (token * step.heads + task.kv_head * group + r % group) * d;
    };
    std::fill_n(work.keys, padded * KEYS, 0.0f);
    std::fill_n(work.q, rows * padded, 0.0f);
    for (int64_t r = 0; r < used; r++)
        copy_query(step.q + offset(r), d, step.scale, work.q + r * padded);
    std::fill_n(work.sums, rows * padded, 0.0f);
    std::fill_n(work.total, rows * LANES, 0.0f);
    std::fill_n(work.largest, rows, LOWEST);
    for (int64_t at = step.first(task.begin) / KEYS * KEYS; at < task.end; at += KEYS) {
        const int64_t count = std::min(KEYS, task.end - at);
        // What lies before the window is not looked up: its block may be another's by now.
        const int64_t unseen = std::max<int64_t>(0, step.first(task.begin) - at);
        step.table.find(task.segment, at + unseen, at + count, step.stride, task.kv_head * d,
                        work.places + unseen);
        std::fill_n(work.places, unseen, work.places[unseen]);
        copy_tile(step, work, keys, values, count);
        attend_tile(step, work, task, rows, at, count);
    }
    for (int64_t r = 0; r < used; r++)
        divide(work.sums + r * padded, sum(load(work.total + r * LANES)), step.out + offset(r), d);
}

// The dearest first, so that no thread is left alone with a large one at the end.
std::vector<Task> cut(const Step& step, int64_t segments) {
    const int64_t all = (step.starts[segments] - step.starts[0]) * step.kv_heads;
    const int64_t fair = all / (4 * pool::threads());
    const int64_t most = std::max<int64_t>(1, TASK_ROWS / step.group());
    const int64_t tile = std::clamp<int64_t>(fair, std::min<int64_t>(8, most), most);
    std::vector<Task> tasks;
    for (int64_t segment = 0; segment < segments; segment++) {
        const int64_t context = step.table.contexts[segment];
        for (int64_t begin = context - step.tokens(segment); begin < context; begin += tile) {
            const int64_t end = std::min(begin + tile, context);
            const int64_t cost = (end - begin) * (end - step.first(begin));
            for (int64_t kv_head = 0; kv_head < step.kv_heads; kv_head++)
                tasks.push_back({segment, kv_head, begin, end, cost});
        }
    }
    std::sort(tasks.begin(), tasks.end(),
              [](const Task& a, const Task& b) { return a.cost > b.cost; });
    return tasks;
}

}  // namespace

// Returns the first segment whose rows, context or blocks do not fit together, or -1.
static int64_t attend_prompts(const float* q, int64_t rows, int64_t heads, int64_t kv_heads,
                              int64_t head_dim, const void* keys, const void* values,
                              int64_t page_type, int64_t stride, int64_t slots,
                              const int32_t* starts, int64_t segments, const int32_t* contexts,
                              const int32_t* blocks, int64_t width, int64_t block_size,
                              int64_t window, float scale, float* out) {
    const pages::Table table{contexts, blocks, width, block_size, slots};
    const Step step{q,        out,   starts, table, heads, kv_heads, head_dim,
                    round_up(head_dim, LANES), stride, window, scale * LOG2_E};
    for (int64_t segment = 0; segment < segments; segment++) {
        const int64_t tokens = step.tokens(segment), before = contexts[segment] - tokens;
        if (starts[segment] < 0 || tokens < 0 || starts[segment + 1] > rows) return segment;
        if (tokens && (before < 0 || !table.is_sound(segment, step.first(before)))) return segment;
    }
    const std::vector<Task> tasks = cut(step, segments);
    pages::with_type(page_type, [&](auto type) {
        using T = decltype(type);
        pool::parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t number) {
            attend(step, tasks[number], static_cast<const T*>(keys), static_cast<const T*>(values));
        });
    });
    return -1;
}
KERNEL(attend_prompts);
