"""SPEC 6: what is on disk, in which form, how soon, and what a damaged file costs."""

import json
import os
import stat
from pathlib import Path

import pytest
from contract_services import kill
from contract_validator import Metagraph, row
from waiting import until

import shmelim


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def again(make, mode, state, unused_name):
    """Make managers of one state, one after the other."""
    name, made = unused_name(), []

    def again(*args, **options):
        for earlier in made:
            earlier.shutdown()
        made.append(make(mode, *args, state_dir=state, **({"name": name} if mode == "rpc" else {}) | options))
        return made[-1]

    return again


def in_file(state):
    return json.loads((state / "eliminations.json").read_text())


def departed_in_file(state):
    return json.loads((state / "departed_hotkeys.json").read_text())


def listing(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob("*"))


# ---------------------------------------------------------------------- form


def test_form_of_the_files(again, state):
    manager = again()
    manager.sync_eliminations([row("z"), row("a")])
    manager.update_metagraph(["a", "m", "k"])
    manager.update_metagraph(["a"])
    manager.save_eliminations()
    assert in_file(state) == {"eliminations": [row("z"), row("a")]}
    departed = departed_in_file(state)
    assert departed == {"departed_hotkeys": manager.get_departed_hotkeys()}
    assert all(list(info) == ["detected_ms"] for info in departed["departed_hotkeys"].values())
    assert list(departed["departed_hotkeys"]) == ["k", "m"] or list(departed["departed_hotkeys"]) == ["m", "k"]


@pytest.mark.parametrize(
    "legacy", [["old", "older"], {"departed_hotkeys": ["old", "older"]}], ids=["list", "dict"]
)
def test_a_legacy_list_of_departed_hotkeys_reads_as_1970(again, state, legacy):
    state.mkdir()
    (state / "departed_hotkeys.json").write_text(json.dumps(legacy))
    manager = again(Metagraph("old"), None, None)
    assert manager.get_departed_hotkeys() == {"old": {"detected_ms": 0}, "older": {"detected_ms": 0}}
    assert manager.is_hotkey_re_registered("old")


def test_files_that_are_there_at_the_first_start_are_the_state(again, state):
    state.mkdir()
    (state / "eliminations.json").write_text(json.dumps({"eliminations": [row("z"), row("a")]}))
    (state / "departed_hotkeys.json").write_text(json.dumps({"departed_hotkeys": {"m": {"detected_ms": 5}}}))
    manager = again()
    assert manager.get_eliminations_from_memory() == [row("z"), row("a")]
    assert manager.get_departed_hotkeys() == {"m": {"detected_ms": 5}}


def test_an_edit_by_hand_counts_at_the_next_start(again, state):
    manager = again()
    manager.sync_eliminations([row("a"), row("b")])
    manager.shutdown()
    (state / "eliminations.json").write_text(json.dumps({"eliminations": [row("b"), row("c")]}))
    assert again().get_eliminations_from_memory() == [row("b"), row("c")]


def test_a_default_departed_file_is_used_when_there_is_none_yet(again, tmp_path):
    default = tmp_path / "default.json"
    default.write_text(json.dumps({"departed_hotkeys": {"x": {"detected_ms": 5}}}))
    manager = again(default_departed=default)
    assert manager.get_departed_hotkeys() == {"x": {"detected_ms": 5}}
    manager.update_metagraph(["y", "z"])
    manager.update_metagraph(["z"])
    default.write_text(json.dumps({"departed_hotkeys": {"other": {"detected_ms": 6}}}))
    assert list(again(default_departed=default).get_departed_hotkeys()) == ["x", "y"]


def test_the_real_list_of_departed_hotkeys(again):
    (real,) = Path(shmelim.__file__).parent.rglob("default_departed_hotkeys.json")
    departed = again(default_departed=real).get_departed_hotkeys()
    assert len(departed) == 367
    assert all(isinstance(info["detected_ms"], int) for info in departed.values())


def test_the_default_is_a_state_directory_for_each_name(make):
    base = Path(os.environ["XDG_STATE_HOME"])
    for _ in range(2):
        manager = make("rpc")
        manager.add_elimination("a", row("a"))
        (directory,) = [path for path in base.rglob(manager.name) if path.is_dir()]
        manager.save_eliminations()
        assert in_file(directory) == {"eliminations": [row("a")]}


