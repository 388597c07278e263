// Work on many rows, shared between threads only where it is worth the hand-over.
#pragma once

#include <algorithm>

#include "pool.h"

namespace rows {

// Floats that one thread should have: below, waking another takes longer than the work.
constexpr int64_t GRAIN = 16384;

// Runs body(row) for every row, of `width` floats each.
template <typename Body>
void parallel(int64_t rows, int64_t width, const Body& body) {
    const int64_t each = std::max<int64_t>(1, GRAIN / width);
    pool::parallel_for((rows + each - 1) / each, [&](int64_t task) {
        const int64_t end = std::min(rows, (task + 1) * each);
        for (int64_t row = task * each; row < end; row++) body(row);
    });
}

}  // namespace rows
