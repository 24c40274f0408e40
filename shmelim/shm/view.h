/* What every part of the extension needs: the state of the module, and View, an attached data segment.
 *
 * A view holds the memory of a data segment and of the root segment whose version word named it, and the numbers that
 * were checked against that memory. It never changes. */

#ifndef SHMELIM_VIEW_H
#define SHMELIM_VIEW_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "probe.h"

#if PY_VERSION_HEX < 0x030D0000
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif

typedef struct {
    PyObject *corrupt; /* CorruptSegmentError */
    PyTypeObject *memory_type;
    PyTypeObject *view_type;
    PyTypeObject *table_type;
    PyTypeObject *lookups_type;
    PyTypeObject *image_type;
} State;

static struct PyModuleDef native_module;

/* The state of the module that made an object's type, or a base of it. */
static State *
state_of(PyObject *object)
{
    return PyModule_GetState(PyType_GetModuleByDef(Py_TYPE(object), &native_module));
}

typedef struct {
    PyObject_HEAD
    Map map;
    Py_buffer root;
    Py_buffer data;
    PyObject *label; /* NULL until all of it is mapped */
} View;

/* Tell whether two copies with these numbers lie in a segment of this size. */
static bool
copies_fit(uint64_t size, uint64_t capacity, uint64_t arena_size, uint64_t stride)
{
    return capacity != 0 && capacity <= MAX_CAPACITY && (capacity & (capacity - 1)) == 0 && size >= PAGE
           && arena_size <= size && stride <= (size - PAGE) / 2 && stride % WORD == 0
           && COPY_HEADER_SIZE + capacity * SLOT_SIZE + arena_size <= stride;
}

/* Check the numbers of a data header against the buffer, and compute from them where everything is. */
static int
view_place(View *self, uint64_t capacity, uint64_t arena_size, uint64_t stride)
{
    const unsigned char *root = self->root.buf, *data = self->data.buf;
    if (self->root.len < PAGE || ((uintptr_t)root | (uintptr_t)data) % WORD != 0) {
        PyErr_SetString(PyExc_ValueError, "a segment is too short, or not aligned");
        return -1;
    }
    if (!copies_fit((uint64_t)self->data.len, capacity, arena_size, stride)) {
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

/* Hold the memory of root and data segment, and place the copies in it. Once per view, even if it fails. */
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
    if (self->root.obj != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "a view is mapped once");
        return NULL;
    }
    if (PyObject_GetBuffer(root, &self->root, PyBUF_SIMPLE) < 0
        || PyObject_GetBuffer(data, &self->data, PyBUF_SIMPLE) < 0
        || view_place(self, capacity, arena_size, stride) < 0) {
        return NULL;
    }
    self->map.generation = generation;
    set_seed(&self->map, seed);
    self->label = Py_NewRef(label);
    Py_RETURN_NONE;
}

/* No type of this extension takes part in garbage collection: buffers refer to memory and memory to nothing, so that no
 * cycle goes through a view, nor through what refers to views. What a subclass adds is collected as its own. */
static void
free_object(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static void
view_dealloc(PyObject *op)
{
    View *self = (View *)op;
    PyBuffer_Release(&self->root);
    PyBuffer_Release(&self->data);
    Py_XDECREF(self->label);
    free_object(op);
}

static PyMethodDef view_methods[] = {
    {"_map", view_map, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot view_slots[] = {
    {Py_tp_doc, "An attached data segment, with the root segment that named it."},
    {Py_tp_methods, view_methods},
    {Py_tp_dealloc, view_dealloc},
    {0, NULL},
};

static PyType_Spec view_spec = {
    .name = "shmelim.shm._native.View",
    .basicsize = sizeof(View),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = view_slots,
};

/* Making the error runs Python code, which may let go of a view that is borrowed. */
static void
raise_corrupt(PyObject *op, View *view, const char *what)
{
    Py_INCREF(view);
    PyErr_Format(state_of(op)->corrupt, "segment %U %s", view->label, what);
    Py_DECREF(view);
}

#define NO_END "has no empty slot: a lookup cannot end"

static void
raise_misplaced(PyObject *op, View *view, uint64_t packed)
{
    char what[80];
    PyOS_snprintf(what, sizeof what, "has a record at %llu that does not fit into its arena",
                  (unsigned long long)(packed >> 16));
    raise_corrupt(op, view, what);
}

#endif
