/* Image: one copy of the table as its writer changes it; image.py is the reference, and says how and why.
 *
 * Nobody reads the copy meanwhile, but for readers who are late, and drop what they find: so words of slots and headers
 * are stored whole, and in whichever order. What stands in the memory is not believed any more than by readers: the
 * writer may have adopted it. Whatever the bytes are, these functions stay inside the copy and come to an end.
 *
 * The GIL is kept. What is iterated over is held, and no Python code runs before a function ends. */

#ifndef SHMELIM_IMAGE_H
#define SHMELIM_IMAGE_H

#include "view.h"

enum { NEXT_ORDINAL = 3, LIVE = 4, ENTRY_CHECKED = 16, KIND_PUT = 1, KIND_REMOVE = 2, CHANGE_FIELDS = 4 };

#define MAX_ORDINAL ((UINT64_C(1) << 63) - 1)

typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    Map map; /* of which only copies[0] is used */
    Word *header;
    Word *slots;
    unsigned char *arena;
    PyObject *label; /* NULL until it is mapped */
} Image;

typedef struct {
    const unsigned char *key;
    size_t key_size;
    const unsigned char *record;
    size_t size;
    uint64_t ordinal;
    unsigned flags;
    bool removes, ordered;
} Change;

/* An entry of the log, where it stands. */
typedef struct {
    const unsigned char *key;
    uint64_t ordinal;
    uint64_t size, checked; /* of all of it; of what its checksum is of */
    uint8_t key_size, flags, kind;
} Entry;

static inline void
store(Word *word, uint64_t value)
{
    atomic_store_explicit(word, value, memory_order_relaxed);
}

static inline void
add(Word *word, uint64_t amount)
{
    store(word, load(word) + amount);
}

static int
broken(Image *self, const char *what)
{
    PyErr_Format(state_of((PyObject *)self)->corrupt, "segment %U %s", self->label, what);
    return -1;
}

static inline uint64_t
entry_size(size_t key_size, size_t record_size)
{
    return (ENTRY_HEADER + key_size + record_size + WORD - 1) & ~(uint64_t)(WORD - 1);
}

/* ---------------------------------------------------------------- slots */

/* Find the slot of a key, or the empty one where it would go; packed is 0 there. */
static inline Found
find_slot(const Image *self, const unsigned char *key, size_t size, uint64_t hash, uint64_t *index, uint64_t *packed)
{
    const uint64_t mask = self->map.mask;
    *index = hash & mask;
    for (uint64_t left = mask; ; left--) {
        const Word *slot = self->slots + *index * SLOT_WORDS;
        *packed = load(slot + PACKED);
        if (*packed == 0) {
            return ABSENT;
        }
        if (load(slot) == hash && same_key(&self->map, &self->map.copies[0], slot, *packed, key, size)) {
            return FOUND;
        }
        if (left == 0) {
            return CONTRADICTION;
        }
        *index = (*index + 1) & mask;
    }
}

static void
write_slot(Word *slot, uint64_t hash, const unsigned char *key, size_t size, uint64_t packed)
{
    uint64_t words[INLINE_KEY / WORD] = {0};
    memcpy(words, key, size < INLINE_KEY ? size : INLINE_KEY);
    store(slot, hash);
    for (unsigned n = 0; n < INLINE_KEY / WORD; n++) {
        store(slot + 1 + n, words[n]);
    }
    store(slot + PACKED, packed);
}

static inline void
copy_words(Word *to, const Word *from, uint64_t count)
{
    for (uint64_t n = 0; n < count; n++) {
        store(to + n, load(from + n));
    }
}

/* Empty a slot, and shift back what follows: an entry may move into the hole only if its probe passes there on the way
 * to where it is. */
static void
empty_slot(Image *self, uint64_t hole)
{
    const uint64_t mask = self->map.mask;
    uint64_t index = hole;
    for (uint64_t left = mask; left > 0; left--) {
        index = (index + 1) & mask;
        const Word *slot = self->slots + index * SLOT_WORDS;
        if (load(slot + PACKED) == 0) {
            break;
        }
        if (((index - load(slot)) & mask) >= ((index - hole) & mask)) {
            copy_words(self->slots + hole * SLOT_WORDS, slot, SLOT_WORDS);
            hole = index;
        }
    }
    for (unsigned n = 0; n < SLOT_WORDS; n++) {
        store(self->slots + hole * SLOT_WORDS + n, 0);
    }
}

/* ---------------------------------------------------------------- the log */

