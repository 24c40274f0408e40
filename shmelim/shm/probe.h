/* One copy of the table as a reader sees it: the layout, finding a key, finding its record.
 *
 * The layout is that of docs/memory-format.md. Nothing in shared memory is believed: every offset is checked against
 * the sizes that were checked against the reader's own mapping when it was attached, and a probe looks at no more
 * slots than there are. Whatever the bytes are, these functions stay inside the mapping and come to an end.
 *
 * Memory order. What is read here may be overwritten meanwhile, and is then thrown away, since the version word moved
 * (see read_begin and read_ends). Words that decide where to look next are relaxed atomic loads: each is one load of
 * one aligned word, so that a value that was checked is the value that is used. Keys in the arena and records are read
 * with memcmp and memcpy, which C11 calls a race; so does Linux's seqlock, and for the same reason it does no harm:
 * no address and no length depends on those bytes, and a copy of torn bytes is dropped before anybody looks at it. */

#ifndef SHMELIM_PROBE_H
#define SHMELIM_PROBE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "xxh3.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the memory format is little-endian"
#endif

#define LIKELY(condition) __builtin_expect(!!(condition), 1)
#define ALWAYS_INLINE __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))
#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)

enum {
    WORD = 8,
    PAGE = 4096,
    VERSION_AT = 64,
    STATE_AT = 144,
    HEARTBEAT_AT = 152,
    SEQUENCE_BITS = 48,
    COPY_HEADER_SIZE = 128,
    SLOT_SIZE = 64,
    SLOT_WORDS = SLOT_SIZE / WORD,
    PACKED = SLOT_WORDS - 1,
    INLINE_KEY = 48,
    MAX_KEY = 255,
    ENTRY_HEADER = 24,
};

/* States of a writer that works. */
enum { STARTING = 1, SERVING = 2 };

/* Words of a copy's header. */
enum { EPOCH = 0, USED = 1, COUNT = 2, FLAG_COUNTS = 8, FLAG_BITS = 8 };

#define MAX_CAPACITY (UINT64_C(1) << 32)
#define SEQUENCE_MASK ((UINT64_C(1) << SEQUENCE_BITS) - 1)

typedef _Atomic(uint64_t) Word;
_Static_assert(sizeof(Word) == WORD && ATOMIC_LLONG_LOCK_FREE == 2, "64-bit atomics need no lock");

typedef struct {
    const Word *header;
    const Word *slots;
    const unsigned char *arena;
} Copy;

/* Where everything is. The numbers were checked, and never change. */
typedef struct {
    const Word *version;
    uint64_t generation;
    uint64_t seed;
    uint64_t words_48[XXH3_WORDS_48]; /* made from the seed, for xxh3_48 */
    uint64_t mask;
    uint64_t arena_size;
    Copy copies[2];
} Map;

typedef struct {
    uint64_t ordinal;
    uint64_t start; /* of the record, in the arena */
    uint32_t size;
    uint8_t key_size; /* the key stands right before the record */
} Span;

typedef enum { ABSENT, FOUND, CONTRADICTION, NO_KEY } Found;

static inline uint64_t
load(const Word *word)
{
    return atomic_load_explicit((Word *)(uintptr_t)word, memory_order_relaxed);
}

static inline unsigned
key_size_of(uint64_t packed)
{
    return packed >> 8 & 0xFF;
}

/* ---------------------------------------------------------------- the latch, as its readers use it */

/* Return the version. Nothing read later can be older than what it publishes. */
static inline uint64_t
read_begin(const Map *map)
{
    return atomic_load_explicit((Word *)(uintptr_t)map->version, memory_order_acquire);
}

/* Tell whether all that was read since read_begin belongs to that version. The fence keeps those loads above the
 * second look at the version word: a load that saw a store of the writer's next round sees, through the writer's release
 * fence between its publishing store and that round, the published version too. */
static inline bool
read_ends(const Map *map, uint64_t version)
{
    atomic_thread_fence(memory_order_acquire);
    return load(map->version) == version;
}

/* ---------------------------------------------------------------- the hash of a key */

static inline void
set_seed(Map *map, uint64_t seed)
{
    map->seed = seed;
    xxh3_prepare_48(map->words_48, seed);
}

/* Algorithm 2 of memory-format.md: XXH3 where that is 17 to 128 bytes, XXH64 elsewhere. */
static inline uint64_t
hash_key(const Map *map, const unsigned char *key, size_t size)
{
    if (size == INLINE_KEY) {
        return xxh3_48(key, map->words_48);
    }
    bool middle = size >= XXH3_FROM && size <= XXH3_TO;
    return middle ? xxh3_middle(key, size, map->seed) : xxh64(key, size, map->seed);
}

/* ---------------------------------------------------------------- finding a key */

ALWAYS_INLINE static inline uint64_t
difference_48(const Word *words, const unsigned char *key)
{
    uint64_t difference = 0;
#pragma GCC unroll 6
    for (int n = 0; n < INLINE_KEY / WORD; n++) {
        difference |= load(words + n) ^ xxh64_word(key + n * WORD);
    }
    return difference;
}

