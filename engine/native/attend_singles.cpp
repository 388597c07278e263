// Decode attention: one query row for each sequence, over keys and values in pages.
//
// Limit   memory: context * kv_heads * head_dim * 2 elements for each sequence, read once; all query
//         heads of a KV head use a key while it is in registers.
// Layout  q, out [n, heads, head_dim] float32; pages and block table as in pages.h.
// Way     A task is up to SPLIT tokens of one sequence and as many KV heads as make a row of memory
//         worth fetching: scores of all tokens, their softmax, the weighted sum of values. For the
//         scores, LANES keys are transposed in registers, so that lanes are tokens and no score
//         needs a sum over lanes. The last task of a sequence to finish merges the parts. Splits
//         lie at fixed positions, so a result depends on nothing but its own sequence: not on the
//         batch, not on the threads.
// Source  PagedAttention (Kwon et al. 2023); split and merge: Flash-Decoding (Dao et al. 2023).
#include <atomic>
#include <memory>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "module.h"
#include "pool.h"

using namespace attention;

namespace {

constexpr int64_t SPLIT = 128;
// Tokens that all heads pass over, for scores and again for values, before the next are touched.
constexpr int64_t TILE = 16;
// Bytes of a slot that a task reads: blocks lie anywhere, so the hardware must find a run to follow.
constexpr int64_t RUN_BYTES = 1024;
// How many heads share a loaded key or value, so that accumulators and operands fit the registers.
constexpr int SCORE_HEADS = LANES == 16 ? 8 : 6;
constexpr int VALUE_HEADS = LANES == 16 ? 6 : 4;
constexpr int VALUE_VECTORS = LANES == 16 ? 4 : 2;
// Fetches the next tile from memory while this one is computed: a cache line now and then, because
// a CPU drops prefetches that come faster than its misses are answered.
class Ahead {
public:
    // The rows of `bytes` at base + places[from], base + places[from + 1] and so on, in elements.
    template <typename T>
    Ahead(const T* base, const int64_t* places, int64_t from, int64_t count, int64_t bytes)
        : base(reinterpret_cast<const char*>(base)), size(sizeof(T)), bytes(bytes),
          place(places + std::min(from, count - 1)), last(places + count - 1) {
        begin_row();
    }

    INLINE void line() {
        _mm_prefetch(at, _MM_HINT_T0);
        at += 64;
        if (__builtin_expect(at >= end, 0)) {
            if (place < last) place++;
            begin_row();
        }
    }

private:
    INLINE void begin_row() {
        at = base + *place * size;
        end = at + bytes;
    }

    const char* base;
    int64_t size, bytes;
    const int64_t *place, *last;
    const char *at, *end;
};

struct Step {
    const float* q;
    float* out;
    pages::Table table;
    int64_t heads, kv_heads, head_dim, padded, stride, window;
    float scale;

    int64_t group() const { return heads / kv_heads; }
    int64_t first(int64_t sequence) const {
        const int64_t context = table.contexts[sequence];
        return window ? std::max<int64_t>(0, context - window) : 0;
    }
    int64_t splits(int64_t sequence) const {
        return (table.contexts[sequence] - 1) / SPLIT - first(sequence) / SPLIT + 1;
    }
};

// Tokens of one split that are seen, and the KV heads kv_head .. kv_head + kv_heads - 1.
struct Task {
    int64_t sequence, split, kv_head, kv_heads;
};

// What a task works in; `heads` are its query heads.
struct Scratch {
    int64_t* places;  // [SPLIT + LANES] of the tokens; behind the last, the last again
    float* q;         // [heads, padded]
    float* sums;      // [heads, padded]
    float* scores;    // [heads, SPLIT], then their exponentials
    float* largest;   // [heads]
    float* total;     // [heads]

