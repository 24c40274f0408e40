/* Table: the view that is current, and the loop of a lookup in it. */

#ifndef SHMELIM_TABLE_H
#define SHMELIM_TABLE_H

#include "view.h"

#include <time.h>

/* How often a read that takes long is tried before it says that publishes overtook it; and how often a record is used
 * where it stands before it is copied first. */
enum { ATTEMPTS = 16, IN_PLACE = 3 };

/* How many reads may pass without a look at the clock, where they come quickly; as in reader.py. */
enum { PATIENCE = 4 };

#define SECOND INT64_C(1000000000)
#define HEARTBEAT_LIMIT (3 * SECOND)

/* What is counted, as words of a page; as in counting.py. A hit is a key that has the first flag. */
enum { MISSES, HITS, BATCHES, RECORDS, SNAPSHOTS, RETRIES, COUNTS };

typedef struct {
    PyObject_HEAD
    uint64_t *counts; /* the page of this process, or own; never NULL */
    View *view; /* the current one; replaced under the critical section of the table, NULL before the first and after the last */
    _Atomic(uint64_t) retries; /* a statistic: threads may lose counts, here and below */
    _Atomic(int) patience; /* reads until the next look at the clock */
    _Atomic(int64_t) second; /* what that said, in s */
    uint64_t own[COUNTS]; /* where there is no page (yet) */
    Py_buffer page;       /* holds its memory */
    char seeks_page; /* whether _find_page() is asked for one, once a second; that ends it */
    char guarded; /* whether _watch() is asked before each read: set once, before the first */
} Table;

/* Count in the page. Whoever counts has the GIL, and no other process writes there, so that a plain increment of an aligned
 * word loses nothing, and is one instruction; an atomic one is that only where there is no GIL. */
ALWAYS_INLINE static inline void
tally(Table *table, unsigned which)
{
#ifdef Py_GIL_DISABLED
    atomic_fetch_add_explicit((_Atomic(uint64_t) *)(table->counts + which), 1, memory_order_relaxed);
#else
    table->counts[which]++;
#endif
}

/* Count a check; a hit is a key that has the first flag. */
ALWAYS_INLINE static inline void
tally_check(Table *table, bool hit)
{
    if (UNLIKELY(hit)) {
        tally(table, HITS);
    }
    else {
        tally(table, MISSES);
    }
}

static void
count_retry(Table *table)
{
    tally(table, RETRIES);
    uint64_t count = atomic_load_explicit(&table->retries, memory_order_relaxed);
    atomic_store_explicit(&table->retries, count + 1, memory_order_relaxed);
}

/* Return the current view, which lives until release_view; NULL without an exception where there is none.
 *
 * With a GIL it is borrowed: only Python code replaces it, and between the two calls none runs. Whoever calls back
 * into Python, or releases the GIL, takes hold instead. */
static inline View *
borrow_view(Table *table)
{
#ifdef Py_GIL_DISABLED
    View *view;
    Py_BEGIN_CRITICAL_SECTION(table);
    view = (View *)Py_XNewRef((PyObject *)table->view);
    Py_END_CRITICAL_SECTION();
    return view;
#else
    return table->view;
#endif
}

static inline void
release_view(View *view)
{
#ifdef Py_GIL_DISABLED
    Py_XDECREF(view);
#else
    (void)view;
#endif
}

/* Say why there is no view: the table may be closed, which its class knows. Runs Python code. */
static int
no_view(PyObject *op)
{
    PyObject *result = PyObject_HasAttrString(op, "_no_view") ? PyObject_CallMethod(op, "_no_view", NULL) : NULL;
    Py_XDECREF(result);
    if (PyErr_Occurred() == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "this table has no view yet");
    }
    return -1;
}

