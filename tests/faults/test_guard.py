"""The guard: what takes back or doubles many eliminations at once is told and kept in mind, or refused."""

from __future__ import annotations

import json

import pytest
from serving import row
from waiting import until

from shmelim import EliminationManager, EliminationManagerServer
from shmelim.eliminations.state.guard import Guard
from shmelim.errors import GuardedChangeError
from shmelim.shm import SharedNamespace
from shmelim.system import clock

DAY_MS = 86_400_000


def rows(*numbers):
    return [row(f"h{n}") for n in numbers]


@pytest.fixture
def start(table_name, tmp_path):
    """Start servers of one name and state, one after the other."""
    running = []

    def start(**options):
        for server in running:
            server.close()
        running[:] = [EliminationManagerServer(SharedNamespace(table_name), tmp_path / "state", **options)]
        return running[0]

    yield start
    for server in running:
        server.close()


def noticed(server):
    health = server.health_check_rpc()
    found = [problem for problem in health["problems"] if problem["name"] == "guarded_change"]
    assert not found or (health["status"] == "ok" and {problem["severity"] for problem in found} == {"notice"})
    return [problem["text"] for problem in found]


@pytest.mark.parametrize(
    ("before", "after", "is_noticed"),
    [
        (range(10), range(10, 10), True),
        (range(9), range(9, 9), False),
        (range(40), range(10, 40), True),
        (range(41), range(10, 41), False),
        (range(20), range(9, 20), False),
        (range(10), range(19), False),
        (range(10), range(20), True),
        (range(9), range(100), False),
        (range(40), range(10, 50), True),
        (range(20), range(29), False),
    ],
)
def test_what_it_takes(start, before, after, is_noticed):
    server = start()
    server.sync_eliminations_rpc(rows(*before))
    assert noticed(server) == []
    server.sync_eliminations_rpc(rows(*after))
    assert bool(noticed(server)) is is_noticed


def shrink(server, sizes):
    """Sync smaller and smaller states."""
    for size in sizes:
        server.sync_eliminations_rpc(rows(*range(40 - size, 40)))


SMALL_STEPS = range(40, 20, -3)


def test_many_small_changes_count_as_one(start):
    """Or a state could be taken back bit by bit, without a word."""
    server = start()
    shrink(server, SMALL_STEPS[:4])
    server = start()  # which forgets nothing of it
    assert noticed(server) == []
    before = server.get_history_rpc(limit=None)
    shrink(server, SMALL_STEPS[4:5])
    (text,) = noticed(server)
    assert text.startswith("sync: take back 12 of 40 eliminations, with the small changes before it")
    shrink(server, SMALL_STEPS[5:])
    assert len(noticed(server)) == 1, "what was noticed is not counted again"
    remedy = server.health_check_rpc()["problems"][0]["remedy"]
    first = [event["id"] for event in reversed(before)][39]
    assert f"rollback --to {first}`" in remedy, "all of it is undone"


def test_small_changes_are_refused_from_the_one_on_that_makes_too_many(start):
    server = start(sync_guard="refuse")
    shrink(server, SMALL_STEPS[:4])
    for _ in range(2):
        with pytest.raises(GuardedChangeError, match="would take back 12 of 40 eliminations"):
            shrink(server, SMALL_STEPS[4:5])
    assert len(server.get_eliminated_hotkeys_rpc()) == 31
    with pytest.raises(GuardedChangeError, match=r"would take back 10 of 40 .*with the small changes before it"):
        server.delete_eliminations_rpc(["h39"])
    server.delete_eliminations_rpc(["h39"], force=True)
    assert len(noticed(server)) == 1
    assert server.delete_eliminations_rpc(["h38"]) == ["h38"], "it is counted anew"


def test_what_is_taken_back_and_brought_again_is_not_gone(start):
    server = start(sync_guard="refuse")
    for _ in range(15):
        shrink(server, [40, 39])
        shrink(server, [40, 38])
    assert noticed(server) == []


def test_small_changes_of_more_than_a_day_are_not_added_up(start, monkeypatch):
    server = start()
    shrink(server, SMALL_STEPS[:3])
    now = clock.now_ms()
    monkeypatch.setattr("shmelim.system.clock.now_ms", lambda: now + DAY_MS)
    shrink(server, SMALL_STEPS[3:6])
    assert noticed(server) == []
    monkeypatch.setattr("shmelim.system.clock.now_ms", lambda: now + 2 * DAY_MS - 60_000)
    shrink(server, SMALL_STEPS[6:])
    assert len(noticed(server)) == 1


def test_neither_a_slow_growth_nor_what_the_rules_delete_is_added_up(start):
    server = start(sync_guard="refuse")
    for size in range(1, 40, 3):
        shrink(server, [size])
    for hotkey, record in list(server.get_eliminations_dict_rpc().items())[:30]:
        times = {hotkey: record["elimination_initiated_time_ms"]}
        assert server.delete_eliminations_rpc([hotkey], times) == [hotkey]
    assert noticed(server) == []


def test_a_notice_outlives_the_server_and_a_day_ends_it(start, monkeypatch):
    server = start()
    server.sync_eliminations_rpc(rows(*range(30)))
    server.clear_eliminations_rpc()
    (text,) = noticed(server)
    assert text.startswith("clear: take back 30 of 30 eliminations")
    server = start()
    assert noticed(server) == [text]
    now = clock.now_ms()
    monkeypatch.setattr("shmelim.system.clock.now_ms", lambda: now + DAY_MS - 60_000)
    assert noticed(server) == [text]
    monkeypatch.setattr("shmelim.system.clock.now_ms", lambda: now + DAY_MS)
    assert noticed(server) == []
    assert noticed(start()) == []