    Scratch(int64_t heads, int64_t padded) {
        const int64_t floats = heads * (2 * padded + SPLIT + 2);
        places = static_cast<int64_t*>(pool::scratch(
            sizeof(int64_t) * (SPLIT + LANES) + sizeof(float) * static_cast<size_t>(floats)));
        q = reinterpret_cast<float*>(places + SPLIT + LANES);
        sums = q + heads * padded;
        scores = sums + heads * padded;
        largest = scores + heads * SPLIT;
        total = largest + heads;
    }
};

// Calls body(std::integral_constant<int, n>) for n in [1, most].
template <int most, typename Body>
INLINE void with_constant(int64_t n, const Body& body) {
    if constexpr (most > 1) {
        if (n < most) return with_constant<most - 1>(n, body);
    }
    body(std::integral_constant<int, most>{});
}

// Cuts `heads` into the fewest parts of at most `most`, all nearly alike.
template <int most, typename Body>
INLINE void by_heads(int64_t heads, const Body& body) {
    for (int64_t parts = (heads + most - 1) / most, head = 0; parts > 0; parts--) {
        const int64_t count = (heads - head + parts - 1) / parts;
        with_constant<most>(count, [&](auto n) { body(n, head); });
        head += count;
    }
}

// Scores of LANES tokens and H heads. Lanes are tokens.
template <int H, typename T>
INLINE void score(const T* keys, const int64_t* places, const float* q, int64_t head_dim,
                  int64_t padded, float* scores, Ahead& next) {
    constexpr int PACE = 64 / (LANES * static_cast<int>(sizeof(T)));  // steps for a line as used
    Ahead ahead = next;  // a copy that lives in registers
    Vec sums[H];
    for (Vec& sum : sums) sum = zero();
    for (int64_t i = 0; i < head_dim; i += LANES) {
        Vec part[LANES];
        if (head_dim - i >= LANES) {
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; lane++) part[lane] = load(keys + places[lane] + i);
        } else {
            for (int lane = 0; lane < LANES; lane++)
                part[lane] = load(keys + places[lane] + i, head_dim - i);
        }
        transpose(part);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) {
            if (j % PACE == 0) ahead.line();
#pragma GCC unroll 8
            for (int head = 0; head < H; head++)
                sums[head] = fma(part[j], splat(q[head * padded + i + j]), sums[head]);
        }
    }
    for (int head = 0; head < H; head++) store(scores + head * SPLIT, sums[head]);
    next = ahead;
}

template <typename T>
void score_all(const Step& step, const Task& task, const Scratch& work, const T* keys,
               const T* values, int64_t count) {
    const int64_t group = step.group(), d = step.head_dim;
    const int64_t run = task.kv_heads * d * static_cast<int64_t>(sizeof(T));
    Ahead ahead(keys, work.places, LANES, count, run);
    for (int64_t token = 0; token < count; token += LANES) {
        if (count - token <= LANES) ahead = Ahead(values, work.places, 0, count, run);
        for (int64_t kv_head = 0; kv_head < task.kv_heads; kv_head++)
            by_heads<SCORE_HEADS>(group, [&](auto heads, int64_t some) {
                const int64_t head = kv_head * group + some;
                score<heads>(keys + kv_head * d, work.places + token, work.q + head * step.padded,
                             d, step.padded, work.scores + head * SPLIT + token, ahead);
            });
    }
}

// Scores to weights 2^(score - largest), not yet divided by their total.
INLINE void soften(float* scores, int64_t count, float& largest, float& total) {
    const int64_t end = round_up(count, LANES);
    store(scores + end - LANES, hide(load(scores + end - LANES), 0, count - (end - LANES)));
    Vec most = splat(LOWEST), sums = zero();
    for (int64_t i = 0; i < end; i += LANES) most = max(most, load(scores + i));
    largest = maximum(most);
    for (int64_t i = 0; i < end; i += LANES) {
        const Vec weight = exp2(load(scores + i) - splat(largest));
        store(scores + i, weight);
        sums = sums + weight;
    }
    total = sum(sums);
}

