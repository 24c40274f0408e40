"""Decoding many records at once, and the garbage collector meanwhile."""

from __future__ import annotations

import gc
import os

from shmelim.eliminations import rows as entry
from shmelim.eliminations.record import encode
from shmelim.eliminations.rows import PREFIX, Status, eliminations_in
from shmelim.shm import Entry


def entries(count):
    record = PREFIX.pack(0, 0) + encode({"hotkey": "h", "reason": "R", "elimination_initiated_time_ms": 1})
    return {b"%d" % number: Entry(int(Status.ELIMINATED), record, number) for number in range(count)}


def test_the_collector_rests_only_while_many_are_decoded(monkeypatch):
    seen = []

    def decode(record):
        seen.append(gc.isenabled())
        return {}

    monkeypatch.setattr(entry, "decode", decode)
    eliminations_in(entries(10))
    assert set(seen) == {True}
    seen.clear()
    eliminations_in(entries(2000))
    assert set(seen) == {False}
    assert gc.isenabled()


def test_a_collector_that_somebody_switched_off_stays_off():
    gc.disable()
    try:
        eliminations_in(entries(2000))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_child_forked_meanwhile_collects_again(monkeypatch):
    outcome = []

    def decode(record):
        if not outcome:
            pid = os.fork()
            if pid == 0:
                os._exit(0 if gc.isenabled() else 1)
            outcome.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return {}

    monkeypatch.setattr(entry, "decode", decode)
    eliminations_in(entries(2000))
    assert outcome == [0]
    assert gc.isenabled()
