/* Lookups of many keys at once, all as of one version.
 *
 * Keys are looked up a block at a time, in three steps: hash all of them and ask for their slots; look at the slot
 * where each belongs; go on probing for the few that this does not settle. The first two are the same instructions for
 * every key, whether it is there or not, so that the processor works on several at once and has nothing to guess: what a
 * key is cannot be told from those before it, and each wrong guess would cost as much as hashing two. */

#ifndef SHMELIM_BATCH_H
#define SHMELIM_BATCH_H

#include "table.h"

/* Keys of a block: enough slots on their way at once, few enough for the fastest cache. */
enum { BLOCK = 32 };

typedef struct {
    const unsigned char *data;
    size_t size;
    uint64_t hash;
} Key;

typedef struct {
    PyObject *op;     /* who is asked: who refuses what is not a key */
    PyObject *list;   /* where the keys are: a list, or a tuple, */
    Py_buffer array;  /* or an array of fixed-size byte strings, padded with zero bytes that do not count */
    Py_ssize_t count;
} Batch;

/* How one item of a list becomes a key: 1, or 0 for one that is in no table, or -1 with an exception. */
typedef int (*Convert)(PyObject *op, PyObject *item, const unsigned char **data, size_t *size);

static int
batch_of_array(Batch *batch, PyObject *array)
{
    if (PyObject_GetBuffer(array, &batch->array, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) {
        return -1;
    }
    const char *format = batch->array.format;
    if (batch->array.ndim != 1 || format == NULL || format[0] == 0 || format[strlen(format) - 1] != 's') {
        PyErr_SetString(PyExc_TypeError, "an array of keys must be one-dimensional, of byte strings");
        return -1;
    }
    batch->count = batch->array.shape[0];
    return 0;
}

/* Take the keys of a list or tuple, or of anything that has the buffer of an array. Either is released by batch_fill. */
static int
batch_init(Batch *batch, PyObject *op, PyObject *source)
{
    *batch = (Batch){.op = op};
    if (!PyList_Check(source) && !PyTuple_Check(source)) {
        return batch_of_array(batch, source);
    }
    batch->count = PySequence_Fast_GET_SIZE(source);
#ifdef Py_GIL_DISABLED
    /* Other threads may change a list at any time. */
    batch->list = PySequence_Tuple(source);
    return batch->list == NULL ? -1 : 0;
#else
    batch->list = Py_NewRef(source);
    return 0;
#endif
}

/* Take one key from where it is, and hash it. The bytes of a text live as long as the text is in the list, which is
 * until Python code runs: see batch_answer. */
ALWAYS_INLINE static inline int
batch_take(const Batch *batch, const Map *map, PyObject **items, Py_ssize_t n, Key *key, Convert convert)
{
    if (items != NULL) {
        int converted = convert(batch->op, items[n], &key->data, &key->size);
        if (UNLIKELY(converted <= 0)) {
            /* An empty key is in no table. */
            *key = (Key){(const unsigned char *)"", 0, 0};
            return converted;
        }
    }
    else {
        size_t size = (size_t)batch->array.itemsize;
        key->data = (const unsigned char *)batch->array.buf + (size_t)n * size;
        while (size > 0 && key->data[size - 1] == 0) {
            size--;
        }
        key->size = size;
    }
    key->hash = hash_key(map, key->data, key->size);
    return 0;
}

ALWAYS_INLINE static inline uint8_t
answer_of(uint64_t packed, unsigned mask)
{
    return mask == 0 ? (uint8_t)packed : (packed & mask) == mask;
}

/* Look up all keys in one version, and write an answer for each: whether it has all flags of the mask, or all its flags
 * where the mask is 0. NO_KEY: an exception is set. CONTRADICTION is one only if the version stands. */
ALWAYS_INLINE static inline Found
batch_pass(const Batch *batch, const Map *map, unsigned which, unsigned mask, uint8_t *answers, Convert convert)
{
    PyObject **items = batch->list == NULL ? NULL : PySequence_Fast_ITEMS(batch->list);
    for (Py_ssize_t start = 0; start < batch->count; start += BLOCK) {
        Key keys[BLOCK];
        unsigned unsettled[BLOCK], left = 0;
        unsigned size = batch->count - start < BLOCK ? (unsigned)(batch->count - start) : BLOCK;
        for (unsigned n = 0; n < size; n++) {
            if (batch_take(batch, map, items, start + n, &keys[n], convert) < 0) {
                return NO_KEY;
            }
            prefetch(map, which, keys[n].hash);
        }
        for (unsigned n = 0; n < size; n++) {
            uint64_t packed = 0;
            const Key *key = &keys[n];
            bool settled = LIKELY(key->size == INLINE_KEY) && first_slot_48(map, which, key->data, key->hash, &packed);
            answers[start + n] = answer_of(packed, mask);
            unsettled[left] = n;
            left += !settled;
        }
        for (unsigned n = 0; n < left; n++) {
            uint64_t packed;
            const Key *key = &keys[unsettled[n]];
            if (UNLIKELY(probe(map, which, key->data, key->size, key->hash, &packed) == CONTRADICTION)) {
                return CONTRADICTION;
            }
            answers[start + unsettled[n]] = answer_of(packed, mask);
        }
    }
    return FOUND;
}

/* Answer for all keys. 1 when done, 0 when publishes overtook it every time, -1 on an error.
 *
 * A list may change whenever Python code runs, and that is in attach only: each attach is followed by taking the keys
 * anew, and whoever made the list shorter meanwhile is told. */
ALWAYS_INLINE static inline int
batch_answer(const Batch *batch, Table *table, unsigned mask, uint8_t *answers, Convert convert)
{
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        uint64_t version;
        View *view = hold(table, &version);
        if (view == NULL) {
            return -1;
        }
        if (batch->list != NULL && PySequence_Fast_GET_SIZE(batch->list) != batch->count) {
            PyErr_SetString(PyExc_RuntimeError, "the list of keys changed its size");
            Py_DECREF(view);
            return -1;
        }
        Found found = batch_pass(batch, &view->map, version & 1, mask, answers, convert);
        bool whole = found == NO_KEY || read_ends(&view->map, version);
        if (whole && found == CONTRADICTION) {
            raise_corrupt((PyObject *)table, view, NO_END);
        }
        Py_DECREF(view);
        if (whole) {
            return found == FOUND ? 1 : -1;
        }
        count_retry(table);
    }
    return 0;
}

