"""What eliminations owe, on a server without processes: every step that a debt can take, and every refusal."""

import itertools
import math
import os
import sqlite3
import time

import pytest
from crashing import call
from serving import row

from shmelim import EliminationManagerServer
from shmelim.eliminations.debts.states import (
    KINDS,
    LIMIT_ORDERS,
    POSITIONS,
    SLASH,
    attempt_is_alive,
    attempt_is_mine,
    new_attempt,
)
from shmelim.eliminations.store import schema

ELIMINATED_MS = row("a")["elimination_initiated_time_ms"]


@pytest.fixture(params=["memory", "disk"])
def server(request, tmp_path):
    directory = None if request.param == "memory" else tmp_path / "state"
    with EliminationManagerServer(None, directory, durability="process") as server:
        yield server


def eliminate(server, hotkey="a", kinds=KINDS, replacements=None, *, stamp=0, within=None):
    return server.eliminate_rpc(hotkey, row(hotkey, stamp), list(kinds), replacements, within)


def slashes(server, hotkey=None):
    """The slashes that were made, without when that was."""
    return [(s["hotkey"], s["eliminated_ms"] - ELIMINATED_MS, s["by"]) for s in server.get_slashes_rpc(hotkey)]


def owed(server, hotkey=None):
    return [(debt["hotkey"], debt["kind"], debt["state"]) for debt in server.get_debts_rpc(hotkey)]


def told(server, *actions):
    """The events of these actions, oldest first."""
    events = server.get_history_rpc(limit=None)[::-1]
    return [(event["action"], event["note"]) for event in events if not actions or event["action"] in actions]


def slash(server, hotkey="a"):
    (debt,) = [debt for debt in server.get_debts_rpc(hotkey) if debt["kind"] == SLASH]
    return debt


# ------------------------------------------------------------------ attempts


def test_an_attempt_is_known_by_its_process():
    mine = new_attempt()
    assert (attempt_is_alive(mine), attempt_is_mine(mine)) == (True, True)
    assert mine != new_attempt()
    theirs = call(new_attempt)
    assert (attempt_is_alive(theirs), attempt_is_mine(theirs)) == (False, False)
    assert call(lambda: (attempt_is_alive(mine), attempt_is_mine(mine))) == (True, False)


def test_a_process_that_got_the_id_of_another_has_not_its_attempts():
    pid, started, boot = new_attempt().rpartition(".")[0].split("-")
    assert pid == str(os.getpid())
    assert attempt_is_alive(f"{pid}-{started}-{boot}.7")
    assert not attempt_is_alive(f"{pid}-{int(started) - 1}-{boot}.7")
    assert not attempt_is_alive(f"{pid}-{started}-{boot[::-1]}.7"), "of another boot"


@pytest.mark.parametrize("token", ["", "x", "1", ".", "-.-", "²-1-x.1", "-1-0-x.1", "99999999999-1-x.1"])
def test_what_is_not_a_token_is_not_an_attempt(token):
    assert not attempt_is_alive(token)
    assert not attempt_is_mine(token)


# ------------------------------------------------------------------ eliminating


def test_eliminate_records_what_is_owed(server):
    assert eliminate(server) == "added"
    assert server.is_hotkey_eliminated_rpc("a")
    assert owed(server) == [("a", LIMIT_ORDERS, "owed"), ("a", POSITIONS, "owed"), ("a", SLASH, "owed")]
    debt = slash(server)
    assert debt.pop("since_ms") > 0
    assert debt == {
        "hotkey": "a",
        "kind": SLASH,
        "state": "owed",
        "due": True,
        "eliminated_ms": ELIMINATED_MS,
        "attempts": 0,
        "error": None,
        "attempt": None,
        "in_doubt_since_ms": None,
    }
    assert told(server) == [("add", None), ("owe", "limit_orders, positions, slash")]


def test_the_first_reason_and_its_debts_stay(server):
    assert eliminate(server, kinds=[POSITIONS]) == "added"
    other = row("a", 5, reason="PLAGIARISM")
    assert server.eliminate_rpc("a", other, [SLASH]) == "already"
    assert server.get_elimination_rpc("a") == row("a")
    assert owed(server) == [("a", POSITIONS, "owed")]


