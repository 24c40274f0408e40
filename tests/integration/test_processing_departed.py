"""Who has left: departures that are believed, zombies, the deletion of what is long over; through the manager."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from reference_validator import DAY, Managed

from shmelim.eliminations.debts.states import IN_DOUBT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def miners(count: int) -> list[str]:
    return [f"miner{number:02}" for number in range(count)]


def test_10_lost_of_40_are_recorded(managed: Managed) -> None:
    validator = managed.validator
    validator.register(*miners(40))
    managed.tick()
    validator.deregister(*miners(10))
    managed.tick()
    assert sorted(managed.manager.get_departed_hotkeys()) == miners(10)


def test_11_lost_of_44_are_not_recorded_until_the_metagraph_recovered(managed: Managed) -> None:
    validator = managed.validator
    validator.register(*miners(44))
    managed.tick()
    validator.deregister(*miners(11))
    managed.tick()
    assert managed.manager.get_departed_hotkeys() == {}
    validator.registry.set([*validator.registry.hotkeys, *miners(10)])
    managed.tick()
    assert list(managed.manager.get_departed_hotkeys()) == ["miner10"], "the one who is still missing"


def test_loss_that_is_not_believed_is_told_once_until_the_metagraph_recovered(managed: Managed) -> None:
    validator = managed.validator
    told = []
    managed.manager.slack_notifier = SimpleNamespace(send_message=lambda text, level: told.append((text, level)))
    everybody = miners(44)
    for outages in (1, 2):
        validator.registry.set(everybody)
        managed.tick()
        validator.deregister(*miners(11))
        managed.tick()
        managed.tick()
        losses = [level for text, level in told if text.startswith("11 hotkeys are missing")]
        assert losses == ["error"] * outages


def test_hotkey_that_comes_back_is_re_registered_at_once_here_and_elsewhere_once_a_tick_saw_it(
    managed: Managed,
) -> None:
    validator = managed.validator
    validator.register("a", "b")
    managed.tick()
    validator.deregister("a")
    managed.tick()
    info = managed.manager.get_departed_hotkey_info("a")
    validator.registry.set(["a", "b"])
    assert managed.manager.is_hotkey_re_registered("a"), "the metagraph is at hand"
    assert not managed.manager.reader.is_hotkey_re_registered("a")
    managed.tick()
    assert managed.manager.reader.is_hotkey_re_registered("a")
    validator.deregister("a")
    managed.tick()
    assert managed.manager.get_departed_hotkey_info("a") == info, "recorded once, for ever"


def test_legacy_departed_list_reads_as_departed_in_1970(tmp_path: Path, make: Callable[..., Managed]) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "departed_hotkeys.json").write_text(json.dumps({"departed_hotkeys": ["old", "older"]}))
    managed = make("direct")
    managed.validator.register("old")
    managed.tick()
    assert managed.manager.get_departed_hotkeys() == {"old": {"detected_ms": 0}, "older": {"detected_ms": 0}}
    assert managed.manager.is_hotkey_re_registered("old")


def test_default_departed_file_is_used_when_there_is_none_yet(tmp_path: Path) -> None:
    from reference_validator import ReferenceValidator, manager_of, plug_in

    default = tmp_path / "default.json"
    default.write_text(json.dumps({"departed_hotkeys": {"gone": {"detected_ms": 5}}}))
    validator = ReferenceValidator(tmp_path / "validator")
    validator.register("gone")
    collaborators, environment = plug_in(validator)
    manager = manager_of(collaborators, environment, running_unit_tests=True, default_departed=default)
    try:
        manager.process_eliminations()
        assert manager.get_departed_hotkeys() == {"gone": {"detected_ms": 5}}
        assert manager.is_hotkey_re_registered("gone")
    finally:
        manager.shutdown()


@pytest.mark.parametrize("unknown", [None, ["", None]])
def test_metagraph_without_hotkeys_is_not_known_yet(managed: Managed, unknown: Any) -> None:
    validator = managed.validator
    validator.register("a", "b")
    managed.tick()
    validator.registry.set_to(unknown)
    managed.tick()
    assert len(managed.alerts) == (unknown is not None)
    assert managed.reasons == {}
    assert managed.manager.get_departed_hotkeys() == {}


def test_nobody_departs_while_an_entry_of_the_metagraph_is_not_a_hotkey(directly: Managed) -> None:
    validator = directly.validator
    validator.register("a", "b")
    directly.tick()
    validator.deregister("b")
    validator.registry.set_to(["a", "", None, "x" * 256, "new"])
    for _ in range(3):
        directly.tick()
    assert directly.manager.reader.snapshot().registered == {"a", "b", "new"}
    assert directly.manager.get_departed_hotkeys() == {}
    assert directly.reasons == {}
    assert len(directly.alerts) == 1
    assert "3 entries of the metagraph are not hotkeys" in directly.alerts[0]
    validator.registry.set_to(["a", "new"])
    directly.tick()
    assert list(directly.manager.get_departed_hotkeys()) == ["b"]
    assert directly.reasons == {"b": "ZOMBIE"}


def test_manager_starts_with_a_metagraph_that_is_not_whole_yet(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from shmelim import EliminationManager

    for hotkeys, registered in ((None, set()), (["a", "", None], {"a"}), (("b", "c"), {"b", "c"})):
        metagraph: Any = SimpleNamespace(hotkeys=hotkeys)
        with EliminationManager(metagraph, None, None, running_unit_tests=True) as manager:
            assert manager.reader.snapshot().registered == registered


# ---------------------------------------------------------------------- zombies


def test_zombie_is_flattened_and_never_slashed(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "b")
    validator.open_position("a")
    validator.limit_orders.place("a")
    managed.tick()
    validator.deregister("a")
    managed.tick()
    row = managed.manager.get_elimination("a")
    assert row is not None
    assert (row["reason"], row["dd"], row["elimination_initiated_time_ms"]) == ("ZOMBIE", None, validator.now_ms)
    assert validator.is_flat("a")
    assert validator.collateral.slashes() == []
    assert managed.reasons == {"a": "ZOMBIE"}


def test_development_hotkey_is_no_zombie(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "DEVELOPMENT")
    managed.tick()
    validator.deregister("DEVELOPMENT")
    managed.tick()
    assert managed.reasons == {}


def test_missing_miners_whose_loss_is_not_believed_are_no_zombies(managed: Managed) -> None:
    validator = managed.validator
    validator.register(*miners(44))
    managed.tick()
    everybody = list(validator.registry.hotkeys)
    validator.deregister(*miners(11))
    managed.tick()
    assert managed.reasons == {}
    validator.registry.set([])
    managed.tick()
    assert managed.reasons == {}
    validator.registry.set(everybody[1:])
    managed.tick()
    assert managed.reasons == {"miner00": "ZOMBIE"}


def test_newcomer_is_no_zombie_of_a_metagraph_that_is_not_believed(managed: Managed) -> None:
    """Its first look at the metagraph is one in which a third of all are missing, itself among them."""
    validator = managed.validator
    validator.register(*miners(44))
    managed.tick()
    validator.register("newcomer")
    validator.deregister("newcomer", *miners(15))
    managed.tick()
    assert managed.reasons == {}


def test_metagraph_that_is_not_loaded_yet_makes_no_zombies(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.registry.set([])
    managed.tick()
    assert managed.reasons == {}


def test_development_hotkey_is_the_environments_for_the_server_object_too(make: Callable[..., Managed]) -> None:
    managed = make("direct", development_hotkey="own")
    assert not managed.manager._server_proxy.is_zombie_hotkey_rpc("own", [])
    assert managed.manager._server_proxy.is_zombie_hotkey_rpc("DEVELOPMENT", [])
    assert not managed.manager.is_zombie_hotkey("own", [])


def test_manager_has_every_step(managed: Managed) -> None:
    validator, manager = managed.validator, managed.manager
    validator.register("zombie", "owing", "other")
    manager.process_eliminations()
    validator.open_position("owing")
    row = manager.generate_elimination_row("owing", 0.1, "X", validator.now_ms)
    manager._server_proxy.eliminate_rpc("owing", row, ["positions"])
    manager.settle_debts()
    assert validator.is_flat("owing")
    validator.deregister("zombie")
    assert manager.handle_departed() == ["zombie"]
    assert manager.handle_departed() == []
    manager.handle_zombies()
    assert managed.reasons == {"owing": "X", "zombie": "ZOMBIE"}
    validator.pass_time(2 * DAY)
    manager.delete_expired()
    assert managed.reasons == {"owing": "X"}


# ---------------------------------------------------------------------- deletion


def eliminated_and_gone(managed: Managed, hotkey: str = "a") -> int:
    """Eliminate a miner, let it leave, and return when it was eliminated."""
    validator = managed.validator
    validator.register(hotkey, "other")
    validator.open_position(hotkey)
    validator.probation.fail(hotkey, "PLAGIARISM", None)
    managed.tick()
    validator.deregister(hotkey)
    managed.tick()
    return int(managed.manager.get_elimination(hotkey)["elimination_initiated_time_ms"])


def test_elimination_is_deleted_at_exactly_the_delay(managed: Managed) -> None:
    at_ms = eliminated_and_gone(managed)
    validator = managed.validator
    managed.tick(at_ms + 2 * DAY - 1 - validator.now_ms)
    assert "a" in managed.reasons
    validator.pass_time(1)
    managed.manager.delete_expired()
    assert managed.reasons == {}
    assert validator.book.on_disk("a") == []
    assert "a" not in validator.disk.read("stages", {})
    assert not (validator.miners_directory / "a").exists()
    assert (validator.miners_directory / "other").exists()
    assert list(managed.manager.get_departed_hotkeys()) == ["a"], "that it left is never forgotten"


@pytest.mark.parametrize("how", ["sync", "add"])
def test_elimination_that_was_made_anew_while_the_old_one_was_deleted_stays(managed: Managed, how: str) -> None:
    eliminated_and_gone(managed)
    managed.manager.sync_epoch = None
    row = managed.manager.generate_elimination_row("a", 0.1, "LIQUIDATED", managed.validator.now_ms + 3 * DAY)

    def anew() -> None:
        if how == "sync":
            managed.manager.sync_eliminations([row])
        else:
            managed.manager.add_elimination("a", row)

    managed.validator.faults.at("drop!", anew)
    managed.tick(3 * DAY)
    assert managed.reasons == {"a": "LIQUIDATED"}
    managed.tick(2 * DAY)
    assert managed.reasons == {}


def test_elimination_of_a_registered_miner_is_not_deleted(managed: Managed) -> None:
    eliminated_and_gone(managed)
    managed.validator.registry.set(["a", "other"])
    managed.tick(10 * DAY)
    assert "a" in managed.reasons
    assert len(managed.validator.book.on_disk("a")) == 1


def test_nothing_is_deleted_while_so_many_are_missing_that_it_is_not_believed(managed: Managed) -> None:
    validator = managed.validator
    validator.register(*miners(44))
    validator.probation.fail("miner00", "PLAGIARISM", None)
    managed.tick()
    validator.deregister(*miners(11))
    managed.tick(10 * DAY)
    assert managed.reasons == {"miner00": "PLAGIARISM"}


def test_entries_of_the_challenge_period_are_written_once_for_all_that_are_deleted(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "b", "c", "other")
    for hotkey in ("a", "b", "c"):
        validator.probation.fail(hotkey, "PLAGIARISM", None)
    managed.tick()
    validator.deregister("a", "b", "c")
    before = validator.faults.count("save stages!")
    managed.tick(3 * DAY)
    assert managed.reasons == {}
    assert validator.faults.count("save stages!") == before + 1
    assert set(validator.disk.read("stages", {})) == {"other"}
    managed.tick(3 * DAY)
    assert validator.faults.count("save stages!") == before + 1


def test_elimination_whose_slash_is_in_doubt_is_not_deleted(managed: Managed) -> None:
    managed.validator.faults.fail("slash!")
    eliminated_and_gone(managed)
    managed.tick(10 * DAY)
    assert [(debt["kind"], debt["state"]) for debt in managed.debts] == [("slash", IN_DOUBT)]
    assert "a" in managed.reasons
    assert managed.manager._server_proxy.resolve_slash_rpc("a", made=True)
    managed.tick()
    assert managed.reasons == {}


def test_positions_that_are_still_owed_do_not_keep_an_expired_elimination(managed: Managed) -> None:
    managed.validator.faults.fail("store", hotkey="a", times=None)
    managed.validator.register("a", "other")
    managed.validator.faults.clear()
    managed.validator.open_position("a")
    managed.validator.faults.fail("store", hotkey="a", times=None)
    managed.validator.probation.fail("a", "PLAGIARISM", None)
    managed.tick()
    managed.validator.deregister("a")
    managed.tick(3 * DAY)
    assert managed.reasons == {}
    assert managed.debts == []
    assert managed.validator.book.on_disk("a") == []


def test_deletion_that_was_broken_off_is_repeated(managed: Managed) -> None:
    eliminated_and_gone(managed)
    managed.validator.faults.fail("drop!")
    managed.tick(3 * DAY)
    assert "a" in managed.reasons
    managed.tick()
    assert managed.reasons == {}
    assert not (managed.validator.miners_directory / "a").exists()
