/* XXH64, written from its specification:
 * https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
 *
 * One-shot and little-endian. */

#ifndef SHMELIM_XXH64_H
#define SHMELIM_XXH64_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define XXH64_PRIME_1 UINT64_C(0x9E3779B185EBCA87)
#define XXH64_PRIME_2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define XXH64_PRIME_3 UINT64_C(0x165667B19E3779F9)
#define XXH64_PRIME_4 UINT64_C(0x85EBCA77C2B2AE63)
#define XXH64_PRIME_5 UINT64_C(0x27D4EB2F165667C5)

static inline uint64_t
xxh64_rotate(uint64_t word, unsigned count)
{
    return word << count | word >> (64 - count);
}

static inline uint64_t
xxh64_word(const unsigned char *data)
{
    uint64_t word;
    memcpy(&word, data, sizeof word);
    return word;
}

static inline uint64_t
xxh64_round(uint64_t accumulator, uint64_t lane)
{
    return xxh64_rotate(accumulator + lane * XXH64_PRIME_2, 31) * XXH64_PRIME_1;
}

/* The hash of any number of bytes. */
static inline uint64_t
xxh64(const unsigned char *data, size_t size, uint64_t seed)
{
    size_t left = size;
    uint64_t hash = seed + XXH64_PRIME_5;
    if (left >= 32) {
        uint64_t lanes[] = {seed + XXH64_PRIME_1 + XXH64_PRIME_2, seed + XXH64_PRIME_2, seed, seed - XXH64_PRIME_1};
        for (; left >= 32; left -= 32) {
            for (int n = 0; n < 4; n++, data += 8) {
                lanes[n] = xxh64_round(lanes[n], xxh64_word(data));
            }
        }
        hash = xxh64_rotate(lanes[0], 1) + xxh64_rotate(lanes[1], 7) + xxh64_rotate(lanes[2], 12)
               + xxh64_rotate(lanes[3], 18);
        for (int n = 0; n < 4; n++) {
            hash = (hash ^ xxh64_round(0, lanes[n])) * XXH64_PRIME_1 + XXH64_PRIME_4;
        }
    }
    hash += size;
    for (; left >= 8; left -= 8, data += 8) {
        hash = xxh64_rotate(hash ^ xxh64_round(0, xxh64_word(data)), 27) * XXH64_PRIME_1 + XXH64_PRIME_4;
    }
    for (; left >= 4; left -= 4, data += 4) {
        uint32_t half;
        memcpy(&half, data, sizeof half);
        hash = xxh64_rotate(hash ^ half * XXH64_PRIME_1, 23) * XXH64_PRIME_2 + XXH64_PRIME_3;
    }
    for (; left > 0; left--, data++) {
        hash = xxh64_rotate(hash ^ *data * XXH64_PRIME_5, 11) * XXH64_PRIME_1;
    }
    hash = (hash ^ hash >> 33) * XXH64_PRIME_2;
    hash = (hash ^ hash >> 29) * XXH64_PRIME_3;
    return hash ^ hash >> 32;
}

#endif