def test_who_acknowledges_is_in_the_history(start):
    server = start()
    server.sync_eliminations_rpc(rows(*range(30)))
    server.clear_eliminations_rpc()
    assert server.acknowledge_rpc() == ["clear: take back 30 of 30 eliminations"]
    assert noticed(server) == noticed(start()) == []
    assert start().get_history_rpc(limit=1)[0]["action"] == "ack"


def test_a_storm_of_syncs_is_told_in_few_notices(start):
    """Something that syncs two lists in turn, each second, would fill the health, and each look at it."""
    server = start()
    lists = [rows(*range(20)), rows(*range(20, 40))]
    server.sync_eliminations_rpc(lists[0])
    for number in range(61):
        server.sync_eliminations_rpc(lists[1 - number % 2])
    found = noticed(server)
    assert len(found) == 20
    (merged,) = [text for text in found if "more such changes" in text]
    assert merged.endswith(", and 41 more such changes after it")
    problems = [each for each in server.health_check_rpc()["problems"] if each["name"] == "guarded_change"]
    first = problems[0]["remedy"].partition("--to ")[2].partition("`")[0]
    assert server.rollback_rpc(first) == 40
    assert sorted(server.get_eliminations_dict_rpc()) == sorted(each["hotkey"] for each in lists[0])
    assert len(server.acknowledge_rpc()) == 20
    assert noticed(server) == []


def test_a_notice_names_no_rollback_that_was_pruned(start):
    server = start()
    server.sync_eliminations_rpc(rows(*range(40)))
    server.sync_eliminations_rpc(rows(*range(20)))
    for event, named in ((40, "rollback --to 40"), (41, "a backup")):
        server.prune_history_rpc(event)
        (problem,) = server.health_check_rpc()["problems"]
        assert named in problem["remedy"]
    (problem,) = start().health_check_rpc()["problems"]
    assert "a backup" in problem["remedy"]
    start().sync_eliminations_rpc(rows(*range(5)))
    assert len(noticed(start())) == 2


def test_what_was_forgotten_hides_no_small_change_from_the_guard(start):
    server = start()
    shrink(server, SMALL_STEPS[:4])
    server.prune_history_rpc(server.get_history_rpc(limit=1)[0]["id"])
    shrink(server, SMALL_STEPS[4:5])
    assert len(noticed(server)) == 1


def test_what_is_meant_is_told_all_the_same(start):
    server = start(sync_guard="refuse")
    server.sync_eliminations_rpc(rows(*range(30)))
    for call in (
        lambda **meant: server.sync_eliminations_rpc([], **meant),
        lambda **meant: server.write_eliminations_to_disk_rpc(rows(*range(60)), **meant),
        lambda **meant: server.delete_eliminations_rpc([f"h{n}" for n in range(10)], **meant),
        server.clear_eliminations_rpc,
    ):
        before = server.get_eliminations_dict_rpc(), server.get_history_rpc(limit=1)
        with pytest.raises(GuardedChangeError, match="force=True"):
            call()
        assert (server.get_eliminations_dict_rpc(), server.get_history_rpc(limit=1)) == before
    assert noticed(server) == []
    server.clear_eliminations_rpc(force=True)
    assert len(noticed(server)) == 1


def test_what_the_rules_delete_is_exempt(start):
    server = start(sync_guard="refuse")
    server.sync_eliminations_rpc(rows(*range(30)))
    times = {
        name: record["elimination_initiated_time_ms"]
        for name, record in server.get_eliminations_dict_rpc().items()
    }
    assert len(server.delete_eliminations_rpc(list(times), times)) == 30
    assert noticed(server) == []


@pytest.mark.parametrize("mode", ["tell", "refuse"])
@pytest.mark.parametrize("while_serving", [True, False])
def test_an_edit_of_the_file_counts(start, tmp_path, mode, while_serving):
    server = start(sync_guard=mode)
    server.sync_eliminations_rpc(rows(*range(30)))
    file = tmp_path / "state" / "eliminations.json"
    if not while_serving:
        server.close()
    kept = json.loads(file.read_text())["eliminations"][:5]
    file.write_text(json.dumps({"eliminations": kept}))
    if while_serving:
        server.load_eliminations_from_disk_rpc()
    else:
        server = start(sync_guard=mode)
    if mode == "tell":
        assert len(server.get_eliminated_hotkeys_rpc()) == 5
        assert len(noticed(server)) == 1
    else:
        assert len(server.get_eliminated_hotkeys_rpc()) == 30
        (problem,) = server.health_check_rpc()["problems"]
        assert problem["name"] == "file_not_applied"
        assert "25 of 30" in problem["text"]


def test_figures_are_checked():
    with pytest.raises(ValueError, match="sync_guard"):
        EliminationManager(None, None, None, running_unit_tests=True, sync_guard="perhaps")
    for figures in ({"count": 0}, {"share": 2}, {"share": float("nan")}):
        with pytest.raises(ValueError, match="guard"):
            Guard(**figures)


def test_slack_hears_at_once_of_a_change_that_was_meant(managers):
    told = []

    class Slack:
        def send_message(self, text, level="info"):
            told.append(text)

    manager = managers(sync_guard="refuse", slack_notifier=Slack())
    manager.sync_eliminations(rows(*range(30)))

    with pytest.raises(GuardedChangeError):
        manager.sync_eliminations(rows(*range(10)))
    assert len(manager.eliminations) == 30
    assert manager.sync_eliminations(rows(*range(10)), force=True)
    until(lambda: told)
    assert "take back 20 of 30" in told[0]
