"""What a publisher leaves for those who look at its host, and what they make of it."""

from __future__ import annotations

import os

import pytest

from shmelim.fleet import publishing as module
from shmelim.fleet.publishing import Note, Publishing, publishing
from shmelim.watch.seeing import with_publisher

NOW = 1_800_000_000_000


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SHMELIM_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(module, "now_ms", lambda: NOW)
    (tmp_path / "fleet").mkdir(mode=0o700)
    return tmp_path / "fleet" / "publisher.json"


def test_what_is_written_is_read_once_a_second(place, monkeypatch):
    note = Note("fleet", "redis://engine")
    note.write(term=1, line=2, seq=3, behind=4)
    found = publishing("fleet")
    assert found == Publishing(os.getpid(), "redis://engine", NOW, 1, 2, 3, 4)
    assert place.stat().st_mode & 0o777 == 0o600
    note.write(behind=5)
    assert publishing("fleet") == found
    monkeypatch.setattr(module, "now_ms", lambda: NOW + 1000)
    note.write(behind=5)
    assert publishing("fleet").behind == 5
    note.remove()
    assert publishing("fleet") is None
    assert list(place.parent.iterdir()) == []


def test_the_file_of_the_next_publisher_stays(place):
    Note("fleet", "redis://engine").write()
    place.write_bytes(place.read_bytes().replace(str(os.getpid()).encode(), b"1"))
    Note("fleet", "redis://engine").remove()
    assert publishing("fleet").pid == 1


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


@pytest.mark.parametrize(
    ("fields", "name", "severity", "status"),
    [
        ({}, None, None, "ok"),
        ({"behind": 10_000}, None, None, "ok"),
        ({"at_ms": NOW - 10_000}, None, None, "ok"),
        ({"at_ms": NOW - 10_001}, "publisher_silent", "degraded", "degraded"),
        ({"error": "the engine is full"}, "publisher_error", "degraded", "degraded"),
        ({"held": "look first"}, "publisher_held", "notice", "ok"),
    ],
)
def test_what_is_wrong_with_it_is_a_problem_of_the_name(fields, name, severity, status):
    found = Publishing(**{"pid": 1, "engine": "redis://engine", "at_ms": NOW, **fields})
    other = {"name": "disk_nearly_full"}
    judged, problems = with_publisher(found, "ok", [other])
    assert judged == status
    assert [each["name"] for each in problems] == ["disk_nearly_full", *([name] if name else [])]
    if name:
        assert problems[1]["severity"] == severity
        assert problems[1]["text"]
        assert problems[1]["since_ms"] == found.at_ms
    assert with_publisher(found, "failing", [])[0] == "failing"
    assert with_publisher(None, "ok", []) == ("ok", [])
