/* The compiled paths: lookups in the shared table, straight from the caller's call to shared memory, and the loops over
 * entries of its writer.
 *
 * What: five types, none of which knows what the table is used for.
 *
 *     Memory       a file of shared memory, mapped for reading
 *     View         an attached data segment: two buffers and the numbers that were checked against them; immutable
 *     Table        lookups by bytes; holds the view that is current, and calls _attach() when the generation moved
 *                  and _look_at_name() when the writer seems dead
 *     Lookups      lookups by text in a Table; the base of whoever gives flags and records a meaning
 *     Image        a copy of the table as its writer changes it; has nothing to do with the others
 *     ReleaseWord  one word that a writer stores with release semantics, and for which others wait
 *
 * And two functions for who makes records of Python's values; see plain.h.
 *
 * How: every lookup is the loop of memory-format.md: load the version (acquire), look into the copy that it names,
 * fence, load it again; if it moved, start over. probe.h has that and the layout, xxh3.h and xxh64.h the hash. Attaching, which
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

#include "batch.h"
#include "collect.h"
#include "image.h"
#include "lookups.h"
#include "memory.h"
#include "plain.h"
#include "waiting.h"

#include <limits.h>
#include <structmember.h>

#define INTERFACE 7

/* ------------------------------------------------------------------ Table */

static PyObject *
table_get_view(PyObject *op, void *Py_UNUSED(closure))
{
    Table *self = (Table *)op;
    PyObject *view;
    Py_BEGIN_CRITICAL_SECTION(op);
    view = Py_XNewRef((PyObject *)self->view);
    Py_END_CRITICAL_SECTION();
    if (view == NULL) {
        no_view(op);
    }
    return view;
}

/* Deleting it closes the table. */
static int
table_set_view(PyObject *op, PyObject *value, void *Py_UNUSED(closure))
{
    Table *self = (Table *)op;
    if (value != NULL
        && (!PyObject_TypeCheck(value, state_of(op)->view_type) || ((View *)value)->label == NULL)) {
        PyErr_SetString(PyExc_TypeError, "a table's view must be a mapped View");
        return -1;
    }
    View *old;
    Py_BEGIN_CRITICAL_SECTION(op);
    old = self->view;
    self->view = (View *)Py_XNewRef(value);
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(old);
    return 0;
}

static PyObject *
table_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(names))
{
    Table *self = (Table *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->counts = self->own;
    }
    return (PyObject *)self;
}

/* Count in a page from now on, or, with None, in memory of the table's own: (page, or None; first word). What was counted in
 * such memory before goes to the page; what was counted in a page stays there. */
static PyObject *
table_count_in(PyObject *op, PyObject *args)
{
    Table *self = (Table *)op;
    PyObject *page;
    Py_ssize_t first;
    Py_buffer buffer = {0};
    if (!PyArg_ParseTuple(args, "On:_count_in", &page, &first)) {
        return NULL;
    }
    if (page != Py_None) {
        if (PyObject_GetBuffer(page, &buffer, PyBUF_WRITABLE) < 0) {
            return NULL;
        }
        if (first < 0 || first > buffer.len / WORD - COUNTS || (uintptr_t)buffer.buf % WORD != 0) {
            PyBuffer_Release(&buffer);
            PyErr_SetString(PyExc_ValueError, "the counts are not in the memory, or not aligned");
            return NULL;
        }
    }
    Py_buffer former = self->page;
    uint64_t *words = page == Py_None ? self->own : (uint64_t *)buffer.buf + first;
    for (unsigned which = 0; which < COUNTS; which++) {
        if (page != Py_None && self->counts == self->own) {
            words[which] += self->own[which];
        }
    }
    memset(self->own, 0, sizeof self->own);
    self->counts = words;
    self->page = buffer;
    /* The next read looks whether there is a page to be had. */
    atomic_store_explicit(&self->second, 0, memory_order_relaxed);
    atomic_store_explicit(&self->patience, 0, memory_order_relaxed);
    PyBuffer_Release(&former);
    Py_RETURN_NONE;
}

/* Count what the class does itself: (number of the count). */
static PyObject *
table_tally(PyObject *op, PyObject *number)
{
    unsigned long which = PyLong_AsUnsignedLong(number);
    if (which >= COUNTS) {
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "count %lu must be 0 to %d", which, COUNTS - 1);
    }
    tally((Table *)op, (unsigned)which);
    Py_RETURN_NONE;
}

static void
table_dealloc(PyObject *op)
{
    PyBuffer_Release(&((Table *)op)->page);
    Py_XDECREF(((Table *)op)->view);
    free_object(op);
}

