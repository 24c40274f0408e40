"""The benchmark runs from one end to the other, says what it left out, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import tempfile

import pytest

from bench import around
from bench.crew import Process, WorkerError
from bench.peers import NAMES
from bench.plan import Plan
from bench.report import Results, document
from bench.run import Run

TINY = Plan(
    (128,),
    (1, 2),
    main_seconds=0.01,
    crowd_seconds=0.01,
    duel_seconds=0.01,
    scaling_rounds=1,
    rounds=2,
    changed=(),
)


def test_a_small_run(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said = []
    raw = Run(TINY, ("dict", "sqlite3", "cache"), said.append).run()
    assert not list(tmp_path.iterdir())
    assert raw["failed"] == []
    results = Results(json.loads(json.dumps(raw)))
    for name in results.names:
        for operation in ("hit", "miss", "get", "batch", "everything"):
            assert results.cell(name, 128, operation)["p50"] > 0
            assert results.cell(name, 128, operation, writer=True)["written_per_second"] > 0
        assert results.cell(name, 128, "hit", 2)["rate"] > 0
        low, high = results.cell(name, 128, "empty")["spread"]["p50"]
        assert 0 < low <= results.cell(name, 128, "empty")["p50"] <= high
    assert results.cell("dict", 128, "sync")
    assert results.cell("sqlite3", 128, "sync")
    assert results.cell("cache", 128, "sync") is None
    assert results.raw["around"]["waking"]["publishes"] > 0
    assert results.raw["around"]["import"]["more_modules"] > 0
    assert "| sqlite3 |" in document(raw)
    assert any("sqlite3, 128 records" in line for line in said)


def test_a_part_that_fails_leaves_the_rest_of_a_run_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail():
        raise MemoryError("no room")

    monkeypatch.setattr(around, "importing", fail)
    plan = dataclasses.replace(TINY, sizes=())
    raw = Run(plan, (), lambda _line: None).run()
    assert [failed["part"] for failed in raw["failed"]] == ["around a check"]
    shown = document(raw)
    assert "**A part failed**, around a check: MemoryError: no room" in shown
    assert "not measured" in shown


def die(_pipe):
    raise SystemExit(3)


def test_a_process_that_dies_is_an_error_and_not_a_wait():
    with Process("a process", die, environment={}) as process, pytest.raises(WorkerError, match="exit code 3"):
        process.answer(30)


def fail(pipe):
    pipe.send(("failed", "ValueError: why"))


def test_a_process_that_fails_says_why():
    with (
        Process("a process", fail, environment={}) as process,
        pytest.raises(WorkerError, match="ValueError: why"),
    ):
        process.answer(30)


def test_all_contenders_can_be_named():
    assert NAMES[:3] == ("shmelim", "shmelim-pure", "dict")
