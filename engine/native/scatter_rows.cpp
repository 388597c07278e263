// Rows of KV off the wire into pages. Neighbours move together: a block of 16 tokens is one copy,
// and of a long one the C library writes past the caches.
//
// Limit   memory: 1 read and 1 write of planes * count * row_bytes.
// Layout  pages [planes, slots, row_bytes], a plane for each layer's keys and each layer's values;
//         wire [planes, count, row_bytes]; chosen [count], slots.
#include <cstring>
#include <vector>

#include "module.h"

namespace {

struct Run {
    int64_t slot, first, count;  // the first slot; where it stands among those chosen; how many
};

}  // namespace

// Returns the first of `chosen` that is not in [0, slots), before anything is written, or -1.
static int64_t scatter_rows(char* pages, int64_t planes, int64_t slots, int64_t row_bytes,
                            const int64_t* chosen, int64_t count, const char* wire) {
    std::vector<Run> runs;
    for (int64_t i = 0; i < count; i++) {
        if (chosen[i] < 0 || chosen[i] >= slots) return i;
        if (i > 0 && chosen[i] == chosen[i - 1] + 1) runs.back().count++;
        else runs.push_back({chosen[i], i, 1});
    }
    for (int64_t plane = 0; plane < planes; plane++)
        for (const Run& run : runs)
            std::memcpy(pages + (plane * slots + run.slot) * row_bytes,
                        wire + (plane * count + run.first) * row_bytes,
                        static_cast<size_t>(run.count * row_bytes));
    return -1;
}
KERNEL(scatter_rows);