def test_debts_come_in_the_order_of_the_eliminations(server):
    for hotkey in ("c", "a", "b"):
        eliminate(server, hotkey, [SLASH, POSITIONS, LIMIT_ORDERS, SLASH])
    assert owed(server) == [(hotkey, kind, "owed") for hotkey in ("c", "a", "b") for kind in KINDS]
    assert owed(server, "a") == [("a", kind, "owed") for kind in KINDS]
    assert owed(server, "unknown") == []


def test_other_ways_to_be_eliminated_owe_nothing(server):
    server.add_elimination_rpc("a", row("a"))
    server.append_elimination_row_rpc("b", 1.0, "ZOMBIE", 5)
    server.sync_eliminations_rpc([row("c")])
    assert eliminate(server, "d", []) == "added"
    assert server.get_debts_rpc() == []


@pytest.mark.parametrize("replace", ["sync", "write", "clear", "upload"])
def test_a_replacement_supersedes_what_was_decided_before(server, replace):
    server.add_elimination_rpc("kept", row("kept"))
    before = server.get_replacements_rpc()
    assert eliminate(server, "first", replacements=before) == "added"
    match replace:
        case "sync":
            server.sync_eliminations_rpc([row("kept", 1)])
        case "write":
            server.write_eliminations_to_disk_rpc([row("kept")])
        case "clear":
            server.clear_eliminations_rpc()
        case "upload":
            token = server.begin_upload_rpc()
            server.upload_rpc(token, [row("kept")])
            server.sync_uploaded_rpc(token)
    assert server.get_replacements_rpc() == before + 1
    known = len(told(server))
    assert eliminate(server, "second", replacements=before) == "superseded"
    assert not server.is_hotkey_eliminated_rpc("second")
    assert server.get_debts_rpc("second") == []
    assert len(told(server)) == known
    assert eliminate(server, "second", replacements=before + 1) == "added"


def test_other_changes_and_a_sync_to_the_same_supersede_nothing(server):
    before = server.get_replacements_rpc()
    server.sync_eliminations_rpc([])
    server.add_elimination_rpc("a", row("a"))
    server.remove_elimination_rpc("a")
    server.delete_eliminations_rpc(["a"])
    server.update_metagraph_rpc(["a"])
    assert server.get_replacements_rpc() == before == 0


# ------------------------------------------------------------------ limit orders and positions


@pytest.mark.parametrize("kind", [LIMIT_ORDERS, POSITIONS])
def test_settle(server, kind):
    eliminate(server)
    assert server.settle_debt_rpc("a", kind) is True
    assert kind not in [name for _, name, _ in owed(server)]
    assert server.settle_debt_rpc("a", kind) is False
    assert told(server, "settle") == [("settle", kind)]


def test_fail_keeps_the_last_error(server):
    eliminate(server)
    assert server.fail_debt_rpc("a", POSITIONS, "no price") is True
    assert server.fail_debt_rpc("a", POSITIONS, "locked") is True
    debt = server.get_debts_rpc("a")[1]
    assert (debt["kind"], debt["state"], debt["attempts"], debt["error"]) == (POSITIONS, "owed", 2, "locked")
    assert server.settle_debt_rpc("a", POSITIONS)
    assert told(server, "settle") == [("settle", "positions, after 2 failures")]


