/* Waiting for a word of shared memory to change: a futex.
 *
 * Who waits needs only to read the word; the kernel knows him by the file and the offset, from whichever process he maps it.
 * Who stores wakes everybody, and does not know whether there is anybody: a system call for nothing, 0.2 us.
 * A futex has 32 bits, and looks at the low half of the word, which is the first one. */

#ifndef SHMELIM_WAITING_H
#define SHMELIM_WAITING_H

#include "view.h"

#include <errno.h>
#include <limits.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#define WAKES 1
#else
#define WAKES 0
#endif

static void
wake(Word *word)
{
#if WAKES
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
#else
    (void)word;
#endif
}

/* Wait while a word is what it was, until somebody stores it, a signal comes, or so many seconds are over; False where that
 * cannot be: (memory, index, value, seconds). */
static PyObject *
wait_word(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer memory;
    Py_ssize_t index;
    unsigned long long value;
    double seconds;
    if (!PyArg_ParseTuple(args, "y*nKd:wait_word", &memory, &index, &value, &seconds)) {
        return NULL;
    }
    if (index < 0 || index >= memory.len / WORD || (uintptr_t)memory.buf % WORD != 0 || !(seconds >= 0 && seconds < 1e6)) {
        PyBuffer_Release(&memory);
        PyErr_SetString(PyExc_ValueError, "the word is not in the memory, or not aligned, or the time is none");
        return NULL;
    }
    int failed = ENOSYS;
#if WAKES
    struct timespec pause = {.tv_sec = (time_t)seconds};
    pause.tv_nsec = (long)((seconds - (double)pause.tv_sec) * 1e9);
    const uint32_t *word = (const uint32_t *)((const char *)memory.buf + index * WORD);
    Py_BEGIN_ALLOW_THREADS
    failed = syscall(SYS_futex, word, FUTEX_WAIT, (uint32_t)value, &pause, NULL, 0) < 0 ? errno : 0;
    Py_END_ALLOW_THREADS
#endif
    PyBuffer_Release(&memory);
    if (failed == EINTR && PyErr_CheckSignals() < 0) {
        return NULL;
    }
    return PyBool_FromLong(failed == 0 || failed == EAGAIN || failed == ETIMEDOUT || failed == EINTR);
}

#endif
