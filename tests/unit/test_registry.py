"""What is remembered of a name outside of its state directory."""

import os
import stat
import threading
from pathlib import Path

import msgspec
import pytest
from waiting import until

from shmelim.eliminations.starting.registry import Memory, Registry, Remembering, registry_base
from shmelim.errors import StoreError
from shmelim.system.problems import Problems

MEMORY = Memory("ab" * 16, "/state", 7, 3, 2, 1_700_000_000_000)


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "deep" / "registry", "a-name")


def test_what_is_remembered_is_recalled(registry):
    assert registry.recall() is None
    registry.remember(MEMORY)
    assert Registry(registry.path.parent, "a-name").recall() == MEMORY
    assert Registry(registry.path.parent, "another").recall() is None
    assert registry.forget()
    assert registry.recall() is None
    assert not registry.forget()


def test_it_is_private(registry):
    before = os.umask(0)
    try:
        registry.remember(MEMORY)
    finally:
        os.umask(before)
    assert stat.S_IMODE(registry.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(registry.path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b'{"store_id": 7}', b'{"store_id": "\xff"}'),
        *(
            msgspec.json.encode({**msgspec.structs.asdict(MEMORY), name: value})
            for name, value in (("store_id", "zz"), ("store_id", "a"), ("commit", -1), ("at_ms", 1 << 62))
        ),
        msgspec.json.encode(MEMORY).replace(b'"commit":7', b'"commit":99999999999999999999999'),
    ],
)
def test_what_cannot_be_understood_counts_as_missing_and_says_so(registry, content, caplog):
    registry.remember(MEMORY)
    registry.path.write_bytes(content)
    assert registry.recall() is None
    assert str(registry.path) in caplog.text


def test_what_cannot_be_used_is_an_error_that_names_it(tmp_path):
    (tmp_path / "directory" / "a.json").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"directory/a\.json is a directory"):
        Registry(tmp_path / "directory", "a").recall()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/a\.json cannot be written") as caught:
        Registry(tmp_path / "file", "a").remember(MEMORY)
    assert caught.value.hint


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(StoreError, match="is a pipe"):
        Registry(tmp_path, "a").recall()


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("SHMELIM_REGISTRY", str(tmp_path))
    assert registry_base() == registry_base(given=True) == tmp_path
    assert registry_base("given") == Path("given").absolute()
    assert registry_base(None) is registry_base(given=False) is None
    monkeypatch.setenv("SHMELIM_REGISTRY", "off")
    assert registry_base() is None
    for unset in ("", None):
        monkeypatch.setenv("SHMELIM_REGISTRY", "")
        if unset is None:
            monkeypatch.delenv("SHMELIM_REGISTRY")
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        # No name can begin with a dot.
        assert registry_base() == tmp_path / "state" / "shmelim" / ".registry"


class Served:
    """A store that is served, as far as the registry cares."""

    def __init__(self):
        self.commit = 1
        self.durable = 0

    def memory(self):
        return Memory("ab" * 16, "/state", self.commit, 3, 2, 0)

    def sync(self):
        self.durable = self.commit


@pytest.fixture
def served():
    return Served()


@pytest.fixture
def problems():
    return Problems()


@pytest.fixture
def remembering(registry, served, problems):
    made = Remembering(registry, served.memory, lambda: served.commit, served.sync, problems)
    made.start()
    yield made
    made.stop()


@pytest.mark.usefixtures("remembering")
def test_it_follows_what_is_served(registry, served):
    assert registry.recall().commit == 1
    served.commit = 2
    until(lambda: registry.recall().commit == 2)
    assert served.durable == 2


def test_it_is_exact_after_the_end(registry, served, remembering):
    served.commit = 5
    remembering.stop()
    assert registry.recall().commit == 5
    assert not [thread for thread in threading.enumerate() if thread.name == "shmelim-registry"]
    remembering.stop()


@pytest.mark.usefixtures("remembering")
def test_what_keeps_it_from_following_is_a_named_problem_while_it_lasts(registry, served, problems):
    registry.path.unlink()
    registry.path.parent.rmdir()
    registry.path.parent.write_text("in the way")
    served.commit = 2
    until(lambda: problems.stands("registry_behind"))
    (problem,) = problems.standing()
    assert str(registry.path) in problem.text
    assert problem.remedy
    registry.path.parent.unlink()
    until(lambda: not problems.stands("registry_behind"))
    assert registry.recall().commit == 2
