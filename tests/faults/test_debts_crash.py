"""kill -9 at every line of each step of a debt: afterwards it was taken whole, with its event, or not at all.

And races for one slash: of all who want to make it, one may.
"""

import os
import random
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
from crashing import Child, Counter, at_line, kill_self, package_files
from serving import row, state_in_table
from waiting import until

from shmelim import EliminationManagerServer
from shmelim.eliminations.debts.states import KINDS, POSITIONS, SLASH, new_attempt
from shmelim.eliminations.store.store import Store
from shmelim.errors import StoreError
from shmelim.shm import SharedNamespace

ROUNDS = 2000
_TRACED = package_files(
    "eliminations/state/changes.py",
    "eliminations/state/thread.py",
    "eliminations/store/database.py",
    "eliminations/state/debt_book.py",
    "eliminations/store/history.py",
    "eliminations/store/store.py",
)


def _fill(server):
    """One miner in each state that a step can begin from."""
    server.sync_eliminations_rpc([row("other")])
    for hotkey in ("owing", "failed", "begun", "doubted", "gone", "slashed"):
        assert server.eliminate_rpc(hotkey, row(hotkey), list(KINDS)) == "added"
        if hotkey != "owing":
            assert server.begin_slash_rpc(hotkey, "one")
    assert server.fail_debt_rpc("failed", SLASH, "refused", "one")
    assert server.doubt_slash_rpc("doubted", "one", "timeout")
    assert server.remove_elimination_rpc("gone")
    assert server.settle_debt_rpc("slashed", SLASH, "one")
    assert server.remove_elimination_rpc("slashed")


STEPS = {
    "eliminate": lambda server: server.eliminate_rpc("new", row("new"), list(KINDS), 1),
    "eliminate again": lambda server: server.eliminate_rpc("gone", row("gone"), list(KINDS), 1),
    "eliminate the slashed": lambda server: server.eliminate_rpc("slashed", row("slashed"), list(KINDS), 1),
    "eliminate for another rule": lambda server: server.eliminate_rpc("gone", row("gone"), [SLASH], 1, "drawdown"),
    "come back": lambda server: server.update_metagraph_rpc(["other", "gone", "slashed"]) == [],
    "declined": lambda server: server.settle_debt_rpc("begun", SLASH, "one", declined=True, answer="False"),
    "late answer": lambda server: server.settle_debt_rpc("doubted", SLASH, "one"),
    "rearm": lambda server: server.rearm_slash_rpc("slashed"),
    "hold": lambda server: server.begin_slash_rpc("owing", "two", at_ms=0, most_per_hour=0) is False,
    "settle": lambda server: server.settle_debt_rpc("owing", POSITIONS),
    "fail": lambda server: server.fail_debt_rpc("owing", POSITIONS, "no price"),
    "begin": lambda server: server.begin_slash_rpc("owing", "two"),
    "begin again": lambda server: server.begin_slash_rpc("failed", "two"),
    "settle slash": lambda server: server.settle_debt_rpc("begun", SLASH, "one"),
    "not made": lambda server: server.fail_debt_rpc("begun", SLASH, "refused", "one"),
    "not made, not due": lambda server: server.fail_debt_rpc("gone", SLASH, "refused", "one"),
    "fail in doubt": lambda server: server.fail_debt_rpc("begun", SLASH, "timeout", "one", in_doubt=True),
    "doubt": lambda server: server.doubt_slash_rpc("begun", "one", "its process is gone"),
    "resolve as made": lambda server: server.resolve_slash_rpc("doubted", made=True),
    "resolve as not made": lambda server: server.resolve_slash_rpc("doubted", made=False),
    "remove": lambda server: server.remove_elimination_rpc("doubted"),
    "sync": lambda server: server.sync_eliminations_rpc([row("other", 1), row("begun")]),
    "clear": lambda server: server.clear_eliminations_rpc(),
}


def _state(server):
    """All that a step may change, but for times."""
    debts = server.get_debts_rpc()
    for debt in debts:
        assert debt.pop("since_ms") > 0
        assert (debt.pop("in_doubt_since_ms") is not None) == (debt["state"] == "in_doubt")
    slashes = server.get_slashes_rpc()
    for slash in slashes:
        assert slash.pop("made_ms") > 0
    # The one stands where the other went: there is no moment with both, or with neither.
    told = {}
    for event in reversed(server.get_history_rpc(limit=None)):
        if event["action"] == "rearm":
            del told[event["hotkey"]]
        elif _is_made(event):
            told[event["hotkey"]] = event["action"]
    assert {slash["hotkey"]: slash["by"] for slash in slashes} == {
        hotkey: "contract" if action == "settle" else "hand" for hotkey, action in told.items()
    }
    causes = [
        {(d["hotkey"], d["rule"], d["registration"]) for d in found if "kind" not in d or d["kind"] == SLASH}
        for found in (slashes, debts)
    ]
    assert not causes[0] & causes[1]
    events = [(event["action"], event["hotkey"], event["note"]) for event in server.get_history_rpc(limit=None)]
    held = server.get_money_held_rpc()
    return (
        state_in_table(server.reader),
        debts,
        slashes,
        events,
        server.get_replacements_rpc(),
        held and held["why"],
    )