static PyMethodDef table_methods[] = {
    {"flags", table_flags, METH_O, table_flags_doc},
    {"read", table_read, METH_VARARGS, table_read_doc},
    {"_entry", table_entry, METH_O, NULL},
    {"_fill", (PyCFunction)(void (*)(void))table_fill, METH_FASTCALL, NULL},
    {"_collect", table_collect, METH_VARARGS, NULL},
    {"_count_in", table_count_in, METH_VARARGS, NULL},
    {"_tally", table_tally, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef table_getset[] = {
    {"_view", table_get_view, table_set_view, "The view that is current.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef table_members[] = {
    {"retries", T_ULONGLONG, offsetof(Table, retries), 0,
     "How often a read started over because a publish overtook it."},
    {"_guarded", T_BOOL, offsetof(Table, guarded), 0, "Whether _watch() is asked before each read."},
    {"_seeks_page", T_BOOL, offsetof(Table, seeks_page), 0, "Whether _find_page() is asked, at most once a second."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot table_slots[] = {
    {Py_tp_doc, "Lookups by bytes in the current view; a subclass provides _attach()."},
    {Py_tp_methods, table_methods},
    {Py_tp_getset, table_getset},
    {Py_tp_members, table_members},
    {Py_tp_new, table_new},
    {Py_tp_dealloc, table_dealloc},
    {0, NULL},
};

static PyType_Spec table_spec = {
    .name = "shmelim.shm._native.Table",
    .basicsize = sizeof(Table),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = table_slots,
};

/* ------------------------------------------------------------------ ReleaseWord */

typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    Word *word;
} ReleaseWord;

static PyObject *
release_word_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(names))
{
    PyObject *memory;
    Py_ssize_t index;
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
    if (value == NULL) {
        PyErr_SetString(PyExc_TypeError, "a word cannot be deleted");
        return -1;
    }
    unsigned long long word = PyLong_AsUnsignedLongLong(value);
    if (word == ULLONG_MAX && PyErr_Occurred()) {
        return -1;
    }
    /* The release store keeps all that was written before from being seen after it. The fence keeps all that is
     * written later from being seen before it, which a release store alone does not. */
    atomic_store_explicit(((ReleaseWord *)op)->word, word, memory_order_release);
    atomic_thread_fence(memory_order_release);
    wake(((ReleaseWord *)op)->word);
    return 0;
}

static void
release_word_dealloc(PyObject *op)
{
    PyBuffer_Release(&((ReleaseWord *)op)->memory);
    free_object(op);
}

static PyType_Slot release_word_slots[] = {
    {Py_tp_doc, "ReleaseWord(memory, index)\n--\n\n"
                "A word of memory; assigning to its item 0 is a release store with a release fence behind it, and "
                "wakes who waits for it."},
    {Py_tp_new, release_word_new},
    {Py_tp_dealloc, release_word_dealloc},
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

/* Put a method of one text argument into a subclass of Lookups: (cls, name, doc, which). Which 0 to 3: whether its flags
 * have all of the mask of that number; 4: the choice that its flags select; 5: what its record is decoded to. */
static PyObject *
bind(PyObject *module, PyObject *args)
{
    static const _PyCFunctionFastWithKeywords functions[] = {test_0, test_1, test_2, test_3, choose, decoded};
    PyTypeObject *type;
    const char *name, *doc;
    Py_ssize_t name_size, doc_size;
    unsigned char which;
    State *state = PyModule_GetState(module);
    if (!PyArg_ParseTuple(args, "O!s#s#b:bind", &PyType_Type, &type, &name, &name_size, &doc, &doc_size, &which)) {
        return NULL;
    }
    if (!PyType_IsSubtype(type, state->lookups_type) || which > TESTS + 1) {
        PyErr_SetString(PyExc_TypeError, "bind needs a subclass of Lookups, and a number from 0 to 5");
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

/* Return the hash of a key with a seed, as lookups do. */
static PyObject *
hash(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer key;
    unsigned long long seed;
    Map map;
    if (!PyArg_ParseTuple(args, "y*K:key_hash", &key, &seed)) {
        return NULL;
    }
    set_seed(&map, seed);
    uint64_t digest = hash_key(&map, key.buf, (size_t)key.len);
    PyBuffer_Release(&key);
    return PyLong_FromUnsignedLongLong(digest);
}

static PyObject *
fence(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    atomic_thread_fence(memory_order_acq_rel);
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"bind", bind, METH_VARARGS, NULL},
    {"key_hash", hash, METH_VARARGS, NULL},
    {"fence", fence, METH_NOARGS, NULL},
    {"map_file", map_file, METH_O, NULL},
    {"map_writable", map_writable, METH_VARARGS, NULL},
    {"wait_word", wait_word, METH_VARARGS, NULL},
    {"is_plain", is_plain, METH_O, NULL},
    {"may_mean_the_same", may_mean_the_same, METH_VARARGS, NULL},
    {"scan", scan_plain, METH_VARARGS, NULL},
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
    if (state->corrupt == NULL || (state->memory_type = add_type(module, &memory_spec)) == NULL
        || (state->view_type = add_type(module, &view_spec)) == NULL
        || (state->table_type = add_type(module, &table_spec)) == NULL
        || (state->lookups_type = add_type(module, &lookups_spec)) == NULL
        || (state->image_type = add_type(module, &image_spec)) == NULL
        || (release_word = add_type(module, &release_word_spec)) == NULL) {
        return -1;
    }
    Py_DECREF(release_word);
    if (PyModule_AddIntConstant(module, "WAKES", WAKES) < 0) {
        return -1;
    }
    return PyModule_AddIntConstant(module, "INTERFACE", INTERFACE);
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->corrupt);
    Py_VISIT(state->memory_type);
    Py_VISIT(state->view_type);
    Py_VISIT(state->table_type);
    Py_VISIT(state->lookups_type);
    Py_VISIT(state->image_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->corrupt);
    Py_CLEAR(state->memory_type);
    Py_CLEAR(state->view_type);
    Py_CLEAR(state->table_type);
    Py_CLEAR(state->lookups_type);
    Py_CLEAR(state->image_type);
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