/* Read the entry at a place of a log that ends at `end`, which lies in the arena. */
static bool
read_entry(const Image *self, uint64_t at, uint64_t end, Entry *entry)
{
    uint32_t record;
    if (at > end || end - at < ENTRY_HEADER || at % WORD != 0) {
        return false;
    }
    const unsigned char *start = self->arena + at;
    memcpy(&entry->ordinal, start, sizeof entry->ordinal);
    memcpy(&record, start + ENTRY_CHECKED, sizeof record);
    entry->key_size = start[20];
    entry->flags = start[21];
    entry->kind = start[22];
    entry->key = start + ENTRY_HEADER;
    entry->size = entry_size(entry->key_size, record);
    entry->checked = ENTRY_HEADER - ENTRY_CHECKED + (uint64_t)entry->key_size + record;
    return entry->size <= end - at && entry->key_size > 0 && (entry->kind == KIND_PUT || entry->kind == KIND_REMOVE);
}

static inline uint64_t
used_of(const Image *self)
{
    uint64_t used = load(self->header + USED);
    return used > self->map.arena_size ? self->map.arena_size : used;
}

/* Write an entry behind the log; its place, or UINT64_MAX with an exception. */
static uint64_t
append(Image *self, unsigned kind, const Change *change, uint64_t ordinal)
{
    const uint64_t at = load(self->header + USED), size = entry_size(change->key_size, change->size);
    if (at > self->map.arena_size || size > self->map.arena_size - at || at % WORD != 0) {
        broken(self, "has no room for an entry that was to fit");
        return UINT64_MAX;
    }
    unsigned char *start = self->arena + at, *tail = start + ENTRY_CHECKED;
    const uint32_t record = (uint32_t)change->size;
    const size_t checked = ENTRY_HEADER - ENTRY_CHECKED + change->key_size + change->size;
    memset(start + size - WORD, 0, WORD); /* the padding */
    memcpy(start, &ordinal, sizeof ordinal);
    memcpy(tail, &record, sizeof record);
    tail[4] = (unsigned char)change->key_size;
    tail[5] = (unsigned char)change->flags;
    tail[6] = (unsigned char)kind;
    tail[7] = 0;
    memcpy(start + ENTRY_HEADER, change->key, change->key_size);
    memcpy(start + ENTRY_HEADER + change->key_size, change->record, change->size);
    const uint64_t checksum = xxh64(tail, checked, self->map.seed ^ ordinal);
    memcpy(start + WORD, &checksum, sizeof checksum);
    store(self->header + USED, at + size);
    return at;
}

static void
count(Image *self, unsigned flags, uint64_t size, uint64_t sign)
{
    add(self->header + COUNT, sign);
    add(self->header + LIVE, sign * size);
    for (unsigned bit = 0; bit < FLAG_BITS; bit++) {
        if (flags >> bit & 1) {
            add(self->header + FLAG_COUNTS + bit, sign);
        }
    }
}

/* Take the entry of a slot out of the counts, and tell its ordinal. */
static int
forget(Image *self, uint64_t packed, uint64_t *ordinal)
{
    Entry entry;
    if (!read_entry(self, packed >> 16, used_of(self), &entry)) {
        return broken(self, "has a record that does not fit into its arena");
    }
    *ordinal = entry.ordinal;
    count(self, packed & 0xFF, entry.size, UINT64_MAX);
    return 0;
}

/* Let the slot that find_slot found lead to an entry of the log. */
static int
point(Image *self, uint64_t index, uint64_t hash, const Entry *entry, uint64_t at, bool new)
{
    if (new && load(self->header + COUNT) >= self->map.mask) {
        return broken(self, "has no empty slot for an entry that was to fit");
    }
    if (entry->ordinal >= load(self->header + NEXT_ORDINAL)) {
        store(self->header + NEXT_ORDINAL, entry->ordinal + 1);
    }
    count(self, entry->flags, entry->size, 1);
    write_slot(self->slots + index * SLOT_WORDS, hash, entry->key, entry->key_size,
               at << 16 | (uint64_t)entry->key_size << 8 | entry->flags);
    return 0;
}

/* ---------------------------------------------------------------- changes */

