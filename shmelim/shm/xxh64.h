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

static inline uint64_t
xxh64_merge(uint64_t accumulator, uint64_t other)
{
    return (accumulator ^ xxh64_round(0, other)) * XXH64_PRIME_1 + XXH64_PRIME_4;
}

typedef struct {
    uint64_t a, b, c, d;
} Xxh64Lanes;

static inline Xxh64Lanes
xxh64_begin(uint64_t seed)
{
    return (Xxh64Lanes){seed + XXH64_PRIME_1 + XXH64_PRIME_2, seed + XXH64_PRIME_2, seed, seed - XXH64_PRIME_1};
}

/* A stripe of 32 bytes. */
static inline void
xxh64_stripe(Xxh64Lanes *lanes, const unsigned char *at)
{
    lanes->a = xxh64_round(lanes->a, xxh64_word(at));
    lanes->b = xxh64_round(lanes->b, xxh64_word(at + 8));
    lanes->c = xxh64_round(lanes->c, xxh64_word(at + 16));
    lanes->d = xxh64_round(lanes->d, xxh64_word(at + 24));
}

static inline uint64_t
xxh64_converge(const Xxh64Lanes *lanes)
{
    uint64_t hash = xxh64_rotate(lanes->a, 1) + xxh64_rotate(lanes->b, 7) + xxh64_rotate(lanes->c, 12)
                    + xxh64_rotate(lanes->d, 18);
    hash = xxh64_merge(hash, lanes->a);
    hash = xxh64_merge(hash, lanes->b);
    hash = xxh64_merge(hash, lanes->c);
    return xxh64_merge(hash, lanes->d);
}

/* What is left after the stripes: words, then half a word, then bytes. */
static inline uint64_t
xxh64_left_word(uint64_t hash, const unsigned char *at)
{
    return xxh64_rotate(hash ^ xxh64_round(0, xxh64_word(at)), 27) * XXH64_PRIME_1 + XXH64_PRIME_4;
}

static inline uint64_t
xxh64_left_half(uint64_t hash, const unsigned char *at)
{
    uint32_t half;
    memcpy(&half, at, sizeof half);
    return xxh64_rotate(hash ^ half * XXH64_PRIME_1, 23) * XXH64_PRIME_2 + XXH64_PRIME_3;
}

static inline uint64_t
xxh64_left_byte(uint64_t hash, const unsigned char *at)
{
    return xxh64_rotate(hash ^ *at * XXH64_PRIME_5, 11) * XXH64_PRIME_1;
}

static inline uint64_t
xxh64_avalanche(uint64_t hash)
{
    hash = (hash ^ hash >> 33) * XXH64_PRIME_2;
    hash = (hash ^ hash >> 29) * XXH64_PRIME_3;
    return hash ^ hash >> 32;
}

/* The hash of any number of bytes. */
static inline uint64_t
xxh64(const unsigned char *data, size_t size, uint64_t seed)
{
    size_t left = size;
    uint64_t hash = seed + XXH64_PRIME_5;
    if (left >= 32) {
        Xxh64Lanes lanes = xxh64_begin(seed);
        for (; left >= 32; left -= 32, data += 32) {
            xxh64_stripe(&lanes, data);
        }
        hash = xxh64_converge(&lanes);
    }
    hash += size;
    for (; left >= 8; left -= 8, data += 8) {
        hash = xxh64_left_word(hash, data);
    }
    for (; left >= 4; left -= 4, data += 4) {
        hash = xxh64_left_half(hash, data);
    }
    for (; left > 0; left--, data++) {
        hash = xxh64_left_byte(hash, data);
    }
    return xxh64_avalanche(hash);
}

#endif
