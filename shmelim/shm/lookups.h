/* Lookups: lookups by text, and the methods that are made of them. */

#ifndef SHMELIM_LOOKUPS_H
#define SHMELIM_LOOKUPS_H

#include "batch.h"

enum { FLAGS = 256, TESTS = 4 };

/* The empty key, which is in no table; in the place of what cannot be a key. */
#define NO_TABLES_KEY ((const unsigned char *)"")

typedef struct {
    PyObject_HEAD
    Table *table; /* set once, so that it can be used without a reference */
    uint8_t masks[TESTS];
    uint8_t skip;
    PyObject *choices; /* a tuple, by flags */
    PyObject *argument; /* the name that callers give a key */
    PyObject *decode;   /* what makes a result of a record; or NULL */
} Lookups;

static int
no_table(void)
{
    PyErr_SetString(PyExc_RuntimeError, "this object has no table yet");
    return -1;
}

/* Call a method with one argument, whatever that is: of a tuple, PyObject_CallMethod makes several. */
static PyObject *
call_with(PyObject *op, const char *method, PyObject *argument)
{
    PyObject *name = PyUnicode_FromString(method);
    PyObject *result = name == NULL ? NULL : PyObject_CallMethodOneArg(op, name, argument);
    Py_XDECREF(name);
    return result;
}

/* Have the subclass say in its own words what is wrong with a key that is not a text. Runs Python code, in which a list
 * that the key was taken from may be emptied: the key is held. */
static int
refuse(PyObject *op, PyObject *key)
{
    Py_INCREF(key);
    PyObject *result = call_with(op, "_refuse", key);
    if (result != NULL) {
        Py_DECREF(result);
        PyErr_Format(PyExc_TypeError, "key must be text, not %.200s", Py_TYPE(key)->tp_name);
    }
    Py_DECREF(key);
    return -1;
}

/* Tell whether a text has lone surrogates, and so no UTF-8. Looked for rather than tried: an exception is an object that
 * the garbage collector counts, and what that runs may free the very text. */
static bool
has_surrogates(PyObject *text)
{
    const int kind = PyUnicode_KIND(text);
    const void *characters = PyUnicode_DATA(text);
    for (Py_ssize_t n = 0; kind != PyUnicode_1BYTE_KIND && n < PyUnicode_GET_LENGTH(text); n++) {
        if (Py_UNICODE_IS_SURROGATE(PyUnicode_READ(kind, characters, n))) {
            return true;
        }
    }
    return false;
}

/* Any text that is not plain ASCII; and None, which is in no table, as it is in no dict of texts. Nothing here but what
 * ends in an error runs Python code. */
static int
text_key_slow(PyObject *op, PyObject *key, const unsigned char **data, size_t *size)
{
    if (!PyUnicode_Check(key)) {
        return key == Py_None ? 0 : refuse(op, key);
    }
#if PY_VERSION_HEX < 0x030C0000
    if (PyUnicode_READY(key) < 0) {
        return -1;
    }
#endif
    /* A character takes a byte at least. */
    if (PyUnicode_GET_LENGTH(key) > MAX_KEY || has_surrogates(key)) {
        return 0;
    }
    Py_ssize_t length;
    *data = (const unsigned char *)PyUnicode_AsUTF8AndSize(key, &length);
    if (*data == NULL) {
        return -1;
    }
    *size = (size_t)length;
    return 1;
}

/* The UTF-8 of a text: 1, or 0 for what is in no table (lone surrogates, None), or -1 with an exception. */
ALWAYS_INLINE static inline int
text_key(PyObject *op, PyObject *key, const unsigned char **data, size_t *size)
{
    if (LIKELY(PyUnicode_Check(key) && PyUnicode_IS_COMPACT_ASCII(key))) {
        *data = PyUnicode_1BYTE_DATA(key);
        *size = (size_t)PyUnicode_GET_LENGTH(key);
        return 1;
    }
    return text_key_slow(op, key, data, size);
}

