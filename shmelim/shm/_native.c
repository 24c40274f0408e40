/* The compiled read path: lookups in the shared table, straight from the caller's call to shared memory.
 *
 * What: four types, none of which knows what the table is used for.
 *
 *     View         an attached data segment: two buffers and the numbers that were checked against them; immutable
 *     Table        lookups by bytes; holds the view that is current, and calls _attach() when the generation moved
 *     Lookups      lookups by text in a Table; the base of whoever gives flags and records a meaning
 *     ReleaseWord  one word that a writer stores with release semantics
 *
 * How: every lookup is the loop of memory-format.md: load the version (acquire), look into the copy that it names,
 * fence, load it again; if it moved, start over. probe.h has that and the layout, xxh64.h the hash. Attaching, which
 * happens once per generation, is done by the pure-Python classes that Table and View are mixed into; they are the
 * reference for everything here. bind() puts methods into a class under the names and docstrings that it gives them,
 * so that a call finds a plain C function in the type of its object, without a frame or a bound method in between.
 *
 * Why it is enough: the writer touches the copy that version v names only after it published v + 1, with a release
 * fence in between. A reader whose second look still finds v has therefore read nothing of those stores; see read_ends.
 *
 * Trade-offs: a lookup that a publish overtakes is done again. Lookups of many keys, and of all records, take longer than
 * the pause between two publishes may be; after ATTEMPTS they say that they were overtaken, and their caller replays
 * the log, which always ends. Views are replaced under a critical section of their Table: where there is a GIL that is
 * nothing, where there is none it is one uncontended lock per lookup, as long as each thread has a reader of its own.
 *
 * No state but that of the module; every type is a heap type; any number of interpreters. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <limits.h>
#include <stddef.h>

#include "probe.h"

#define INTERFACE 1
#define FLAGS 256
#define TESTS 4

enum { ATTEMPTS = 16, STACK_KEYS = 256, PREFETCH_AHEAD = 8, LARGE = 1 << 15 };

#if PY_VERSION_HEX < 0x030D0000
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif

typedef struct {
    PyObject *corrupt; /* CorruptSegmentError */
    PyTypeObject *view_type;
    PyTypeObject *table_type;
    PyTypeObject *lookups_type;
} State;

static struct PyModuleDef native_module;

static State *
state_of(PyObject *object)
{
    PyObject *module = PyType_GetModuleByDef(Py_TYPE(object), &native_module);
    return module == NULL ? NULL : PyModule_GetState(module);
}

/* ------------------------------------------------------------------ View */

typedef struct {
    PyObject_HEAD
    Map map; /* map.version is NULL until map() was called */
    Py_buffer root;
    Py_buffer data;
    PyObject *label;
} View;

/* Check the numbers of a data header against the buffer, and compute from them where everything is. */
static int
view_place(View *self, uint64_t capacity, uint64_t arena_size, uint64_t stride)
{
    uint64_t size = (uint64_t)self->data.len;
    const unsigned char *root = self->root.buf, *data = self->data.buf;
    if (self->root.len < PAGE || ((uintptr_t)root | (uintptr_t)data) % WORD != 0) {
        PyErr_SetString(PyExc_ValueError, "a segment is too short, or not aligned");
        return -1;
    }
    if (capacity == 0 || capacity > MAX_CAPACITY || (capacity & (capacity - 1)) != 0 || size < PAGE
        || arena_size > size || stride > (size - PAGE) / 2 || stride % WORD != 0
        || COPY_HEADER_SIZE + capacity * SLOT_SIZE + arena_size > stride) {
        PyErr_SetString(PyExc_ValueError, "the copies of the table do not fit into the segment");
        return -1;
    }
    self->map.mask = capacity - 1;
    self->map.arena_size = arena_size;
    for (unsigned which = 0; which < 2; which++) {
        const unsigned char *base = data + PAGE + which * stride;
        self->map.copies[which].header = (const Word *)(const void *)base;
        self->map.copies[which].slots = (const Word *)(const void *)(base + COPY_HEADER_SIZE);
        self->map.copies[which].arena = base + COPY_HEADER_SIZE + capacity * SLOT_SIZE;
    }
    self->map.version = (const Word *)(const void *)(root + VERSION_AT);
    return 0;
}

PyDoc_STRVAR(view_map_doc,
"_map($self, root, data, label, generation, seed, capacity, arena_size, stride, /)\n--\n\n"
"Hold the memory of root and data segment, and place the copies in it. Once per view.");

static PyObject *
view_map(PyObject *op, PyObject *args)
{
    View *self = (View *)op;
    PyObject *root, *data, *label;
    unsigned long long generation, seed, capacity, arena_size, stride;
    if (!PyArg_ParseTuple(args, "OOUKKKKK:_map", &root, &data, &label, &generation, &seed, &capacity, &arena_size,
                          &stride)) {
        return NULL;
    }
    if (self->label != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "a view is mapped once");
        return NULL;
    }
    if (PyObject_GetBuffer(root, &self->root, PyBUF_SIMPLE) < 0) {
        return NULL;
    }
    if (PyObject_GetBuffer(data, &self->data, PyBUF_SIMPLE) < 0) {
        PyBuffer_Release(&self->root);
        return NULL;
    }
    self->map.generation = generation;
    self->map.seed = seed;
    if (view_place(self, capacity, arena_size, stride) < 0) {
        PyBuffer_Release(&self->root);
        PyBuffer_Release(&self->data);
        return NULL;
    }
    self->label = Py_NewRef(label);
    Py_RETURN_NONE;
}

