"""Random sequences of everything that can happen to debts, against a model of a few lines of Python."""

import itertools
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import row

from shmelim import EliminationManagerServer
from shmelim.eliminations.debts.states import KINDS, SLASH
from shmelim.shm import PrivateNamespace

HOTKEYS = ["a", "b"]
TOKENS = ["t1", "t2", "t3"]
RULES = ["drawdown", "perf_ledger"]
MOST = 2  # slashes in an hour; no hour ever passes here
STAMP_0 = row("a")["elimination_initiated_time_ms"]


class Sequences:
    """What takes several steps in a row, of which chance makes too few."""

    def slash(self, hotkey, rule, again):
        """Slash a miner and take the elimination back, before or after; then eliminate him again."""
        done = [self.remove(hotkey), self.eliminate(hotkey, [SLASH], None, 0, rule)]
        done += [self.begin(hotkey, token, rule) for token in TOKENS]
        done += [self.remove(hotkey), self.eliminate(hotkey, [SLASH], None, 10, again)]
        done += [self.settle(hotkey, SLASH, token, declined=False) for token in TOKENS]
        return [*done, self.remove(hotkey), self.eliminate(hotkey, [SLASH], None, 20, again)]

    def come_back(self, hotkey):
        """Depart and register again."""
        self.look([name for name in HOTKEYS if name != hotkey])
        self.look(HOTKEYS)


class Debt:
    """What the model knows of one debt."""

    def __init__(self, stamp, reason):
        self.state, self.token, self.due, self.attempts = "owed", None, True, 0
        self.stamp, self.reason = stamp, reason  # None: the record's that brought him back, whichever that is


