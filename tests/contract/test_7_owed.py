"""SPEC 7: what an elimination owes, over restarts, syncs and attempts; the guard of syncs."""

import pytest
from contract_validator import DAY, HOUR, Notifier, eliminated, miners, row
from waiting import until

import shmelim.errors
from shmelim import SlashNotMadeError

# ---------------------------------------------------------------------- what is owed


def restarted(validate, validator, mode):
    """Another manager of the same state and validator."""
    name = validator.manager.name
    validator.manager.shutdown()
    again = validate(mode, options={"name": name} if mode == "rpc" else {})
    again.now_ms = validator.now_ms
    for attribute in ("metagraph", "positions", "ledgers", "challenge", "contract"):
        setattr(again, attribute, getattr(validator, attribute))
    for attribute, value in again.arguments().items():
        if attribute in ("metagraph", "position_manager", "challengeperiod_manager", "contract_manager"):
            setattr(again.manager, attribute, value)
    return again


def test_what_is_owed_is_finished_after_a_restart(validate, mode):
    validator = validate(mode)
    validator.register("a")
    validator.open("a")
    validator.positions.fail_to_save.add("a")
    validator.contract.answers["a"] = SlashNotMadeError("the chain is away")
    eliminated(validator, "a")
    assert not validator.is_flat("a")
    validator.positions.fail_to_save.clear()
    validator.contract.answers.clear()
    before = validator.contract.slashed("a")
    again = restarted(validate, validator, mode)
    for _ in range(50):  # a slash that failed may pause for a while
        again.tick(HOUR)
    assert again.is_flat("a")
    assert again.contract.slashed("a") == before + 1


@pytest.mark.parametrize("answer", [None, True], ids=str)
def test_a_slash_that_was_made_is_never_made_again(validate, mode, answer):
    validator = validate(mode)
    validator.register("a")
    validator.contract.answers["a"] = answer
    eliminated(validator, "a")
    validator.tick()
    again = restarted(validate, validator, mode)
    again.tick()
    assert again.contract.slashed("a") == 1


def test_a_slash_whose_outcome_is_not_known_is_not_repeated(validator):
    validator.register("a")
    validator.contract.answers["a"] = RuntimeError("no answer")
    eliminated(validator, "a")
    for _ in range(3):
        validator.tick(HOUR)
    assert validator.contract.slashed("a") == 1
    assert validator.slack.about("a", "slash"), "a person decides"


def test_a_slash_that_was_certainly_not_made_is_tried_again(validator):
    validator.register("a")
    validator.contract.answers["a"] = SlashNotMadeError("the chain is away")
    eliminated(validator, "a")
    for _ in range(30):
        validator.tick(HOUR)
    tried = validator.contract.slashed("a")
    assert tried > 1
    validator.contract.answers.clear()
    for _ in range(60):
        validator.tick(HOUR)
    assert validator.contract.slashed("a") == tried + 1


def test_a_slash_that_is_declined_is_settled(direct):
    direct.register("a", "other")
    direct.contract.answers["a"] = False
    eliminated(direct, "a")
    direct.leave("a")
    direct.tick(3 * DAY)
    assert direct.contract.slashed("a") == 1
    assert direct.reasons == {}
    assert direct.slack.of("error") == []


def test_the_share_is_that_of_the_moment(validate):
    validator = validate("direct", slash_proportions={"FAILED_CHALLENGE_PERIOD_TIME": 0.5})
    validator.register("a")
    validator.contract.answers["a"] = SlashNotMadeError("the chain is away")
    eliminated(validator, "a")
    validator.contract.answers.clear()
    validator.environment.slash_proportions["FAILED_CHALLENGE_PERIOD_TIME"] = 1.0
    for _ in range(50):
        validator.tick(HOUR)
    assert {share for _, share in validator.contract.slashes} == {0.5}


def test_an_elimination_that_a_sync_takes_back_again_and_again_is_one_slash(direct):
    direct.register("a", "b")
    for _ in range(4):
        eliminated(direct, "a")
        direct.manager.sync_eliminations([])
        direct.tick(3 * DAY)
    assert direct.contract.slashed("a") == 1


def test_another_rule_or_another_registration_is_another_slash(validator):
    validator.register("a", "b")
    eliminated(validator, "a")
    validator.leave("a")
    validator.tick(3 * DAY)
    assert validator.reasons == {}
    validator.register("a")
    validator.tick(3 * DAY)
    eliminated(validator, "a")
    assert validator.contract.slashed("a") == 2