/* Read a change as writer.py makes it: (key, flags or None, record, ordinal or None). */
static int
read_change(PyObject *item, Change *change)
{
    PyObject *key, *flags, *record, *ordinal;
    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != CHANGE_FIELDS) {
        goto wrong;
    }
    key = PyTuple_GET_ITEM(item, 0);
    flags = PyTuple_GET_ITEM(item, 1);
    record = PyTuple_GET_ITEM(item, 2);
    ordinal = PyTuple_GET_ITEM(item, 3);
    if (!PyBytes_Check(key) || !PyBytes_Check(record) || (flags != Py_None && !PyLong_Check(flags))
        || (ordinal != Py_None && !PyLong_Check(ordinal))) {
        goto wrong;
    }
    const long value = flags == Py_None ? 0 : PyLong_AsLong(flags);
    const unsigned long long place = ordinal == Py_None ? 0 : PyLong_AsUnsignedLongLong(ordinal);
    if (PyErr_Occurred() != NULL) {
        return -1;
    }
    *change = (Change){(const unsigned char *)PyBytes_AS_STRING(key), (size_t)PyBytes_GET_SIZE(key),
                       (const unsigned char *)PyBytes_AS_STRING(record), (size_t)PyBytes_GET_SIZE(record),
                       place, (unsigned)value, flags == Py_None, ordinal != Py_None};
    if (change->key_size == 0 || change->key_size > MAX_KEY || change->size > UINT32_MAX || value < 0
        || value > 0xFF || place > MAX_ORDINAL) {
        goto wrong;
    }
    return 0;
wrong:
    PyErr_SetString(PyExc_TypeError, "a change must be a checked (key, flags or None, record, ordinal or None)");
    return -1;
}

static int
change_one(Image *self, const Change *change)
{
    uint64_t index, packed, ordinal = change->ordinal;
    const uint64_t hash = hash_key(&self->map, change->key, change->key_size);
    const Found found = find_slot(self, change->key, change->key_size, hash, &index, &packed);
    if (found == CONTRADICTION) {
        return broken(self, NO_END);
    }
    if (found == FOUND) {
        uint64_t known;
        if (forget(self, packed, &known) < 0) {
            return -1;
        }
        ordinal = change->ordered ? ordinal : known;
    }
    else if (change->removes) {
        return 0;
    }
    else if (!change->ordered) {
        ordinal = load(self->header + NEXT_ORDINAL);
    }
    if (change->removes) {
        if (append(self, KIND_REMOVE, &(Change){.key = change->key, .key_size = change->key_size,
                                                .record = change->key}, ordinal) == UINT64_MAX) {
            return -1;
        }
        empty_slot(self, index);
        return 0;
    }
    const uint64_t at = append(self, KIND_PUT, change, ordinal);
    const Entry entry = {.key = change->key, .ordinal = ordinal, .size = entry_size(change->key_size, change->size),
                         .key_size = (uint8_t)change->key_size, .flags = (uint8_t)change->flags};
    return at == UINT64_MAX ? -1 : point(self, index, hash, &entry, at, found == ABSENT);
}

static int
not_mapped(Image *self)
{
    if (self->label == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "this image has no memory yet");
        return -1;
    }
    return 0;
}

/* Carry out changes in order; the caller has made sure that slots and arena have room for all. */
static PyObject *
image_apply(PyObject *op, PyObject *changes)
{
    Image *self = (Image *)op;
    PyObject *held = not_mapped(self) < 0 ? NULL : PySequence_Tuple(changes);
    Change change;
    bool done = held != NULL;
    for (Py_ssize_t n = 0; done && n < PyTuple_GET_SIZE(held); n++) {
        done = read_change(PyTuple_GET_ITEM(held, n), &change) == 0 && change_one(self, &change) == 0;
    }
    Py_XDECREF(held);
    return done ? Py_NewRef(Py_None) : NULL;
}

/* Return how many of these keys are absent. */
static PyObject *
image_missing(PyObject *op, PyObject *keys)
{
    Image *self = (Image *)op;
    PyObject *held = not_mapped(self) < 0 ? NULL : PySequence_Tuple(keys);
    Py_ssize_t missing = 0, size = held == NULL ? 0 : PyTuple_GET_SIZE(held);
    for (Py_ssize_t n = 0; n < size && PyErr_Occurred() == NULL; n++) {
        uint64_t index, packed;
        char *key;
        Py_ssize_t length;
        if (PyBytes_AsStringAndSize(PyTuple_GET_ITEM(held, n), &key, &length) < 0) {
            break;
        }
        const unsigned char *data = (const unsigned char *)key;
        const uint64_t hash = hash_key(&self->map, data, (size_t)length);
        const Found found = find_slot(self, data, (size_t)length, hash, &index, &packed);
        if (found == CONTRADICTION) {
            broken(self, NO_END);
        }
        missing += found == ABSENT;
    }
    Py_XDECREF(held);
    return PyErr_Occurred() != NULL ? NULL : PyLong_FromSsize_t(missing);
}