/* Have the segment attached that the version word names now. Runs Python code. */
static int
attach(Table *table)
{
    if (table->view == NULL) {
        return no_view((PyObject *)table);
    }
    PyObject *result = PyObject_CallMethod((PyObject *)table, "_attach", NULL);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* Count a read. Return whether it is time to look at the clock: a load, a store and a branch that is hardly ever taken. */
ALWAYS_INLINE static inline bool
impatient(Table *table)
{
    int left = atomic_load_explicit(&table->patience, memory_order_relaxed) - 1;
    atomic_store_explicit(&table->patience, left, memory_order_relaxed);
    return left < 0;
}

/* Look whether the writer lives; if that is not sure, have the name looked at. Once a second at most; but before each
 * read of a guarded table, which never has patience: there the class looks, and may refuse the read. */
NEVER_INLINE static int
watch(Table *table, int64_t second)
{
    atomic_store_explicit(&table->patience, 0, memory_order_relaxed);
    if (table->guarded) {
        PyObject *allowed = PyObject_CallMethod((PyObject *)table, "_watch", NULL);
        Py_XDECREF(allowed);
        return allowed == NULL ? -1 : 0;
    }
    atomic_store_explicit(&table->second, second, memory_order_relaxed);
    if (table->seeks_page) {
        PyObject *found = PyObject_CallMethod((PyObject *)table, "_find_page", NULL);
        if (found == NULL) {
            return -1;
        }
        Py_DECREF(found);
    }
    View *view = borrow_view(table);
    if (view == NULL) {
        return 0;
    }
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const unsigned char *root = view->root.buf;
    uint64_t state = load((const Word *)(const void *)(root + STATE_AT));
    int64_t beat = (int64_t)load((const Word *)(const void *)(root + HEARTBEAT_AT));
    release_view(view);
    int64_t age = now.tv_sec * SECOND + now.tv_nsec - beat;
    if ((state == STARTING || state == SERVING) && age > -SECOND && age < HEARTBEAT_LIMIT) {
        return 0;
    }
    PyObject *result = PyObject_CallMethod((PyObject *)table, "_look_at_name", NULL);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* Look whether another second has begun, which costs a load, and watch the writer then. Where reads come slowly, each of
 * them does that; where they come quickly, every fourth does this much. */
NEVER_INLINE static int
look_at_clock(Table *table)
{
    int64_t second = time(NULL);
    if (LIKELY(second == atomic_load_explicit(&table->second, memory_order_relaxed))) {
        atomic_store_explicit(&table->patience, PATIENCE - 1, memory_order_relaxed);
        return 0;
    }
    return watch(table, second);
}

/* Return the current view and a version of its generation, for release_view; NULL with an exception set. */
static inline View *
begin(Table *table, uint64_t *version)
{
    if (UNLIKELY(impatient(table)) && look_at_clock(table) < 0) {
        return NULL;
    }
    for (;;) {
        View *view = borrow_view(table);
        if (LIKELY(view != NULL)) {
            *version = read_begin(&view->map);
            if (LIKELY(*version >> SEQUENCE_BITS == view->map.generation)) {
                return view;
            }
            release_view(view);
        }
        if (attach(table) < 0) {
            return NULL;
        }
    }
}

/* The same, with a reference of the caller's own. */
static View *
hold(Table *table, uint64_t *version)
{
    View *view = begin(table, version);
    if (view != NULL) {
        Py_INCREF(view);
        release_view(view);
    }
    return view;
}

/* Find the packed word of a key, 0 if it is absent. The lookup: everything else is variations of it. */
NEVER_INLINE static int
look_up(Table *table, const unsigned char *key, size_t size, uint64_t *packed)
{
    for (;;) {
        uint64_t version;
        View *view = begin(table, &version);
        if (UNLIKELY(view == NULL)) {
            return -1;
        }
        uint64_t hash = hash_key(&view->map, key, size);
        Found found = probe(&view->map, version & 1, key, size, hash, packed);
        if (LIKELY(read_ends(&view->map, version))) {
            if (UNLIKELY(found == CONTRADICTION)) {
                raise_corrupt((PyObject *)table, view, NO_END);
                release_view(view);
                return -1;
            }
            release_view(view);
            return 0;
        }
        release_view(view);
        count_retry(table);
    }
}

/* The same for a key of 48 bytes, up to what is rare: an attach, a retry, an error. */
ALWAYS_INLINE static inline int
look_up_48(Table *table, const unsigned char *key, uint64_t *packed)
{
    if (UNLIKELY(impatient(table)) && look_at_clock(table) < 0) {
        return -1;
    }
    View *view = borrow_view(table);
    if (LIKELY(view != NULL)) {
        uint64_t version = read_begin(&view->map);
        bool done = LIKELY(version >> SEQUENCE_BITS == view->map.generation)
                    && LIKELY(probe_48(&view->map, version & 1, key, xxh3_48(key, view->map.words_48), packed)
                              != CONTRADICTION)
                    && LIKELY(read_ends(&view->map, version));
        release_view(view);
        if (LIKELY(done)) {
            return 0;
        }
    }
    return look_up(table, key, INLINE_KEY, packed);
}

/* What a record is wanted for: decode is called on its bytes where they stand; without it, they are copied. */
typedef struct {
    PyObject *decode;
    uint32_t skip; /* of the record's first bytes; one that has no others is None */
} Use;

/* Call decode with a window that is taken over, and released behind it. */
static PyObject *
decode_window(PyObject *decode, PyObject *window)
{
    if (window == NULL) {
        return NULL;
    }
    PyObject *result = PyObject_CallOneArg(decode, window);
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *released = PyObject_CallMethod(window, "release", NULL);
    if (released == NULL) {
        Py_CLEAR(result);
    }
    if (type != NULL) {
        /* What decode raised tells more. */
        PyErr_Restore(type, value, trace);
    }
    Py_XDECREF(released);
    Py_DECREF(window);
    return result;
}

/* Call decode with a window over a copy, which is taken over. */
static PyObject *
decode_copy(PyObject *decode, PyObject *copy)
{
    PyObject *window = PyMemoryView_FromObject(copy);
    Py_DECREF(copy);
    return decode_window(decode, window);
}

static PyObject *
use_record(const View *view, unsigned which, const Span *span, const Use *use)
{
    if (use->skip != 0 && span->size <= use->skip) {
        return Py_NewRef(Py_None);
    }
    const unsigned char *start = view->map.copies[which].arena + span->start + use->skip;
    Py_ssize_t size = (Py_ssize_t)(span->size - use->skip);
    if (use->decode == NULL) {
        return PyBytes_FromStringAndSize((const char *)start, size);
    }
    /* A memoryview of the whole memory, cut: it holds the mapping for as long as somebody holds on to it. */
    Py_ssize_t at = start - (const unsigned char *)view->data.buf;
    PyObject *whole = PyMemoryView_FromObject(view->data.obj);
    PyObject *window = whole == NULL ? NULL : PySequence_GetSlice(whole, at, at + size);
    Py_XDECREF(whole);
    return decode_window(use->decode, window);
}

/* Find the record of a key and use it; None if the key is absent. An exception of decode counts as its result does:
 * only if nothing was published meanwhile.
 *
 * A decode that is overtaken every time, perhaps by what it publishes itself, is given a copy in the end. What a version
 * says of a record is not written over before the epoch of its copy moves (see memory-format.md), so that the record
 * can be copied after the version moved on; and the decode of a copy counts, whatever happens meanwhile. */
static PyObject *
with_record(Table *table, const unsigned char *key, size_t size, const Use *use, Span *span, uint64_t *packed)
{
    for (int attempt = 0; ; attempt += attempt < IN_PLACE) {
        uint64_t version;
        View *view = hold(table, &version);
        if (view == NULL) {
            return NULL;
        }
        const Map *map = &view->map;
        const unsigned which = version & 1;
        const bool in_place = use->decode == NULL || attempt < IN_PLACE;
        PyObject *result = NULL;
        uint64_t epoch = load(map->copies[which].header + EPOCH);
        Found found = probe(map, which, key, size, hash_key(map, key, size), packed);
        Found placed = found == FOUND ? find_record(map, which, *packed, span) : found;
        bool whole = in_place || read_ends(map, version);
        if (whole && placed != CONTRADICTION) {
            const Use copy = {NULL, use->skip};
            result = placed == FOUND ? use_record(view, which, span, in_place ? use : &copy) : Py_NewRef(Py_None);
        }
        if (in_place) {
            whole = read_ends(map, version);
        }
        else if (whole && placed == FOUND) {
            atomic_thread_fence(memory_order_acquire);
            whole = load(map->copies[which].header + EPOCH) == epoch;
        }
        if (whole) {
            if (found == CONTRADICTION) {
                raise_corrupt((PyObject *)table, view, NO_END);
            }
            else if (placed == CONTRADICTION) {
                raise_misplaced((PyObject *)table, view, *packed);
            }
        }
        Py_DECREF(view);
        if (whole) {
            tally(table, RECORDS);
            return in_place || result == NULL || result == Py_None ? result : decode_copy(use->decode, result);
        }
        if (result == NULL && PyErr_Occurred() != NULL) {
            if (!PyErr_ExceptionMatches(PyExc_Exception)) {
                return NULL;
            }
            PyErr_Clear();
        }
        Py_XDECREF(result);
        count_retry(table);
    }
}

static int
bytes_key(PyObject *key, const unsigned char **data, size_t *size)
{
    if (!PyBytes_Check(key)) {
        PyErr_Format(PyExc_TypeError, "key must be bytes, not %.200s", Py_TYPE(key)->tp_name);
        return -1;
    }
    *data = (const unsigned char *)PyBytes_AS_STRING(key);
    *size = (size_t)PyBytes_GET_SIZE(key);
    return 0;
}

PyDoc_STRVAR(table_flags_doc, "flags($self, key, /)\n--\n\nReturn the flags of ``key``, 0 if it is absent. One probe.");

static PyObject *
table_flags(PyObject *op, PyObject *key)
{
    const unsigned char *data;
    size_t size;
    uint64_t packed;
    if (bytes_key(key, &data, &size) < 0 || look_up((Table *)op, data, size, &packed) < 0) {
        return NULL;
    }
    tally_check((Table *)op, packed & 1);
    return PyLong_FromLong((long)(packed & 0xFF));
}

/* Return flags, ordinal and a copy of the record of a key, or None. */
static PyObject *
table_entry(PyObject *op, PyObject *key)
{
    const unsigned char *data;
    size_t size;
    Span span;
    uint64_t packed;
    if (bytes_key(key, &data, &size) < 0) {
        return NULL;
    }
    PyObject *record = with_record((Table *)op, data, size, &(Use){NULL, 0}, &span, &packed);
    if (record == NULL || record == Py_None) {
        return record;
    }
    return Py_BuildValue("kKN", (unsigned long)(packed & 0xFF), (unsigned long long)span.ordinal, record);
}

PyDoc_STRVAR(table_read_doc,
"read($self, key, decode, /)\n--\n\n"
"Run ``decode`` on the record's bytes in shared memory and return its result, or None if absent.\n\n"
"``decode`` may run several times and may see bytes that are being overwritten: its result (or its\n"
"error) counts only if no publish overtook it. After three times it is given a copy, and that call\n"
"counts. It must copy what it keeps; the view, which is read-only, is released afterwards.");

static PyObject *
table_read(PyObject *op, PyObject *args)
{
    PyObject *key;
    Use use = {NULL, 0};
    const unsigned char *data;
    size_t size;
    Span span;
    uint64_t packed;
    if (!PyArg_ParseTuple(args, "OO:read", &key, &use.decode) || bytes_key(key, &data, &size) < 0) {
        return NULL;
    }
    return with_record((Table *)op, data, size, &use, &span, &packed);
}

#endif