// sums [H, C vectors] += weights [H, count] x values [count, C vectors]; the last vector may be cut.
template <int H, int C, typename T>
INLINE void add_values(const T* values, const int64_t* places, int64_t count, const float* weights,
                       int64_t last_lanes, float* sums, int64_t padded, Ahead& next, int64_t lines) {
    Ahead ahead = next;
    Vec held[H][C];
    for (int head = 0; head < H; head++)
        for (int c = 0; c < C; c++) held[head][c] = load(sums + head * padded + c * LANES);
    for (int64_t token = 0; token < count; token++) {
        for (int64_t i = 0; i < lines; i++) ahead.line();
        const T* row = values + places[token];
        Vec value[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
            value[c] = c < C - 1 || last_lanes == LANES ? load(row + c * LANES)
                                                        : load(row + c * LANES, last_lanes);
#pragma GCC unroll 8
        for (int head = 0; head < H; head++) {
            const Vec weight = splat(weights[head * SPLIT + token]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) held[head][c] = fma(weight, value[c], held[head][c]);
        }
    }
    for (int head = 0; head < H; head++)
        for (int c = 0; c < C; c++) store(sums + head * padded + c * LANES, held[head][c]);
    next = ahead;
}

template <typename T>
void add_all(const Step& step, const Task& task, const Scratch& work, const T* values,
             int64_t count) {
    constexpr int64_t WIDTH = VALUE_VECTORS * LANES;
    const int64_t group = step.group(), d = step.head_dim;
    const int64_t head_bytes = d * static_cast<int64_t>(sizeof(T));
    const int64_t passes = (d + WIDTH - 1) / WIDTH * ((group + VALUE_HEADS - 1) / VALUE_HEADS);
    const int64_t lines = (head_bytes + 64 * passes - 1) / (64 * passes);  // in a step of a pass
    for (int64_t token = 0; token < count; token += TILE) {
        const int64_t tokens = std::min(TILE, count - token);
        Ahead ahead(values, work.places, token + TILE, count, task.kv_heads * head_bytes);
        for (int64_t kv_head = 0; kv_head < task.kv_heads; kv_head++)
            for (int64_t i = 0; i < d; i += WIDTH) {
                const int64_t width = std::min(d - i, WIDTH);
                const int64_t vectors = (width + LANES - 1) / LANES;
                const int64_t last = width - (vectors - 1) * LANES;
                with_constant<VALUE_VECTORS>(vectors, [&](auto columns) {
                    by_heads<VALUE_HEADS>(group, [&](auto heads, int64_t some) {
                        const int64_t head = kv_head * group + some;
                        add_values<heads, columns>(
                            values + kv_head * d + i, work.places + token, tokens,
                            work.scores + head * SPLIT + token, last,
                            work.sums + head * step.padded + i, step.padded, ahead, lines);
                    });
                });
            }
    }
}

// Attention of the task's queries over the tokens begin .. end - 1 of its split.
template <typename T>
void attend(const Step& step, const Task& task, const Scratch& work, const T* keys,
            const T* values, int64_t begin, int64_t end) {
    const int64_t heads = task.kv_heads * step.group(), count = end - begin, d = step.head_dim;
    step.table.find(task.sequence, begin, end, step.stride, task.kv_head * d, work.places);
    std::fill_n(work.places + count, LANES, work.places[count - 1]);
    const float* q = step.q + (task.sequence * step.heads + task.kv_head * step.group()) * d;
    for (int64_t head = 0; head < heads; head++)
        copy_query(q + head * d, d, step.scale, work.q + head * step.padded);
    std::fill_n(work.sums, heads * step.padded, 0.0f);
    score_all(step, task, work, keys, values, count);
    for (int64_t head = 0; head < heads; head++)
        soften(work.scores + head * SPLIT, count, work.largest[head], work.total[head]);
    add_all(step, task, work, values, count);
}

// One head's parts of a sequence become one; parts follow each other as [sums, largest, total].
void merge(const Step& step, float* parts, int64_t count, int64_t apart, float* out) {
    float largest = LOWEST, total = 0;
    for (int64_t i = 0; i < count; i++)
        largest = std::max(largest, parts[i * apart + step.padded]);
    float* sums = parts;  // the first part becomes the result
    for (int64_t i = 0; i < count; i++) {
        const float* part = parts + i * apart;
        const float share = std::exp2(part[step.padded] - largest);
        total += share * part[step.padded + 1];
        for (int64_t j = 0; j < step.padded; j += LANES) {
            const Vec scaled = load(part + j) * splat(share);
            store(sums + j, i ? load(sums + j) + scaled : scaled);
        }
    }
    divide(sums, total, out, step.head_dim);
}

// The parts of all sequences, [splits, heads, padded + 2] each, and how many are there by now.
struct Parts {
    int64_t head_floats, sequence_heads;
    std::vector<int64_t> first;  // part of each sequence
    std::unique_ptr<float[]> floats;
    std::vector<std::atomic<int64_t>> done;  // [sequences, kv_heads]

    Parts(const Step& step, int64_t sequences)
        : head_floats(step.padded + 2),
          sequence_heads(step.heads),
          first(sequences),
          done(sequences * step.kv_heads) {
        int64_t parts = 0;
        for (int64_t sequence = 0; sequence < sequences; sequence++) {
            first[sequence] = parts;
            if (const int64_t splits = step.splits(sequence); splits > 1) parts += splits;
        }
        floats.reset(new float[parts * apart()]);
    }

    int64_t apart() const { return sequence_heads * head_floats; }
    float* of(int64_t sequence, int64_t split, int64_t head) {
        return floats.get() + (first[sequence] + split) * apart() + head * head_floats;
    }
};

template <typename T>
void run_task(const Step& step, const Task& task, const T* keys, const T* values, Parts& parts) {
    const int64_t heads = task.kv_heads * step.group(), head = task.kv_head * step.group();
    const Scratch work(heads, step.padded);
    const int64_t first = step.first(task.sequence), splits = step.splits(task.sequence);
    const int64_t from = (first / SPLIT + task.split) * SPLIT;
    attend(step, task, work, keys, values, std::max(from, first),
           std::min(from + SPLIT, static_cast<int64_t>(step.table.contexts[task.sequence])));
    float* out = step.out + (task.sequence * step.heads + head) * step.head_dim;
    if (splits == 1) {
        for (int64_t i = 0; i < heads; i++)
            divide(work.sums + i * step.padded, work.total[i], out + i * step.head_dim,
                   step.head_dim);
        return;
    }
    for (int64_t i = 0; i < heads; i++) {
        float* part = parts.of(task.sequence, task.split, head + i);
        std::copy_n(work.sums + i * step.padded, step.padded, part);
        part[step.padded] = work.largest[i];
        part[step.padded + 1] = work.total[i];
    }
    auto& done = parts.done[task.sequence * step.kv_heads + task.kv_head];
    if (done.fetch_add(1) != splits - 1) return;
    for (int64_t i = 0; i < heads; i++)
        merge(step, parts.of(task.sequence, 0, head + i), splits, parts.apart(),
              out + i * step.head_dim);
}

template <typename T>
void run(const Step& step, const T* keys, const T* values, int64_t sequences) {
    const int64_t head_bytes = step.head_dim * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::max<int64_t>(1, RUN_BYTES / head_bytes);
    std::vector<Task> tasks;
    for (int64_t sequence = 0; sequence < sequences; sequence++)
        for (int64_t split = 0; split < step.splits(sequence); split++)
            for (int64_t kv_head = 0; kv_head < step.kv_heads; kv_head += most)
                tasks.push_back({sequence, split, kv_head, std::min(most, step.kv_heads - kv_head)});
    Parts parts(step, sequences);
    pool::parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t number) {
        run_task(step, tasks[number], keys, values, parts);
    });
}

}  // namespace

// Returns the first sequence whose context or blocks do not fit the pages, or -1.
int64_t attend_singles(const float* q, int64_t sequences, int64_t heads, int64_t kv_heads,
                              int64_t head_dim, const void* keys, const void* values,
                              int64_t page_type, int64_t stride, int64_t slots,
                              const int32_t* contexts, const int32_t* blocks, int64_t width,
                              int64_t block_size, int64_t window, float scale, float* out) {
    const pages::Table table{contexts, blocks, width, block_size, slots};
    const Step step{q,        out,    table,  heads, kv_heads, head_dim, round_up(head_dim, LANES),
                    stride, window, scale * LOG2_E};
    for (int64_t sequence = 0; sequence < sequences; sequence++)
        if (!table.is_sound(sequence, contexts[sequence] > 0 ? step.first(sequence) : 0))
            return sequence;
    pages::with_type(page_type, [&](auto type) {
        using T = decltype(type);
        run(step, static_cast<const T*>(keys), static_cast<const T*>(values), sequences);
    });
    return -1;
}
KERNEL(attend_singles);