/* ---------------------------------------------------------------- whole copies */

/* The other image of an argument; NULL with an exception. */
static Image *
other_image(PyObject *op, PyObject *argument, bool same_size)
{
    Image *self = (Image *)op, *other = (Image *)argument;
    if (!PyObject_TypeCheck(argument, state_of(op)->image_type) || not_mapped(self) < 0 || not_mapped(other) < 0) {
        if (PyErr_Occurred() == NULL) {
            PyErr_Format(PyExc_TypeError, "the other copy must be an Image, not %.200s", Py_TYPE(argument)->tp_name);
        }
        return NULL;
    }
    if (self == other || self->map.seed != other->map.seed
        || (same_size && (self->map.mask != other->map.mask || self->map.arena_size != other->map.arena_size))) {
        PyErr_SetString(PyExc_ValueError, "the other copy must be another one, of this size and seed");
        return NULL;
    }
    return other;
}

/* Move the epoch: must be seen before the first store over what readers took for an append-only log. */
static void
begin_overwrite(Image *self)
{
    add(self->header + EPOCH, 1);
    atomic_thread_fence(memory_order_acq_rel);
}

static void
clear_slots(Image *self)
{
    for (uint64_t n = 0; n < (self->map.mask + 1) * SLOT_WORDS; n++) {
        store(self->slots + n, 0);
    }
}

/* Carry out what a log says from a place on, with checksums where the log may be damaged. */
static int
replay(Image *self, uint64_t at, uint64_t end, bool check)
{
    while (at < end) {
        Entry entry;
        uint64_t index, packed, known, checksum;
        if (!read_entry(self, at, end, &entry)) {
            return broken(self, "has an entry that does not fit into its log");
        }
        memcpy(&checksum, self->arena + at + WORD, sizeof checksum);
        if (check && xxh64(self->arena + at + ENTRY_CHECKED, entry.checked, self->map.seed ^ entry.ordinal) != checksum) {
            return broken(self, "has a damaged entry in its log");
        }
        const uint64_t hash = hash_key(&self->map, entry.key, entry.key_size);
        const Found found = find_slot(self, entry.key, entry.key_size, hash, &index, &packed);
        if (found == CONTRADICTION) {
            return broken(self, NO_END);
        }
        if (found == FOUND && forget(self, packed, &known) < 0) {
            return -1;
        }
        if (entry.kind == KIND_PUT) {
            if (point(self, index, hash, &entry, at, found == ABSENT) < 0) {
                return -1;
            }
        }
        else if (found == FOUND) {
            empty_slot(self, index);
        }
        at += entry.size;
        store(self->header + USED, at);
    }
    return 0;
}

/* Bring this copy, whose log another one has continued, up to that one. */
static PyObject *
image_follow(PyObject *op, PyObject *argument)
{
    Image *self = (Image *)op, *source = other_image(op, argument, true);
    if (source == NULL) {
        return NULL;
    }
    const uint64_t at = load(self->header + USED), end = used_of(source);
    if (at > end || at % WORD != 0) {
        broken(self, "has a log that the other copy does not continue");
        return NULL;
    }
    memcpy(self->arena + at, source->arena + at, end - at);
    return replay(self, at, end, false) < 0 ? NULL : Py_NewRef(Py_None);
}

static bool
same_words(const Word *words, const Word *others, unsigned count)
{
    uint64_t difference = 0;
    for (unsigned n = 0; n < count; n++) {
        difference |= load(words + n) ^ load(others + n);
    }
    return difference == 0;
}

/* Compare slots and header with those that the log alone leads to: each slot is where lookups find it. */
static int
compare(Image *self, Image *other)
{
    uint64_t occupied = 0;
    for (uint64_t n = 0; n <= self->map.mask; n++) {
        const Word *slot = self->slots + n * SLOT_WORDS;
        const uint64_t at = load(slot + PACKED) >> 16;
        uint64_t index, packed;
        Entry entry;
        if (load(slot + PACKED) == 0) {
            continue;
        }
        occupied++;
        if (!read_entry(self, at, used_of(self), &entry)
            || find_slot(other, entry.key, entry.key_size, load(slot), &index, &packed) != FOUND
            || !same_words(slot, other->slots + index * SLOT_WORDS, SLOT_WORDS)) {
            return broken(self, "has a slot that contradicts its entry");
        }
        if (find_slot(self, entry.key, entry.key_size, load(slot), &index, &packed) != FOUND || index != n) {
            return broken(self, "has entries that lookups do not find");
        }
    }
    if (occupied != load(other->header + COUNT) || load(self->header + COUNT) != occupied
        || load(self->header + LIVE) != load(other->header + LIVE)
        || !same_words(self->header + FLAG_COUNTS, other->header + FLAG_COUNTS, FLAG_BITS)
        || load(self->header + NEXT_ORDINAL) < load(other->header + NEXT_ORDINAL) || 2 * occupied > self->map.mask + 1) {
        return broken(self, "has a header that contradicts its entries");
    }
    return 0;
}