NEVER_INLINE static int
any_text_flags(PyObject *op, PyObject *key, uint64_t *packed)
{
    const unsigned char *data = NO_TABLES_KEY;
    size_t size = 0;
    *packed = 0;
    /* What is in no table is looked up all the same: the table may be closed. */
    return text_key(op, key, &data, &size) < 0 ? -1 : look_up(((Lookups *)op)->table, data, size, packed);
}

/* Find the flags of a text; 0 where it is not a key of this table. */
ALWAYS_INLINE static inline int
text_flags(PyObject *op, PyObject *key, uint64_t *packed)
{
    Table *table = ((Lookups *)op)->table;
    if (UNLIKELY(table == NULL)) {
        return no_table();
    }
    if (LIKELY(PyUnicode_Check(key) && PyUnicode_IS_COMPACT_ASCII(key) && PyUnicode_GET_LENGTH(key) == INLINE_KEY)) {
        /* Such a text is its header and then its characters. */
        return look_up_48(table, (const unsigned char *)((PyASCIIObject *)key + 1), packed);
    }
    return any_text_flags(op, key, packed);
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
    return PyErr_Format(PyExc_TypeError, "%.200s expected exactly one argument, %S", Py_TYPE(op)->tp_name,
                        argument == NULL ? Py_None : argument);
}

/* The methods that bind() hands out. What sets them apart is a constant, so that each is one function to its caller. */

ALWAYS_INLINE static inline PyObject *
test_flags(PyObject *op, PyObject *const *args, Py_ssize_t count, PyObject *names, unsigned which)
{
    uint64_t packed;
    PyObject *key = LIKELY(count == 1 && names == NULL) ? args[0] : only_argument(op, args, count, names);
    if (key == NULL) {
        return NULL;
    }
    Table *table = ((Lookups *)op)->table; /* in a register from here on */
    if (text_flags(op, key, &packed) < 0) {
        return NULL;
    }
    uint8_t mask = ((Lookups *)op)->masks[which];
    bool fits = (packed & mask) == mask;
    /* The first mask is the first flag: that of a member. */
    tally_check(table, which == 0 ? fits : packed & 1);
    return Py_NewRef(fits ? Py_True : Py_False);
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
    tally_check(((Lookups *)op)->table, packed & 1);
    if (choices == NULL) {
        return PyLong_FromLong((long)(packed & 0xFF));
    }
    return Py_NewRef(PyTuple_GET_ITEM(choices, (Py_ssize_t)(packed & 0xFF)));
}

static int
lookups_contains(PyObject *op, PyObject *key)
{
    uint64_t packed;
    if (text_flags(op, key, &packed) < 0) {
        return -1;
    }
    uint8_t mask = ((Lookups *)op)->masks[0];
    tally_check(((Lookups *)op)->table, packed & 1);
    return (packed & mask) == mask;
}

/* Return the flags of a text, 0 if it is absent. */
static PyObject *
lookups_flags(PyObject *op, PyObject *key)
{
    uint64_t packed;
    if (text_flags(op, key, &packed) < 0) {
        return NULL;
    }
    tally_check(((Lookups *)op)->table, packed & 1);
    return PyLong_FromLong((long)(packed & 0xFF));
}

/* Use what follows the first bytes of a text's record; None if there is nothing. */
static PyObject *
use_body(PyObject *op, PyObject *key, PyObject *decode)
{
    Lookups *self = (Lookups *)op;
    const unsigned char *data = NO_TABLES_KEY;
    size_t size = 0;
    Span span;
    uint64_t packed;
    if ((self->table == NULL ? no_table() : text_key(op, key, &data, &size)) < 0) {
        return NULL;
    }
    return with_record(self->table, data, size, &(Use){decode, self->skip}, &span, &packed);
}

