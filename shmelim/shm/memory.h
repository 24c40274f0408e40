/* Memory: a file of shared memory that is mapped; and how it is opened for reading.
 *
 * The descriptor is closed before anybody knows of it, and no signal handler runs in between: an interrupted reader leaves
 * none, and owns none. What the file is and whose it is was looked at on that descriptor. */

#ifndef SHMELIM_MEMORY_H
#define SHMELIM_MEMORY_H

#include "view.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
    PyObject_HEAD
    void *start;
    Py_ssize_t size;
    int readonly;
} Memory;

/* Hand over a mapping, which is ended where that fails. */
static PyObject *
memory_of(PyObject *module, void *start, size_t size, int readonly)
{
    PyTypeObject *type = ((State *)PyModule_GetState(module))->memory_type;
    Memory *memory = (Memory *)type->tp_alloc(type, 0);
    if (memory == NULL) {
        munmap(start, size);
        return NULL;
    }
    memory->start = start;
    memory->size = (Py_ssize_t)size;
    memory->readonly = readonly;
    return (PyObject *)memory;
}

/* Map an open file for writing: (descriptor, size). The mapping owns no descriptor, but keeps the file's flock. */
static PyObject *
map_writable(PyObject *module, PyObject *args)
{
    int file;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "in", &file, &size)) {
        return NULL;
    }
    void *start = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    return start == MAP_FAILED ? PyErr_SetFromErrno(PyExc_OSError) : memory_of(module, start, (size_t)size, 0);
}

/* Map a file: (memory, or None where it is not a file or is empty; mode, inode, device, links, uid, gid, size). */
static PyObject *
map_file(PyObject *module, PyObject *name)
{
    PyObject *path;
    if (!PyUnicode_FSConverter(name, &path)) {
        return NULL;
    }
    struct stat status;
    void *start = MAP_FAILED;
    int failed = 0;
    Py_BEGIN_ALLOW_THREADS
    int file = open(PyBytes_AS_STRING(path), O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) < 0) {
        failed = errno;
    }
    else if (S_ISREG(status.st_mode) && status.st_size > 0) {
        start = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, file, 0);
        failed = start == MAP_FAILED ? errno : 0;
    }
    if (file >= 0) {
        close(file);
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    if (failed) {
        errno = failed;
        return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, name);
    }
    PyObject *memory = Py_NewRef(Py_None);
    if (start != MAP_FAILED) {
        Py_SETREF(memory, memory_of(module, start, (size_t)status.st_size, 1));
        if (memory == NULL) {
            return NULL;
        }
    }
    return Py_BuildValue("NIKKKIIL", memory, (unsigned)status.st_mode, (unsigned long long)status.st_ino,
                         (unsigned long long)status.st_dev, (unsigned long long)status.st_nlink,
                         (unsigned)status.st_uid, (unsigned)status.st_gid, (long long)status.st_size);
}

static int
memory_buffer(PyObject *op, Py_buffer *view, int flags)
{
    Memory *self = (Memory *)op;
    return PyBuffer_FillInfo(view, op, self->start, self->size, self->readonly, flags);
}

static Py_ssize_t
memory_length(PyObject *op)
{
    return ((Memory *)op)->size;
}

/* Where a slice begins and its size, which never leaves the mapping; -1 with an error. */
static Py_ssize_t
memory_slice(Memory *self, PyObject *key, char **start)
{
    Py_ssize_t first, stop, step;
    if (!PySlice_Check(key)) {
        PyErr_Format(PyExc_TypeError, "memory is sliced, not indexed with %.200s", Py_TYPE(key)->tp_name);
        return -1;
    }
    if (PySlice_Unpack(key, &first, &stop, &step) < 0) {
        return -1;
    }
    Py_ssize_t size = PySlice_AdjustIndices(self->size, &first, &stop, step);
    if (step != 1) {
        PyErr_Format(PyExc_ValueError, "memory is sliced in steps of 1, not %zd", step);
        return -1;
    }
    *start = (char *)self->start + first;
    return size;
}

/* A slice is a copy. */
static PyObject *
memory_subscript(PyObject *op, PyObject *key)
{
    char *start;
    Py_ssize_t size = memory_slice((Memory *)op, key, &start);
    return size < 0 ? NULL : PyBytes_FromStringAndSize(start, size);
}

static int
memory_assign(PyObject *op, PyObject *key, PyObject *value)
{
    char *start;
    Py_ssize_t size = memory_slice((Memory *)op, key, &start);
    if (size < 0) {
        return -1;
    }
    if (((Memory *)op)->readonly || value == NULL) {
        PyErr_SetString(PyExc_TypeError, "this memory is mapped for reading");
        return -1;
    }
    Py_buffer bytes;
    if (PyObject_GetBuffer(value, &bytes, PyBUF_SIMPLE) < 0) {
        return -1;
    }
    int fits = bytes.len == size;
    if (fits) {
        memcpy(start, bytes.buf, (size_t)size);
    }
    else {
        PyErr_Format(PyExc_ValueError, "a slice of %zd bytes takes as many, not %zd", size, bytes.len);
    }
    PyBuffer_Release(&bytes);
    return fits ? 0 : -1;
}

PyDoc_STRVAR(memory_discard_doc,
"discard($self, /)\n--\n\n"
"Give the pages back, without the GIL; who still looks gets them again. Unmapping takes no time then.");

static PyObject *
memory_discard(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Memory *self = (Memory *)op;
    Py_BEGIN_ALLOW_THREADS
    madvise(self->start, (size_t)self->size, MADV_DONTNEED);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static void
memory_dealloc(PyObject *op)
{
    munmap(((Memory *)op)->start, (size_t)((Memory *)op)->size);
    free_object(op);
}

static PyMethodDef memory_methods[] = {
    {"discard", memory_discard, METH_NOARGS, memory_discard_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot memory_slots[] = {
    {Py_tp_doc, "A file, mapped for reading by map_file, or by map_writable."},
    {Py_tp_methods, memory_methods},
    {Py_tp_dealloc, memory_dealloc},
    {Py_mp_length, memory_length},
    {Py_mp_subscript, memory_subscript},
    {Py_mp_ass_subscript, memory_assign},
    {Py_bf_getbuffer, memory_buffer},
    {0, NULL},
};

static PyType_Spec memory_spec = {
    .name = "shmelim.shm._native.Memory",
    .basicsize = sizeof(Memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = memory_slots,
};

#endif