/* Raise CorruptSegmentError unless log, slots and header agree, and lookups find every entry. */
static PyObject *
image_check(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Image *self = (Image *)op;
    if (not_mapped(self) < 0) {
        return NULL;
    }
    const uint64_t used = load(self->header + USED), words = COPY_HEADER_SIZE / WORD + (self->map.mask + 1) * SLOT_WORDS;
    if (used % WORD != 0 || used > self->map.arena_size) {
        broken(self, "says that more of its arena is used than there is");
        return NULL;
    }
    /* The same log, over memory of its own for header and slots. */
    Word *memory = PyMem_RawCalloc((size_t)words, WORD);
    if (memory == NULL) {
        return PyErr_NoMemory();
    }
    Image other = *self;
    other.header = memory;
    other.slots = memory + COPY_HEADER_SIZE / WORD;
    other.map.copies[0].header = other.header;
    other.map.copies[0].slots = other.slots;
    const int done = replay(&other, 0, used, true) < 0 ? -1 : compare(self, &other);
    PyMem_RawFree(memory);
    return done < 0 ? NULL : Py_NewRef(Py_None);
}

/* Empty this copy. */
static PyObject *
image_clear(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Image *self = (Image *)op;
    if (not_mapped(self) < 0) {
        return NULL;
    }
    begin_overwrite(self);
    clear_slots(self);
    store(self->header + USED, 0);
    store(self->header + COUNT, 0);
    store(self->header + NEXT_ORDINAL, 0);
    store(self->header + LIVE, 0);
    for (unsigned bit = 0; bit < FLAG_BITS; bit++) {
        store(self->header + FLAG_COUNTS + bit, 0);
    }
    Py_RETURN_NONE;
}

