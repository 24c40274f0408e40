/* Plain values, as plain.py says what those are: in Python's objects, and in msgpack.
 *
 * plain.py is the reference; both must give the same answers. What is not plain is no error: whoever asks takes another way
 * then. Nothing here calls Python code, so that no object can change under the walk but by another thread, where there is
 * no GIL: hence the critical sections, and the references to what was found in a container. */

#ifndef SHMELIM_PLAIN_H
#define SHMELIM_PLAIN_H

#include "view.h"

#include <string.h>

#define DEEPEST 64 /* levels of containers */
#define MOST 1000  /* containers */

/* The kinds of values in msgpack; a field may be of several. */
enum { NOTHING = 1, BOOLEAN = 2, INTEGER = 4, NUMBER = 8, TEXT = 16, LIST = 32, MAP = 64 };

static int walk_plain(PyObject *value, int depth, int *containers);

static int
walk_dict(PyObject *dict, int depth, int *containers)
{
    int plain = 1;
    Py_BEGIN_CRITICAL_SECTION(dict);
    Py_ssize_t place = 0;
    PyObject *key, *value;
    while (plain && PyDict_Next(dict, &place, &key, &value)) {
        plain = PyUnicode_CheckExact(key) && walk_plain(value, depth, containers);
    }
    Py_END_CRITICAL_SECTION();
    return plain;
}

static int
walk_list(PyObject *list, int depth, int *containers)
{
    int plain = 1;
    Py_BEGIN_CRITICAL_SECTION(list);
    for (Py_ssize_t place = 0; plain && place < PyList_GET_SIZE(list); place++) {
        plain = walk_plain(PyList_GET_ITEM(list, place), depth, containers);
    }
    Py_END_CRITICAL_SECTION();
    return plain;
}

static int
walk_tuple(PyObject *tuple, int depth, int *containers)
{
    int plain = 1;
    for (Py_ssize_t place = 0; plain && place < PyTuple_GET_SIZE(tuple); place++) {
        plain = walk_plain(PyTuple_GET_ITEM(tuple, place), depth, containers);
    }
    return plain;
}

/* Whether a value that stands in so many containers is plain. */
static int
walk_plain(PyObject *value, int depth, int *containers)
{
    if (PyUnicode_CheckExact(value) || PyFloat_CheckExact(value) || PyLong_CheckExact(value) || value == Py_None
        || PyBool_Check(value)) {
        return 1;
    }
    int is_dict = PyDict_CheckExact(value), is_list = PyList_CheckExact(value);
    if (!(is_dict || is_list || PyTuple_CheckExact(value)) || depth == DEEPEST || ++*containers > MOST) {
        return 0;
    }
    Py_INCREF(value);
    int plain = (is_dict ? walk_dict : is_list ? walk_list : walk_tuple)(value, depth + 1, containers);
    Py_DECREF(value);
    return plain;
}

static PyObject *
is_plain(PyObject *Py_UNUSED(module), PyObject *value)
{
    int containers = 0;
    return PyBool_FromLong(PyDict_CheckExact(value) && walk_plain(value, 0, &containers));
}

/* ------------------------------------------------------------------ msgpack */

typedef struct {
    const uint8_t *at, *end;
    int containers;
} Packed;

typedef struct {
    int kind;
    const uint8_t *text; /* of a TEXT */
    size_t size;         /* its bytes; the elements of a LIST, the pairs of a MAP */
    uint64_t word;       /* an INTEGER's 64 bits */
    int is_signed;       /* whether they are those of a negative number */
} Packing;

static int
take_number(Packed *packed, int bytes, uint64_t *number)
{
    if (packed->end - packed->at < bytes) {
        return 0;
    }
    *number = 0;
    for (int each = 0; each < bytes; each++) {
        *number = *number << 8 | *packed->at++;
    }
    return 1;
}

