// A copy and its digest in one pass: what has to be copied before it may be judged costs its digest
// no second walk through memory.
//
// Limit   memory: 1 read and 1 write of size bytes; 12 instructions for every 64 bytes of them.
// Layout  source, target [size] bytes that do not overlap, size > 240; returns XXH3_64 with seed 0.
//         Each byte of the source is read once: what is digested is what was copied, whoever else
//         writes there meanwhile.
// Source  Collet, "XXH3", specification in xxHash's doc/xxhash_spec.md, its path for long inputs.
#include <immintrin.h>

#include <cstring>

#include "module.h"
#include "simd.h"

namespace {

constexpr int64_t STRIPE = 64, SECRET = 192, BLOCK = (SECRET - STRIPE) / 8 * STRIPE;
constexpr uint64_t P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D;
constexpr uint64_t P64_1 = 0x9E3779B185EBCA87, P64_2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t P64_3 = 0x165667B19E3779F9, P64_4 = 0x85EBCA77C2B2AE63;
constexpr uint64_t P64_5 = 0x27D4EB2F165667C5;

alignas(64) constexpr uint8_t secret[SECRET] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

using Half = __m256i;

INLINE Half load(const void* from) { return _mm256_loadu_si256(static_cast<const Half*>(from)); }

// Eight 64-bit sums, as two halves.
struct Sums {
    Half part[2];

    INLINE void add(int half, Half data, const uint8_t* key) {
        const Half mixed = _mm256_xor_si256(data, load(key));
        const Half product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
        const Half swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
        part[half] = _mm256_add_epi64(part[half], _mm256_add_epi64(product, swapped));
    }

    INLINE void scramble() {
        const Half prime = _mm256_set1_epi32(static_cast<int>(P32_1));
        for (int half = 0; half < 2; half++) {
            const Half sum = part[half];
            const Half mixed =
                _mm256_xor_si256(_mm256_xor_si256(sum, _mm256_srli_epi64(sum, 47)),
                                 load(secret + SECRET - STRIPE + 32 * half));
            const Half high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
            part[half] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime),
                                          _mm256_slli_epi64(high, 32));
        }
    }

    // `count` stripes of one block.
    INLINE void copy(const uint8_t* source, uint8_t* target, int64_t count) {
        for (int64_t stripe = 0; stripe < count; stripe++)
            for (int half = 0; half < 2; half++) {
                const int64_t at = stripe * STRIPE + 32 * half;
                Half data = load(source + at);
                asm volatile("" : "+x"(data));  // or a compiler may load it a second time
                _mm256_storeu_si256(reinterpret_cast<Half*>(target + at), data);
                add(half, data, secret + 8 * stripe + 32 * half);
            }
    }
};

uint64_t word(const uint8_t* from) {
    uint64_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

uint64_t folded(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

}  // namespace

static int64_t copy_digest(const uint8_t* source, uint8_t* target, int64_t size) {
    alignas(64) uint64_t sums[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    Sums all{{load(sums), load(sums + 4)}};
    const int64_t blocks = (size - 1) / BLOCK;
    for (int64_t block = 0; block < blocks; block++) {
        all.copy(source + block * BLOCK, target + block * BLOCK, BLOCK / STRIPE);
        all.scramble();
    }
    const int64_t done = blocks * BLOCK, stripes = (size - 1 - done) / STRIPE;
    all.copy(source + done, target + done, stripes);
    const int64_t copied = done + stripes * STRIPE;
    std::memcpy(target + copied, source + copied, static_cast<size_t>(size - copied));
    for (int half = 0; half < 2; half++)  // the last 64 bytes, some of them for the second time
        all.add(half, load(target + size - STRIPE + 32 * half),
                secret + SECRET - STRIPE - 7 + 32 * half);
    std::memcpy(sums, all.part, sizeof sums);
    uint64_t digest = static_cast<uint64_t>(size) * P64_1;
    for (int i = 0; i < 4; i++)
        digest += folded(sums[2 * i] ^ word(secret + 11 + 16 * i),
                         sums[2 * i + 1] ^ word(secret + 19 + 16 * i));
    digest = (digest ^ (digest >> 37)) * 0x165667919E3779F9;
    return static_cast<int64_t>(digest ^ (digest >> 32));
}
KERNEL(copy_digest);
