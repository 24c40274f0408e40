"""Lists that come in parts: bounded in number, size and time, and never half applied."""

import pytest
from serving import row

from shmelim.eliminations.state import uploads
from shmelim.eliminations.state.uploads import Uploads


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(uploads, "time", clock)
    return clock


def test_parts_become_one_list():
    subject = Uploads()
    token = subject.begin()
    assert subject.extend(token, [row("b"), row("a")]) == 2
    assert subject.extend(token, [row("a", 1)]) == 2
    assert list(subject.finish(token)) == ["b", "a"]


def test_two_do_not_mix():
    subject = Uploads()
    one, other = subject.begin(), subject.begin()
    assert one != other
    subject.extend(one, [row("a")])
    subject.extend(other, [row("b")])
    assert list(subject.finish(one)) == ["a"]
    assert list(subject.finish(other)) == ["b"]


def test_one_nobody_went_on_with_is_forgotten(clock):
    subject = Uploads()
    tokens = [subject.begin() for _ in range(4)]
    clock.now += uploads.IDLE_LIMIT - 1
    subject.extend(tokens[0], [row("a")])
    with pytest.raises(ValueError, match="4 uploads"):
        subject.begin()
    clock.now += 2
    again = [subject.begin() for _ in range(3)]
    assert len(again) == 3
    with pytest.raises(ValueError, match="4 uploads"):
        subject.begin()
    with pytest.raises(ValueError, match="no upload"):
        subject.extend(tokens[1], [row("a")])
    assert list(subject.finish(tokens[0])) == ["a"]


def test_more_than_the_limit_is_refused_and_forgotten(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 1000)
    subject = Uploads()
    token = subject.begin()
    subject.extend(token, [row("a")])
    with pytest.raises(ValueError, match="1,000 bytes"):
        subject.extend(token, [row("b", pad=1000)])
    with pytest.raises(ValueError, match="no upload"):
        subject.finish(token)


def test_a_bad_record_gives_up_the_upload_and_is_named_by_its_place_in_the_whole():
    subject = Uploads()
    token = subject.begin()
    subject.extend(token, [row("a"), row("a")])
    with pytest.raises(ValueError, match="elimination 3 of the list"):
        subject.extend(token, [row("b"), {"hotkey": "c"}])
    with pytest.raises(ValueError, match="no upload"):
        subject.finish(token)


@pytest.mark.parametrize("token", ["", "0123", None])
def test_an_unknown_token(token):
    subject = Uploads()
    with pytest.raises(ValueError, match="no upload"):
        subject.extend(token, [row("a")])
    with pytest.raises(ValueError, match="no upload"):
        subject.finish(token)
