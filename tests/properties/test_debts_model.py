"""Random sequences of everything that can happen to debts, against a model of a few lines of Python."""

import math
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import row

from shmelim import EliminationManagerServer
from shmelim.eliminations.debts.states import KINDS, SLASH
from shmelim.shm import PrivateNamespace

HOTKEYS = ["a", "b"]
TOKENS = ["t1", "t2"]
STAMP_0 = row("a")["elimination_initiated_time_ms"]


class Sequences:
    """What takes several steps in a row, of which chance makes too few."""

    def slash(self, hotkey, stamp, again, within):
        """Slash a miner and take the elimination back, before or after; then eliminate him again."""
        done = [self.remove(hotkey), self.eliminate(hotkey, [SLASH], None, stamp, within)]
        done += [self.begin(hotkey, token) for token in TOKENS]
        if within is None:
            # The slash that was begun stands for the second one too.
            done += [self.remove(hotkey), self.eliminate(hotkey, [SLASH], None, again, within)]
        done += [self.settle(hotkey, SLASH, token) for token in TOKENS]
        return [*done, self.remove(hotkey), self.eliminate(hotkey, [SLASH], None, again, within)]


class Model(Sequences):
    """What must be owed, ``{(hotkey, kind): [state, token, due, attempts, stamp]}`` in order, and what was made.

    The stamp is that of the elimination; a slash that was made is ``{hotkey: (stamp, by)}``.
    """

    def __init__(self):
        self.eliminated = {}  # with the stamp of each record
        self.debts = {}
        self.slashes = {}
        self.replacements = 0

    def eliminate(self, hotkey, kinds, behind, stamp, within):
        if behind is not None and behind > 0:
            return "superseded"
        if hotkey in self.eliminated:
            return "already"
        self.eliminated[hotkey] = stamp
        for kind in KINDS:
            if kind in kinds and not (kind == SLASH and self._was_made(hotkey, stamp, within)):
                debt = self.debts.pop((hotkey, kind), ["owed", None, True, 0, stamp])
                debt[2], debt[4] = True, stamp
                self.debts[hotkey, kind] = debt
        return "added"

    def _was_made(self, hotkey, stamp, within):
        made, _ = self.slashes.get(hotkey, (math.inf, None))
        return within is not None and abs(made - stamp) < within

    def _take_back(self, hotkeys):
        for hotkey in hotkeys:
            self.eliminated.pop(hotkey, None)
        for key, debt in list(self.debts.items()):
            if key[0] in hotkeys:
                debt[2] = False
                if debt[0] == "owed":
                    del self.debts[key]

    def remove(self, hotkey):
        was = hotkey in self.eliminated
        self._take_back([hotkey])
        return was

    def sync(self, hotkeys):
        listed = dict.fromkeys(hotkeys, 0)
        self.replacements += listed != self.eliminated  # the same list again changes nothing
        self._take_back(self.eliminated.keys() - listed.keys())
        self.eliminated = listed

    def _fitting(self, hotkey, kind, token):
        debt = self.debts.get((hotkey, kind))
        if debt is None or (debt[0], debt[1]) != (("owed", debt[1]) if token is None else ("attempting", token)):
            return None
        return debt

    def settle(self, hotkey, kind, token):
        if self._fitting(hotkey, kind, token) is None or (kind == SLASH and token is None):
            return False
        stamp = self.debts.pop((hotkey, kind))[4]
        if kind == SLASH:
            self.slashes[hotkey] = stamp, "contract"
        return True

    def fail(self, hotkey, kind, token, in_doubt):
        debt = self._fitting(hotkey, kind, token)
        if debt is None:
            return False
        debt[3] += 1
        debt[0] = "in_doubt" if in_doubt else "owed"
        if not in_doubt and not debt[2]:
            del self.debts[hotkey, kind]
        return True

    def begin(self, hotkey, token):
        debt = self.debts.get((hotkey, SLASH))
        if debt is None or debt[0] == "in_doubt":
            return False
        if debt[0] == "owed" and debt[1] != token:
            debt[:2] = "attempting", token
            return True
        return debt[:2] == ["attempting", token]

    def resolve(self, hotkey, made):
        debt = self.debts.get((hotkey, SLASH))
        if debt is None or debt[0] == "owed":
            return False
        debt[0] = "owed"
        if made:
            self.slashes[hotkey] = debt[4], "hand"
        if made or not debt[2]:
            del self.debts[hotkey, SLASH]
        return True

    def restart(self):
        pass


class Subject(Sequences):
    """A server that is asked the same."""

    def __init__(self, directory):
        self.directory, self.namespace = directory, PrivateNamespace()
        self.start()

    def start(self):
        self.server = EliminationManagerServer(self.namespace, self.directory, durability="process", files="off")

    def restart(self):
        self.server.close()
        self.start()

    def eliminate(self, hotkey, kinds, behind, stamp, within):
        expected = None if behind is None else self.server.get_replacements_rpc() - behind
        return self.server.eliminate_rpc(hotkey, row(hotkey, stamp), kinds, expected, within)

    def remove(self, hotkey):
        return self.server.remove_elimination_rpc(hotkey)

    def sync(self, hotkeys):
        self.server.sync_eliminations_rpc([row(hotkey) for hotkey in hotkeys])

    def settle(self, hotkey, kind, token):
        return self.server.settle_debt_rpc(hotkey, kind, token)

    def fail(self, hotkey, kind, token, in_doubt):
        if in_doubt and token == "t1":
            return self.server.doubt_slash_rpc(hotkey, token, "error")
        return self.server.fail_debt_rpc(hotkey, kind, "error", token, in_doubt)

    def begin(self, hotkey, token):
        return self.server.begin_slash_rpc(hotkey, token)

    def resolve(self, hotkey, made):
        return self.server.resolve_slash_rpc(hotkey, made)


