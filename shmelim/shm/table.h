/* Table: the view that is current, and the loop of a lookup in it. */

#ifndef SHMELIM_TABLE_H
#define SHMELIM_TABLE_H

#include "view.h"

#include <limits.h>

/* How often a read that takes long is tried before it says that publishes overtook it. */
enum { ATTEMPTS = 16 };

typedef struct {
    PyObject_HEAD
    View *view; /* the current one; replaced under the critical section of the table, NULL before the first */
    _Atomic(uint64_t) retries; /* a statistic: threads may lose counts */
} Table;

static void
count_retry(Table *table)
{
    uint64_t count = atomic_load_explicit(&table->retries, memory_order_relaxed);
    atomic_store_explicit(&table->retries, count + 1, memory_order_relaxed);
}

/* Return the current view, which lives until release_view; NULL without an exception where there is none.
 *
 * With a GIL it is borrowed: only Python code replaces it, and between the two calls none runs. Whoever calls back
 * into Python, or releases the GIL, takes hold instead. */
#ifdef Py_GIL_DISABLED
static inline View *
borrow_view(Table *table)
{
    View *view;
    Py_BEGIN_CRITICAL_SECTION(table);
    view = (View *)Py_XNewRef((PyObject *)table->view);
    Py_END_CRITICAL_SECTION();
    return view;
}

static inline void
release_view(View *view)
{
    Py_XDECREF(view);
}
#else
static inline View *
borrow_view(Table *table)
{
    return table->view;
}

static inline void
release_view(View *Py_UNUSED(view))
{
}
#endif

/* Have the segment attached that the version word names now. Runs Python code. */
static int
attach(Table *table)
{
    if (table->view == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "this table has no view yet");
        return -1;
    }
    PyObject *result = PyObject_CallMethod((PyObject *)table, "_attach", NULL);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* Return the current view and a version of its generation, for release_view; NULL with an exception set. */
static inline View *
begin(Table *table, uint64_t *version)
{
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
    for (;;) {
        View *view = borrow_view(table);
        Py_XINCREF(view);
        release_view(view);
        if (view != NULL) {
            *version = read_begin(&view->map);
            if (*version >> SEQUENCE_BITS == view->map.generation) {
                return view;
            }
            Py_DECREF(view);
        }
        if (attach(table) < 0) {
            return NULL;
        }
    }
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
    View *view = borrow_view(table);
    if (LIKELY(view != NULL)) {
        uint64_t version = read_begin(&view->map);
        bool done = LIKELY(version >> SEQUENCE_BITS == view->map.generation)
                    && LIKELY(probe_48(&view->map, version & 1, key, hash_48(&view->map, key), packed)
                              != CONTRADICTION)
                    && LIKELY(read_ends(&view->map, version));
        release_view(view);
        if (LIKELY(done)) {
            return 0;
        }
    }
    return look_up(table, key, INLINE_KEY, packed);
}

/* What is done with a record that was found: returns a new reference, or NULL with an exception. */
typedef PyObject *(*Use)(View *view, unsigned which, const Span *span, uint64_t packed, void *context);

/* Find the record of a key and use it; None if the key is absent. An exception of use counts as its result does: only
 * if nothing was published meanwhile. */