static int
view_traverse(PyObject *op, visitproc visit, void *arg)
{
    View *self = (View *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->root.obj);
    Py_VISIT(self->data.obj);
    return 0;
}

/* No tp_clear: buffers refer to memory, and memory refers to nothing, so that no cycle goes through a view. */
static void
view_dealloc(PyObject *op)
{
    View *self = (View *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    PyBuffer_Release(&self->root);
    PyBuffer_Release(&self->data);
    Py_CLEAR(self->label);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMethodDef view_methods[] = {
    {"_map", view_map, METH_VARARGS, view_map_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot view_slots[] = {
    {Py_tp_doc, "An attached data segment, with the root segment that named it."},
    {Py_tp_methods, view_methods},
    {Py_tp_traverse, view_traverse},
    {Py_tp_dealloc, view_dealloc},
    {0, NULL},
};

static PyType_Spec view_spec = {
    .name = "shmelim.shm._native.View",
    .basicsize = sizeof(View),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = view_slots,
};

static void
raise_corrupt(PyObject *op, const View *view, const char *what)
{
    State *state = state_of(op);
    if (state != NULL) {
        PyErr_Format(state->corrupt, "segment %U %s", view->label, what);
    }
}

#define NO_END "has no empty slot: a lookup cannot end"

/* Say what is wrong with the record of a slot. */
static void
raise_misplaced(PyObject *op, const View *view, uint64_t packed, const Span *span)
{
    char what[128];
    unsigned long long offset = packed >> 16;
    if (offset + ENTRY_HEADER > view->map.arena_size) {
        PyOS_snprintf(what, sizeof what, "has a record at %llu, outside its arena", offset);
    }
    else {
        PyOS_snprintf(what, sizeof what, "has a record of %lu bytes at %llu that does not fit",
                      (unsigned long)span->size, offset);
    }
    raise_corrupt(op, view, what);
}

/* ------------------------------------------------------------------ Table */

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
 * into Python, or releases the GIL, takes hold_view instead. */
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
    View *view = begin(table, version);
    Py_XINCREF(view);
    release_view(view);
    return view;
}

/* Find the packed word of a key, 0 if it is absent. The lookup: everything else is variations of it. */
static inline int
look_up(Table *table, const unsigned char *key, size_t size, uint64_t *packed)
{
    for (;;) {
        uint64_t version;
        View *view = begin(table, &version);
        if (UNLIKELY(view == NULL)) {
            return -1;
        }
        uint64_t hash = xxh64(key, size, view->map.seed);
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
        Found found = probe(&view->map, which, key, size, xxh64(key, size, view->map.seed), &packed);
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

/* ------------------------------------------------------------------ many keys */

typedef struct {
    const unsigned char *data;
    size_t size;
    uint64_t hash;
} Key;

typedef struct {
    Key *keys;
    Py_ssize_t count;
    Key on_stack[STACK_KEYS];
    PyObject *owner; /* the tuple whose items the keys point into */
    Py_buffer buffer; /* or the array */
} Keys;

/* How one item of a list becomes a key: 1, or 0 for one that is in no table, or -1 with an exception. */
typedef int (*Convert)(PyObject *op, PyObject *item, const unsigned char **data, size_t *size);

static int
keys_reserve(Keys *keys, Py_ssize_t count)
{
    keys->count = count;
    keys->keys = count <= STACK_KEYS ? keys->on_stack : PyMem_New(Key, (size_t)count);
    if (keys->keys == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static void
keys_release(Keys *keys)
{
    if (keys->keys != keys->on_stack) {
        PyMem_Free(keys->keys);
    }
    Py_XDECREF(keys->owner);
    if (keys->buffer.obj != NULL) {
        PyBuffer_Release(&keys->buffer);
    }
}

/* Keys of an array of fixed-size byte strings, as numpy has them: padded with zero bytes that do not count. */
static int
keys_of_array(Keys *keys, PyObject *array)
{
    if (PyObject_GetBuffer(array, &keys->buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) {
        return -1;
    }
    const char *format = keys->buffer.format;
    size_t width = (size_t)keys->buffer.itemsize;
    if (format == NULL || format[strlen(format) - 1] != 's' || keys->buffer.ndim != 1) {
        PyErr_SetString(PyExc_TypeError, "an array of keys must be one-dimensional, of byte strings");
        return -1;
    }
    if (keys_reserve(keys, keys->buffer.shape[0]) < 0) {
        return -1;
    }
    const unsigned char *row = keys->buffer.buf;
    for (Py_ssize_t n = 0; n < keys->count; n++, row += width) {
        size_t size = width;
        while (size > 0 && row[size - 1] == 0) {
            size--;
        }
        keys->keys[n] = (Key){row, size, 0};
    }
    return 0;
}

/* Keys of a list, whose items are kept alive by a tuple: attaching runs Python code, which may change the list. */
static int
keys_of_list(Keys *keys, PyObject *op, PyObject *list, Convert convert)
{
    keys->owner = PySequence_Tuple(list);
    if (keys->owner == NULL || keys_reserve(keys, PyTuple_GET_SIZE(keys->owner)) < 0) {
        return -1;
    }
    for (Py_ssize_t n = 0; n < keys->count; n++) {
        Key *key = &keys->keys[n];
        int converted = convert(op, PyTuple_GET_ITEM(keys->owner, n), &key->data, &key->size);
        if (converted < 0) {
            return -1;
        }
        if (converted == 0) {
            /* No key is as long as that. */
            key->data = (const unsigned char *)"";
            key->size = 0;
        }
    }
    return 0;
}

/* Look up all keys in one version and write an answer for each. CONTRADICTION is one only if the version stands. */
static Found
answer_all(const Map *map, uint64_t version, const Keys *keys, unsigned mask, uint8_t *answers)
{
    for (Py_ssize_t n = 0; n < keys->count; n++) {
        if (n + PREFETCH_AHEAD < keys->count) {
            prefetch(map, version & 1, keys->keys[n + PREFETCH_AHEAD].hash);
        }
        const Key *key = &keys->keys[n];
        uint64_t packed;
        if (probe(map, version & 1, key->data, key->size, key->hash, &packed) == CONTRADICTION) {
            return CONTRADICTION;
        }
        answers[n] = mask == 0 ? (uint8_t)packed : (packed & mask) == mask;
    }
    return FOUND;
}

/* Answer for all keys, as of one version. 1 when done, 0 when publishes overtook it every time, -1 on an error. */
static int
fill(Table *table, Keys *keys, unsigned mask, uint8_t *answers)
{
    uint64_t seed = 0;
    bool hashed = false;
    for (int attempt = 0; attempt < ATTEMPTS;) {
        uint64_t version;
        View *view = hold(table, &version);
        if (view == NULL) {
            return -1;
        }
        if (!hashed || seed != view->map.seed) {
            /* Before the version is looked at, so that the part that can be overtaken stays short. */
            seed = view->map.seed;
            hashed = true;
            for (Py_ssize_t n = 0; n < keys->count; n++) {
                keys->keys[n].hash = xxh64(keys->keys[n].data, keys->keys[n].size, seed);
            }
            Py_DECREF(view);
            continue;
        }
        Found found = answer_all(&view->map, version, keys, mask, answers);
        bool whole = read_ends(&view->map, version);
        if (whole && found == CONTRADICTION) {
            raise_corrupt((PyObject *)table, view, NO_END);
        }
        Py_DECREF(view);
        if (whole) {
            return found == CONTRADICTION ? -1 : 1;
        }
        count_retry(table);
        attempt++;
    }
    return 0;
}

/* What Table._fill and Lookups._fill have in common: keys from a list or an array, answers into a buffer. */
static PyObject *
fill_buffer(Table *table, PyObject *op, PyObject *args, Convert convert)
{
    PyObject *source, *target;
    unsigned char mask;
    Py_buffer answers;
    if (!PyArg_ParseTuple(args, "OOb:_fill", &source, &target, &mask)
        || PyObject_GetBuffer(target, &answers, PyBUF_CONTIG) < 0) {
        return NULL;
    }
    Keys keys;
    keys.keys = keys.on_stack;
    keys.owner = NULL;
    keys.buffer.obj = NULL;
    bool listed = PyList_Check(source) || PyTuple_Check(source);
    int done = listed ? keys_of_list(&keys, op, source, convert) : keys_of_array(&keys, source);
    if (done == 0 && answers.len != keys.count) {
        PyErr_Format(PyExc_ValueError, "%zd bytes cannot take %zd answers", answers.len, keys.count);
        done = -1;
    }
    if (done == 0) {
        done = fill(table, &keys, mask, answers.buf);
    }
    keys_release(&keys);
    PyBuffer_Release(&answers);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static int
convert_bytes(PyObject *Py_UNUSED(op), PyObject *item, const unsigned char **data, size_t *size)
{
    return bytes_key(item, data, size) < 0 ? -1 : 1;
}

PyDoc_STRVAR(table_fill_doc,
"_fill($self, keys, answers, mask, /)\n--\n\n"
"Write an answer for each key into a buffer of bytes: whether it has all flags of ``mask``, or all its\n"
"flags if that is 0. Keys are a list or tuple of bytes, or an array of byte strings. False: publishes\n"
"overtook it every time.");

static PyObject *
table_fill(PyObject *op, PyObject *args)
{
    return fill_buffer((Table *)op, op, args, convert_bytes);
}

/* ------------------------------------------------------------------ all records */

/* In which form entries are collected: their keys, what follows a record's first bytes, both, keys with those first bytes. */
enum { KEYS, VALUES, ITEMS, HEADS };

typedef struct {
    uint64_t ordinal;
    uint64_t start;
    uint32_t size;
    uint8_t key_size;
} Entry;

typedef struct {
    View *view;
    uint64_t version;
    unsigned mask, form;
    uint32_t skip;
    Entry *entries;
    size_t count;
    uint64_t bytes; /* of the result, without its header */
    Found found;
} Collection;

static size_t
text_header(uint8_t size)
{
    return size < 32 ? 1 : 2;
}

static uint64_t
collected_size(const Collection *all, const Entry *entry)
{
    uint64_t key = all->form == VALUES ? 0 : text_header(entry->key_size) + entry->key_size;
    uint64_t value = all->form == KEYS ? 0 : all->form == HEADS ? 2 + all->skip : entry->size - all->skip;
    return key + value;
}

/* Find all entries that have the flags of the mask. CONTRADICTION may come of a publish, or of corruption. */
static Found
gather(Collection *all, uint64_t room)
{
    const Map *map = &all->view->map;
    const Copy *copy = &map->copies[all->version & 1];
    uint64_t live = 0, arena = 0;
    all->count = 0;
    all->bytes = 0;
    for (uint64_t index = 0; index <= map->mask; index++) {
        uint64_t packed = load(copy->slots + index * SLOT_WORDS + PACKED);
        if (packed == 0) {
            continue;
        }
        live++;
        if ((packed & all->mask) != all->mask) {
            continue;
        }
        Span span;
        if (all->count == room || find_record(map, all->version & 1, packed, &span) != FOUND || span.size < all->skip) {
            return CONTRADICTION;
        }
        Entry *entry = &all->entries[all->count++];
        *entry = (Entry){span.ordinal, span.start, span.size, span.key_size};
        all->bytes += collected_size(all, entry);
        arena += ENTRY_HEADER + span.size;
        /* Entries that lie in each other are none; and no more is allocated than the arena could hold. */
        if (arena > map->arena_size || (index % 4096 == 0 && load(map->version) != all->version)) {
            return CONTRADICTION;
        }
    }
    return live == load(copy->header + COUNT) ? FOUND : CONTRADICTION;
}

/* Sort by ordinal: a radix sort of bytes, least significant first, that leaves out those in which none differ. */
static void
sort_entries(Entry **entries, Entry **spare, size_t count)
{
    uint64_t differ = 0;
    bool in_order = true;
    for (size_t n = 1; n < count; n++) {
        differ |= (*entries)[n].ordinal ^ (*entries)[0].ordinal;
        in_order = in_order && (*entries)[n - 1].ordinal <= (*entries)[n].ordinal;
    }
    for (unsigned shift = 0; !in_order && shift < 64 && differ >> shift != 0; shift += 8) {
        size_t starts[256] = {0}, at = 0;
        if ((differ >> shift & 0xFF) == 0) {
            continue;
        }
        for (size_t n = 0; n < count; n++) {
            starts[(*entries)[n].ordinal >> shift & 0xFF]++;
        }
        for (unsigned byte = 0; byte < 256; byte++) {
            size_t size = starts[byte];
            starts[byte] = at;
            at += size;
        }
        for (size_t n = 0; n < count; n++) {
            (*spare)[starts[(*entries)[n].ordinal >> shift & 0xFF]++] = (*entries)[n];
        }
        Entry *sorted = *spare;
        *spare = *entries;
        *entries = sorted;
    }
}

static size_t
put_header(unsigned char *to, bool map, size_t count)
{
    to[0] = map ? 0xDF : 0xDD;
    for (unsigned n = 0; n < 4; n++) {
        to[1 + n] = (unsigned char)(count >> (24 - 8 * n));
    }
    return 5;
}

static unsigned char *
put_key(unsigned char *to, const unsigned char *key, uint8_t size)
{
    if (size < 32) {
        *to++ = (unsigned char)(0xA0 | size);
    }
    else {
        *to++ = 0xD9;
        *to++ = size;
    }
    memcpy(to, key, size);
    return to + size;
}

/* Write the result: one msgpack array, or map, of what was gathered. Every place was checked by gather. */
static void
put_all(const Collection *all, unsigned char *to)
{
    const unsigned char *arena = all->view->map.copies[all->version & 1].arena;
    to += put_header(to, all->form == ITEMS || all->form == HEADS, all->count);
    for (size_t n = 0; n < all->count; n++) {
        const Entry *entry = &all->entries[n];
        const unsigned char *record = arena + entry->start;
        if (n + PREFETCH_AHEAD < all->count) {
            __builtin_prefetch(arena + all->entries[n + PREFETCH_AHEAD].start);
        }
        if (all->form != VALUES) {
            to = put_key(to, record - entry->key_size, entry->key_size);
        }
        if (all->form == VALUES || all->form == ITEMS) {
            memcpy(to, record + all->skip, entry->size - all->skip);
            to += entry->size - all->skip;
        }
        else if (all->form == HEADS) {
            *to++ = 0xC4;
            *to++ = (unsigned char)all->skip;
            memcpy(to, record, all->skip);
            to += all->skip;
        }
    }
}

/* Gather and sort. 1 when done, 0 when a publish overtook it, -1 on an error. */
static int
collect_entries(Table *table, Collection *all)
{
    const Map *map = &all->view->map;
    uint64_t room = load(map->copies[all->version & 1].header + COUNT);
    room = room > map->mask ? map->mask + 1 : room;
    Entry *entries = PyMem_RawMalloc((size_t)(room ? room : 1) * sizeof(Entry));
    Entry *spare = PyMem_RawMalloc((size_t)(room ? room : 1) * sizeof(Entry));
    all->entries = entries;
    if (entries == NULL || spare == NULL) {
        PyMem_RawFree(entries);
        PyMem_RawFree(spare);
        all->entries = NULL;
        PyErr_NoMemory();
        return -1;
    }
    bool whole;
    PyThreadState *thread = map->mask < LARGE ? NULL : PyEval_SaveThread();
    all->found = gather(all, room);
    whole = read_ends(map, all->version);
    if (whole && all->found == FOUND) {
        sort_entries(&entries, &spare, all->count);
    }
    if (thread != NULL) {
        PyEval_RestoreThread(thread);
    }
    all->entries = entries;
    PyMem_RawFree(spare);
    if (whole && all->found == CONTRADICTION) {
        raise_corrupt((PyObject *)table, all->view, "has entries that contradict each other");
        return -1;
    }
    return whole;
}

/* One attempt: the result, Py_None when a publish overtook it, NULL with an exception. */
static PyObject *
collect_once(Table *table, Collection *all)
{
    PyObject *result = NULL;
    int gathered = collect_entries(table, all);
    if (gathered > 0) {
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(all->bytes + 5));
    }
    if (result != NULL) {
        unsigned char *to = (unsigned char *)PyBytes_AS_STRING(result);
        PyThreadState *thread = all->bytes < LARGE * SLOT_SIZE ? NULL : PyEval_SaveThread();
        put_all(all, to);
        gathered = read_ends(&all->view->map, all->version);
        if (thread != NULL) {
            PyEval_RestoreThread(thread);
        }
    }
    PyMem_RawFree(all->entries);
    if (gathered == 0) {
        Py_XDECREF(result);
        return Py_NewRef(Py_None);
    }
    return result;
}

PyDoc_STRVAR(table_collect_doc,
"_collect($self, mask, form, skip, /)\n--\n\n"
"Return version and msgpack of all entries that have the flags of ``mask``, in the order of their ordinals.\n\n"
"``form`` 0: an array of keys, 1: an array of what follows the first ``skip`` bytes of each record, 2: a map\n"
"of both, 3: a map of keys to those first bytes. None: publishes overtook it every time.");

static PyObject *
table_collect(PyObject *op, PyObject *args)
{
    Table *self = (Table *)op;
    unsigned char mask, form, skip;
    if (!PyArg_ParseTuple(args, "bbb:_collect", &mask, &form, &skip)) {
        return NULL;
    }
    if (form > HEADS) {
        return PyErr_Format(PyExc_ValueError, "form %d must be 0 to %d", form, HEADS);
    }
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        Collection all = {.mask = mask, .form = form, .skip = skip};
        all.view = hold(self, &all.version);
        if (all.view == NULL) {
            return NULL;
        }
        PyObject *result = collect_once(self, &all);
        Py_DECREF(all.view);
        if (result != Py_None) {
            return result == NULL ? NULL : Py_BuildValue("KN", (unsigned long long)all.version, result);
        }
        Py_DECREF(result);
        count_retry(self);
    }
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------ Table, the type */

static PyObject *
table_get_view(PyObject *op, void *Py_UNUSED(closure))
{
    Table *self = (Table *)op;
    PyObject *view;
    Py_BEGIN_CRITICAL_SECTION(op);
    view = Py_XNewRef((PyObject *)self->view);
    Py_END_CRITICAL_SECTION();
    if (view == NULL) {
        PyErr_SetString(PyExc_AttributeError, "_view");
    }
    return view;
}

static int
table_set_view(PyObject *op, PyObject *value, void *Py_UNUSED(closure))
{
    Table *self = (Table *)op;
    State *state = state_of(op);
    if (state == NULL) {
        return -1;
    }
    if (value == NULL || !PyObject_TypeCheck(value, state->view_type) || ((View *)value)->label == NULL) {
        PyErr_SetString(PyExc_TypeError, "a table's view must be a mapped View");
        return -1;
    }
    View *old;
    Py_BEGIN_CRITICAL_SECTION(op);
    old = self->view;
    self->view = (View *)Py_NewRef(value);
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(old);
    return 0;
}

static PyObject *
table_get_retries(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(atomic_load_explicit(&((Table *)op)->retries, memory_order_relaxed));
}

static int
table_set_retries(PyObject *op, PyObject *value, void *Py_UNUSED(closure))
{
    unsigned long long count = value == NULL ? 0 : PyLong_AsUnsignedLongLong(value);
    if (count == ULLONG_MAX && PyErr_Occurred()) {
        return -1;
    }
    atomic_store_explicit(&((Table *)op)->retries, count, memory_order_relaxed);
    return 0;
}

static int
table_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((Table *)op)->view);
    return 0;
}

static int
table_clear(PyObject *op)
{
    Py_CLEAR(((Table *)op)->view);
    return 0;
}

static void
table_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    table_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMethodDef table_methods[] = {
    {"flags", table_flags, METH_O, table_flags_doc},
    {"read", table_read, METH_VARARGS, table_read_doc},
    {"_entry", table_entry, METH_O, table_entry_doc},
    {"_counter", table_counter, METH_O, table_count_doc},
    {"_fill", table_fill, METH_VARARGS, table_fill_doc},
    {"_collect", table_collect, METH_VARARGS, table_collect_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef table_getset[] = {
    {"_view", table_get_view, table_set_view, "The view that is current.", NULL},
    {"retries", table_get_retries, table_set_retries,
     "How often a read started over because a publish overtook it.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot table_slots[] = {
    {Py_tp_doc, "Lookups by bytes in the current view; a subclass provides _attach()."},
    {Py_tp_methods, table_methods},
    {Py_tp_getset, table_getset},
    {Py_tp_traverse, table_traverse},
    {Py_tp_clear, table_clear},
    {Py_tp_dealloc, table_dealloc},
    {0, NULL},
};

static PyType_Spec table_spec = {
    .name = "shmelim.shm._native.Table",
    .basicsize = sizeof(Table),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = table_slots,
};

/* ------------------------------------------------------------------ Lookups */

typedef struct {
    PyObject_HEAD
    Table *table; /* set once, so that it can be used without a reference */
    uint8_t masks[TESTS];
    uint8_t skip;
    PyObject *choices; /* a tuple, by flags */
    PyObject *argument; /* the name that callers give a key */
} Lookups;

static int
no_table(PyObject *Py_UNUSED(op))
{
    PyErr_SetString(PyExc_RuntimeError, "this object has no table yet");
    return -1;
}

/* Have the subclass say in its own words what is wrong with a key that is no text. */
static int
refuse(PyObject *op, PyObject *key)
{
    PyObject *result = PyObject_CallMethod(op, "_refuse", "O", key);
    if (result != NULL) {
        Py_DECREF(result);
        PyErr_Format(PyExc_TypeError, "key must be text, not %.200s", Py_TYPE(key)->tp_name);
    }
    return -1;
}

/* Any text that is not plain ASCII. */
static int
text_key_slow(PyObject *op, PyObject *key, const unsigned char **data, size_t *size)
{
    if (!PyUnicode_Check(key)) {
        return refuse(op, key);
    }
    Py_ssize_t length;
    *data = (const unsigned char *)PyUnicode_AsUTF8AndSize(key, &length);
    if (*data == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) {
            return -1;
        }
        PyErr_Clear();
        return 0;
    }
    *size = (size_t)length;
    return 1;
}

/* The UTF-8 of a text: 1, or 0 where it has none (lone surrogates), or -1 with an exception. */
static inline int
text_key(PyObject *op, PyObject *key, const unsigned char **data, size_t *size)
{
    if (LIKELY(PyUnicode_Check(key) && PyUnicode_IS_COMPACT_ASCII(key))) {
        *data = PyUnicode_1BYTE_DATA(key);
        *size = (size_t)PyUnicode_GET_LENGTH(key);
        return 1;
    }
    return text_key_slow(op, key, data, size);
}

/* Find the flags of a text; 0 where it is no key of this table. */
static inline int
text_flags(PyObject *op, PyObject *key, uint64_t *packed)
{
    const unsigned char *data;
    size_t size;
    Table *table = ((Lookups *)op)->table;
    if (UNLIKELY(table == NULL)) {
        return no_table(op);
    }
    int converted = text_key(op, key, &data, &size);
    if (LIKELY(converted > 0)) {
        return look_up(table, data, size, packed);
    }
    *packed = 0;
    return converted;
}

/* The one argument of a call, however it was given; a borrowed reference. */
static PyObject *
only_argument(PyObject *op, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    PyObject *argument = ((Lookups *)op)->argument;
    if (count == 0 && names != NULL && PyTuple_GET_SIZE(names) == 1 && argument != NULL) {
        int same = PyObject_RichCompareBool(PyTuple_GET_ITEM(names, 0), argument, Py_EQ);
        if (same != 0) {
            return same < 0 ? NULL : args[0];
        }
    }
    PyErr_Format(PyExc_TypeError, "%.200s expected exactly one argument, %S", Py_TYPE(op)->tp_name,
                 argument == NULL ? Py_None : argument);
    return NULL;
}

/* The methods that bind() hands out. What sets them apart is a constant, so that each is one function to its caller. */

__attribute__((always_inline)) static inline PyObject *
test_flags(PyObject *op, PyObject *const *args, Py_ssize_t count, PyObject *names, unsigned which)
{
    uint64_t packed;
    PyObject *key = LIKELY(count == 1 && names == NULL) ? args[0] : only_argument(op, args, count, names);
    if (key == NULL || text_flags(op, key, &packed) < 0) {
        return NULL;
    }
    uint8_t mask = ((Lookups *)op)->masks[which];
    return Py_NewRef((packed & mask) == mask ? Py_True : Py_False);
}

#define TEST(which)                                                                                                \
    static PyObject *test_##which(PyObject *op, PyObject *const *args, Py_ssize_t count, PyObject *names)          \
    {                                                                                                              \
        return test_flags(op, args, count, names, which);                                                          \
    }

TEST(0)
TEST(1)
TEST(2)
TEST(3)

static PyObject *
choose(PyObject *op, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    uint64_t packed;
    PyObject *choices = ((Lookups *)op)->choices;
    PyObject *key = LIKELY(count == 1 && names == NULL) ? args[0] : only_argument(op, args, count, names);
    if (key == NULL || text_flags(op, key, &packed) < 0) {
        return NULL;
    }
    if (choices == NULL) {
        return PyLong_FromLong((long)(packed & 0xFF));
    }
    return Py_NewRef(PyTuple_GET_ITEM(choices, (Py_ssize_t)(packed & 0xFF)));
}

static int
lookups_contains(PyObject *op, PyObject *key)
{
    uint64_t packed;
    if (!PyUnicode_Check(key)) {
        return 0;
    }
    if (text_flags(op, key, &packed) < 0) {
        return -1;
    }
    uint8_t mask = ((Lookups *)op)->masks[0];
    return (packed & mask) == mask;
}

PyDoc_STRVAR(lookups_flags_doc, "_flags($self, key, /)\n--\n\nReturn the flags of a text, 0 if it is absent.");

static PyObject *
lookups_flags(PyObject *op, PyObject *key)
{
    uint64_t packed;
    return text_flags(op, key, &packed) < 0 ? NULL : PyLong_FromLong((long)(packed & 0xFF));
}

PyDoc_STRVAR(lookups_record_doc,
"_record($self, key, /)\n--\n\n"
"Return a copy of what follows the first bytes of a text's record; None if there is nothing.");

static PyObject *
lookups_record(PyObject *op, PyObject *key)
{
    Lookups *self = (Lookups *)op;
    const unsigned char *data;
    size_t size;
    uint32_t skip = self->skip;
    int converted = self->table == NULL ? no_table(op) : text_key(op, key, &data, &size);
    if (converted <= 0) {
        return converted < 0 ? NULL : Py_NewRef(Py_None);
    }
    return with_record(self->table, data, size, copy_record, &skip);
}

PyDoc_STRVAR(lookups_read_doc,
"_read($self, key, decode, /)\n--\n\n"
"Run ``decode`` on what follows the first bytes of a text's record; None if there is nothing.");

static PyObject *
lookups_read(PyObject *op, PyObject *args)
{
    Lookups *self = (Lookups *)op;
    PyObject *key;
    Decoding decoding = {NULL, self->skip};
    const unsigned char *data;
    size_t size;
    if (!PyArg_ParseTuple(args, "OO:_read", &key, &decoding.decode)) {
        return NULL;
    }
    int converted = self->table == NULL ? no_table(op) : text_key(op, key, &data, &size);
    if (converted <= 0) {
        return converted < 0 ? NULL : Py_NewRef(Py_None);
    }
    return with_record(self->table, data, size, decode_in_place, &decoding);
}

PyDoc_STRVAR(lookups_fill_doc,
"_fill($self, keys, answers, mask, /)\n--\n\nAs ``Table._fill``, with texts in lists and tuples.");

static PyObject *
lookups_fill(PyObject *op, PyObject *args)
{
    Table *table = ((Lookups *)op)->table;
    if (table == NULL) {
        no_table(op);
        return NULL;
    }
    return fill_buffer(table, op, args, text_key);
}

static PyObject *
lookups_get_table(PyObject *op, void *Py_UNUSED(closure))
{
    PyObject *table = Py_XNewRef((PyObject *)((Lookups *)op)->table);
    if (table == NULL) {
        PyErr_SetString(PyExc_AttributeError, "_table");
    }
    return table;
}

static int
lookups_set_table(PyObject *op, PyObject *value, void *Py_UNUSED(closure))
{
    Lookups *self = (Lookups *)op;
    State *state = state_of(op);
    if (state == NULL) {
        return -1;
    }
    if (value == NULL || self->table != NULL || !PyObject_TypeCheck(value, state->table_type)) {
        PyErr_SetString(PyExc_TypeError, "_table is a Table, and set once");
        return -1;
    }
    self->table = (Table *)Py_NewRef(value);
    return 0;
}

/* Read from the class what its methods test for: (masks, choices or None, name of the argument, skip). */
static int
lookups_prepare(Lookups *self, PyTypeObject *type)
{
    PyObject *settings = PyObject_GetAttrString((PyObject *)type, "_settings");
    PyObject *masks, *choices, *argument;
    if (settings == NULL) {
        return -1;
    }
    int done = -1;
    if (!PyTuple_Check(settings)) {
        PyErr_SetString(PyExc_TypeError, "_settings must be a tuple");
    }
    else if (PyArg_ParseTuple(settings, "O!OUb", &PyTuple_Type, &masks, &choices, &argument, &self->skip)
             && PyArg_ParseTuple(masks, "bbbb", &self->masks[0], &self->masks[1], &self->masks[2], &self->masks[3])) {
        if (choices != Py_None && !(PyTuple_Check(choices) && PyTuple_GET_SIZE(choices) == FLAGS)) {
            PyErr_Format(PyExc_TypeError, "choices must be a tuple of %d", FLAGS);
        }
        else {
            self->choices = choices == Py_None ? NULL : Py_NewRef(choices);
            self->argument = Py_NewRef(argument);
            done = 0;
        }
    }
    Py_DECREF(settings);
    return done;
}

static PyObject *
lookups_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    PyObject *op = type->tp_alloc(type, 0);
    if (op != NULL && lookups_prepare((Lookups *)op, type) < 0) {
        Py_CLEAR(op);
    }
    return op;
}

static int
lookups_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((Lookups *)op)->table);
    Py_VISIT(((Lookups *)op)->choices);
    return 0;
}

/* No tp_clear: a table and a tuple of flags lead back to no lookups, and the table must stay as long as the object. */
static void
lookups_dealloc(PyObject *op)
{
    Lookups *self = (Lookups *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    Py_CLEAR(self->table);
    Py_CLEAR(self->choices);
    Py_CLEAR(self->argument);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMethodDef lookups_methods[] = {
    {"_flags", lookups_flags, METH_O, lookups_flags_doc},
    {"_record", lookups_record, METH_O, lookups_record_doc},
    {"_read", lookups_read, METH_VARARGS, lookups_read_doc},
    {"_fill", lookups_fill, METH_VARARGS, lookups_fill_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef lookups_getset[] = {
    {"_table", lookups_get_table, lookups_set_table, "The table that is looked up in.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot lookups_slots[] = {
    {Py_tp_doc, "Lookups by text in a table."},
    {Py_tp_methods, lookups_methods},
    {Py_tp_getset, lookups_getset},
    {Py_tp_new, lookups_new},
    {Py_tp_traverse, lookups_traverse},
    {Py_tp_dealloc, lookups_dealloc},
    {Py_sq_contains, lookups_contains},
    {0, NULL},
};

static PyType_Spec lookups_spec = {
    .name = "shmelim.shm._native.Lookups",
    .basicsize = sizeof(Lookups),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = lookups_slots,
};

/* ------------------------------------------------------------------ ReleaseWord */

typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    Word *word;
} ReleaseWord;

static PyObject *
release_word_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *memory;
    Py_ssize_t index;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "ReleaseWord takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "On:ReleaseWord", &memory, &index)) {
        return NULL;
    }
    ReleaseWord *self = (ReleaseWord *)type->tp_alloc(type, 0);
    if (self == NULL || PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE) < 0) {
        Py_XDECREF(self);
        return NULL;
    }
    if (index < 0 || index >= self->memory.len / WORD || (uintptr_t)self->memory.buf % WORD != 0) {
        PyErr_SetString(PyExc_ValueError, "the word is not in the memory, or not aligned");
        Py_DECREF(self);
        return NULL;
    }
    self->word = (Word *)self->memory.buf + index;
    return (PyObject *)self;
}

/* An assignment to an item, whichever: a statement in which no signal handler runs, other than a call. */
static int
release_word_store(PyObject *op, PyObject *Py_UNUSED(index), PyObject *value)
{
    unsigned long long word = value == NULL ? ULLONG_MAX : PyLong_AsUnsignedLongLong(value);
    if (word == ULLONG_MAX && (value == NULL || PyErr_Occurred())) {
        if (value == NULL) {
            PyErr_SetString(PyExc_TypeError, "a word cannot be deleted");
        }
        return -1;
    }
    /* The release store keeps all that was written before from being seen after it. The fence keeps all that is
     * written later from being seen before it, which a release store alone does not. */
    atomic_store_explicit(((ReleaseWord *)op)->word, word, memory_order_release);
    atomic_thread_fence(memory_order_release);
    return 0;
}

static PyObject *
release_word_load(PyObject *op, PyObject *Py_UNUSED(index))
{
    return PyLong_FromUnsignedLongLong(load(((ReleaseWord *)op)->word));
}

static void
release_word_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyBuffer_Release(&((ReleaseWord *)op)->memory);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot release_word_slots[] = {
    {Py_tp_doc, "ReleaseWord(memory, index)\n--\n\n"
                "A word of memory; assigning to its item 0 is a release store with a release fence behind it."},
    {Py_tp_new, release_word_new},
    {Py_tp_dealloc, release_word_dealloc},
    {Py_mp_subscript, release_word_load},
    {Py_mp_ass_subscript, release_word_store},
    {0, NULL},
};

static PyType_Spec release_word_spec = {
    .name = "shmelim.shm._native.ReleaseWord",
    .basicsize = sizeof(ReleaseWord),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = release_word_slots,
};

/* ------------------------------------------------------------------ the module */

PyDoc_STRVAR(bind_doc,
"bind(cls, name, doc, which, /)\n--\n\n"
"Put a method of one text argument into a subclass of Lookups.\n\n"
"``which`` 0 to 3: whether its flags have all of the mask of that number; 4: the choice that its flags select.");

static PyObject *
bind(PyObject *module, PyObject *args)
{
    static const _PyCFunctionFastWithKeywords functions[] = {test_0, test_1, test_2, test_3, choose};
    PyTypeObject *type;
    const char *name, *doc;
    Py_ssize_t name_size, doc_size;
    unsigned char which;
    State *state = PyModule_GetState(module);
    if (!PyArg_ParseTuple(args, "O!s#s#b:bind", &PyType_Type, &type, &name, &name_size, &doc, &doc_size, &which)) {
        return NULL;
    }
    if (!PyType_IsSubtype(type, state->lookups_type) || which > TESTS) {
        PyErr_SetString(PyExc_TypeError, "bind needs a subclass of Lookups, and a number from 0 to 4");
        return NULL;
    }
    /* A definition must outlive every descriptor and every bound method made from it, and nothing tells when the last of
     * them is gone (not even the class, while the garbage collector takes a cycle apart). So it is never freed: a
     * hundred bytes for each method of a class. */
    PyMethodDef *definition = PyMem_RawMalloc(sizeof *definition + (size_t)(name_size + doc_size) + 2);
    if (definition == NULL) {
        return PyErr_NoMemory();
    }
    char *texts = (char *)(definition + 1);
    memcpy(texts, name, (size_t)name_size + 1);
    memcpy(texts + name_size + 1, doc, (size_t)doc_size + 1);
    *definition = (PyMethodDef){texts, (PyCFunction)(void (*)(void))functions[which], METH_FASTCALL | METH_KEYWORDS,
                                texts + name_size + 1};
    /* Of this very type, and not of Lookups: the interpreter specialises only calls whose object is exactly of the type
     * that the descriptor belongs to. */
    PyObject *method = PyDescr_NewMethod(type, definition);
    int done = method == NULL ? -1 : PyObject_SetAttrString((PyObject *)type, name, method);
    Py_XDECREF(method);
    if (done < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(hash_doc, "xxh64(data, seed, /)\n--\n\nReturn the XXH64 of bytes.");

static PyObject *
hash(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer data;
    unsigned long long seed;
    if (!PyArg_ParseTuple(args, "y*K:xxh64", &data, &seed)) {
        return NULL;
    }
    uint64_t digest = xxh64(data.buf, (size_t)data.len, seed);
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLongLong(digest);
}

PyDoc_STRVAR(fence_doc, "fence()\n--\n\nKeep this thread's loads and stores on their sides of this call.");

static PyObject *
fence(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    atomic_thread_fence(memory_order_acq_rel);
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"bind", bind, METH_VARARGS, bind_doc},
    {"xxh64", hash, METH_VARARGS, hash_doc},
    {"fence", fence, METH_NOARGS, fence_doc},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject *
add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type != NULL && PyModule_AddType(module, type) < 0) {
        Py_CLEAR(type);
    }
    return type;
}

static int
module_exec(PyObject *module)
{
    State *state = PyModule_GetState(module);
    PyObject *errors = PyImport_ImportModule("shmelim.errors");
    if (errors == NULL) {
        return -1;
    }
    state->corrupt = PyObject_GetAttrString(errors, "CorruptSegmentError");
    Py_DECREF(errors);
    PyTypeObject *release_word = NULL;
    if (state->corrupt == NULL || (state->view_type = add_type(module, &view_spec)) == NULL
        || (state->table_type = add_type(module, &table_spec)) == NULL
        || (state->lookups_type = add_type(module, &lookups_spec)) == NULL
        || (release_word = add_type(module, &release_word_spec)) == NULL) {
        return -1;
    }
    Py_DECREF(release_word);
    return PyModule_AddIntConstant(module, "INTERFACE", INTERFACE);
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->corrupt);
    Py_VISIT(state->view_type);
    Py_VISIT(state->table_type);
    Py_VISIT(state->lookups_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->corrupt);
    Py_CLEAR(state->view_type);
    Py_CLEAR(state->table_type);
    Py_CLEAR(state->lookups_type);
    return 0;
}

static void
module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef native_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmelim.shm._native",
    .m_doc = "The compiled read path of the shared table.",
    .m_size = sizeof(State),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__native(void)
{
    return PyModuleDef_Init(&native_module);
}