hotkey = st.sampled_from(HOTKEYS)
no = st.just(value=False)
token = st.sampled_from(TOKENS)
behind = st.sampled_from([None, 0, 0, 1])
stamp = st.sampled_from([0, 10, 20])
within = st.sampled_from([None, 0, 10, 11])
repeatable = st.sampled_from(KINDS[:2])
# Some of it about one miner and one attempt, so that few steps lead far.
step = st.one_of(
    st.tuples(
        st.just("eliminate"),
        hotkey,
        st.lists(st.sampled_from(KINDS)),
        st.sampled_from([None, 0, 0, 1]),
        stamp,
        within,
    ),
    st.tuples(st.just("eliminate"), hotkey, st.just(list(KINDS)), st.none(), stamp, within),
    st.tuples(st.just("remove"), hotkey),
    st.tuples(st.just("sync"), st.lists(hotkey, unique=True)),
    st.tuples(st.just("settle"), hotkey, repeatable, st.none()),
    st.tuples(st.just("settle"), hotkey, st.just(SLASH), token | st.none()),
    st.tuples(st.just("fail"), hotkey, repeatable, st.none(), no),
    st.tuples(st.just("fail"), hotkey, st.just(SLASH), token, st.booleans()),
    st.tuples(st.just("fail"), hotkey, st.just(SLASH), st.none(), no),
    st.tuples(st.just("begin"), hotkey, token),
    st.tuples(st.just("begin"), hotkey, token),
    st.tuples(st.just("begin"), st.just("a"), st.just("t1")),
    st.tuples(st.just("slash"), hotkey, stamp, stamp, within),
    st.tuples(st.just("slash"), hotkey, stamp, stamp, within),
    st.tuples(st.just("fail"), st.just("a"), st.just(SLASH), st.just("t1"), no),
    st.tuples(st.just("remove"), st.just("a")),
    st.tuples(st.just("resolve"), hotkey, st.booleans()),
    st.tuples(st.just("restart")),
)


def check(server, model):
    assert server.get_replacements_rpc() == model.replacements
    assert server.get_eliminated_hotkeys_rpc() == model.eliminated.keys()
    found = server.get_debts_rpc()
    assert [
        (
            (debt["hotkey"], debt["kind"]),
            [debt["state"], debt["attempt"], debt["due"], debt["attempts"], debt["eliminated_ms"] - STAMP_0],
        )
        for debt in found
    ] == [
        (key, [state, None if state == "owed" else token, due, attempts, stamp])
        for key, (state, token, due, attempts, stamp) in model.debts.items()
    ]
    made = server.get_slashes_rpc()
    assert {s["hotkey"]: (s["eliminated_ms"] - STAMP_0, s["by"]) for s in made} == model.slashes
    for name in HOTKEYS:
        assert server.get_debts_rpc(name) == [debt for debt in found if debt["hotkey"] == name]
        assert server.get_slashes_rpc(name) == [slash for slash in made if slash["hotkey"] == name]
    health = server.health_check_rpc()
    assert health["num_debts"] == len(found)
    assert health["slashes_in_doubt"] == [debt["hotkey"] for debt in found if debt["state"] == "in_doubt"]
    for debt in found:
        # Whoever is not eliminated owes nothing but what may have been made already.
        assert debt["state"] != "owed" or debt["hotkey"] in model.eliminated


def check_history(server, model):
    """Played back, the history gives the debts that stand."""
    standing = set()
    for event in reversed(server.get_history_rpc(limit=None)):
        name, note = event["hotkey"], event["note"]
        match event["action"]:
            case "owe":
                new = {(name, kind) for kind in note.split(", ") if kind in KINDS}
                assert not new & standing
                standing |= new
            case "cancel":
                standing -= {(name, kind) for kind in note.partition(":")[0].split(", ")}
            case "settle":
                standing.remove((name, note.partition(",")[0]))
            case "resolve" if note.endswith(": made"):
                standing.remove((name, SLASH))
    assert standing == set(model.debts)


SETTINGS = settings(suppress_health_check=[HealthCheck.too_slow])


@settings(SETTINGS, max_examples=60)
@given(st.lists(step, min_size=30, max_size=60))
def test_debts_equal_the_model(steps):
    play(steps)


@pytest.mark.long
@settings(SETTINGS, max_examples=3000)
@given(st.lists(step, min_size=30, max_size=150))
def test_debts_equal_the_model_at_length(steps):
    play(steps)


def play(steps):
    with tempfile.TemporaryDirectory() as directory:
        subject, model = Subject(directory), Model()
        try:
            for name, *arguments in steps:
                found = getattr(subject, name)(*arguments)
                assert found == getattr(model, name)(*arguments), (name, arguments)
                check(subject.server, model)
            check_history(subject.server, model)
        finally:
            subject.server.close()