def test_failures_do_not_flood_the_history(server):
    eliminate(server)
    for number in range(1, 101):
        assert server.fail_debt_rpc("a", POSITIONS, f"error {number}")
    assert [note for _, note in told(server, "fail")] == [
        f"positions: error {n} (failure {n})" for n in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert server.get_debts_rpc("a")[1]["attempts"] == 100


def test_nothing_fits_where_nothing_is_owed(server):
    eliminate(server, kinds=[LIMIT_ORDERS])
    known = told(server)
    for hotkey, kind in itertools.product(("a", "unknown"), (POSITIONS, SLASH)):
        assert server.settle_debt_rpc(hotkey, kind) is False
        assert server.fail_debt_rpc(hotkey, kind, "error") is False
    for hotkey in ("a", "unknown"):
        assert server.begin_slash_rpc(hotkey, "t") is False
        assert server.settle_debt_rpc(hotkey, SLASH, "t") is False
        assert server.fail_debt_rpc(hotkey, SLASH, "error", "t", in_doubt=True) is False
        assert server.doubt_slash_rpc(hotkey, "t", "error") is False
        assert server.resolve_slash_rpc(hotkey, made=True) is False
    assert told(server) == known
    assert owed(server) == [("a", LIMIT_ORDERS, "owed")]


# ------------------------------------------------------------------ slashes


def test_a_slash_belongs_to_one_attempt(server):
    eliminate(server)
    assert server.begin_slash_rpc("a", "one") is True
    assert server.begin_slash_rpc("a", "one") is True
    assert server.begin_slash_rpc("a", "two") is False
    assert (slash(server)["state"], slash(server)["attempt"]) == ("attempting", "one")
    for refused in ("two", None):
        assert server.settle_debt_rpc("a", SLASH, refused) is False
        assert server.fail_debt_rpc("a", SLASH, "error", refused) is False
    assert server.doubt_slash_rpc("a", "two", "error") is False
    assert (slash(server)["state"], slash(server)["attempts"]) == ("attempting", 0)
    assert server.settle_debt_rpc("a", SLASH, "one") is True
    assert server.begin_slash_rpc("a", "one") is False
    assert server.begin_slash_rpc("a", "two") is False
    assert told(server, "begin", "settle") == [("begin", "slash, attempt one"), ("settle", "slash, attempt one")]


def test_a_slash_that_is_only_owed_cannot_be_settled(server):
    eliminate(server)
    assert server.settle_debt_rpc("a", SLASH) is False
    assert server.settle_debt_rpc("a", SLASH, "one") is False
    assert slash(server)["state"] == "owed"


def test_a_slash_can_fail_before_it_is_begun(server):
    eliminate(server)
    assert server.fail_debt_rpc("a", SLASH, "no contract manager") is True
    assert (slash(server)["state"], slash(server)["error"]) == ("owed", "no contract manager")


def test_a_slash_that_was_certainly_not_made_is_owed_again(server):
    eliminate(server)
    assert server.begin_slash_rpc("a", "one")
    assert server.fail_debt_rpc("a", SLASH, "chain refused", "one") is True
    debt = slash(server)
    assert (debt["state"], debt["attempt"], debt["attempts"], debt["error"]) == ("owed", None, 1, "chain refused")
    assert server.begin_slash_rpc("a", "one") is False, "an attempt that ended came back"
    assert server.begin_slash_rpc("a", "two") is True
    assert server.settle_debt_rpc("a", SLASH, "two") is True
    assert told(server, "settle") == [("settle", "slash, attempt two, after 1 failures")]


@pytest.mark.parametrize("how", ["fail", "doubt"])
def test_a_slash_in_doubt_is_nobodys(server, how):
    eliminate(server)
    server.begin_slash_rpc("a", "one")
    if how == "fail":
        assert server.fail_debt_rpc("a", SLASH, "timeout", "one", in_doubt=True) is True
    else:
        assert server.doubt_slash_rpc("a", "one", "timeout") is True
    debt = slash(server)
    assert (debt["state"], debt["attempt"], debt["attempts"], debt["error"]) == ("in_doubt", "one", 1, "timeout")
    assert debt["in_doubt_since_ms"] >= debt["since_ms"]
    for attempt in ("one", "two"):
        assert server.begin_slash_rpc("a", attempt) is False
        assert server.settle_debt_rpc("a", SLASH, attempt) is False
        assert server.fail_debt_rpc("a", SLASH, "again", attempt) is False
        assert server.doubt_slash_rpc("a", attempt, "again") is False
    assert server.fail_debt_rpc("a", SLASH, "again") is False
    assert slash(server) == debt
    assert told(server, "doubt") == [("doubt", "slash, attempt one: timeout")]


def test_resolved_as_made(server):
    eliminate(server, kinds=[SLASH])
    server.begin_slash_rpc("a", "one")
    server.doubt_slash_rpc("a", "one", "timeout")
    assert server.resolve_slash_rpc("a", made=True) is True
    assert server.get_debts_rpc() == []
    assert server.resolve_slash_rpc("a", made=True) is False
    assert told(server, "resolve") == [("resolve", "slash, attempt one: made")]
    (event,) = [event for event in server.get_history_rpc("a") if event["action"] == "resolve"]
    assert event["pid"] == os.getpid()


def test_resolved_as_not_made(server):
    eliminate(server, kinds=[SLASH])
    server.begin_slash_rpc("a", "one")
    server.doubt_slash_rpc("a", "one", "timeout")
    assert server.resolve_slash_rpc("a", made=False) is True
    debt = slash(server)
    assert (debt["state"], debt["in_doubt_since_ms"]) == ("owed", None)
    assert server.resolve_slash_rpc("a", made=False) is False
    assert server.begin_slash_rpc("a", "one") is False
    assert server.begin_slash_rpc("a", "two") is True
    assert told(server, "resolve") == [("resolve", "slash, attempt one: not made")]


def test_an_attempt_that_may_still_run_is_not_declared_unmade(server):
    eliminate(server, kinds=[SLASH])
    server.begin_slash_rpc("a", new_attempt())
    assert server.resolve_slash_rpc("a", made=False) is False
    assert slash(server)["state"] == "attempting"
    assert server.resolve_slash_rpc("a", made=True) is True


def test_an_attempt_whose_process_is_gone_can_be_resolved(server):
    eliminate(server, kinds=[SLASH])
    server.begin_slash_rpc("a", call(new_attempt))
    assert server.resolve_slash_rpc("a", made=False) is True
    assert slash(server)["state"] == "owed"


def test_attempts_that_are_refused_each_time_do_not_flood_the_history(server):
    eliminate(server, kinds=[SLASH])
    for number in range(1, 21):
        assert server.begin_slash_rpc("a", f"t{number}")
        assert server.fail_debt_rpc("a", SLASH, "not now", f"t{number}")
    begun = [note for _, note in told(server, "begin")]
    assert begun == [f"slash, attempt t{n}" for n in (1, 2, 4, 8, 16)]
    assert [note.split(":")[0] for _, note in told(server, "fail")] == begun


# ------------------------------------------------------------------ eliminations that are taken back

REMOVALS = {
    "remove": lambda server: server.remove_elimination_rpc("a"),
    "delete": lambda server: server.delete_eliminations_rpc(["a", "other"]),
    "sync": lambda server: server.sync_eliminations_rpc([row("b")]),
    "write": lambda server: server.write_eliminations_to_disk_rpc([row("b")]),
    "clear": lambda server: server.clear_eliminations_rpc(),
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_removal_cancels_what_is_owed(server, removal):
    eliminate(server, "a")
    eliminate(server, "other", [POSITIONS])
    REMOVALS[removal](server)
    assert owed(server, "a") == []
    if removal == "remove":
        assert owed(server) == [("other", POSITIONS, "owed")]
    reason = "remove" if removal == "delete" else removal
    assert ("cancel", f"limit_orders, positions, slash: {reason}") in told(server, "cancel")
    assert server.begin_slash_rpc("a", "t") is False


def test_debts_of_those_that_stay_stay(server):
    eliminate(server, "a")
    server.sync_eliminations_rpc([row("b"), row("a", 7)])
    server.add_elimination_rpc("a", row("a", 8))
    assert owed(server) == [("a", kind, "owed") for kind in KINDS]
    assert told(server, "cancel") == []


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("state", ["attempting", "in_doubt"])
def test_a_slash_that_was_begun_outlives_its_elimination(server, removal, state):
    eliminate(server, "a")
    server.begin_slash_rpc("a", "one")
    if state == "in_doubt":
        server.doubt_slash_rpc("a", "one", "timeout")
    REMOVALS[removal](server)
    assert owed(server, "a") == [("a", SLASH, state)]
    assert slash(server)["due"] is False


@pytest.mark.parametrize("how", ["fail", "resolve"])
def test_what_was_not_made_is_not_owed_again_by_who_is_not_eliminated(server, how):
    eliminate(server, "a", [SLASH])
    server.begin_slash_rpc("a", "one")
    server.remove_elimination_rpc("a")
    if how == "fail":
        assert server.fail_debt_rpc("a", SLASH, "refused", "one") is True
    else:
        server.doubt_slash_rpc("a", "one", "timeout")
        assert server.resolve_slash_rpc("a", made=False) is True
    assert server.get_debts_rpc() == []
    assert told(server, "cancel") == [("cancel", "slash: its elimination was taken back")]


@pytest.mark.parametrize("state", ["attempting", "in_doubt"])
def test_eliminated_again_while_a_slash_stands_there_is_no_second_one(server, state):
    eliminate(server, "a")
    server.begin_slash_rpc("a", "one")
    if state == "in_doubt":
        server.doubt_slash_rpc("a", "one", "timeout")
    server.remove_elimination_rpc("a")
    eliminate(server, "b", [POSITIONS])
    assert eliminate(server, "a") == "added"
    assert owed(server) == [
        ("b", POSITIONS, "owed"),
        ("a", LIMIT_ORDERS, "owed"),
        ("a", POSITIONS, "owed"),
        ("a", SLASH, state),
    ]
    assert slash(server)["due"] is True
    assert server.begin_slash_rpc("a", "two") is False
    assert told(server, "owe")[-1] == ("owe", f"limit_orders, positions, slash (begun before, {state})")
    # Made: it counts for both. Not made: it is owed, once.
    server.doubt_slash_rpc("a", "one", "timeout")
    assert server.resolve_slash_rpc("a", made=False) is True
    assert slash(server)["state"] == "owed"


def test_eliminated_again_without_a_slash_none_is_made_for_the_old_one(server):
    eliminate(server, "a")
    server.begin_slash_rpc("a", "one")
    server.remove_elimination_rpc("a")
    eliminate(server, "a", [POSITIONS])
    assert server.fail_debt_rpc("a", SLASH, "refused", "one") is True
    assert owed(server) == [("a", POSITIONS, "owed")]


def test_debts_change_nothing_that_is_published(server):
    eliminate(server)
    version = server.reader.version
    server.fail_debt_rpc("a", POSITIONS, "error")
    server.settle_debt_rpc("a", POSITIONS)
    server.begin_slash_rpc("a", "one")
    server.doubt_slash_rpc("a", "one", "timeout")
    server.resolve_slash_rpc("a", made=True)
    assert server.reader.version == version


# ------------------------------------------------------------------ a slash that was made


def make_slash(server, hotkey="a", how="contract"):
    assert server.begin_slash_rpc(hotkey, "one")
    if how == "contract":
        assert server.settle_debt_rpc(hotkey, SLASH, "one")
    else:
        assert server.doubt_slash_rpc(hotkey, "one", "timeout")
        assert server.resolve_slash_rpc(hotkey, made=True)


@pytest.mark.parametrize("how", ["contract", "hand"])
def test_a_slash_that_was_made_stays_on_record(server, how):
    eliminate(server, stamp=7)
    before = time.time_ns() // 1_000_000
    assert server.get_slashes_rpc() == []
    make_slash(server, how=how)
    (made,) = server.get_slashes_rpc()
    assert before <= made.pop("made_ms") <= time.time_ns() // 1_000_000
    assert made == {"hotkey": "a", "eliminated_ms": ELIMINATED_MS + 7, "by": how}
    server.remove_elimination_rpc("a")
    assert slashes(server, "a") == [("a", 7, how)]
    assert slashes(server, "b") == []


def test_what_is_not_a_slash_that_was_made_is_not_on_record(server):
    eliminate(server)
    for kind in (LIMIT_ORDERS, POSITIONS):
        assert server.settle_debt_rpc("a", kind)
    assert server.settle_debt_rpc("a", SLASH, "one") is False
    assert server.begin_slash_rpc("a", "one")
    assert server.settle_debt_rpc("a", SLASH, "two") is False
    assert server.fail_debt_rpc("a", SLASH, "refused", "one")
    assert server.begin_slash_rpc("a", "two")
    assert server.doubt_slash_rpc("a", "two", "timeout")
    assert server.resolve_slash_rpc("a", made=False)
    assert server.get_slashes_rpc() == []


def test_of_each_hotkey_the_last_slash_counts_and_the_oldest_comes_first(server, monkeypatch):
    clock = itertools.count(1_700_000_000_000_000_000, 1_000_000)
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    for number, hotkey in enumerate(("c", "b", "a", "c")):
        eliminate(server, hotkey, [SLASH], stamp=number)
        make_slash(server, hotkey, "hand" if number == 3 else "contract")
        server.remove_elimination_rpc(hotkey)
    assert slashes(server) == [("b", 1, "contract"), ("a", 2, "contract"), ("c", 3, "hand")]


@pytest.mark.parametrize("how", ["contract", "hand"])
@pytest.mark.parametrize(
    ("stamp", "within", "again"),
    [
        (0, 100, False),
        (99, 100, False),
        (-99, 100, False),
        (100, 100, True),
        (-100, 100, True),
        (0, 0, True),
        (0, 0.5, False),
        (0, None, True),
        (10**12, math.inf, False),
    ],
)
def test_a_slash_is_not_owed_again_for_nearly_the_same_elimination(server, how, stamp, within, again):
    eliminate(server, within=within)
    make_slash(server, how=how)
    server.sync_eliminations_rpc([row("b")])
    assert eliminate(server, stamp=stamp, within=within) == "added"
    kinds = KINDS if again else KINDS[:2]
    assert owed(server) == [("a", kind, "owed") for kind in kinds]
    said = "limit_orders, positions, slash" + ("" if again else " (made before)")
    assert told(server, "owe")[-1] == ("owe", said)
    assert server.begin_slash_rpc("a", "two") is again


def test_a_slash_of_one_miner_is_not_anothers(server):
    eliminate(server)
    make_slash(server)
    eliminate(server, "b", within=100)
    assert slash(server, "b")["state"] == "owed"


def test_a_slash_that_was_made_is_known_however_much_came_after_it(server):
    eliminate(server, within=100)
    make_slash(server)
    for number in range(60):
        server.add_elimination_rpc("a", row("a", number + 1))
        server.remove_elimination_rpc("a")
    last = server.get_history_rpc("a")
    assert len(last) == 100
    assert not [event for event in last if event["action"] == "settle"]
    assert eliminate(server, within=100) == "added"
    assert owed(server) == [("a", kind, "owed") for kind in KINDS[:2]]


def test_a_slash_that_was_made_is_known_after_a_restart(tmp_path):
    with EliminationManagerServer(None, tmp_path, durability="process") as server:
        eliminate(server)
        make_slash(server)
        server.remove_elimination_rpc("a")
        before = server.get_slashes_rpc()
    with EliminationManagerServer(None, tmp_path, durability="process") as server:
        assert server.get_slashes_rpc() == before
        eliminate(server, kinds=[SLASH], within=100)
        assert server.get_debts_rpc() == []
        assert told(server)[-1] == ("owe", "slash (made before)")


def test_a_slash_that_stood_for_two_eliminations_is_on_record_with_the_later(server):
    eliminate(server)
    server.begin_slash_rpc("a", "one")
    server.remove_elimination_rpc("a")
    eliminate(server, stamp=1000, within=100)
    assert slash(server)["eliminated_ms"] == ELIMINATED_MS + 1000
    assert server.settle_debt_rpc("a", SLASH, "one")
    assert slashes(server) == [("a", 1000, "contract")]


def test_a_slash_that_was_begun_for_another_is_left_alone_where_one_was_made(server):
    eliminate(server)
    make_slash(server)
    server.remove_elimination_rpc("a")
    eliminate(server, stamp=1000, within=100)
    assert server.begin_slash_rpc("a", "two")
    server.remove_elimination_rpc("a")
    eliminate(server, within=100)
    debt = slash(server)
    assert (debt["state"], debt["due"], debt["eliminated_ms"]) == ("attempting", False, ELIMINATED_MS + 1000)
    assert server.fail_debt_rpc("a", SLASH, "refused", "two")
    assert owed(server) == [("a", kind, "owed") for kind in KINDS[:2]]


@pytest.mark.parametrize("time_ms", [-(1 << 63), (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_any_time_that_a_record_may_have(server, time_ms):
    record = row("a") | {"elimination_initiated_time_ms": time_ms}
    assert server.eliminate_rpc("a", record, [SLASH], None, 100) == "added"
    make_slash(server)
    server.remove_elimination_rpc("a")
    assert server.eliminate_rpc("a", record, [SLASH], None, 100) == "added"
    assert server.get_debts_rpc() == []


def test_the_store_takes_no_other_teller():
    db = sqlite3.connect(":memory:")
    for statement in schema._SECOND:
        db.execute(statement)
    with pytest.raises(sqlite3.IntegrityError, match="said_by"):
        db.execute("INSERT INTO slashes VALUES ('a', 1, 1, 'hearsay')")
    db.close()


# ------------------------------------------------------------------ arguments

BAD = [
    (ValueError, "hotkey", lambda s: s.eliminate_rpc("", row("a"), [])),
    (TypeError, "hotkey", lambda s: s.eliminate_rpc(None, row("a"), [])),
    (ValueError, "hotkey", lambda s: s.eliminate_rpc("b", row("a"), [])),
    (TypeError, "owed .*str", lambda s: s.eliminate_rpc("b", row("b"), "slash")),
    (TypeError, "kind .*int", lambda s: s.eliminate_rpc("b", row("b"), [1])),
    (ValueError, "kind .*'fine'", lambda s: s.eliminate_rpc("b", row("b"), [SLASH, "fine"])),
    (TypeError, "replacements", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], "0")),
    (TypeError, "replacements", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], replacements=False)),
    (TypeError, "slash_once_within_ms", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], None, "100")),
    (TypeError, "slash_once_within_ms", lambda s: s.eliminate_rpc("b", row("b"), [], slash_once_within_ms=True)),
    (ValueError, "slash_once_within_ms", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], None, -1)),
    (ValueError, "slash_once_within_ms", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], None, math.nan)),
    (ValueError, "hotkey", lambda s: s.get_debts_rpc("")),
    (ValueError, "hotkey", lambda s: s.get_slashes_rpc("")),
    (TypeError, "hotkey", lambda s: s.get_slashes_rpc(7)),
    (ValueError, "hotkey", lambda s: s.settle_debt_rpc("", SLASH)),
    (ValueError, "kind .*'fine'", lambda s: s.settle_debt_rpc("a", "fine")),
    (ValueError, "attempt .*'positions'", lambda s: s.settle_debt_rpc("a", POSITIONS, "t")),
    (TypeError, "error .*Error", lambda s: s.fail_debt_rpc("a", POSITIONS, OSError("x"))),
    (ValueError, "in_doubt", lambda s: s.fail_debt_rpc("a", POSITIONS, "x", in_doubt=True)),
    (ValueError, "in_doubt", lambda s: s.fail_debt_rpc("a", SLASH, "x", in_doubt=True)),
    (TypeError, "in_doubt", lambda s: s.fail_debt_rpc("a", SLASH, "x", "t", in_doubt="no")),
    (ValueError, "attempt .*'limit_orders'", lambda s: s.fail_debt_rpc("a", LIMIT_ORDERS, "x", "t")),
    (ValueError, "attempt", lambda s: s.begin_slash_rpc("a", "")),
    (ValueError, "attempt", lambda s: s.begin_slash_rpc("a", "x" * 256)),
    (ValueError, "attempt", lambda s: s.begin_slash_rpc("a", "\udc80")),
    (TypeError, "attempt", lambda s: s.begin_slash_rpc("a", 7)),
    (TypeError, "attempt", lambda s: s.doubt_slash_rpc("a", None, "x")),
    (TypeError, "made", lambda s: s.resolve_slash_rpc("a", "false")),
    (TypeError, "made", lambda s: s.resolve_slash_rpc("a", 1)),
    (ValueError, "hotkey", lambda s: s.resolve_slash_rpc("x" * 256, made=True)),
]


