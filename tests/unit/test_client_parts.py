"""How a client cuts a long list into messages."""

from __future__ import annotations

import pytest

from shmelim.eliminations import calls
from shmelim.eliminations.calls import Calls
from shmelim.errors import MessageTooLargeError


class Recorder(Calls):
    """A client whose calls go nowhere: a message takes so many records, and what arrives is kept."""

    def __init__(self, room):
        self.room = room
        self.calls = []
        self.received = []
        self._timeout = 10.0

    def _size(self):
        return 0

    def _call(self, method, args=(), kwargs=None, **_options):
        records = args[-1] if args and isinstance(args[-1], list) else []
        if len(records) > self.room:
            raise MessageTooLargeError(f"{method}: {len(records)} records")
        self.calls.append(method)
        self.received += records
        return {"begin_upload_rpc": "token", "upload_rpc": len(self.received)}.get(method, ["gone"])


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(calls, "_PART", 10)


def test_a_short_list_is_one_message():
    client = Recorder(room=100)
    assert client.sync_eliminations(range(9)) == ["gone"]
    assert client.calls == ["sync_eliminations_rpc"]


def test_a_long_list_goes_in_parts_and_is_applied_once():
    client, progress = Recorder(room=100), []
    client.sync_eliminations(range(25), on_progress=progress.append)
    assert client.calls == ["begin_upload_rpc", "upload_rpc", "upload_rpc", "upload_rpc", "sync_uploaded_rpc"]
    assert client.received == list(range(25))
    assert progress == [10, 20, 25]


@pytest.mark.parametrize("count", [1, 9, 10, 25])
@pytest.mark.parametrize("room", [1, 3, 7])
def test_parts_that_are_too_large_are_cut_smaller(count, room):
    client = Recorder(room)
    client.sync_eliminations(range(count))
    assert client.received == list(range(count))


def test_one_record_that_is_too_large_is_refused():
    client = Recorder(room=0)
    with pytest.raises(MessageTooLargeError):
        client.sync_eliminations(range(3))
    assert client.calls == ["begin_upload_rpc", "abandon_upload_rpc"]
