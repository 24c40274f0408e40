"""SPEC 7: who is eliminated, when and why, and what happens to him; in both modes by the same test bodies."""

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from contract_services import is_alive
from contract_validator import DAY, HOUR, MINUTE, PRICE, START, eliminated, miners, row
from waiting import PATIENCE, until

from shmelim import EliminationClient, ShmelimError, ValidatorEnvironment


def departed(validator):
    return sorted(validator.manager.get_departed_hotkeys())


# ---------------------------------------------------------------------- the environment


def test_defaults_of_the_environment():
    environment = ValidatorEnvironment()
    assert environment.check_interval_ms == 300_000
    assert environment.deletion_delay_ms == 172_800_000
    assert environment.development_hotkey == "DEVELOPMENT"
    for percentage, goes in ((9.99, False), (10, True), (10.01, True)):
        ledger = SimpleNamespace(cps=[SimpleNamespace(mdd=1.0), SimpleNamespace(mdd=1 - percentage / 100)])
        assert environment.drawdown(ledger) == (goes, pytest.approx(percentage))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_drawdown_percentage", float("nan")),
        ("check_interval_ms", -1),
        ("deletion_delay_ms", -1),
        ("slash_proportions", {"LIQUIDATED": 1.5}),
        ("slash_proportions", {"LIQUIDATED": -0.1}),
        ("tick_pause_s", float("nan")),
        ("clock", lambda: 5),
    ],
)
def test_a_figure_that_cannot_be_is_a_value_error_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        ValidatorEnvironment(**{field: value})


PAIR = SimpleNamespace(trade_pair_id="BTCUSD", trade_pair="BTC/USD")


def test_price_source_understands_prices_by_the_name_of_the_pair():
    assert ValidatorEnvironment().price_source(PAIR, {"BTC/USD": 1.5}, START) == 1.5
    assert ValidatorEnvironment().price_source(PAIR, {"ETH/USD": 1.5}, START) is None


def test_price_source_understands_pairs_of_price_and_time():
    prices = {"BTCUSD": (1.5, START), "BTCUSD_prev": (1.4, START - 1)}
    assert ValidatorEnvironment().price_source(PAIR, prices, START) == 1.5


def test_the_limit_of_slashes_is_the_environments():
    assert ValidatorEnvironment().max_slashes_per_hour == 10


# ---------------------------------------------------------------------- when a tick is due


def test_a_tick_runs_after_strictly_more_than_the_interval(validate):
    validator = validate("rpc")
    validator.register("a")
    validator.tick()
    validator.fall("a", 20)
    validator.tick(300_000)
    assert validator.reasons == {}
    validator.tick(1)
    assert validator.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}
    assert validator.manager.get_last_update_time_ms() == validator.now_ms


def test_or_when_challenge_reasons_wait(validate):
    validator = validate("rpc")
    validator.register("a")
    validator.tick()
    validator.challenged("a")
    validator.tick(0)
    assert validator.reasons == {"a": "FAILED_CHALLENGE_PERIOD_TIME"}


def test_or_always_in_direct_mode(direct):
    direct.register("a")
    direct.tick(0)
    direct.fall("a", 20)
    direct.tick(0)
    assert direct.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}


def test_rules_come_in_their_order(validator):
    """As the history tells it."""
    validator.register("expired", "liquid", "failed", "down", "zombie", "other")
    eliminated(validator, "expired")
    validator.leave("expired")
    validator.tick(2 * DAY - HOUR)
    validator.fall("down", 20)
    validator.challenged("failed")
    validator.liquidate("liquid")
    validator.leave("zombie")
    (before, *_) = validator.manager._server_proxy.get_history_rpc(limit=1)
    validator.tick(HOUR)
    events = [event for event in validator.manager._server_proxy.get_history_rpc() if event["id"] > before["id"]]
    seen = [(event["action"], event["hotkey"]) for event in reversed(events)]
    assert [found for found in seen if found[0] in ("depart", "add", "remove")] == [
        ("depart", "zombie"),
        ("add", "liquid"),
        ("add", "failed"),
        ("add", "down"),
        ("add", "zombie"),
        ("remove", "expired"),
    ]