static inline bool
same_inline(const Word *words, const unsigned char *key, size_t size)
{
    uint64_t difference = 0;
    for (; size >= WORD; size -= WORD, key += WORD) {
        difference |= load(words++) ^ xxh64_word(key);
    }
    if (size) {
        uint64_t rest = 0;
        memcpy(&rest, key, size);
        difference |= (load(words) ^ rest) & ((UINT64_C(1) << 8 * size) - 1);
    }
    return difference == 0;
}

NEVER_INLINE static bool
same_in_arena(const Map *map, const Copy *copy, uint64_t packed, const unsigned char *key, size_t size)
{
    uint64_t offset = packed >> 16;
    return offset + ENTRY_HEADER + size <= map->arena_size
           && memcmp(copy->arena + offset + ENTRY_HEADER, key, size) == 0;
}

static inline bool
same_key(const Map *map, const Copy *copy, const Word *slot, uint64_t packed, const unsigned char *key, size_t size)
{
    if (key_size_of(packed) != size) {
        return false;
    }
    if (LIKELY(size == INLINE_KEY)) {
        return difference_48(slot + 1, key) == 0;
    }
    return size < INLINE_KEY ? same_inline(slot + 1, key, size) : same_in_arena(map, copy, packed, key, size);
}

/* Find the packed word of a key: 0 if it is absent. Linear probing from the home slot to the first empty one; the
 * hash is compared first, since it differs in all but one of 2**64 strangers. */
static inline Found
probe(const Map *map, unsigned which, const unsigned char *key, size_t size, uint64_t hash, uint64_t *packed)
{
    const Copy *copy = &map->copies[which];
    uint64_t index = hash & map->mask;
    for (uint64_t left = map->mask; ; left--) {
        const Word *slot = copy->slots + index * SLOT_WORDS;
        *packed = load(slot + PACKED);
        if (load(slot) == hash && same_key(map, copy, slot, *packed, key, size)) {
            return *packed ? FOUND : ABSENT;
        }
        if (*packed == 0) {
            return ABSENT;
        }
        if (UNLIKELY(left == 0)) {
            return CONTRADICTION;
        }
        index = (index + 1) & map->mask;
    }
}

/* The same for a key of 48 bytes, without the branches that only other keys need. */
ALWAYS_INLINE static inline Found
probe_48(const Map *map, unsigned which, const unsigned char *key, uint64_t hash, uint64_t *packed)
{
    const Word *slots = map->copies[which].slots;
    const uint64_t mask = map->mask;
    for (uint64_t index = hash & mask, left = mask; ; index = (index + 1) & mask, left--) {
        const Word *slot = slots + index * SLOT_WORDS;
        *packed = load(slot + PACKED);
        if (*packed == 0) {
            return ABSENT;
        }
        if (load(slot) == hash && key_size_of(*packed) == INLINE_KEY && difference_48(slot + 1, key) == 0) {
            return FOUND;
        }
        if (UNLIKELY(left == 0)) {
            return CONTRADICTION;
        }
    }
}

/* Look at the slot where a key of 48 bytes belongs, without a branch. Return whether that settles it: the key is there,
 * or nothing is. */
ALWAYS_INLINE static inline bool
first_slot_48(const Map *map, unsigned which, const unsigned char *key, uint64_t hash, uint64_t *packed)
{
    const Word *slot = map->copies[which].slots + (hash & map->mask) * SLOT_WORDS;
    *packed = load(slot + PACKED);
    uint64_t difference = (load(slot) ^ hash) | (key_size_of(*packed) ^ INLINE_KEY) | difference_48(slot + 1, key);
    return (*packed == 0) | (difference == 0);
}

static inline void
prefetch(const Map *map, unsigned which, uint64_t hash)
{
    __builtin_prefetch((const void *)(map->copies[which].slots + (hash & map->mask) * SLOT_WORDS));
}

/* ---------------------------------------------------------------- finding a record */

/* Find where the record of a slot is. CONTRADICTION if it does not lie in the arena. */
static inline Found
find_record(const Map *map, unsigned which, uint64_t packed, Span *span)
{
    uint64_t offset = packed >> 16;
    if (offset + ENTRY_HEADER > map->arena_size) {
        return CONTRADICTION;
    }
    /* Copied out once and checked afterwards; an offset that lies may be unaligned. */
    const unsigned char *entry = map->copies[which].arena + offset;
    memcpy(&span->ordinal, entry, sizeof span->ordinal);
    memcpy(&span->size, entry + 16, sizeof span->size);
    memcpy(&span->key_size, entry + 20, sizeof span->key_size);
    span->start = offset + ENTRY_HEADER + span->key_size;
    bool fits = span->start + span->size <= map->arena_size && span->key_size == key_size_of(packed);
    return fits ? FOUND : CONTRADICTION;
}

#endif
