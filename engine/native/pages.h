// Where the tokens of a sequence lie in the pages, and of which type the pages are.
//
// A slot is `stride` elements, [kv_heads, head_dim]; slot = block * block_size + offset, and a row
// of the block table names the blocks of one sequence, first to last.
#pragma once

#include <algorithm>

#include "simd.h"

namespace pages {

// Calls body with a value of the type that the launchers number so.
template <typename Body>
void with_type(int64_t type, const Body& body) {
    if (type == 0) body(float{});
    else if (type == 1) body(simd::bf16{});
    else body(simd::fp16{});
}

struct Table {
    const int32_t* contexts;  // [segments], tokens of each
    const int32_t* blocks;    // [segments, width], arbitrary past the context
    int64_t width, block_size;
    int64_t slots;  // that the pages have

    // Whether the blocks of tokens begin .. context - 1 are named and exist.
    bool is_sound(int64_t segment, int64_t begin) const {
        const int64_t context = contexts[segment];
        if (context < 1 || context > width * block_size) return false;
        for (int64_t i = begin / block_size; i < (context + block_size - 1) / block_size; i++) {
            const int64_t block = blocks[segment * width + i];
            if (block < 0 || block >= slots / block_size) return false;
        }
        return true;
    }

    // The place of each token begin .. end - 1, in elements: slot * stride + shift.
    void find(int64_t segment, int64_t begin, int64_t end, int64_t stride, int64_t shift,
              int64_t* places) const {
        const int32_t* block = blocks + segment * width + begin / block_size;
        for (int64_t token = begin; token < end; block++) {
            const int64_t offset = token % block_size;
            const int64_t stop = std::min(end, token - offset + block_size);
            int64_t place = (*block * block_size + offset) * stride + shift;
            for (; token < stop; token++, place += stride) *places++ = place;
        }
    }
};

}  // namespace pages