def test_the_first_rule_that_fits_counts_and_the_first_reason_stays(validator):
    validator.register("a", "b", "c", "other")
    validator.tick()
    for hotkey in "abc":
        validator.fall(hotkey, 20)
    validator.challenged("a", "PLAGIARISM")
    validator.challenged("b", "PLAGIARISM")
    validator.liquidate("a")
    validator.leave("c")
    validator.tick()
    validator.liquidate("b")
    validator.liquidate("c")
    validator.tick()
    assert validator.reasons == {"a": "LIQUIDATED", "b": "PLAGIARISM", "c": "MAX_TOTAL_DRAWDOWN"}


def test_the_loop_pauses_while_a_sync_is_in_progress_and_survives_every_exception(validate, mode):
    validator = validate(mode, tick_pause_s=0.01, error_pause_s=0.01, check_interval_ms=0)
    validator.register("a", "b")
    validator.syncing.value = True
    asked = []

    def reasons():
        asked.append(validator.syncing.value)
        if len(asked) < 4:
            raise RuntimeError("the challenge period is out of order")
        return bool(validator.challenge.reasons)

    validator.challenge.has_elimination_reasons = reasons
    looks = iter(range(10**9))
    validator.manager.sync_in_progress = Looked(validator.syncing, looks)
    loop = threading.Thread(target=validator.manager.run_update_loop)
    loop.start()
    until(lambda: next(looks) > 5, "some looks at the flag")
    assert asked == []
    validator.challenged("a")
    validator.syncing.value = False
    until(lambda: "a" in validator.reasons, "a tick after the exceptions")
    assert not any(asked)
    until(lambda: validator.slack.about("out of order"), "an alert")
    validator.ending["it"] = "ends"
    loop.join(PATIENCE)
    assert not loop.is_alive()


class Looked:
    """A shared value that counts who looks."""

    def __init__(self, value, looks):
        self._value, self._looks = value, looks

    @property
    def value(self):
        next(self._looks)
        return self._value.value


