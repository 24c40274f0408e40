"""Decoding many records at once, and the garbage collector meanwhile."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace

import pytest

from shmelim.eliminations import rows
from shmelim.eliminations.record import encode
from shmelim.eliminations.rows import PREFIX, Status, decode_rows, pack
from shmelim.shm import VALUES, Entry


def packed(count):
    record = PREFIX.pack(0, 0) + encode({"hotkey": "h", "reason": "R", "elimination_initiated_time_ms": 1})
    entries = {b"%d" % number: Entry(int(Status.ELIMINATED), record, number) for number in range(count)}
    return pack(entries, Status.ELIMINATED, VALUES)


@pytest.mark.parametrize(("count", "rests"), [(10, False), (10_000, True)])
def test_the_collector_rests_only_while_many_are_decoded(count, rests):
    seen = []
    rows._decode_all(SimpleNamespace(decode=lambda _: seen.append(gc.isenabled())), packed(count))
    assert seen == [not rests]
    assert gc.isenabled()


def test_a_collector_that_somebody_switched_off_stays_off():
    gc.disable()
    try:
        assert len(decode_rows(packed(10_000))) == 10_000
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_child_forked_meanwhile_collects_again():
    outcome = []

    def decode(_):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if gc.isenabled() else 1)
        outcome.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    rows._decode_all(SimpleNamespace(decode=decode), packed(10_000))
    assert outcome == [0]
    assert gc.isenabled()