class Model(Sequences):
    """What must be owed by ``(hotkey, kind, rule, registration)``, in order, and what was made, by cause."""

    def __init__(self):
        self.eliminated = set()
        self.debts = {}
        self.owed_once = set()  # (hotkey, kind)
        self.slashes = {}  # (hotkey, rule, registration) -> (stamp, by, outcome)
        self.registrations = dict.fromkeys(HOTKEYS, 0)
        self.registered, self.departed, self.looked = set(), set(), False
        self.undone = {}  # the return that was undone and waits for an attempt, by hotkey
        self.replacements = 0
        self.held, self.begun, self.released = False, set(), set()

    def eliminate(self, hotkey, kinds, behind, stamp, rule):
        if behind is not None and behind > 0:
            return "superseded"
        if hotkey in self.eliminated:
            return "already"
        self.eliminated.add(hotkey)
        for kind in KINDS:
            if kind not in kinds:
                continue
            cause = (rule, self.registrations[hotkey]) if kind == SLASH else ("", 0)
            same = self._same(hotkey) if kind == SLASH else [0]
            causes = [key for key in self.debts if key[:3] == (hotkey, kind, cause[0]) and key[3] in same]
            causes.sort(key=lambda key: self.debts[key].state == "owed")
            key = causes[0] if causes else (hotkey, kind, *cause)
            standing = self.debts.get(key)
            is_made = kind == SLASH and any((hotkey, rule, number) in self.slashes for number in same)
            if is_made and (standing is None or standing.state == "owed"):
                continue
            self.debts.pop(key, None)
            if standing is None or kind != SLASH:
                standing = Debt(stamp, rule if kind == SLASH else None)
            standing.due, standing.stamp = True, stamp
            self.debts[key] = standing
            self.owed_once.add((hotkey, kind))
        return "added"

    def _same(self, hotkey):
        """The numbers of the registration of now; a return that was none and stays counted made no other."""
        number = self.registrations[hotkey]
        return range(0 if self.undone.get(hotkey) == number else number, number + 1)

    def _take_back(self, hotkeys):
        self.eliminated -= set(hotkeys)
        for key, debt in self.debts.items():
            if key[0] in hotkeys:
                debt.due = False

    def _bring(self, hotkey, reason):
        if hotkey in self.eliminated:
            return
        self.eliminated.add(hotkey)
        slashes = [
            debt
            for key, debt in self.debts.items()
            if key[:2] == (hotkey, SLASH) and not debt.due and key[3] in self._same(hotkey)
        ]
        woken = [debt for debt in slashes if debt.reason == reason] or slashes[-1:]
        for key, debt in self.debts.items():
            if key[0] == hotkey and (key[1] != SLASH or debt in woken):
                debt.due = True
        # Meanwhile he may have traded: what may be repeated is.
        for kind in KINDS:
            if kind != SLASH and (hotkey, kind) in self.owed_once:
                self.debts.setdefault((hotkey, kind, "", 0), Debt(None, None))

    def remove(self, hotkey):
        was = hotkey in self.eliminated
        if was:
            self._take_back([hotkey])
        return was

    def sync(self, hotkeys, reason):
        self.replacements += bool(hotkeys or self.eliminated)  # nothing for nothing changes nothing
        self._take_back(self.eliminated - set(hotkeys))
        for hotkey in hotkeys:
            self._bring(hotkey, reason)

    def look(self, hotkeys):
        seen = set(hotkeys)
        if self.looked:
            for hotkey in (seen - self.registered) & self.departed:
                self.registrations[hotkey] += 1
        self.departed |= self.registered - seen
        self.registered, self.looked = seen, True

    def undo(self, hotkey):
        if hotkey not in self.departed:
            return []
        self.departed.discard(hotkey)
        self._count_down(hotkey)
        return [hotkey]

    def _count_down(self, hotkey):
        if last := self.registrations[hotkey]:
            self.registrations[hotkey] = self.undone[hotkey] = self._make_one(hotkey, last)

    def _owe_again(self, key):
        last = self.undone.get(key[0], 0)
        if last == self.registrations[key[0]]:
            self._count_down(key[0])
        elif key[3] <= last:
            self._make_one(key[0], last)

    def _make_one(self, hotkey, last):
        """Have the registrations up to one be one: of a rule's slashes one is left, if none was made."""
        slashes = {key: debt for key, debt in self.debts.items() if key[:2] == (hotkey, SLASH) and key[3] <= last}
        begun = {key: debt for key, debt in slashes.items() if debt.state != "owed"}
        made = {cause for cause in self.slashes if cause[0] == hotkey and cause[2] <= last}
        left = max([0, *(key[3] for key in begun), *(number for _, _, number in made)])
        one = {key[2]: debt for key, debt in begun.items()}
        for key in sorted(slashes.keys() - begun.keys(), key=lambda key: key[3]):
            debt = self.debts.pop(key)
            if stands := one.get(key[2]):
                stands.token = stands.token or debt.token
                if debt.due:
                    stands.due, stands.stamp = True, debt.stamp
            elif key[2] not in {rule for _, rule, _ in made}:
                one[key[2]] = self.debts[*key[:3], min(key[3], left)] = debt
        return left

    def _fitting(self, hotkey, kind, token):
        for key, debt in self.debts.items():
            if key[:2] == (hotkey, kind):
                if token is None and debt.state == "owed" and debt.due:
                    return key
                if token is not None and debt.state != "owed" and debt.token == token:
                    return key
        return None

    def settle(self, hotkey, kind, token, declined):
        if kind == SLASH:  # also of one that is owed again: how an attempt ended is so, whatever a person said
            last = (key for key, debt in self.debts.items() if key[:2] == (hotkey, kind) and debt.token == token)
            key = None if token is None else next(last, None)
        else:
            key = self._fitting(hotkey, kind, token)
        if key is None:
            return False
        debt = self.debts.pop(key)
        self.released.discard(key)
        if kind == SLASH and declined:
            self.begun.discard(debt.token)
        if kind == SLASH:
            self.slashes[hotkey, *key[2:]] = debt.stamp, "contract", "declined" if declined else "made"
        return True

    def fail(self, hotkey, kind, token, in_doubt):
        key = self._fitting(hotkey, kind, token)
        if key is None or (in_doubt and self.debts[key].state == "in_doubt"):
            return False
        debt = self.debts[key]
        debt.attempts += 1
        debt.state = "in_doubt" if in_doubt else "owed"
        if not in_doubt:
            self.begun.discard(token)
            self._owe_again(key)
        return True

    def begin(self, hotkey, token, rule):
        found = {
            key: debt for key, debt in self.debts.items() if key[:2] == (hotkey, SLASH) and rule in (None, key[2])
        }
        mine = [debt.state for debt in found.values() if debt.token == token]
        if mine:
            return "attempting" in mine
        key = next((key for key, debt in found.items() if debt.state == "owed" and debt.due), None)
        if key is None or self.held:
            return False
        if key not in self.released and len(self.begun) >= MOST:
            self.held = True
            return False
        self.begun.add(token)
        self.debts[key].state, self.debts[key].token = "attempting", token
        return True

    def resolve(self, hotkey, made, rule):
        found = [
            key
            for key, debt in self.debts.items()
            if key[:2] == (hotkey, SLASH) and rule in (None, key[2]) and debt.state != "owed"
        ]
        if len(found) > 1:
            return "several"
        if not found:
            return False
        debt = self.debts[found[0]]
        debt.state = "owed"
        if made:
            del self.debts[found[0]]
            self.released.discard(found[0])
            self.slashes[hotkey, *found[0][2:]] = debt.stamp, "hand", "made"
        else:
            self.begun.discard(debt.token)
            self._owe_again(found[0])
        return True

    def rearm(self, hotkey, rule):
        found = [key for key in self.slashes if key[0] == hotkey and rule in (None, key[1])]
        for key in found:
            del self.slashes[key]
        return bool(found)

    def release(self):
        was, self.held = self.held, False
        if was:
            self.released = {key for key, debt in self.debts.items() if debt.state == "owed" and debt.due}
            self.begun.clear()
        return was

    def restart(self):
        pass


