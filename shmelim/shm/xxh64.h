/* XXH64, written from its specification:
 * https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
 *
 * One-shot and little-endian. The body is inlined with a constant length for the keys that matter (48 bytes), where
 * every loop below unrolls into straight-line code. */

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

static inline uint64_t
xxh64_merge(uint64_t accumulator, uint64_t other)
{
    return (accumulator ^ xxh64_round(0, other)) * XXH64_PRIME_1 + XXH64_PRIME_4;
}

/* Steps 1 to 3: as many stripes of 32 bytes as there are, and their convergence. */
static inline uint64_t
xxh64_stripes(const unsigned char **data, const unsigned char *end, uint64_t seed)
{
    uint64_t a = seed + XXH64_PRIME_1 + XXH64_PRIME_2;
    uint64_t b = seed + XXH64_PRIME_2;
    uint64_t c = seed;
    uint64_t d = seed - XXH64_PRIME_1;
    const unsigned char *at = *data;
    for (; end - at >= 32; at += 32) {
        a = xxh64_round(a, xxh64_word(at));
        b = xxh64_round(b, xxh64_word(at + 8));
        c = xxh64_round(c, xxh64_word(at + 16));
        d = xxh64_round(d, xxh64_word(at + 24));
    }
    *data = at;
    uint64_t hash = xxh64_rotate(a, 1) + xxh64_rotate(b, 7) + xxh64_rotate(c, 12) + xxh64_rotate(d, 18);
    hash = xxh64_merge(hash, a);
    hash = xxh64_merge(hash, b);
    hash = xxh64_merge(hash, c);
    return xxh64_merge(hash, d);
}

__attribute__((always_inline)) static inline uint64_t
xxh64_body(const unsigned char *data, size_t size, uint64_t seed)
{
    const unsigned char *end = data + size;
    uint64_t hash = size >= 32 ? xxh64_stripes(&data, end, seed) : seed + XXH64_PRIME_5;
    hash += size;
    for (; end - data >= 8; data += 8) {
        hash = xxh64_rotate(hash ^ xxh64_round(0, xxh64_word(data)), 27) * XXH64_PRIME_1 + XXH64_PRIME_4;
    }
    if (end - data >= 4) {
        uint32_t half;
        memcpy(&half, data, sizeof half);
        hash = xxh64_rotate(hash ^ half * XXH64_PRIME_1, 23) * XXH64_PRIME_2 + XXH64_PRIME_3;
        data += 4;
    }
    for (; data < end; data++) {
        hash = xxh64_rotate(hash ^ *data * XXH64_PRIME_5, 11) * XXH64_PRIME_1;
    }
    hash = (hash ^ hash >> 33) * XXH64_PRIME_2;
    hash = (hash ^ hash >> 29) * XXH64_PRIME_3;
    return hash ^ hash >> 32;
}

__attribute__((unused)) static uint64_t
xxh64_any(const unsigned char *data, size_t size, uint64_t seed)
{
    return xxh64_body(data, size, seed);
}

static inline uint64_t
xxh64(const unsigned char *data, size_t size, uint64_t seed)
{
    return size == 48 ? xxh64_body(data, 48, seed) : xxh64_any(data, size, seed);
}

#endif