static PyObject *
decoded(PyObject *op, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Lookups *self = (Lookups *)op;
    PyObject *key = LIKELY(count == 1 && names == NULL) ? args[0] : only_argument(op, args, count, names);
    PyObject *record = key == NULL ? NULL : use_body(op, key, NULL);
    if (record == NULL || record == Py_None || self->decode == NULL) {
        return record;
    }
    /* With room before it, as bound methods like it. */
    PyObject *arguments[2] = {NULL, record};
    PyObject *result = PyObject_Vectorcall(self->decode, arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    Py_DECREF(record);
    if (UNLIKELY(result == NULL) && PyErr_ExceptionMatches(PyExc_Exception)) {
        PyErr_Clear();
        result = call_with(op, "_decoding", key);
    }
    return result;
}

static PyObject *
lookups_record(PyObject *op, PyObject *key)
{
    return use_body(op, key, NULL);
}

static PyObject *
lookups_read(PyObject *op, PyObject *args)
{
    PyObject *key, *decode;
    return PyArg_ParseTuple(args, "OO:_read", &key, &decode) ? use_body(op, key, decode) : NULL;
}

/* As table_fill, with texts in lists and tuples. */
static PyObject *
lookups_fill(PyObject *op, PyObject *const *args, Py_ssize_t count)
{
    Table *table = ((Lookups *)op)->table;
    if (table == NULL) {
        no_table();
        return NULL;
    }
    return batch_fill(table, op, args, count, text_key);
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

/* Takes from the class, too, what its methods are made of: (masks, choices or None, name of the argument, skip, decode or
 * None). */
static int
lookups_set_table(PyObject *op, PyObject *value, void *Py_UNUSED(closure))
{
    Lookups *self = (Lookups *)op;
    PyObject *masks, *choices, *argument, *decode;
    if (value == NULL || self->table != NULL || !PyObject_TypeCheck(value, state_of(op)->table_type)) {
        PyErr_SetString(PyExc_TypeError, "_table is a Table, and set once");
        return -1;
    }
    /* Reading the settings may run Python code, and so may set the table. */
    PyObject *settings = PyObject_GetAttrString((PyObject *)Py_TYPE(op), "_settings");
    if (settings != NULL
        && PyArg_ParseTuple(settings, "O!OUbO", &PyTuple_Type, &masks, &choices, &argument, &self->skip, &decode)
        && PyArg_ParseTuple(masks, "bbbb", &self->masks[0], &self->masks[1], &self->masks[2], &self->masks[3])) {
        if (choices != Py_None && !(PyTuple_Check(choices) && PyTuple_GET_SIZE(choices) == FLAGS)) {
            PyErr_Format(PyExc_TypeError, "choices must be a tuple of %d", FLAGS);
        }
        else if (self->table != NULL) {
            PyErr_SetString(PyExc_TypeError, "_table is a Table, and set once");
        }
        else {
            self->choices = choices == Py_None ? NULL : Py_NewRef(choices);
            self->argument = Py_NewRef(argument);
            self->decode = decode == Py_None ? NULL : Py_NewRef(decode);
            self->table = (Table *)Py_NewRef(value);
        }
    }
    Py_XDECREF(settings);
    return PyErr_Occurred() == NULL ? 0 : -1;
}

static void
lookups_dealloc(PyObject *op)
{
    Lookups *self = (Lookups *)op;
    Py_XDECREF(self->table);
    Py_XDECREF(self->choices);
    Py_XDECREF(self->argument);
    Py_XDECREF(self->decode);
    free_object(op);
}

static PyMethodDef lookups_methods[] = {
    {"_flags", lookups_flags, METH_O, NULL},
    {"_record", lookups_record, METH_O, NULL},
    {"_read", lookups_read, METH_VARARGS, NULL},
    {"_fill", (PyCFunction)(void (*)(void))lookups_fill, METH_FASTCALL, NULL},
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
    {Py_tp_dealloc, lookups_dealloc},
    {Py_sq_contains, lookups_contains},
    {0, NULL},
};

static PyType_Spec lookups_spec = {
    .name = "shmelim.shm._native.Lookups",
    .basicsize = sizeof(Lookups),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = lookups_slots,
};

#endif
