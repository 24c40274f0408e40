"""Lists that come in parts: bounded in number, size and time, and never half applied."""

import pytest
from serving import row

from shmelim import EliminationManagerServer
from shmelim.eliminations.comparing import Comparison
from shmelim.eliminations.state import uploads
from shmelim.eliminations.state.uploads import Uploads


@pytest.fixture(scope="module")
def nothing():
    """What a server has published that knows of nobody."""
    with EliminationManagerServer() as server:
        yield server.reader


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(uploads, "time", clock)
    return clock


def test_parts_become_one_list(nothing):
    subject = Uploads()
    token = subject.begin(Comparison(nothing))
    assert subject.extend(token, [row("b"), row("a")]) == 2
    assert subject.extend(token, [row("a", 1)]) == 2
    assert list(subject.finish(token).changed) == ["b", "a"]


def test_two_do_not_mix(nothing):
    subject = Uploads()
    one, other = subject.begin(Comparison(nothing)), subject.begin(Comparison(nothing))
    assert one != other
    subject.extend(one, [row("a")])
    subject.extend(other, [row("b")])
    assert list(subject.finish(one).changed) == ["a"]
    assert list(subject.finish(other).changed) == ["b"]


def test_one_nobody_went_on_with_is_forgotten(nothing, clock):
    subject = Uploads()
    tokens = [subject.begin(Comparison(nothing)) for _ in range(2)]
    clock.now += uploads.IDLE_LIMIT - 1
    subject.extend(tokens[0], [row("a")])
    subject.expire()
    subject.extend(tokens[1], [row("b")])
    clock.now += uploads.IDLE_LIMIT - 1
    subject.extend(tokens[0], [row("b")])
    clock.now += 2
    subject.expire()
    with pytest.raises(ValueError, match="no upload"):
        subject.extend(tokens[1], [row("a")])
    assert list(subject.finish(tokens[0]).changed) == ["a", "b"]


def test_abandoned_ones_lock_nobody_out_and_the_one_idle_longest_makes_room(nothing, clock):
    subject = Uploads()
    tokens = [subject.begin(Comparison(nothing)) for _ in range(uploads.MAX_OPEN)]
    with pytest.raises(ValueError, match="4 uploads"):
        subject.begin(Comparison(nothing))
    clock.now += uploads.PAUSE
    for token in (tokens[0], tokens[2], tokens[3]):
        subject.extend(token, [row("a")])
    another = subject.begin(Comparison(nothing))
    with pytest.raises(ValueError, match="no upload"):
        subject.extend(tokens[1], [row("a")])
    with pytest.raises(ValueError, match="4 uploads"):
        subject.begin(Comparison(nothing))
    for token in (tokens[0], tokens[2], tokens[3], another):
        subject.extend(token, [row("b")])


def test_an_abandoned_one_makes_room_for_the_bytes_of_another(nothing, clock, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 1500)
    subject = Uploads()
    abandoned, token = subject.begin(Comparison(nothing)), subject.begin(Comparison(nothing))
    subject.extend(abandoned, [row("a", pad=1000)])
    clock.now += uploads.PAUSE
    assert subject.extend(token, [row("b", pad=1000)]) == 1
    with pytest.raises(ValueError, match="no upload"):
        subject.finish(abandoned)
    assert list(subject.finish(token).changed) == ["b"]


def test_more_than_the_limit_is_refused_and_forgotten(nothing, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 1000)
    subject = Uploads()
    token = subject.begin(Comparison(nothing))
    subject.extend(token, [row("a")])
    with pytest.raises(ValueError, match="1,000 bytes"):
        subject.extend(token, [row("b", pad=1000)])
    with pytest.raises(ValueError, match="no upload"):
        subject.finish(token)


def test_a_bad_record_gives_up_the_upload_and_is_named_by_its_place_in_the_whole(nothing):
    subject = Uploads()
    token = subject.begin(Comparison(nothing))
    subject.extend(token, [row("a"), row("a")])
    with pytest.raises(ValueError, match="elimination 3 of the list"):
        subject.extend(token, [row("b"), {"dd": 0.5}])
    with pytest.raises(ValueError, match="no upload"):
        subject.finish(token)


@pytest.mark.parametrize("token", ["", "0123", None])
def test_an_unknown_token(token):
    subject = Uploads()
    with pytest.raises(ValueError, match="no upload"):
        subject.extend(token, [row("a")])
    with pytest.raises(ValueError, match="no upload"):
        subject.finish(token)
