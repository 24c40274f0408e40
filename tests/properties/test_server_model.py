"""Random sequences of all changes, with restarts in between, against a model of a few lines of Python."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import row, state_in_files, state_in_store, state_in_table

from shmelim import EliminationManagerServer
from shmelim.shm import PrivateNamespace

HOTKEYS = [f"h{n}" for n in range(14)]
HOTKEYS[0] = "ü" * 30
HOTKEYS[1] = "x" * 255


class Model:
    """What the state must be."""

    def __init__(self):
        self.eliminated = {}
        self.departed = {}
        self.registered = set()
        self.losses = []  # who was lost in one look, and of how many
        self.unproved = set()  # whom only a look that was not believed has shown
        self.believed = None  # how many there were before it

    def add(self, hotkey, stamp):
        new = hotkey not in self.eliminated
        self.eliminated[hotkey] = row(hotkey, stamp)
        return new

    def remove(self, hotkey):
        return self.eliminated.pop(hotkey, None) is not None

    def delete(self, hotkeys):
        return [hotkey for hotkey in dict.fromkeys(hotkeys) if self.remove(hotkey)]

    def sync(self, hotkeys, stamp):
        gone = [hotkey for hotkey in self.eliminated if hotkey not in hotkeys]
        self.delete(gone)
        for hotkey in hotkeys:
            self.add(hotkey, stamp)
        return gone

    def clear(self):
        self.eliminated.clear()

    def metagraph(self, hotkeys):
        seen, before = set(hotkeys), self.registered - self.unproved
        lost = sorted(before - seen)
        size = len(before) if self.believed is None else self.believed
        # All of it is within one day.
        sizes = [len(before), *(size for _, size in self.losses)]
        gone = set(lost).union(*(earlier for earlier, _ in self.losses)) - seen
        if lost and (
            not seen
            or (len(lost) > 10 and 4 * len(lost) >= size)
            or (self.losses and len(gone) > 10 and 4 * len(gone) >= max(sizes))
        ):
            self.registered, self.unproved, self.believed = seen | before, seen - before, size
            return []
        self.registered, self.unproved, self.believed = seen, set(), None
        if lost:
            self.losses.append((set(lost), len(before)))
        new = [hotkey for hotkey in lost if hotkey not in self.departed]
        self.departed |= dict.fromkeys(new)
        return new


class Subject:
    """A server that can be started again."""

    def __init__(self, directory, durability):
        self.directory, self.durability = directory, durability
        self.namespace = PrivateNamespace()
        self.start()

    def start(self):
        self.server = EliminationManagerServer(self.namespace, self.directory, durability=self.durability)

    def restart(self):
        self.server.close()
        self.start()

    def add(self, hotkey, stamp):
        return self.server.add_elimination_rpc(hotkey, row(hotkey, stamp))

    def append(self, hotkey, stamp):
        record = row(hotkey, stamp)
        return self.server.append_elimination_row_rpc(
            hotkey,
            record["dd"],
            record["reason"],
            record["elimination_initiated_time_ms"],
            record["price_info"],
            record["return_info"],
        )

    def remove(self, hotkey):
        return self.server.remove_elimination_rpc(hotkey)

    def delete(self, hotkeys):
        return self.server.delete_eliminations_rpc(hotkeys)

    def sync(self, hotkeys, stamp):
        return self.server.sync_eliminations_rpc([row(hotkey, stamp) for hotkey in hotkeys])

    def upload(self, hotkeys, stamp):
        token = self.server.begin_upload_rpc()
        middle = len(hotkeys) // 2
        self.server.upload_rpc(token, [row(hotkey, stamp) for hotkey in hotkeys[:middle]])
        self.server.upload_rpc(token, [row(hotkey, stamp) for hotkey in hotkeys[middle:]])
        return self.server.sync_uploaded_rpc(token)

    def clear(self):
        self.server.clear_eliminations_rpc()

    def metagraph(self, hotkeys):
        return self.server.update_metagraph_rpc(hotkeys)

    def refuse(self, hotkey, stamp):
        try:
            self.server.sync_eliminations_rpc([row(hotkey, stamp), {"dd": 0.5}])
        except ValueError:
            return
        raise AssertionError


hotkey = st.sampled_from(HOTKEYS)
hotkeys = st.lists(hotkey, unique=True)
stamp = st.integers(0, 3)
step = st.one_of(
    st.tuples(st.just("add"), hotkey, stamp),
    st.tuples(st.just("append"), hotkey, stamp),
    st.tuples(st.just("remove"), hotkey),
    st.tuples(st.just("delete"), hotkeys),
    st.tuples(st.just("sync"), hotkeys, stamp),
    st.tuples(st.just("upload"), hotkeys, stamp),
    st.tuples(st.just("clear")),
    st.tuples(st.just("metagraph"), hotkeys),
    st.tuples(st.just("metagraph"), st.sets(st.sampled_from(HOTKEYS[4:])).map(lambda gone: [*HOTKEYS[:4], *gone])),
    st.tuples(st.just("metagraph"), st.just(HOTKEYS)),
    st.tuples(st.just("refuse"), hotkey, stamp),
    st.tuples(st.just("restart")),
)
SAME_AS = {"append": "add", "upload": "sync"}


def check(server, model):
    reader = server.reader
    assert list(reader.items()) == list(model.eliminated.items())
    assert list(reader.get_departed_hotkeys()) == list(model.departed)
    assert reader.snapshot().registered == model.registered
    assert (len(reader), reader.num_departed_hotkeys) == (len(model.eliminated), len(model.departed))
    for name in HOTKEYS:
        assert reader.get_elimination(name) == model.eliminated.get(name)
        flags = (name in model.eliminated) + 2 * (name in model.departed) + 4 * (name in model.registered)
        assert reader.status(name) == flags
    assert reader.are_eliminated(HOTKEYS).tolist() == [name in model.eliminated for name in HOTKEYS]


def check_history(server, model):
    """Played back, the history gives the state."""
    eliminated, departed = {}, set()
    for event in reversed(server.get_history_rpc(limit=None)):
        name = event["hotkey"]
        if event["action"] in ("add", "update"):
            assert eliminated.get(name) == event["old"]
            assert (event["old"] is None) == (event["action"] == "add")
            eliminated[name] = event["new"]
        elif event["action"] == "remove":
            assert eliminated.pop(name) == event["old"]
        elif event["action"] == "depart":
            departed.add(name)
    assert eliminated == model.eliminated
    assert departed == set(model.departed)


SETTINGS = settings(suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.timeout(900)  # some 5 s alone; beside others, late in a long run, minutes were seen
@settings(SETTINGS, max_examples=20)
@given(st.lists(step, max_size=40))
def test_table_store_files_and_history_equal_the_model(steps):
    play(steps)


@pytest.mark.long
@settings(SETTINGS, max_examples=3000)
@given(st.lists(step, min_size=10, max_size=80))
def test_table_store_files_and_history_equal_the_model_at_length(steps):
    play(steps)


def play(steps):
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        subject, model = Subject(directory, "process"), Model()
        try:
            for name, *arguments in steps:
                found = getattr(subject, name)(*arguments)
                if name not in ("refuse", "restart"):
                    assert found == getattr(model, SAME_AS.get(name, name))(*arguments), (name, arguments)
                check(subject.server, model)
            check_history(subject.server, model)
            subject.server.save_eliminations_rpc()
            state = state_in_table(subject.server.reader)
            assert state_in_files(directory) == state.without_registered()
        finally:
            subject.server.close()
        assert state_in_store(directory) == state
        subject.start()
        try:
            check(subject.server, model)
        finally:
            subject.server.close()
