/* All records of one version, as one msgpack array or map, in the order of their ordinals. */

#ifndef SHMELIM_COLLECT_H
#define SHMELIM_COLLECT_H

#include "table.h"

/* Slots from which on others may run meanwhile, and entries that are asked for ahead. */
enum { LARGE = 1 << 15, PREFETCH_RECORDS = 8 };

/* In which form entries are collected: an array of their keys; an array of what follows the first bytes of each record;
 * a map of both; a map of keys to those first bytes. */
enum { KEYS, VALUES, ITEMS, HEADS };

typedef struct {
    View *view;
    uint64_t version;
    unsigned mask, form;
    uint32_t skip;
    Span *entries;
    size_t count;
    uint64_t bytes; /* of the result, without its header */
} Collection;

static uint64_t
collected_size(const Collection *all, const Span *entry)
{
    uint64_t key = all->form == VALUES ? 0 : (entry->key_size < 32 ? 1 : 2) + (uint64_t)entry->key_size;
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
    for (uint64_t index = 0; index <= map->mask; index++) {
        if (index % 4096 == 0 && load(map->version) != all->version) {
            return CONTRADICTION;
        }
        uint64_t packed = load(copy->slots + index * SLOT_WORDS + PACKED);
        if (packed == 0) {
            continue;
        }
        live++;
        if ((packed & all->mask) != all->mask) {
            continue;
        }
        Span *entry = &all->entries[all->count];
        if (all->count == room || find_record(map, all->version & 1, packed, entry) != FOUND || entry->size < all->skip) {
            return CONTRADICTION;
        }
        all->count++;
        all->bytes += collected_size(all, entry);
        arena += ENTRY_HEADER + entry->size;
        /* Entries do not overlap; and no more is allocated than the arena could hold. */
        if (arena > map->arena_size) {
            return CONTRADICTION;
        }
    }
    return live == load(copy->header + COUNT) ? FOUND : CONTRADICTION;
}

/* Sort by ordinal: a radix sort of bytes, least significant first, that leaves out those in which none differ. Of the
 * two arrays, return the one that has the result. */
static Span *
sort_entries(Span *entries, Span *spare, size_t count)
{
    uint64_t differ = 0;
    bool in_order = true;
    for (size_t n = 1; n < count; n++) {
        differ |= entries[n].ordinal ^ entries[0].ordinal;
        in_order = in_order && entries[n - 1].ordinal <= entries[n].ordinal;
    }
    for (unsigned shift = 0; !in_order && shift < 64 && differ >> shift != 0; shift += 8) {
        size_t starts[256] = {0}, at = 0;
        if ((differ >> shift & 0xFF) == 0) {
            continue;
        }
        for (size_t n = 0; n < count; n++) {
            starts[entries[n].ordinal >> shift & 0xFF]++;
        }
        for (unsigned byte = 0; byte < 256; byte++) {
            size_t size = starts[byte];
            starts[byte] = at;
            at += size;
        }
        for (size_t n = 0; n < count; n++) {
            spare[starts[entries[n].ordinal >> shift & 0xFF]++] = entries[n];
        }
        Span *sorted = spare;
        spare = entries;
        entries = sorted;
    }
    return entries;
}

/* Write the result: one msgpack array, or map, of what was gathered. Every place was checked by gather. */
static void
put_all(const Collection *all, unsigned char *to)
{
    const unsigned char *arena = all->view->map.copies[all->version & 1].arena;
    *to++ = all->form == ITEMS || all->form == HEADS ? 0xDF : 0xDD;
    for (int shift = 24; shift >= 0; shift -= 8) {
        *to++ = (unsigned char)(all->count >> shift);
    }
    for (size_t n = 0; n < all->count; n++) {
        const Span *entry = &all->entries[n];
        const unsigned char *record = arena + entry->start;
        if (n + PREFETCH_RECORDS < all->count) {
            __builtin_prefetch(arena + all->entries[n + PREFETCH_RECORDS].start);
        }
        if (all->form != VALUES) {
            if (entry->key_size < 32) {
                *to++ = (unsigned char)(0xA0 | entry->key_size);
            }
            else {
                *to++ = 0xD9;
                *to++ = entry->key_size;
            }
            memcpy(to, record - entry->key_size, entry->key_size);
            to += entry->key_size;
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

/* One attempt: the result, Py_None when a publish overtook it, NULL with an exception. */
static PyObject *
collect_once(Table *table, Collection *all)
{
    const Map *map = &all->view->map;
    uint64_t room = load(map->copies[all->version & 1].header + COUNT);
    room = room > map->mask ? map->mask + 1 : room;
    Span *memory = PyMem_RawMalloc(2 * (size_t)room * sizeof(Span)); /* half of it to sort in */
    if (memory == NULL) {
        return PyErr_NoMemory();
    }
    all->entries = memory;
    PyThreadState *thread = map->mask < LARGE ? NULL : PyEval_SaveThread();
    Found found = gather(all, room);
    bool whole = read_ends(map, all->version);
    if (whole && found == FOUND) {
        all->entries = sort_entries(memory, memory + room, all->count);
    }
    if (thread != NULL) {
        PyEval_RestoreThread(thread);
    }
    PyObject *result = NULL;
    if (whole && found == CONTRADICTION) {
        raise_corrupt((PyObject *)table, all->view, "has entries that contradict each other");
    }
    else if (whole) {
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(all->bytes + 5));
    }
    if (result != NULL) {
        unsigned char *to = (unsigned char *)PyBytes_AS_STRING(result);
        thread = all->bytes < LARGE * SLOT_SIZE ? NULL : PyEval_SaveThread();
        put_all(all, to);
        whole = read_ends(map, all->version);
        if (thread != NULL) {
            PyEval_RestoreThread(thread);
        }
    }
    PyMem_RawFree(memory);
    if (!whole) {
        Py_XDECREF(result);
        return Py_NewRef(Py_None);
    }
    return result;
}

/* Return version and msgpack of all entries that have the flags of a mask, in the order of their ordinals: (mask, form,
 * skip). None: publishes overtook it every time. */
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
            tally(self, SNAPSHOTS);
            return result == NULL ? NULL : Py_BuildValue("KN", (unsigned long long)(all.version & SEQUENCE_MASK), result);
        }
        Py_DECREF(result);
        count_retry(self);
    }
    Py_RETURN_NONE;
}

#endif