def _is_made(event):
    note = event["note"] or ""
    return note.startswith(SLASH) and (event["action"] == "settle" or note.endswith(": made"))


def _open(directory):
    return EliminationManagerServer(None, directory, durability="process", files="off", slash_lease_s=0)


class Crash:
    """One step, taken again and again by a server that dies at another line each time."""

    def __init__(self, tmp_path, step):
        self.tmp_path, self.step = tmp_path, STEPS[step]
        self.prepared = tmp_path / "prepared"
        with _open(self.prepared) as server:
            _fill(server)
            self.before = _state(server)
        shutil.copytree(self.prepared, tmp_path / "after")
        with _open(tmp_path / "after") as server:
            result = self.step(server)
            assert result is not False
            assert result not in ("already", "superseded")
            self.after = _state(server)
        assert self.before != self.after

    def at(self, number):
        """Die at a line, and check what is left; how many lines there were, and whether the step was taken."""
        directory = self.tmp_path / f"state-{number}"
        shutil.copytree(self.prepared, directory)
        acknowledged, lines = Counter(), Counter()

        def run():
            server = _open(directory)
            at_line(number, kill_self, files=_TRACED, lines=lines)
            self.step(server)
            acknowledged.value = 1
            kill_self()

        with Child(run) as child:
            assert child.wait() == -9
        with _open(directory) as server:
            left = _state(server)
        assert left in ([self.after] if acknowledged.value else [self.before, self.after]), f"line {number}"
        shutil.rmtree(directory)
        return lines.value, left == self.after

    def at_all(self, numbers):
        taken = [self.at(number)[1] for number in numbers]
        # Once it is taken at some line, it is at every later one.
        assert taken == sorted(taken)
        return taken


@pytest.mark.parametrize("step", STEPS)
def test_at_some_lines_of_a_step(tmp_path, step):
    crash = Crash(tmp_path, step)
    lines, taken = crash.at(1 << 30)
    assert lines > 50
    assert taken
    stride = lines // 4
    offset = random.randrange(1, stride + 1)
    print(f"{lines} lines, every {stride}th from {offset}")
    crash.at_all(range(offset, lines + 1, stride))


@pytest.mark.long
@pytest.mark.parametrize("step", STEPS)
def test_at_every_line_of_a_step(tmp_path, step):
    crash = Crash(tmp_path, step)
    lines, _ = crash.at(1 << 30)
    taken = crash.at_all(range(1, lines + 1))
    assert not taken[0]
    assert taken[-1]


# ------------------------------------------------------------------ power cuts