LOOP = """
import multiprocessing, os, signal, sys
from contract_validator import Metagraph
from shmelim import EliminationManager
if __name__ == "__main__":
    manager = EliminationManager(Metagraph("a"), None, None, name=sys.argv[1], port=None, state_dir=sys.argv[2])
    loop = multiprocessing.get_context("fork").Process(target=manager.run_update_loop)
    loop.start()
    print(loop.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_loop_ends_with_the_process_that_made_its_manager(unused_name, tmp_path):
    command = [sys.executable, "-c", LOOP, unused_name(), str(tmp_path / "state")]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths}
    ) as owner:
        pid = int(owner.stdout.readline())
        owner.wait(PATIENCE)
    try:
        until(lambda: not is_alive(pid), "the end of the loop", within=6)
    finally:
        if is_alive(pid):
            os.kill(pid, 9)


# ---------------------------------------------------------------------- one teller


def test_copies_of_an_earlier_manager_are_refused(make, unused_name, tmp_path):
    name, options = unused_name(), {"state_dir": tmp_path / "state"}
    first = make("rpc", name=name, **options)
    here, there = multiprocessing.Pipe()

    def copy():
        there.poll(PATIENCE)
        for call in (lambda: first.update_metagraph(["x"]), lambda: first.add_elimination("x", row("x"))):
            try:
                call()
                there.send("done")
            except ShmelimError as error:
                there.send(str(error))

    child = multiprocessing.get_context("fork").Process(target=copy, daemon=True)
    child.start()
    first.shutdown()
    second = make("rpc", name=name, **options)
    here.send("go on")
    for _ in range(2):
        assert here.poll(PATIENCE)
        assert here.recv() != "done"
    child.join(PATIENCE)
    assert second.eliminations == {}


def test_a_client_may_change_eliminations_and_not_tell_the_metagraph(make):
    manager = make("rpc")
    manager.update_metagraph(["a", "b"])
    client = EliminationClient(manager.name)
    assert client.add_elimination("x", row("x")) is True
    with pytest.raises(ShmelimError):
        client.update_metagraph(["a"])
    assert manager.get_departed_hotkeys() == {}
    client.close()


# ---------------------------------------------------------------------- departed hotkeys


@pytest.mark.parametrize(
    ("lost", "known", "recorded"),
    [(10, 40, True), (10, 11, True), (11, 44, False), (11, 45, True), (12, 60, True)],
)
def test_a_loss_is_recorded_unless_it_is_an_anomaly(direct, lost, known, recorded):
    direct.register(*miners(known))
    direct.tick()
    direct.leave(*miners(lost))
    direct.tick()
    assert departed(direct) == (miners(lost) if recorded else [])


def test_departures_are_recorded_once_for_ever_and_those_of_an_anomaly_when_it_is_over(validator):
    validator.register(*miners(44))
    validator.tick()
    validator.leave("miner43")
    validator.tick()
    first = validator.manager.get_departed_hotkey_info("miner43")
    validator.leave(*miners(20))
    validator.tick()
    assert departed(validator) == ["miner43"]
    assert "ZOMBIE" not in {validator.reasons.get(hotkey) for hotkey in miners(20)}
    validator.register("miner43", *miners(20)[1:])
    validator.tick()
    assert departed(validator) == ["miner00", "miner43"], "who is still missing"
    assert validator.manager.is_hotkey_re_registered("miner43")
    validator.leave("miner43")
    validator.tick()
    assert validator.manager.get_departed_hotkey_info("miner43") == first


def test_a_look_with_an_entry_which_is_no_hotkey_makes_no_departures(direct):
    direct.register("a", "b", "c")
    direct.tick()
    direct.metagraph.hotkeys = ["a", None, "c"]
    direct.tick()
    assert departed(direct) == []
    assert direct.reasons == {}


def test_nor_does_a_metagraph_that_is_not_known_yet(validator):
    validator.register("a", "b")
    validator.tick()
    validator.metagraph.hotkeys = None
    validator.tick()
    assert departed(validator) == []
    assert validator.reasons == {}


def test_nor_does_an_empty_one(direct):
    direct.register("a", "b")
    direct.tick()
    direct.metagraph.hotkeys = []
    direct.tick()
    assert departed(direct) == []
    assert direct.reasons == {}
    server = direct.manager._server_proxy
    assert [problem["name"] for problem in server.health_check_rpc()["problems"]] == ["departures"]
    assert server.get_missing_hotkeys_rpc() == ["a", "b"]
    direct.metagraph.hotkeys = ["a", "b"]
    direct.tick()
    assert server.health_check_rpc()["problems"] == []
    assert server.get_missing_hotkeys_rpc() == []


def test_an_empty_one_is_believed_if_the_environment_says_so(validate):
    validator = validate("direct", believe_empty_metagraph=True)
    validator.register("a", "b")
    validator.tick()
    validator.metagraph.hotkeys = []
    validator.tick()
    assert departed(validator) == ["a", "b"]


def test_nor_does_a_loss_in_small_steps_over_a_day(direct):
    direct.register(*miners(40))
    direct.tick()
    for step in range(5):
        direct.leave(*miners(40)[5 * step : 5 * step + 5])
        direct.tick(HOUR)
    assert len(departed(direct)) <= 10


def test_a_telling_that_was_wrong_is_corrected_by_the_next_look(validator):
    validator.register("a", "b")
    validator.tick()
    validator.manager.update_metagraph(["a"])
    validator.tick()
    assert validator.manager.is_hotkey_re_registered("b")
    assert validator.reasons == {}


# ---------------------------------------------------------------------- first refresh


def test_first_refresh_closes_once_what_eliminated_miners_still_hold(validator):
    validator.register("a", "b")
    validator.open("a")
    validator.open("b")
    validator.manager.add_elimination("a", row("a", elimination_initiated_time_ms=validator.now_ms))
    validator.tick()
    assert (validator.is_flat("a"), validator.is_flat("b")) == (True, False)
    assert validator.manager.first_refresh_ran
    assert validator.contract.slashes == [], "a row from elsewhere owes nothing"
    validator.open("a", "ETH/USD")
    validator.tick()
    assert not validator.is_flat("a"), "not a second time"


def test_there_is_none_in_a_backtest(validate):
    validator = validate("direct", options={"is_backtesting": True})
    validator.register("a")
    validator.open("a")
    validator.manager.add_elimination("a", row("a", elimination_initiated_time_ms=validator.now_ms))
    validator.tick()
    assert not validator.is_flat("a")


# ---------------------------------------------------------------------- the rules


def test_perf_ledger_eliminations_are_stored_as_they_are(validator):
    validator.register("a")
    validator.tick(HOUR)
    at_ms = validator.now_ms
    validator.open("a", at_ms=at_ms - MINUTE)
    validator.liquidate("a", price_info={"BTC/USD": 42.0}, return_info={"x": 1}, further="kept")
    validator.tick(HOUR)
    found = validator.manager.get_elimination("a")
    assert (found["reason"], found["dd"], found["elimination_initiated_time_ms"]) == ("LIQUIDATED", 0.7, at_ms)
    assert (found["price_info"], found["return_info"]) == ({"BTC/USD": 42.0}, {"x": 1})
    (position,) = validator.positions.get_positions_for_one_hotkey("a")
    assert position.is_closed_position
    assert (position.orders[-1].processed_ms, position.orders[-1].price) == (at_ms, 42.0)
    assert validator.queue.messages == [{"hotkey": "a", "position": "a-0", "closed": True}]


def test_challenge_period_eliminations_are_recorded_and_then_cleared(validator):
    validator.register("a", "b")
    validator.challenged("a", "FAILED_CHALLENGE_PERIOD_DRAWDOWN", 0.12)
    validator.challenged("b", "FAILED_CHALLENGE_PERIOD_TIME", None)
    validator.tick()
    assert validator.reasons == {"a": "FAILED_CHALLENGE_PERIOD_DRAWDOWN", "b": "FAILED_CHALLENGE_PERIOD_TIME"}
    assert validator.manager.get_elimination("a")["dd"] == 0.12
    assert validator.challenge.reasons == {}


def test_drawdown_judges_the_scored_bucket_by_ledgers_that_are_valid(validator):
    validator.register("below", "exact", "stale")
    validator.register("unscored", bucket="CHALLENGE")
    validator.fall("below", 9.99)
    for hotkey in ("exact", "stale", "unscored"):
        validator.fall(hotkey, 10)
    validator.ledgers.perf_ledger_hks_to_invalidate = {"stale": 0}
    validator.tick()
    assert validator.reasons == {"exact": "MAX_TOTAL_DRAWDOWN"}
    assert validator.manager.get_elimination("exact")["dd"] == pytest.approx(10.0), "a percentage"


def test_what_is_the_validators_own_decides(validate):
    validator = validate(
        "direct",
        drawdown=lambda ledger: (True, 77.0),
        scored_bucket="OWN",
        development_hotkey="own",
        price_source=lambda pair, prices, at_ms: 55.0,
        slash_proportions={"MAX_TOTAL_DRAWDOWN": 0.5},
    )
    validator.register("a", "own", bucket="OWN")
    validator.open("a")
    validator.fall("a", 0)
    validator.tick()
    validator.leave("own")
    validator.tick()
    assert validator.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}
    assert validator.manager.get_elimination("a")["dd"] == 77.0
    assert validator.positions.get_positions_for_one_hotkey("a")[0].orders[-1].price == 55.0
    assert validator.contract.slashes == [("a", 0.5)]


BAD_FIELDS = {
    "dd": "much",
    "dd of any type": object(),
    "price_info": [1],
    "return_info": {"x": object()},
    "return_info of any size": {"x": "x" * (2 << 20)},
    "elimination_initiated_time_ms": float("nan"),
    "reason": None,
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_ledgers_row_is_never_lost_for_a_side_field(direct, field):
    direct.register("a")
    direct.open("a")
    direct.liquidate("a", **{field.split()[0]: BAD_FIELDS[field]})
    direct.tick()
    assert list(direct.reasons) == ["a"]
    assert direct.is_flat("a")


@pytest.mark.parametrize(
    "why", [("PLAGIARISM", "much"), ("PLAGIARISM", object), (None, 0.1), ("PLAGIARISM",)], ids=str
)
def test_nor_a_challenge_reason(direct, why):
    direct.register("a")
    direct.challenge.reasons["a"] = why
    direct.tick()
    assert list(direct.reasons) == ["a"]


@pytest.mark.parametrize("factor", [float("nan"), "low", None])
def test_nor_a_drawdown_for_one_checkpoint(direct, factor):
    direct.register("a")
    direct.ledgers.ledgers["a"] = SimpleNamespace(cps=[SimpleNamespace(mdd=factor), SimpleNamespace(mdd=0.8)])
    direct.tick()
    assert direct.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}


# ---------------------------------------------------------------------- the elimination of a miner


@pytest.mark.parametrize(("before", "closed_at"), [(1, 0), (0, 1), (-5, 6)])
def test_the_flat_order_stands_at_the_elimination_or_1_ms_after_a_later_order(direct, before, closed_at):
    direct.register("a")
    direct.tick(HOUR)
    direct.liquidate("a")
    eliminated_ms = direct.now_ms
    direct.open("a", at_ms=eliminated_ms - before)
    direct.tick()
    (position,) = direct.positions.get_positions_for_one_hotkey("a")
    assert position.orders[-1].processed_ms == eliminated_ms + closed_at
    assert position.orders[-1].price == PRICE, "which the fetcher was asked for"


def test_a_position_is_read_again_and_saved_under_its_lock(validator):
    validator.register("a")
    validator.open("a")

    def order_comes_in():
        late = validator.positions.get_miner_position_by_uuid("a", "a-0")
        late.orders.append(SimpleNamespace(processed_ms=validator.now_ms + 500, price=1.0))
        validator.positions.book["a"]["a-0"] = late
        validator.locks.when_taken = lambda: None

    validator.locks.when_taken = order_comes_in
    eliminated(validator, "a")
    (position,) = validator.positions.get_positions_for_one_hotkey("a")
    assert [order.processed_ms for order in position.orders][-2:] == [
        validator.now_ms + 500,
        validator.now_ms + 501,
    ]
    assert [done.held for done in validator.done if done.what == "save"] == [[("a", "BTCUSD")]]
    assert validator.locks.held == []


def test_positions_are_left_alone_once_the_epoch_moved(validator):
    validator.register("a")
    validator.open("a")

    def a_sync_begins():
        validator.epoch.value += 1

    validator.locks.when_taken = a_sync_begins
    eliminated(validator, "a")
    assert "a" in validator.reasons
    assert not validator.is_flat("a")
    validator.locks.when_taken = lambda: None
    validator.tick()
    assert validator.is_flat("a"), "by the next tick, from what is there then"


def test_limit_orders_go_and_an_error_there_costs_nothing(validator, caplog):
    validator.register("a")
    validator.open("a")
    validator.limit_orders.error = OSError("the order book is shut")
    eliminated(validator, "a")
    assert validator.is_flat("a")
    assert validator.contract.slashed("a") == 1
    assert [done.hotkey for done in validator.done if done.what == "limit orders"] == ["a"]
    assert any("order book is shut" in record.getMessage() for record in caplog.records)


def test_collateral_is_slashed_by_three_rules_and_never_of_zombies(validator):
    validator.register("liquid", "failed", "down", "zombie", "other")
    validator.tick()
    validator.liquidate("liquid")
    validator.challenged("failed")
    validator.fall("down", 20)
    validator.leave("zombie")
    validator.tick()
    assert len(validator.reasons) == 4
    assert sorted(validator.contract.slashes) == [("down", None), ("failed", None), ("liquid", None)]
    validator.tick()
    assert len(validator.contract.slashes) == 3


def test_all_is_recorded_before_anything_is_closed_and_closed_before_anything_is_slashed(direct):
    direct.register("a", "b", "c")
    for hotkey in "abc":
        direct.open(hotkey)
    seen = []

    def when_done(what, _):
        flat = all(direct.is_flat(hotkey) for hotkey in "abc")
        seen.append((what, len(direct.reasons), flat if what == "slash" else True))

    direct.when_done = when_done
    direct.liquidate("a")
    direct.challenged("b")
    direct.fall("c", 20)
    direct.tick()
    assert {found for found in seen if found[0] in ("save", "slash")} == {("save", 3, True), ("slash", 3, True)}


def test_one_miners_failure_never_stops_the_others(validator):
    validator.register("a", "b", "c")
    for hotkey in "abc":
        validator.open(hotkey)
    validator.positions.fail_to_save.add("a")
    eliminated(validator, "a", "b", "c")
    assert sorted(validator.reasons) == ["a", "b", "c"]
    assert [validator.is_flat(hotkey) for hotkey in "abc"] == [False, True, True]
    assert validator.slack.about("a cannot be saved")
    validator.positions.fail_to_save.clear()
    validator.tick()
    assert validator.is_flat("a")


def test_health_tells_of_the_last_tick(direct):
    direct.register("a")
    direct.tick()
    assert any("tick" in key for key in direct.manager._server_proxy.health_check_rpc())


# ---------------------------------------------------------------------- zombies and deletion


def test_a_zombie_is_flattened_and_never_slashed(validator):
    validator.register("a", "DEVELOPMENT", "b")
    validator.open("a")
    validator.tick()
    validator.leave("a", "DEVELOPMENT")
    validator.tick()
    assert validator.reasons == {"a": "ZOMBIE"}
    assert validator.manager.get_elimination("a")["dd"] is None
    assert validator.is_flat("a")
    assert validator.contract.slashes == []


@pytest.mark.parametrize("name", ["backup-2026", "lost+found", "5" + "F" * 47])
def test_a_directory_that_is_nobodys_is_no_zombie(direct, name):
    direct.register("a")
    (direct.miners / name).mkdir()
    direct.tick()
    assert direct.reasons == {}


def test_a_valid_address_is_one_though_it_was_never_seen(direct):
    direct.register("a")
    (direct.miners / "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY").mkdir()
    direct.tick()
    assert list(direct.reasons.values()) == ["ZOMBIE"]


def test_what_can_be_a_hotkey_is_the_environments(validate):
    validator = validate("direct", is_hotkey=lambda name: name == "hotkey123")
    validator.register("a")
    for name in ("hotkey123", "backup"):
        (validator.miners / name).mkdir()
    validator.tick()
    assert validator.reasons == {"hotkey123": "ZOMBIE"}


def test_the_directory_of_what_was_wrongly_a_zombie_is_never_removed(direct):
    direct.register("a")
    (direct.miners / "backup-2026").mkdir()
    old = row("backup-2026", reason="ZOMBIE", elimination_initiated_time_ms=direct.now_ms - 10 * DAY)
    direct.manager.add_elimination("backup-2026", old)
    direct.tick()
    assert (direct.miners / "backup-2026").exists()
    assert any(
        "backup-2026" in str(problem) for problem in direct.manager._server_proxy.health_check_rpc()["problems"]
    )


def test_deletion_at_exactly_the_delay_of_those_who_left(validator):
    validator.register("a", "stays", "other")
    validator.open("a")
    eliminated(validator, "a", "stays")
    at_ms = validator.now_ms
    validator.leave("a")
    validator.tick(at_ms + 2 * DAY - 1 - validator.now_ms)
    assert "a" in validator.reasons
    written = validator.challenge.written
    validator.manager.set_last_update_time()
    validator.tick(at_ms + 2 * DAY + 300_001 - validator.now_ms)
    assert list(validator.reasons) == ["stays"], "who is in the metagraph is not deleted"
    assert validator.positions.book["a"] == {}
    assert "a" not in validator.challenge.buckets
    assert validator.challenge.written > written
    assert not (validator.miners / "a").exists()
    assert (validator.miners / "stays").exists()
    assert departed(validator) == ["a"], "that it left is never forgotten"