@pytest.mark.parametrize(("kind", "names", "ask"), BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named_and_change_nothing(server, kind, names, ask):
    eliminate(server)
    before = server.get_debts_rpc(), told(server)
    with pytest.raises(kind, match=names):
        ask(server)
    assert (server.get_debts_rpc(), told(server)) == before


def test_an_error_is_kept_such_that_it_can_be_stored(server):
    eliminate(server)
    server.fail_debt_rpc("a", POSITIONS, "bad \udc80" + "x" * 10_000)
    error = server.get_debts_rpc("a")[1]["error"]
    assert error.startswith("bad \\udc80xxx")
    assert len(error) < 600


# ------------------------------------------------------------------ health


def test_health_tells_of_debts_and_of_slashes_in_doubt(server):
    health = server.health_check_rpc()
    assert (health["num_debts"], health["slashes_in_doubt"], health["problems"]) == (0, [], [])
    for number in range(25):
        eliminate(server, f"h{number}", [POSITIONS, SLASH])
        server.begin_slash_rpc(f"h{number}", "t")
    assert server.health_check_rpc()["slashes_in_doubt"] == []
    server.doubt_slash_rpc("h3", "t", "x")
    health = server.health_check_rpc()
    assert (health["status"], health["num_debts"], health["slashes_in_doubt"]) == ("degraded", 50, ["h3"])
    (problem,) = health["problems"]
    assert problem["name"] == "slashes_in_doubt"
    assert problem["text"].endswith(": h3")
    for number in range(25):
        server.doubt_slash_rpc(f"h{number}", "t", "x")
    health = server.health_check_rpc()
    assert health["slashes_in_doubt"] == [f"h{number}" for number in range(20)]
    assert health["problems"][0]["text"].endswith("h19 and 5 more")