def test_files_are_strict_json_and_private(again, state):
    manager = again()
    manager.add_elimination("ü", row("ü", further=[1.5, None]))
    manager.save_eliminations()
    json.loads((state / "eliminations.json").read_text(), parse_constant=pytest.fail)
    for name in ("eliminations.json", "departed_hotkeys.json"):
        if (state / name).exists():
            assert stat.S_IMODE((state / name).stat().st_mode) == 0o600


# ---------------------------------------------------------------------- durable


def test_every_acknowledged_change_is_there_after_sigkill(make, state, unused_name):
    name = unused_name()
    manager = make("rpc", name=name, state_dir=state, enable_auto_restart=False)
    manager.sync_eliminations([row("a"), row("b"), row("c")])
    manager.remove_elimination("a")
    manager.delete_eliminations(["b"])
    manager.append_elimination_row("d", 0.5, "ZOMBIE", 7)
    manager.update_metagraph(["c", "m"])
    manager.update_metagraph(["c"])
    manager.add_elimination("e", row("e"))
    before = manager.eliminations, manager.get_departed_hotkeys()
    kill(manager.server_pid)
    manager.shutdown()
    again = make("rpc", name=name, state_dir=state)
    assert (again.eliminations, again.get_departed_hotkeys()) == before
    assert list(again.eliminations) == ["c", "d", "e"]
    assert list(again.get_departed_hotkeys()) == ["m"]
    assert again.snapshot().registered == {"c"}


def test_what_was_not_saved_is_there_after_an_orderly_end(again):
    manager = again()
    manager.add_elimination("a", row("a"))
    manager.add_elimination("b", row("b"))
    manager.remove_elimination("a")
    assert again().eliminations == {"b": row("b")}


def test_a_clear_is_as_durable(again):
    manager = again()
    manager.add_elimination("a", row("a"))
    manager.clear_eliminations()
    assert again().eliminations == {}


# ---------------------------------------------------------------------- how soon


def test_files_follow_by_themselves(again, state):
    manager = again()
    manager.add_elimination("a", row("a"))
    until(lambda: (state / "eliminations.json").exists() and in_file(state) == {"eliminations": [row("a")]})
    manager.remove_elimination("a")
    until(lambda: in_file(state) == {"eliminations": []})


def test_saving_calls_return_when_the_files_are_written(again, state):
    manager = again()
    for n in range(5):
        manager.add_elimination("a", row("a", n))
        manager.save_eliminations()
        assert in_file(state) == {"eliminations": [row("a", n)]}
        manager.write_eliminations_to_disk([row("b", n)])
        assert in_file(state) == {"eliminations": [row("b", n)]}
        manager.remove_elimination("b")


def test_what_is_read_from_disk_is_written_first(again, state):
    manager = again()
    for n in range(20):
        manager.add_elimination("a", row("a", n))
        assert manager.get_eliminations_from_disk() == [row("a", n)]
        assert in_file(state) == {"eliminations": [row("a", n)]}


def test_in_direct_mode_files_are_current_when_any_change_returns(make, state):
    manager = make("direct", state_dir=state)
    for n in range(20):
        manager.add_elimination("a", row("a", n))
        assert in_file(state) == {"eliminations": [row("a", n)]}
        manager.remove_elimination("a")
        assert in_file(state) == {"eliminations": []}
    manager.update_metagraph(["m", "n"])
    manager.update_metagraph(["n"])
    assert departed_in_file(state) == {"departed_hotkeys": manager.get_departed_hotkeys()}


def test_in_direct_mode_files_are_current_when_a_tick_returns(validate, tmp_path):
    validator = validate("direct")
    validator.register("a", "b")
    for hotkey in ("a", "b"):
        validator.challenged(hotkey)
        validator.tick()
        assert [one["hotkey"] for one in in_file(tmp_path / "state")["eliminations"]] == list(validator.reasons)


def test_a_parameter_turns_the_files_off(again, state):
    manager = again(files="off")
    manager.add_elimination("a", row("a"))
    manager.save_eliminations()
    assert manager.get_eliminations_from_disk() == [row("a")]
    manager.shutdown()
    assert not list(state.glob("*.json"))
    assert again(files="off").eliminations == {"a": row("a")}