/* Mark, in a bitmap of the words of the arena, where the entries are that slots lead to. */
static unsigned char *
mark_live(Image *self, uint64_t used)
{
    unsigned char *live = PyMem_RawCalloc((size_t)(used / WORD / 8 + 1), 1);
    if (live == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (uint64_t n = 0; n <= self->map.mask; n++) {
        const uint64_t packed = load(self->slots + n * SLOT_WORDS + PACKED), at = packed >> 16;
        if (packed != 0 && at < used) {
            live[at / WORD / 8] |= (unsigned char)(1 << at / WORD % 8);
        }
    }
    return live;
}

/* Copy the entries that are marked, side by side, and let slots lead to them. */
static int
move_live(Image *self, uint64_t used, const unsigned char *live, Image *target)
{
    uint64_t run = 0, to = 0; /* where the entries begin that stand side by side, and where they go */
    for (uint64_t at = 0; at < used; ) {
        Entry entry;
        uint64_t index, packed;
        if (!read_entry(self, at, used, &entry)) {
            return broken(self, "has an entry that does not fit into its log");
        }
        const bool lives = live[at / WORD / 8] >> at / WORD % 8 & 1;
        if (lives) {
            const uint64_t moved = to + (at - run);
            const uint64_t hash = hash_key(&self->map, entry.key, entry.key_size);
            if (moved > target->map.arena_size || entry.size > target->map.arena_size - moved) {
                return broken(target, "has no room for an entry that was to fit");
            }
            if (find_slot(target, entry.key, entry.key_size, hash, &index, &packed) != ABSENT
                || point(target, index, hash, &entry, moved, true) < 0) {
                return PyErr_Occurred() != NULL ? -1 : broken(self, "has two slots for one key");
            }
        }
        at += entry.size;
        if (!lives || at == used) {
            const uint64_t size = (lives ? at : at - entry.size) - run;
            memcpy(target->arena + to, self->arena + run, size);
            to += size;
            run = at;
        }
    }
    store(target->header + USED, to);
    return 0;
}

/* Write the current entries, without the garbage between them, into another copy or segment with the same seed. */
static PyObject *
image_compact_into(PyObject *op, PyObject *argument)
{
    Image *self = (Image *)op, *target = other_image(op, argument, false);
    if (target == NULL) {
        return NULL;
    }
    const uint64_t used = used_of(self);
    unsigned char *live = mark_live(self, used);
    PyObject *cleared = live == NULL ? NULL : image_clear(argument, NULL);
    int done = cleared == NULL ? -1 : move_live(self, used, live, target);
    Py_XDECREF(cleared);
    PyMem_RawFree(live);
    store(target->header + NEXT_ORDINAL, load(self->header + NEXT_ORDINAL));
    return done < 0 ? NULL : Py_NewRef(Py_None);
}

/* Make another copy, of the same size, equal to this one; the arenas differ from a place on: (target, arena_from). */
static PyObject *
image_mirror_into(PyObject *op, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    if (count != 1 || names == NULL || PyTuple_GET_SIZE(names) != 1) {
        PyErr_SetString(PyExc_TypeError, "mirror_into expected a target, and arena_from=");
        return NULL;
    }
    Image *self = (Image *)op, *target = other_image(op, args[0], true);
    const unsigned long long from = target == NULL ? 0 : PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred() != NULL) {
        return NULL;
    }
    if (from == 0) {
        begin_overwrite(target);
    }
    const uint64_t used = used_of(self);
    if (from < used) {
        memcpy(target->arena + from, self->arena + from, used - from);
    }
    copy_words(target->slots, self->slots, (self->map.mask + 1) * SLOT_WORDS);
    copy_words(target->header + 1, self->header + 1, COPY_HEADER_SIZE / WORD - 1); /* all but the epoch */
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- the type */

/* Hold the memory of a data segment, and place a copy in it: (memory, label, copy, seed, capacity, arena_size, stride). */
static PyObject *
image_map(PyObject *op, PyObject *args)
{
    Image *self = (Image *)op;
    PyObject *memory, *label;
    unsigned char copy;
    unsigned long long seed, capacity, arena_size, stride;
    if (!PyArg_ParseTuple(args, "OUbKKKK:_map", &memory, &label, &copy, &seed, &capacity, &arena_size, &stride)) {
        return NULL;
    }
    if (self->memory.obj != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "an image is mapped once");
        return NULL;
    }
    if (PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    if ((uintptr_t)self->memory.buf % WORD != 0 || copy > 1
        || !copies_fit((uint64_t)self->memory.len, capacity, arena_size, stride)) {
        PyErr_SetString(PyExc_ValueError, "the copies of the table do not fit into the segment");
        return NULL;
    }
    unsigned char *base = (unsigned char *)self->memory.buf + PAGE + copy * stride;
    self->header = (Word *)(void *)base;
    self->slots = (Word *)(void *)(base + COPY_HEADER_SIZE);
    self->arena = base + COPY_HEADER_SIZE + capacity * SLOT_SIZE;
    self->map.mask = capacity - 1;
    self->map.arena_size = arena_size;
    self->map.copies[0] = (Copy){self->header, self->slots, self->arena};
    set_seed(&self->map, seed);
    self->label = Py_NewRef(label);
    Py_RETURN_NONE;
}

static void
image_dealloc(PyObject *op)
{
    PyBuffer_Release(&((Image *)op)->memory);
    Py_XDECREF(((Image *)op)->label);
    free_object(op);
}

static PyMethodDef image_methods[] = {
    {"_map", image_map, METH_VARARGS, NULL},
    {"_missing", image_missing, METH_O, NULL},
    {"_check", image_check, METH_NOARGS, NULL},
    {"apply", image_apply, METH_O, NULL},
    {"fill", image_apply, METH_O, NULL},
    {"follow", image_follow, METH_O, NULL},
    {"clear", image_clear, METH_NOARGS, NULL},
    {"compact_into", image_compact_into, METH_O, NULL},
    {"mirror_into", (PyCFunction)(void (*)(void))image_mirror_into, METH_FASTCALL | METH_KEYWORDS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot image_slots[] = {
    {Py_tp_doc, "One copy of the table as its writer changes it."},
    {Py_tp_methods, image_methods},
    {Py_tp_dealloc, image_dealloc},
    {0, NULL},
};

static PyType_Spec image_spec = {
    .name = "shmelim.shm._native.Image",
    .basicsize = sizeof(Image),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = image_slots,
};

#endif
