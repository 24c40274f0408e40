"""What eliminations owe, on a server without processes: every step that a debt can take, and every refusal."""

import itertools
import math

import pytest
from owing import ELIMINATED_MS, due, eliminate, owed, slash, told
from serving import row

from shmelim.eliminations.debts.states import (
    KINDS,
    LIMIT_ORDERS,
    POSITIONS,
    SLASH,
)

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
        "rule": "",
        "registration": 0,
        "state": "owed",
        "under_way": False,
        "due": True,
        "eliminated_ms": ELIMINATED_MS,
        "attempts": 0,
        "error": None,
        "attempt": None,
        "in_doubt_since_ms": None,
        "reason": "ZOMBIE",
        "share": None,
        "share_asked": False,
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


# ------------------------------------------------------------------ eliminations that are taken back

REMOVALS = {
    "remove": lambda server: server.remove_elimination_rpc("a"),
    "delete": lambda server: server.delete_eliminations_rpc(["a", "other"]),
    "sync": lambda server: server.sync_eliminations_rpc([row("b")]),
    "write": lambda server: server.write_eliminations_to_disk_rpc([row("b")]),
    "clear": lambda server: server.clear_eliminations_rpc(),
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_what_is_owed_rests_while_its_elimination_is_taken_back(server, removal):
    eliminate(server, "a")
    eliminate(server, "other", [POSITIONS])
    REMOVALS[removal](server)
    assert owed(server, "a") == [("a", kind, "owed") for kind in KINDS]
    assert due(server, "a") == [False] * 3
    assert due(server, "other") == [removal == "remove"]
    reason = "remove" if removal == "delete" else removal
    assert ("rest", f"limit_orders, positions, slash: {reason}") in told(server, "rest")
    for kind in KINDS:
        assert server.settle_debt_rpc("a", kind) is False
        assert server.fail_debt_rpc("a", kind, "x") is False
    assert server.begin_slash_rpc("a", "t") is False


RETURNS = {
    "add": lambda server: server.add_elimination_rpc("a", row("a")),
    "append": lambda server: server.append_elimination_row_rpc("a", 1.0, "ZOMBIE", 5),
    "sync": lambda server: server.sync_eliminations_rpc([row("b"), row("a")]),
    "write": lambda server: server.write_eliminations_to_disk_rpc([row("a")]),
    "rule": eliminate,
}


@pytest.mark.parametrize("how", RETURNS)
def test_and_is_due_again_with_it(server, how):
    eliminate(server, "a")
    server.fail_debt_rpc("a", SLASH, "no contract")
    server.sync_eliminations_rpc([row("b")])
    RETURNS[how](server)
    assert owed(server, "a") == [("a", kind, "owed") for kind in KINDS]
    assert due(server, "a") == [True] * 3
    assert slash(server)["attempts"] == 1
    if how != "rule":
        assert told(server, "wake") == [("wake", "limit_orders, positions, slash: eliminated again")]
    assert server.begin_slash_rpc("a", "t") is True


def test_of_slashes_that_rest_the_one_with_that_reason_is_due_again(server):
    for rule, reason in (("drawdown", "MAX_TOTAL_DRAWDOWN"), ("perf_ledger", "LIQUIDATED")):
        server.eliminate_rpc("a", row("a", reason=reason), [SLASH], None, rule)
        server.sync_eliminations_rpc([])
    server.sync_eliminations_rpc([row("a", reason="MAX_TOTAL_DRAWDOWN")])
    assert [debt["rule"] for debt in server.get_debts_rpc("a") if debt["due"]] == ["drawdown"]
    server.sync_eliminations_rpc([])
    server.sync_eliminations_rpc([row("a", reason="in other words")])
    assert [debt["rule"] for debt in server.get_debts_rpc("a") if debt["due"]] == ["perf_ledger"]


def test_with_the_row_that_expires_goes_all_but_the_slash(server):
    eliminate(server, "a")
    assert server.delete_eliminations_rpc(["a"], {"a": ELIMINATED_MS}) == ["a"]
    assert owed(server) == [("a", SLASH, "owed")]
    assert due(server, "a") == [True]
    assert told(server, "cancel") == [("cancel", "limit_orders, positions: deleted")]


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
    assert (slash(server)["state"], slash(server)["due"]) == (state, False)


@pytest.mark.parametrize("how", ["fail", "resolve"])
def test_what_was_not_made_rests_with_its_elimination(server, how):
    eliminate(server, "a", [SLASH])
    server.begin_slash_rpc("a", "one")
    server.remove_elimination_rpc("a")
    if how == "fail":
        assert server.fail_debt_rpc("a", SLASH, "refused", "one") is True
    else:
        server.doubt_slash_rpc("a", "one", "timeout")
        assert server.resolve_slash_rpc("a", made=False) is True
    assert (owed(server), due(server, "a")) == ([("a", SLASH, "owed")], [False])
    assert server.begin_slash_rpc("a", "two") is False


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


def test_eliminated_again_by_a_rule_without_a_slash_none_is_made_for_the_old_one(server):
    eliminate(server, "a")
    server.begin_slash_rpc("a", "one")
    server.remove_elimination_rpc("a")
    eliminate(server, "a", [POSITIONS])
    assert server.fail_debt_rpc("a", SLASH, "refused", "one") is True
    assert slash(server)["due"] is False
    assert server.begin_slash_rpc("a", "two") is False


def test_debts_change_nothing_that_readers_find_and_are_told_as_they_come(server):
    eliminate(server)
    before, version = server.reader.get_eliminations_dict(), server.reader.version
    server.fail_debt_rpc("a", POSITIONS, "error")
    server.settle_debt_rpc("a", POSITIONS)
    server.begin_slash_rpc("a", "one")
    server.doubt_slash_rpc("a", "one", "timeout")
    server.resolve_slash_rpc("a", made=True)
    assert server.reader.get_eliminations_dict() == before
    assert [event["action"] for event in server.changes_rpc(version)["events"]] == [
        *("fail", "settle", "begin", "doubt", "resolve"),
    ]


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
    (TypeError, "rule", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], None, 7)),
    (ValueError, "rule", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], None, "x" * 65)),
    (ValueError, "rule", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], None, "line\nbreak")),
    (TypeError, "share", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], share="0.5")),
    (TypeError, "share", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], share=True)),
    (ValueError, "share", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], share=50)),
    (ValueError, "share", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], share=-1)),
    (ValueError, "share", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], share=math.nan)),
    (TypeError, "share_asked", lambda s: s.eliminate_rpc("b", row("b"), [SLASH], share_asked=1)),
    (TypeError, "declined", lambda s: s.settle_debt_rpc("a", SLASH, "t", declined="no")),
    (ValueError, "declined", lambda s: s.settle_debt_rpc("a", POSITIONS, declined=True)),
    (TypeError, "answer", lambda s: s.settle_debt_rpc("a", SLASH, "t", answer=False)),
    (TypeError, "registration", lambda s: s.begin_slash_rpc("a", "t", "drawdown", "0")),
    (TypeError, "at_ms", lambda s: s.begin_slash_rpc("a", "t", at_ms=1.5)),
    (TypeError, "most_per_hour", lambda s: s.begin_slash_rpc("a", "t", most_per_hour="10")),
    (TypeError, "rule", lambda s: s.rearm_slash_rpc("a", 7)),
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
    server.begin_slash_rpc("h3", "t")
    server.doubt_slash_rpc("h3", "t", "x")
    health = server.health_check_rpc()
    assert (health["status"], health["num_debts"], health["slashes_in_doubt"]) == ("degraded", 50, ["h3"])
    (problem,) = health["problems"]
    assert problem["name"] == "slashes_in_doubt"
    assert problem["text"].endswith(": h3")
    for number in range(25):
        server.begin_slash_rpc(f"h{number}", "t")
    for number in range(25):
        server.doubt_slash_rpc(f"h{number}", "t", "x")
    health = server.health_check_rpc()
    assert health["slashes_in_doubt"] == [f"h{number}" for number in range(20)]
    assert health["problems"][0]["text"].endswith("h19 and 5 more")