/* Take the head of a value, whose kind is 0 where it is not plain, or not written in as few bytes as can be. */
static Packing
take_head(Packed *packed)
{
    static const Packing odd = {0, NULL, 0, 0, 0};
    Packing head = odd;
    uint64_t size;
    if (packed->at == packed->end) {
        return odd;
    }
    uint8_t first = *packed->at++;
    if (first <= 0x7F || first >= 0xE0) {
        head.kind = INTEGER;
        head.is_signed = first >= 0xE0;
        head.word = head.is_signed ? UINT64_C(0xFFFFFFFFFFFFFF00) | first : first;
        return head;
    }
    if (first <= 0xBF) {
        head.kind = first <= 0x8F ? MAP : first <= 0x9F ? LIST : TEXT;
        size = first & (first <= 0x9F ? 0x0F : 0x1F);
    }
    else if (first == 0xC0 || first == 0xC2 || first == 0xC3) {
        head.kind = first == 0xC0 ? NOTHING : BOOLEAN;
        return head;
    }
    else if (first == 0xCB) {
        if (!take_number(packed, 8, &head.word) || (head.word >> 52 & 0x7FF) == 0x7FF) {
            return odd; /* a NaN or an infinity has no stored form */
        }
        head.kind = NUMBER;
        return head;
    }
    else if (first >= 0xCC && first <= 0xCF) {
        int bits = 8 << (first - 0xCC);
        if (!take_number(packed, bits / 8, &head.word) || head.word >> (bits == 8 ? 7 : bits / 2) == 0) {
            return odd;
        }
        head.kind = INTEGER;
        return head;
    }
    else if (first >= 0xD0 && first <= 0xD3) {
        int bits = 8 << (first - 0xD0);
        if (!take_number(packed, bits / 8, &head.word) || head.word >> (bits - 1) == 0) {
            return odd; /* which is not negative */
        }
        head.word |= bits == 64 ? 0 : ~UINT64_C(0) << bits;
        uint64_t shorter = bits == 8 ? ~UINT64_C(0) << 5 : ~UINT64_C(0) << (bits / 2 - 1);
        if (head.word >= shorter) {
            return odd;
        }
        head.kind = INTEGER;
        head.is_signed = 1;
        return head;
    }
    else if (first >= 0xD9) { /* up to 0xDF, as what is above was handled */
        static const struct {
            uint8_t kind, bytes;
            uint32_t least;
        } forms[] = {{TEXT, 1, 32},    {TEXT, 2, 256},      {TEXT, 4, 65536}, {LIST, 2, 16},
                     {LIST, 4, 65536}, {MAP, 2, 16},        {MAP, 4, 65536}};
        if (!take_number(packed, forms[first - 0xD9].bytes, &size) || size < forms[first - 0xD9].least) {
            return odd;
        }
        head.kind = forms[first - 0xD9].kind;
    }
    else {
        return odd; /* bytes, extensions, short floats, and 0xC1 */
    }
    /* Each element takes a byte at least. */
    if (size > (size_t)(packed->end - packed->at)) {
        return odd;
    }
    head.size = size;
    if (head.kind == TEXT) {
        head.text = packed->at;
        packed->at += size;
        uint8_t bits = 0;
        for (size_t place = 0; place < size; place++) {
            bits |= head.text[place];
        }
        if (bits >= 0x80) {
            PyObject *text = PyUnicode_DecodeUTF8((const char *)head.text, (Py_ssize_t)size, NULL);
            if (text == NULL) {
                PyErr_Clear();
                return odd;
            }
            Py_DECREF(text);
        }
    }
    else if (++packed->containers > MOST) {
        return odd;
    }
    return head;
}

/* Take what is in a container that stands in so many others; whether all is plain. */
static int
take_elements(Packed *packed, Packing head, int depth)
{
    if (depth >= DEEPEST) {
        return 0;
    }
    for (size_t place = 0; place < head.size; place++) {
        if (head.kind == MAP && take_head(packed).kind != TEXT) {
            return 0;
        }
        Packing value = take_head(packed);
        if (value.kind == 0 || (value.kind >= LIST && !take_elements(packed, value, depth + 1))) {
            return 0;
        }
    }
    return 1;
}

static PyObject *
packing_value(Packing head)
{
    if (head.kind == TEXT) {
        return PyUnicode_DecodeUTF8((const char *)head.text, (Py_ssize_t)head.size, NULL);
    }
    return head.is_signed ? PyLong_FromLongLong((long long)head.word) : PyLong_FromUnsignedLongLong(head.word);
}

/* Take a field by its name where it is among these; whether it was, and may be of that kind, and for the first time. */
static int
take_field(PyObject *fields, Packing name, Packing value, PyObject *found, uint32_t *seen, int *matches)
{
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(fields); place++) {
        PyObject *field = PyTuple_GET_ITEM(fields, place);
        PyObject *known = PyTuple_GET_ITEM(field, 0);
        if ((size_t)PyBytes_GET_SIZE(known) != name.size || memcmp(PyBytes_AS_STRING(known), name.text, name.size) != 0) {
            continue;
        }
        *matches = (PyLong_AsLong(PyTuple_GET_ITEM(field, 1)) & value.kind) && !(*seen & UINT32_C(1) << place);
        *seen |= UINT32_C(1) << place;
        if (*matches && found != NULL) {
            PyObject *object = packing_value(value);
            if (object == NULL) {
                return -1;
            }
            PyTuple_SET_ITEM(found, place, object);
        }
        return 1;
    }
    return 0;
}