def test_a_parameter_makes_them_lagged(again, state):
    manager = again(files="lagged")
    manager.sync_eliminations([row("a")])
    until(lambda: (state / "eliminations.json").exists() and in_file(state) == {"eliminations": [row("a")]})
    manager.add_elimination("b", row("b"))
    manager.save_eliminations()
    assert in_file(state) == {"eliminations": [row("a"), row("b")]}


def test_another_word_for_that_parameter_is_refused(again):
    with pytest.raises(ValueError, match="files"):
        again(files="of")


# ---------------------------------------------------------------------- damage

DAMAGE = {
    "empty": lambda text: "",
    "torn": lambda text: text[: len(text) // 2],
    "garbage": lambda text: "\0\xff" * 100,
    "another shape": lambda text: '{"eliminations": 5}',
    "no object": lambda text: '"x"',
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["eliminations.json", "departed_hotkeys.json"])
def test_a_damaged_file_costs_nothing_of_the_state(again, state, file, damage, caplog):
    manager = again()
    manager.sync_eliminations([row("a"), row("b")])
    manager.update_metagraph(["m", "n"])
    manager.update_metagraph(["n"])
    manager.save_eliminations()
    before = manager.eliminations, manager.get_departed_hotkeys()
    manager.shutdown()
    (state / file).write_text(DAMAGE[damage]((state / file).read_text()))
    manager = again()
    assert (manager.eliminations, manager.get_departed_hotkeys()) == before
    manager.save_eliminations()
    assert in_file(state) == {"eliminations": [row("a"), row("b")]}
    assert departed_in_file(state) == {"departed_hotkeys": before[1]}


def test_a_damaged_file_is_kept_for_a_look(again, state):
    manager = again()
    manager.sync_eliminations([row("a")])
    manager.shutdown()
    (state / "eliminations.json").write_text("damaged beyond repair")
    again()
    kept = [path for path in state.iterdir() if path.is_file() and b"beyond repair" in path.read_bytes()]
    assert [path.name for path in kept] != []
    assert all(path.name != "eliminations.json" for path in kept)


@pytest.mark.parametrize(
    "bad", [{"reason": "ZOMBIE", "mark": "set aside"}, ["set aside"], {"hotkey": 5, "mark": "set aside"}]
)
def test_a_row_without_a_hotkey_is_set_aside_and_the_rest_loads(make, state, bad, caplog):
    state.mkdir()
    (state / "eliminations.json").write_text(json.dumps({"eliminations": [row("a"), bad, row("b")]}))
    manager = make("direct", state_dir=state)
    assert manager.get_eliminations_from_memory() == [row("a"), row("b")]
    aside = [path for path in state.glob("*quarantine*") if "set aside" in path.read_text()]
    (quarantine,) = aside
    assert any(
        record.levelname == "WARNING" and quarantine.name in record.getMessage() for record in caplog.records
    )
    manager.process_eliminations()
    manager.save_eliminations()
    assert in_file(state) == {"eliminations": [row("a"), row("b")]}


def test_a_row_with_a_hotkey_and_nothing_else_loads(make, state):
    state.mkdir()
    (state / "eliminations.json").write_text(json.dumps({"eliminations": [row("a"), {"hotkey": "b"}]}))
    assert list(make("direct", state_dir=state).eliminations) == ["a", "b"]


# ---------------------------------------------------------------------- backtests


def test_a_backtest_writes_nothing(again, state, tmp_path):
    before = listing(tmp_path)
    manager = again(Metagraph("a", "b"), None, None, is_backtesting=True)
    manager.sync_eliminations([row("a"), row("b")])
    manager.process_eliminations()
    manager.save_eliminations()
    assert manager.get_eliminations_from_disk() == [row("a"), row("b")]
    manager.shutdown()
    assert listing(tmp_path) == before


def ticks_of_three_calls(validate, mode):
    validator = validate(mode, options={"is_backtesting": True})
    validator.register("a", "b", "c")
    for hotkey in "abc":
        validator.fall(hotkey, 20)
        validator.tick(0)
    return validator.reasons


def test_every_call_is_a_tick_in_a_backtest_in_direct_mode(validate):
    assert list(ticks_of_three_calls(validate, "direct")) == ["a", "b", "c"]


def test_every_call_is_a_tick_in_a_backtest_in_rpc_mode(validate):
    assert list(ticks_of_three_calls(validate, "rpc")) == ["a", "b", "c"]