class Subject(Sequences):
    """A server that is asked the same; each attempt has a token of its own, as attempts do."""

    stamps = itertools.count(1000)

    def __init__(self, directory):
        self.directory, self.namespace = directory, PrivateNamespace()
        self.start()

    def start(self):
        options = {"durability": "process", "files": "off", "slash_lease_s": 0}
        self.server = EliminationManagerServer(self.namespace, self.directory, **options)

    def restart(self):
        self.server.close()
        self.start()

    def eliminate(self, hotkey, kinds, behind, stamp, rule):
        expected = None if behind is None else self.server.get_replacements_rpc() - behind
        return self.server.eliminate_rpc(hotkey, row(hotkey, stamp, reason=rule), kinds, expected, rule)

    def remove(self, hotkey):
        return self.server.remove_elimination_rpc(hotkey)

    def sync(self, hotkeys, reason):
        self.server.sync_eliminations_rpc([row(hotkey, next(self.stamps), reason=reason) for hotkey in hotkeys])

    def look(self, hotkeys):
        self.server.update_metagraph_rpc(hotkeys)

    def undo(self, hotkey):
        return self.server.undo_departures_rpc([hotkey])

    def settle(self, hotkey, kind, token, declined):
        return self.server.settle_debt_rpc(hotkey, kind, token, declined=declined)

    def fail(self, hotkey, kind, token, in_doubt):
        if in_doubt and token == "t1":
            return self.server.doubt_slash_rpc(hotkey, token, "error")
        return self.server.fail_debt_rpc(hotkey, kind, "error", token, in_doubt)

    def begin(self, hotkey, token, rule):
        return self.server.begin_slash_rpc(hotkey, token, rule, at_ms=0, most_per_hour=MOST)

    def resolve(self, hotkey, made, rule):
        try:
            return self.server.resolve_slash_rpc(hotkey, made, rule)
        except ValueError:
            return "several"

    def rearm(self, hotkey, rule):
        return self.server.rearm_slash_rpc(hotkey, rule)

    def release(self):
        return self.server.release_money_rpc()