/* What Table._fill and Lookups._fill have in common: (keys, answers, mask), the answers into a buffer. */
ALWAYS_INLINE static inline PyObject *
batch_fill(Table *table, PyObject *op, PyObject *const *args, Py_ssize_t count, Convert convert)
{
    Py_buffer answers;
    Batch batch;
    if (count != 3) {
        return PyErr_Format(PyExc_TypeError, "_fill expected 3 arguments, got %zd", count);
    }
    unsigned long mask = PyLong_AsUnsignedLong(args[2]);
    if (mask > 0xFF) {
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "mask %lu must be 0 to 255", mask);
    }
    if (PyObject_GetBuffer(args[1], &answers, PyBUF_CONTIG) < 0) {
        return NULL;
    }
    int done = batch_init(&batch, op, args[0]);
    if (done == 0 && answers.len != batch.count) {
        PyErr_Format(PyExc_ValueError, "%zd bytes cannot take %zd answers", answers.len, batch.count);
        done = -1;
    }
    if (done == 0) {
        done = batch_answer(&batch, table, (unsigned)mask, answers.buf, convert);
    }
    Py_XDECREF(batch.list);
    PyBuffer_Release(&batch.array);
    PyBuffer_Release(&answers);
    if (done > 0) {
        tally(table, BATCHES);
    }
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static int
convert_bytes(PyObject *Py_UNUSED(op), PyObject *item, const unsigned char **data, size_t *size)
{
    return bytes_key(item, data, size) < 0 ? -1 : 1;
}

/* Write an answer for each key into a buffer of bytes: (keys, answers, mask). Keys are a list or tuple of bytes, or an
 * array of byte strings. False: publishes overtook it every time. */
static PyObject *
table_fill(PyObject *op, PyObject *const *args, Py_ssize_t count)
{
    return batch_fill((Table *)op, op, args, count, convert_bytes);
}

#endif