/* Whether these are names with kinds, and these among those that they may have. */
static int
are_fields(PyObject *fields, long kinds)
{
    int good = PyTuple_GET_SIZE(fields) <= 32;
    for (Py_ssize_t place = 0; good && place < PyTuple_GET_SIZE(fields); place++) {
        PyObject *field = PyTuple_GET_ITEM(fields, place);
        good = PyTuple_CheckExact(field) && PyTuple_GET_SIZE(field) == 2 && PyBytes_CheckExact(PyTuple_GET_ITEM(field, 0))
            && PyLong_CheckExact(PyTuple_GET_ITEM(field, 1)) && !(PyLong_AsLong(PyTuple_GET_ITEM(field, 1)) & ~kinds);
    }
    return good;
}

/* scan(packed, required, optional), as plain.py has it. */
static PyObject *
scan_plain(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *bytes, *required, *optional;
    if (!PyArg_ParseTuple(args, "O!O!O!:scan", &PyBytes_Type, &bytes, &PyTuple_Type, &required, &PyTuple_Type, &optional)) {
        return NULL;
    }
    if (!are_fields(required, TEXT | INTEGER) || !are_fields(optional, 2 * MAP - 1)) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_TypeError, "fields must be at most 32 tuples, each of a name in bytes and its kinds");
        }
        return NULL;
    }
    const uint8_t *first = (const uint8_t *)PyBytes_AS_STRING(bytes);
    Packed packed = {first, first + PyBytes_GET_SIZE(bytes), 0};
    Packing map = take_head(&packed);
    if (map.kind != MAP) {
        Py_RETURN_NONE;
    }
    PyObject *found = PyTuple_New(PyTuple_GET_SIZE(required));
    if (found == NULL) {
        return NULL;
    }
    uint32_t seen = 0, seen_optional = 0;
    for (size_t place = 0; place < map.size; place++) {
        Packing name = take_head(&packed);
        Packing value = name.kind == TEXT ? take_head(&packed) : name;
        if (name.kind != TEXT || value.kind == 0 || (value.kind >= LIST && !take_elements(&packed, value, 1))) {
            Py_DECREF(found);
            Py_RETURN_NONE;
        }
        int matches = 1;
        int was = take_field(required, name, value, found, &seen, &matches);
        if (was == 0) {
            was = take_field(optional, name, value, NULL, &seen_optional, &matches);
        }
        if (was < 0 || !matches) {
            Py_DECREF(found);
            if (was < 0) {
                return NULL;
            }
            Py_RETURN_NONE;
        }
    }
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(found); place++) {
        if (PyTuple_GET_ITEM(found, place) == NULL) {
            packed.at = NULL;
        }
    }
    if (packed.at != packed.end) {
        Py_DECREF(found);
        Py_RETURN_NONE;
    }
    return found;
}

/* Whether there may be a NaN, an infinity or -0.0. */
static int
may_be_special(const uint8_t *at, const uint8_t *end)
{
    static const uint8_t zeros[7];
    while ((at = memchr(at, 0xCB, (size_t)(end - at))) != NULL) {
        at++;
        if (end - at >= 2 && (at[0] & 0x7F) == 0x7F && at[1] >= 0xF0) {
            return 1;
        }
        if (end - at >= 8 && at[0] == 0x80 && memcmp(at + 1, zeros, sizeof zeros) == 0) {
            return 1;
        }
    }
    return 0;
}

/* may_mean_the_same(one, other), as plain.py has it. */
static PyObject *
may_mean_the_same(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *one, *other;
    if (!PyArg_ParseTuple(args, "SS:may_mean_the_same", &one, &other)) {
        return NULL;
    }
    const uint8_t *first = (const uint8_t *)PyBytes_AS_STRING(one), *second = (const uint8_t *)PyBytes_AS_STRING(other);
    const size_t size = (size_t)PyBytes_GET_SIZE(one), others = (size_t)PyBytes_GET_SIZE(other);
    uint32_t difference = size != others;
    for (size_t n = 0; size == others && n < size; n++) {
        difference += (uint32_t)first[n] - second[n];
    }
    return PyBool_FromLong(
        difference == 0 || may_be_special(first, first + size) || may_be_special(second, second + others)
    );
}

#endif