hotkey = st.sampled_from(HOTKEYS)
no = st.just(value=False)
token = st.sampled_from(TOKENS)
behind = st.sampled_from([None, 0, 0, 1])
stamp = st.sampled_from([0, 10, 20])
rule = st.sampled_from(RULES)
any_rule = st.sampled_from([None, *RULES])
repeatable = st.sampled_from(KINDS[:2])
# Some of it about one miner and one attempt, so that few steps lead far.
step = st.one_of(
    st.tuples(st.just("eliminate"), hotkey, st.lists(st.sampled_from(KINDS)), behind, stamp, rule),
    st.tuples(st.just("eliminate"), hotkey, st.just(list(KINDS)), st.none(), stamp, rule),
    st.tuples(st.just("remove"), hotkey),
    st.tuples(st.just("sync"), st.lists(hotkey, unique=True, min_size=1), rule),
    st.tuples(st.just("look"), st.lists(hotkey, unique=True, min_size=1)),
    st.tuples(st.just("come_back"), hotkey),
    st.tuples(st.just("undo"), hotkey),
    st.tuples(st.just("settle"), hotkey, repeatable, st.none(), no),
    st.tuples(st.just("settle"), hotkey, st.just(SLASH), token, st.booleans()),
    st.tuples(st.just("settle"), hotkey, st.just(SLASH), st.none(), no),
    st.tuples(st.just("fail"), hotkey, repeatable, st.none(), no),
    st.tuples(st.just("fail"), hotkey, st.just(SLASH), token, st.booleans()),
    st.tuples(st.just("fail"), hotkey, st.just(SLASH), st.none(), no),
    st.tuples(st.just("begin"), hotkey, token, any_rule),
    st.tuples(st.just("begin"), hotkey, token, any_rule),
    st.tuples(st.just("begin"), st.just("a"), st.just("t1"), st.none()),
    st.tuples(st.just("slash"), hotkey, rule, rule),
    st.tuples(st.just("slash"), hotkey, rule, rule),
    st.tuples(st.just("fail"), st.just("a"), st.just(SLASH), st.just("t1"), no),
    st.tuples(st.just("remove"), st.just("a")),
    st.tuples(st.just("resolve"), hotkey, st.booleans(), any_rule),
    st.tuples(st.just("rearm"), hotkey, any_rule),
    st.tuples(st.just("release")),
    st.tuples(st.just("restart")),
)


def check(server, model):
    stamps = {key: debt.stamp for key, debt in model.debts.items()}
    assert server.get_replacements_rpc() == model.replacements
    assert server.get_eliminated_hotkeys_rpc() == model.eliminated
    found = server.get_debts_rpc()
    keys = [(debt["hotkey"], debt["kind"], debt["rule"], debt["registration"]) for debt in found]
    assert {
        key: [
            debt["state"],
            debt["attempt"],
            debt["due"],
            debt["attempts"],
            None if stamps.get(key) is None else debt["eliminated_ms"] - STAMP_0,
            debt["reason"],
        ]
        for key, debt in zip(keys, found, strict=True)
    } == {
        key: [
            debt.state,
            None if debt.state == "owed" else debt.token,
            debt.due,
            debt.attempts,
            debt.stamp,
            debt.reason,
        ]
        for key, debt in model.debts.items()
    }
    made = server.get_slashes_rpc()
    assert {
        (s["hotkey"], s["rule"], s["registration"]): (s["eliminated_ms"] - STAMP_0, s["by"], s["outcome"])
        for s in made
    } == model.slashes
    for name in HOTKEYS:
        assert server.get_debts_rpc(name) == [debt for debt in found if debt["hotkey"] == name]
        assert server.get_slashes_rpc(name) == [slash for slash in made if slash["hotkey"] == name]
    health = server.health_check_rpc()
    assert health["num_debts"] == len(found)
    doubtful = [debt["hotkey"] for debt in found if debt["state"] == "in_doubt"]
    assert sorted(health["slashes_in_doubt"]) == sorted(doubtful)
    assert (server.get_money_held_rpc() is not None) is model.held
    assert ("money_held" in {problem["name"] for problem in health["problems"]}) is model.held
    for debt in found:
        # Whoever is not eliminated owes nothing that is due.
        assert not debt["due"] or debt["hotkey"] in model.eliminated


SETTINGS = settings(suppress_health_check=[HealthCheck.too_slow])


@settings(SETTINGS, max_examples=40)
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
        finally:
            subject.server.close()