static PyObject *
with_record(Table *table, const unsigned char *key, size_t size, Use use, void *context)
{
    for (;;) {
        uint64_t version, packed;
        Span span = {0, 0, 0, 0};
        View *view = hold(table, &version);
        if (view == NULL) {
            return NULL;
        }
        unsigned which = version & 1;
        PyObject *result = NULL;
        Found found = probe(&view->map, which, key, size, hash_key(&view->map, key, size), &packed);
        Found placed = found == FOUND ? find_record(&view->map, which, packed, &span) : found;
        if (placed == FOUND) {
            result = use(view, which, &span, packed, context);
        }
        else if (placed == ABSENT) {
            result = Py_NewRef(Py_None);
        }
        if (read_ends(&view->map, version)) {
            if (found == CONTRADICTION) {
                raise_corrupt((PyObject *)table, view, NO_END);
            }
            else if (placed == CONTRADICTION) {
                raise_misplaced((PyObject *)table, view, packed, &span);
            }
            Py_DECREF(view);
            return result;
        }
        Py_DECREF(view);
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

/* Call a function on a record's bytes where they stand; context is the function, and how much of the record to skip. */
typedef struct {
    PyObject *decode;
    uint32_t skip;
} Decoding;

static PyObject *
decode_in_place(View *view, unsigned which, const Span *span, uint64_t Py_UNUSED(packed), void *context)
{
    const Decoding *decoding = context;
    if (decoding->skip != 0 && span->size <= decoding->skip) {
        return Py_NewRef(Py_None);
    }
    /* A memoryview of the whole memory, cut: it holds the mapping for as long as somebody holds on to it. */
    Py_ssize_t at = view->map.copies[which].arena - (const unsigned char *)view->data.buf;
    Py_ssize_t start = at + (Py_ssize_t)(span->start + decoding->skip);
    PyObject *whole = PyMemoryView_FromObject(view->data.obj);
    PyObject *window = whole == NULL ? NULL : PySequence_GetSlice(whole, start, at + (Py_ssize_t)(span->start + span->size));
    PyObject *result = window == NULL ? NULL : PyObject_CallOneArg(decoding->decode, window);
    PyObject *views[] = {window, whole};
    for (int n = 0; n < 2; n++) {
        if (views[n] == NULL) {
            continue;
        }
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyObject *released = PyObject_CallMethod(views[n], "release", NULL);
        if (released == NULL) {
            /* What decode raised tells more. */
            if (type != NULL) {
                PyErr_Clear();
            }
            Py_CLEAR(result);
        }
        if (type != NULL) {
            PyErr_Restore(type, value, trace);
        }
        Py_XDECREF(released);
        Py_DECREF(views[n]);
    }
    return result;
}

static PyObject *
copy_record(View *view, unsigned which, const Span *span, uint64_t Py_UNUSED(packed), void *context)
{
    uint32_t skip = *(const uint32_t *)context;
    if (skip != 0 && span->size <= skip) {
        return Py_NewRef(Py_None);
    }
    const unsigned char *start = view->map.copies[which].arena + span->start;
    return PyBytes_FromStringAndSize((const char *)start + skip, (Py_ssize_t)(span->size - skip));
}

static PyObject *
copy_entry(View *view, unsigned which, const Span *span, uint64_t packed, void *Py_UNUSED(context))
{
    uint32_t skip = 0;
    PyObject *record = copy_record(view, which, span, packed, &skip);
    if (record == NULL) {
        return NULL;
    }
    return Py_BuildValue("kKN", (unsigned long)(packed & 0xFF), (unsigned long long)span->ordinal, record);
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
    return PyLong_FromLong((long)(packed & 0xFF));
}

PyDoc_STRVAR(table_entry_doc,
"_entry($self, key, /)\n--\n\nReturn flags, ordinal and a copy of the record of ``key``, or None.");

static PyObject *
table_entry(PyObject *op, PyObject *key)
{
    const unsigned char *data;
    size_t size;
    if (bytes_key(key, &data, &size) < 0) {
        return NULL;
    }
    return with_record((Table *)op, data, size, copy_entry, NULL);
}

PyDoc_STRVAR(table_read_doc,
"read($self, key, decode, /)\n--\n\n"
"Run ``decode`` on the record's bytes in shared memory and return its result, or None if absent.\n\n"
"``decode`` may run several times and may see bytes that are being overwritten: its result (or its\n"
"error) counts only if no publish overtook it. It must copy what it keeps; the view is released\n"
"afterwards.");

static PyObject *
table_read(PyObject *op, PyObject *args)
{
    PyObject *key;
    Decoding decoding = {NULL, 0};
    const unsigned char *data;
    size_t size;
    if (!PyArg_ParseTuple(args, "OO:read", &key, &decoding.decode) || bytes_key(key, &data, &size) < 0) {
        return NULL;
    }
    return with_record((Table *)op, data, size, decode_in_place, &decoding);
}

PyDoc_STRVAR(table_count_doc,
"_counter($self, bit, /)\n--\n\nReturn how many entries have the flag with the value ``1 << bit``, 0 to 7.");

static PyObject *
table_counter(PyObject *op, PyObject *argument)
{
    Table *self = (Table *)op;
    long bit = PyLong_AsLong(argument);
    if (bit == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (bit < 0 || bit >= FLAG_BITS) {
        return PyErr_Format(PyExc_ValueError, "bit %ld must be 0 to %d", bit, FLAG_BITS - 1);
    }
    for (;;) {
        uint64_t version;
        View *view = begin(self, &version);
        if (view == NULL) {
            return NULL;
        }
        uint64_t count = load(view->map.copies[version & 1].header + FLAG_COUNTS + bit);
        bool whole = read_ends(&view->map, version);
        release_view(view);
        if (whole) {
            return PyLong_FromUnsignedLongLong(count);
        }
        count_retry(self);
    }
}

#endif