def test_a_debt_rests_and_is_due_again_with_its_elimination(direct):
    direct.register("a", "b")
    direct.contract.answers["a"] = SlashNotMadeError("the chain is away")
    eliminated(direct, "a")
    rows = direct.manager.get_eliminations_from_memory()
    direct.manager.sync_eliminations([])
    direct.contract.answers.clear()
    tried = direct.contract.slashed("a")
    for _ in range(10):
        direct.tick(HOUR)
    assert direct.contract.slashed("a") == tried
    direct.manager.sync_eliminations(rows)
    for _ in range(30):
        direct.tick(HOUR)
    assert direct.contract.slashed("a") == tried + 1


def test_a_slash_is_owed_while_there_is_no_contract_manager(direct):
    direct.register("a")
    direct.manager.contract_manager = None
    eliminated(direct, "a")
    problems = direct.manager._server_proxy.health_check_rpc()["problems"]
    direct.manager.contract_manager = direct.contract
    for _ in range(10):
        direct.tick(HOUR)
    assert direct.contract.slashed("a") == 1
    assert any("contract" in str(problem) for problem in problems)


def test_more_than_ten_slashes_in_an_hour_are_held(direct):
    direct.register(*miners(14))
    eliminated(direct, *miners(14))
    direct.tick()
    assert len(direct.reasons) == 14
    assert len(direct.contract.slashes) == 10
    assert direct.slack.about("held")


# ---------------------------------------------------------------------- syncs and the guard


def test_an_unchanged_sync_changes_nothing_and_commits_nothing(manager):
    rows = [row("a"), row("b", further=(1, 2))]
    manager.sync_eliminations(rows)
    before = manager.eliminations, manager._server_proxy.get_history_rpc(limit=1)
    assert manager.sync_eliminations(reversed(rows)) == []
    assert (manager.eliminations, manager._server_proxy.get_history_rpc(limit=1)) == before


def guarded(make, tmp_path, **options):
    slack = Notifier()
    manager = make("rpc", state_dir=tmp_path / "state", slack_notifier=slack, **options)
    manager.sync_eliminations([row(hotkey) for hotkey in miners(20)])
    assert slack.messages == [], "a first filling is exempt"
    return manager, slack


TAKING_BACK = {
    "sync": lambda manager: manager.sync_eliminations([row(hotkey) for hotkey in miners(10)]),
    "clear": lambda manager: manager.clear_eliminations(),
    "delete": lambda manager: manager.delete_eliminations(miners(10)),
    "doubling": lambda manager: manager.sync_eliminations([row(hotkey) for hotkey in miners(40)]),
}


@pytest.mark.parametrize("how", TAKING_BACK)
def test_the_guard_tells(make, tmp_path, how):
    manager, slack = guarded(make, tmp_path)
    TAKING_BACK[how](manager)
    assert len(manager.eliminations) == {"sync": 10, "clear": 0, "delete": 10, "doubling": 40}[how]
    health = manager._server_proxy.health_check_rpc()
    assert health["status"] == "ok"
    assert any("notice" in str(found) for found in (health["problems"], health.get("notices") and "notices"))
    until(lambda: slack.messages, "a message")


@pytest.mark.parametrize("how", TAKING_BACK)
def test_the_guard_refuses_if_it_is_told_to(make, tmp_path, how):
    manager, _ = guarded(make, tmp_path, sync_guard="refuse")
    with pytest.raises(shmelim.errors.GuardedChangeError):
        TAKING_BACK[how](manager)
    assert len(manager.eliminations) == 20
    manager.sync_eliminations([row(hotkey) for hotkey in miners(11)])  # 9 of 20 are no tenth
    manager.sync_eliminations([], force=True)
    assert manager.eliminations == {}


def test_the_guard_can_be_off(make, tmp_path):
    manager, slack = guarded(make, tmp_path, sync_guard="off")
    manager.clear_eliminations()
    assert manager.eliminations == {}
    assert slack.messages == []


def test_direct_mode_and_backtests_are_exempt(make):
    for options in ({}, {"is_backtesting": True}):
        slack = Notifier()
        manager = make("direct", slack_notifier=slack, **options)
        manager.sync_eliminations([row(hotkey) for hotkey in miners(20)])
        manager.clear_eliminations()
        assert slack.messages == []
