"""What a publisher leaves for those who look at its host, and what they make of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from shmelim.errors import FencedError
from shmelim.fleet import publishing as module
from shmelim.fleet.publishing import Note, Publishing, publishing
from shmelim.system.processes import ProcessIdentity
from shmelim.watch.seeing import with_publisher

NOW = 1_800_000_000_000
ME = ProcessIdentity.this_process()
LIVES = {"pid": ME.pid, "started": ME.started}
DEAD = {"pid": ME.pid, "started": ME.started - 1}


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(at=1000.0)
    monkeypatch.setattr(module, "boottime", lambda: now.at)
    return now


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SHMELIM_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(module, "now_ms", lambda: NOW)
    (tmp_path / "fleet").mkdir(mode=0o700)
    return tmp_path / "fleet" / "publisher.json"


def test_what_is_written_is_read(place, clock):
    note = Note("fleet", "redis://engine")
    note.write(term=1, line=2, seq=3, behind=4)
    assert publishing("fleet") == Publishing(ME.pid, ME.started, "redis://engine", 1000.0, NOW, 1, 2, 3, 4)
    assert place.stat().st_mode & 0o777 == 0o600
    note.remove()
    assert publishing("fleet") is None
    assert list(place.parent.iterdir()) == []


def test_it_is_written_once_a_second_and_at_once_where_something_else_is_so(clock, monkeypatch):
    note = Note("fleet", "redis://engine")
    note.write(behind=4)
    monkeypatch.setattr(module, "now_ms", lambda: NOW + 500)
    clock.at += 0.5
    note.write(behind=5)
    assert publishing("fleet").behind == 4
    note.write(behind=6, error="refused")
    assert (publishing("fleet").behind, publishing("fleet").since_ms) == (6, NOW + 500)
    monkeypatch.setattr(module, "now_ms", lambda: NOW + 1500)
    clock.at += 1
    note.write(behind=7, error="refused")
    assert (publishing("fleet").behind, publishing("fleet").since_ms) == (7, NOW + 500), "it is the same error"


def test_the_file_of_the_next_publisher_stays(place):
    note = Note("fleet", "redis://engine")
    note.write()
    place.write_bytes(place.read_bytes().replace(str(ME.pid).encode(), b"1"))
    note.remove()
    note.end(FencedError("another one has taken over"))
    assert (publishing("fleet").pid, publishing("fleet").ended) == (1, False)


def test_an_end_by_an_error_is_known_until_it_is_started_again():
    note = Note("fleet", "redis://engine")
    note.write(line=1)
    note.end(FencedError("another one has taken over", hint="stop one"))
    name, severity, error = publishing("fleet").problem()
    assert (name, severity, error.hint) == ("publisher_ended", "degraded", "stop one")
    assert "another one has taken over" in error.message
    assert not publishing("fleet").is_up
    Note("fleet", "redis://engine").write()
    assert publishing("fleet").problem() is None
    assert publishing("fleet").is_up


def test_an_end_before_the_first_word_is_known_too():
    Note("fleet", "redis://engine").end(FencedError("another store's"))
    assert publishing("fleet").ended


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"pid": "x"}', b"x" * 100_000])
def test_what_is_none_is_nothing(place, raw):
    place.write_bytes(raw)
    assert publishing("fleet") is None


def test_a_link_or_a_pipe_is_nothing(place, tmp_path):
    (tmp_path / "other").write_text("{}")
    place.symlink_to(tmp_path / "other")
    assert publishing("fleet") is None
    place.unlink()
    os.mkfifo(place)
    assert publishing("fleet") is None


def test_where_nothing_can_be_written_publishing_goes_on(place):
    place.parent.rmdir()
    Note("fleet", "redis://engine").write()
    assert publishing("fleet") is None


def test_a_full_disk_leaves_what_was_said_last_and_nothing_else(place, clock, monkeypatch):
    note = Note("fleet", "redis://engine")
    note.write(seq=1)

    def fail(*_paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        clock.at += 2
        note.write(seq=2)
        assert list(place.parent.iterdir()) == [place]
        assert publishing("fleet").seq == 1
        patch.setattr(Path, "unlink", fail)
        note.remove()
    clock.at += 2
    note.write(seq=3)
    assert publishing("fleet").seq == 3


@pytest.mark.parametrize(
    ("fields", "name", "severity", "status"),
    [
        ({}, None, None, "ok"),
        ({"behind": 10_000}, None, None, "ok"),
        (DEAD | {"said": 990.0}, None, None, "ok"),  # in another container its process means nothing
        (DEAD | {"said": 989.9}, "publisher_silent", "degraded", "degraded"),
        ({"said": 945.0}, None, None, "ok"),  # a snapshot
        ({"said": 939.0}, "publisher_silent", "degraded", "degraded"),  # it hangs
        (DEAD | {"said": 2000.0}, "publisher_silent", "degraded", "degraded"),  # before the machine was started
        ({"error": "the engine is full"}, "publisher_error", "degraded", "degraded"),
        ({"held": "look first"}, "publisher_held", "notice", "ok"),
    ],
)
@pytest.mark.usefixtures("clock")
def test_what_is_wrong_with_it_is_a_problem_of_the_name(fields, name, severity, status):
    found = Publishing(**LIVES | {"engine": "redis://engine", "said": 1000.0, "since_ms": NOW} | fields)
    other = {"name": "disk_nearly_full"}
    judged = with_publisher(found, {"status": "ok", "problems": [other]})
    problems = judged["problems"]
    assert judged["status"] == status
    assert [each["name"] for each in problems] == ["disk_nearly_full", *([name] if name else [])]
    if name:
        assert problems[1]["severity"] == severity
        assert problems[1]["text"]
        assert problems[1]["since_ms"] == found.since_ms
    assert with_publisher(found, {"status": "failing", "problems": []})["status"] == "failing"
    assert with_publisher(None, {"status": "ok", "problems": []}) == {"status": "ok", "problems": []}
