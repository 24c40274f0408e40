/* XXH3, 64 bits, with a seed and its default secret, for 17 to 128 bytes; written from its description:
 * https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
 *
 * The sum of products of 16 bytes each, which do not wait for one another: that is why it is quick, and the length of
 * hotkeys, 48 bytes, has a form of its own, in which a segment's seed has been added to the secret beforehand. */

#ifndef SHMELIM_XXH3_H
#define SHMELIM_XXH3_H

#include "xxh64.h"

#define XXH3_AVALANCHE UINT64_C(0x165667919E3779F9)

enum { XXH3_FROM = 17, XXH3_TO = 128, XXH3_WORDS_48 = 8 };

/* The default secret's first 128 bytes, as words. */
static const uint64_t xxh3_secret[16] = {
    UINT64_C(0xBE4BA423396CFEB8), UINT64_C(0x1CAD21F72C81017C),
    UINT64_C(0xDB979083E96DD4DE), UINT64_C(0x1F67B3B7A4A44072),
    UINT64_C(0x78E5C0CC4EE679CB), UINT64_C(0x2172FFCC7DD05A82),
    UINT64_C(0x8E2443F7744608B8), UINT64_C(0x4C263A81E69035E0),
    UINT64_C(0xCB00C391BB52283C), UINT64_C(0xA32E531B8B65D088),
    UINT64_C(0x4EF90DA297486471), UINT64_C(0xD8ACDEA946EF1938),
    UINT64_C(0x3F349CE33F76FAA8), UINT64_C(0x1D4F0BC7C7BBDCF9),
    UINT64_C(0x3159B4CD4BE0518A), UINT64_C(0x647378D9C97E9FC8),
};

/* The product of two words, its halves folded together. */
static inline uint64_t
xxh3_fold(uint64_t a, uint64_t b)
{
    __extension__ typedef unsigned __int128 Wide;
    Wide product = (Wide)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t
xxh3_mix(const unsigned char *at, uint64_t first, uint64_t second)
{
    return xxh3_fold(xxh64_word(at) ^ first, xxh64_word(at + 8) ^ second);
}

static inline uint64_t
xxh3_avalanche(uint64_t hash)
{
    hash = (hash ^ hash >> 37) * XXH3_AVALANCHE;
    return hash ^ hash >> 32;
}

/* The words that the hash of 48 bytes needs: those of the secret, with the seed added and taken away in turn. */
static inline void
xxh3_prepare_48(uint64_t words[XXH3_WORDS_48], uint64_t seed)
{
    for (int n = 0; n < XXH3_WORDS_48; n += 2) {
        words[n] = xxh3_secret[n] + seed;
        words[n + 1] = xxh3_secret[n + 1] - seed;
    }
}

/* The hash of 48 bytes, without a branch: the first 16 and the last 16, and those between them twice. */
static inline uint64_t
xxh3_48(const unsigned char *data, const uint64_t words[XXH3_WORDS_48])
{
    uint64_t hash = 48 * XXH64_PRIME_1;
    hash += xxh3_mix(data, words[0], words[1]);
    hash += xxh3_mix(data + 32, words[2], words[3]);
    hash += xxh3_mix(data + 16, words[4], words[5]);
    hash += xxh3_mix(data + 16, words[6], words[7]);
    return xxh3_avalanche(hash);
}

/* The hash of 17 to 128 bytes: pairs of 16 bytes, one from the front and one from the back, until they meet. */
static inline uint64_t
xxh3_middle(const unsigned char *data, size_t size, uint64_t seed)
{
    uint64_t hash = size * XXH64_PRIME_1;
    const unsigned char *front = data, *back = data + size - 16;
    const uint64_t *secret = xxh3_secret;
    for (size_t done = 0; done < size; done += 32, front += 16, back -= 16, secret += 4) {
        hash += xxh3_mix(front, secret[0] + seed, secret[1] - seed);
        hash += xxh3_mix(back, secret[2] + seed, secret[3] - seed);
    }
    return xxh3_avalanche(hash);
}

#endif