def test_a_slash_is_begun_on_disk_whatever_the_durability(server, monkeypatch):
    synced = []
    sync = os.fsync

    def watch(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    server.eliminate_rpc("a", row("a"), [SLASH])
    assert "shmelim.sqlite-wal" not in synced
    for _ in range(2):
        synced.clear()
        assert server.begin_slash_rpc("a", "one")
        assert "shmelim.sqlite-wal" in synced
        assert server.state_dir.name in synced
    synced.clear()
    assert not server.begin_slash_rpc("a", "two")
    assert "shmelim.sqlite-wal" not in synced


def test_a_slash_that_may_not_be_on_disk_is_not_begun(server, monkeypatch):
    server.eliminate_rpc("a", row("a"), [SLASH])

    def fail(_path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("shmelim.eliminations.store.database.sync_file", fail)
        with pytest.raises(StoreError, match=r"shmelim\.sqlite.*Input/output error"):
            server.begin_slash_rpc("a", "one")
    assert server.begin_slash_rpc("a", "one"), "it can be repeated"


# ------------------------------------------------------------------ races


def _at_once(*works):
    """Run functions in threads that start together; their results."""
    start = threading.Barrier(len(works))
    results = [None] * len(works)

    def run(index):
        start.wait(60)
        results[index] = works[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def server(tmp_path, new_name):
    name = new_name()
    options = {"durability": "process", "slash_lease_s": 0}
    with EliminationManagerServer(SharedNamespace(name), tmp_path / "state", **options) as server:
        yield server


def test_of_many_attempts_at_once_one_gets_the_slash(server):
    width = 6
    for number in range(40):
        hotkey = f"h{number}"
        server.eliminate_rpc(hotkey, row(hotkey), [SLASH])
        tokens = [new_attempt() for _ in range(width)]
        got = _at_once(*(partial(server.begin_slash_rpc, hotkey, token) for token in tokens))
        assert sorted(got) == [False] * (width - 1) + [True]
        (debt,) = server.get_debts_rpc(hotkey)
        assert debt["attempt"] == tokens[got.index(True)]


def _until_each_came_first(race):
    """Run a race, which returns who came first, until there were two winners."""
    winners = set()
    for number in range(ROUNDS):
        winners.add(race(number))
        if len(winners) == 2:
            return
    pytest.fail(f"of {ROUNDS} races all were won by {winners}")


def test_a_settlement_and_a_doubt_at_once(server):
    def race(number):
        hotkey = f"h{number}"
        server.eliminate_rpc(hotkey, row(hotkey), [SLASH])
        server.begin_slash_rpc(hotkey, "one")
        works = [
            partial(server.settle_debt_rpc, hotkey, SLASH, "one"),
            partial(server.doubt_slash_rpc, hotkey, "one", "x"),
        ]
        # The last to start is the first to go on.
        settled, doubted = _at_once(*works) if number % 2 else reversed(_at_once(*reversed(works)))
        assert settled, "an answer settles a doubt, too"
        assert server.get_debts_rpc(hotkey) == []
        return doubted

    _until_each_came_first(race)


def test_an_elimination_and_a_sync_at_once(server):
    """Whichever came first: what was decided before the sync is not there after it."""

    def race(number):
        server.sync_eliminations_rpc([row("c")])  # from which the other one differs, or it would supersede nothing
        before = server.get_replacements_rpc()
        works = [
            partial(server.eliminate_rpc, "a", row("a"), list(KINDS), before),
            partial(server.sync_eliminations_rpc, [row("b", number)]),
        ]
        outcome, _ = _at_once(*works) if number % 2 else reversed(_at_once(*reversed(works)))
        assert server.get_eliminated_hotkeys_rpc() == {"b"}
        assert not [debt for debt in server.get_debts_rpc() if debt["due"]]
        return outcome

    _until_each_came_first(race)


def test_debts_share_commits_with_other_changes(server, monkeypatch):
    """Held up behind one commit, all that waits goes into the next: steps that fit, that do not, and that fail."""
    server.eliminate_rpc("a", row("a"), list(KINDS))
    server.eliminate_rpc("bad", row("bad"), [POSITIONS])
    add_events = Store.add_events

    def refuse_bad(store, events, *others, **options):
        events = list(events)
        if events[0].hotkey == "bad":
            raise ValueError("on purpose")
        add_events(store, events, *others, **options)

    monkeypatch.setattr(Store, "add_events", refuse_bad)
    state, commits = server._state, server._state.commits
    works = [
        lambda: server.begin_slash_rpc("a", "one"),
        lambda: server.begin_slash_rpc("a", "two"),
        lambda: server.settle_debt_rpc("a", POSITIONS),
        lambda: server.settle_debt_rpc("unknown", POSITIONS),
        lambda: server.add_elimination_rpc("c", row("c")),
        lambda: server.eliminate_rpc("b", row("b"), [POSITIONS]),
        lambda: server.eliminate_rpc("d", row("d"), [SLASH], 99),
        lambda: server.settle_debt_rpc("bad", POSITIONS),
    ]
    results = [None] * len(works)

    def run(index):
        try:
            results[index] = works[index]()
        except ValueError as error:
            results[index] = str(error)

    go_on = threading.Event()
    threads = [threading.Thread(target=state.read, args=(lambda _: go_on.wait(),))]
    threads[0].start()
    until(lambda: state._turns.locked() and not state._queue)
    for index in range(len(works)):
        threads.append(threading.Thread(target=run, args=(index,)))
        threads[-1].start()
        until(lambda index=index: len(state._queue) > index)
    go_on.set()
    for thread in threads:
        thread.join()
    assert state.commits == commits + 1
    assert results == [True, False, True, False, True, "added", "superseded", "on purpose"]
    assert [(d["hotkey"], d["kind"], d["state"]) for d in server.get_debts_rpc()] == [
        ("a", "limit_orders", "owed"),
        ("a", SLASH, "attempting"),
        ("bad", POSITIONS, "owed"),
        ("b", POSITIONS, "owed"),
    ]
    assert server.get_eliminated_hotkeys_rpc() == {"a", "b", "bad", "c"}


def test_a_change_that_fails_takes_no_debt_with_it(server, monkeypatch):
    """The events of a step and the step are one: where its event cannot be written, it is not taken."""
    server.eliminate_rpc("a", row("a"), list(KINDS))
    server.eliminate_rpc("s", row("s"), [SLASH])
    server.begin_slash_rpc("s", "one")
    debts = server.get_debts_rpc()

    def full(*_arguments, **_options):
        raise ValueError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add_events", full)
        for step in (
            lambda: server.begin_slash_rpc("a", "one"),
            lambda: server.settle_debt_rpc("a", POSITIONS),
            lambda: server.settle_debt_rpc("s", SLASH, "one"),
            lambda: server.resolve_slash_rpc("s", made=True),
            lambda: server.fail_debt_rpc("a", POSITIONS, "x"),
            lambda: server.remove_elimination_rpc("a"),
            lambda: server.eliminate_rpc("b", row("b"), [SLASH]),
        ):
            with pytest.raises(ValueError, match="on purpose"):
                step()
    assert server.get_debts_rpc() == debts
    assert server.get_slashes_rpc() == []
    assert server.get_eliminated_hotkeys_rpc() == {"a", "s"}
