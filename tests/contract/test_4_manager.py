"""SPEC 4: `EliminationManager`, what validators hold, in both modes by the same test bodies."""

import contextlib
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import psutil
import pytest
from contract_services import hang
from contract_validator import START, Metagraph, Validator, row
from waiting import PATIENCE, until

from shmelim import (
    EliminationManagerServer,
    EliminationReader,
    NotServingError,
    ShmelimError,
    ValidatorEnvironment,
)

OTHERS = (
    "position_manager",
    "challengeperiod_manager",
    "contract_manager",
    "position_locks",
    "limit_order_manager",
)


class Untouchable:
    """A collaborator that must not be called; it has whatever it is asked for."""

    called = False

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.call

    def call(self, *_, **__):
        self.called = True
        raise AssertionError("the constructor called a collaborator")


# ---------------------------------------------------------------------- the constructor


def test_it_calls_no_collaborator_but_the_metagraph(make, mode):
    others = {name: Untouchable() for name in (*OTHERS, "slack_notifier", "shared_queue_websockets", "sync_epoch")}
    metagraph = Metagraph("a", "b")
    manager = make(mode, metagraph=metagraph, **others)
    assert manager.update_metagraph(["a"]) == ["b"], "it has looked who is registered"
    assert all(getattr(manager, name) is others[name] for name in others)
    assert not any(other.called for other in others.values())
    assert manager.metagraph is metagraph


@pytest.mark.parametrize("metagraph", [None, Metagraph(), Mock(), SimpleNamespace(hotkeys=None)], ids=type)
def test_it_can_do_without_a_metagraph_that_is_ready(make, mode, metagraph):
    manager = make(mode, metagraph, None, None)
    assert manager.get_eliminated_hotkeys() == set()
    assert manager.get_departed_hotkeys() == {}
    assert manager.add_elimination("a", row("a")) is True


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_the_look_at_its_start_counts_like_any_other(make, mode, how):
    """A metagraph that fails then keeps nobody's validator from starting, and is named until it answers."""
    answers = threading.Event()

    class Unwell:
        @property
        def hotkeys(self):
            if how == "hangs" and mode != "direct":
                answers.wait(PATIENCE)
            elif not answers.is_set():
                raise ConnectionError("no chain today")
            return ["a"]

    environment = ValidatorEnvironment(call_deadline_s=0.1)
    manager = make(mode, Unwell(), None, None, environment=environment)
    try:
        assert manager.add_elimination("b", row("b")) is True
        (told,) = [text for text in problems_of(manager) if "departed hotkeys" in text]
        assert ("did not come back" if how == "hangs" and mode != "direct" else "no chain today") in told
    finally:
        answers.set()
    environment.call_deadline_s = PATIENCE

    def is_well():
        manager.process_eliminations()
        return not [text for text in problems_of(manager) if "departed hotkeys" in text]

    until(is_well)
    assert manager.update_metagraph(["b"]) == ["a"]


def problems_of(manager):
    return [str(problem) for problem in manager._server_proxy.health_check_rpc()["problems"]]


def test_use_ipc_is_accepted_and_ignored_with_a_warning(make, mode, recwarn):
    make(mode)
    assert not [warning for warning in recwarn if "use_ipc" in str(warning.message)]
    with pytest.warns(DeprecationWarning, match="use_ipc"):
        manager = make(mode, use_ipc=True)
    assert manager.add_elimination("a", row("a")) is True


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"retries": 3}, TypeError, "retries"),
        ({"name": "Not A Name"}, ValueError, "Not A Name"),
        ({"files": "of"}, ValueError, "files"),
        ({"files_mode": "600"}, ValueError, "files_mode"),
        ({"max_message": 3}, ValueError, "max_message"),
        ({"slack_notifier": "https://hooks.slack.com/secret"}, TypeError, "slack_notifier"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, mode, options, error, named):
    with pytest.raises(error, match=named):
        make(mode, **options)


@pytest.mark.parametrize(
    ("figures", "named"),
    [
        ({"scored_bucket": "NEVER"}, "NEVER"),
        ({"live_price_fetcher": None}, "price"),
        ({"miner_directory": None}, "miner"),
    ],
    ids=["scored bucket", "price fetcher", "miner directory"],
)
def test_what_an_environment_lacks_or_contradicts_is_said_once_by_name(make, tmp_path, figures, named, caplog):
    validator = Validator(tmp_path / "miners", **({"live_price_fetcher": object()} | figures))
    validator.challenge.buckets = {"a": "MAINCOMP"}
    make("direct", **validator.arguments())
    said = [record for record in caplog.records if record.levelname == "WARNING" and named in record.getMessage()]
    assert len(said) == 1


# ---------------------------------------------------------------------- direct mode


def test_direct_mode_is_an_object_of_this_process_and_nothing_else(make, unused_name, tmp_path):
    def around():
        return psutil.Process().children(), psutil.Process().net_connections(), list(tmp_path.iterdir())

    before = around()
    manager = make("direct", name=unused_name())
    manager.sync_eliminations([row("a")])
    assert isinstance(manager._server_proxy, EliminationManagerServer)
    assert manager.server_pid is None
    assert around() == before
    assert not list(Path("/dev/shm").glob(f"*{manager.name}*"))
    assert manager._server_proxy.add_elimination_rpc("b", row("b")) is True
    assert manager.get_eliminated_hotkeys() == {"a", "b"}


def test_its_server_carries_the_price_fetcher_which_callers_patch(make):
    manager = make("direct")
    with patch.object(manager._server_proxy, "live_price_fetcher") as fetcher:
        assert manager.live_price_fetcher is fetcher
    manager.live_price_fetcher = fetcher = object()
    assert manager._server_proxy.live_price_fetcher is fetcher


def test_two_in_memory_share_nothing_even_under_one_name(make):
    first, second = make("direct", name="shmelim"), make("direct", name="shmelim")
    first.add_elimination("a", row("a"))
    assert not second.is_hotkey_eliminated("a")


def test_a_second_one_of_a_state_directory_takes_it_over(make, tmp_path):
    first = make("direct", state_dir=tmp_path / "state")
    first.add_elimination("a", row("a"))
    second = make("direct", state_dir=tmp_path / "state")
    assert second.eliminations == {"a": row("a")}
    with pytest.raises(ShmelimError):
        first.add_elimination("b", row("b"))
    second.add_elimination("b", row("b"))
    assert list(second.eliminations) == ["a", "b"]


def test_it_needs_no_place_and_warns_of_none(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    code = "from shmelim import EliminationManager; EliminationManager(None, None, None, True).shutdown()"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment | {"HOME": str(tmp_path)}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


# ---------------------------------------------------------------------- the JSON files as the state


@pytest.fixture
def of_files(make, tmp_path):
    return lambda **options: make("direct", files_dir=tmp_path / "files", **options)


def test_files_dir_is_read_at_construction(of_files, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "eliminations.json").write_text(json.dumps({"eliminations": [row("b"), row("a")]}))
    (tmp_path / "files" / "departed_hotkeys.json").write_text(json.dumps({"departed_hotkeys": ["m"]}))
    manager = of_files()
    assert list(manager.eliminations) == ["b", "a"]
    assert manager.get_departed_hotkeys() == {"m": {"detected_ms": 0}}


def test_files_dir_is_current_when_a_changing_call_returns(of_files, tmp_path):
    manager = of_files()
    for change in (
        lambda: manager.add_elimination("a", row("a")),
        lambda: manager.append_elimination_row("b", 0.5, "ZOMBIE"),
        lambda: manager.remove_elimination("a"),
        lambda: manager.sync_eliminations([row("c")]),
        lambda: manager.delete_eliminations(["c"]),
        manager.clear_eliminations,
    ):
        change()
        written = json.loads((tmp_path / "files" / "eliminations.json").read_text())
        assert written == {"eliminations": manager.get_eliminations_from_memory()}


def test_files_dir_has_no_lock_and_no_store_and_a_second_one_reads_what_the_first_wrote(of_files, tmp_path):
    first = of_files()
    first.sync_eliminations([row("a")])
    first.update_metagraph(["m", "n"])
    first.update_metagraph(["n"])
    second = of_files()
    assert second.eliminations == {"a": row("a")}
    assert list(second.get_departed_hotkeys()) == ["m"]
    second.add_elimination("b", row("b"))
    first.add_elimination("c", row("c"))
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"eliminations.json", "departed_hotkeys.json"}


def test_files_dir_is_for_direct_mode_only(make, tmp_path):
    with pytest.raises((TypeError, ValueError)) as caught:
        make("rpc", files_dir=tmp_path)
    assert "direct" in str(caught.value) or "running_unit_tests" in str(caught.value)


def test_files_are_private_by_default_and_a_directory_keeps_its_mode(make, mode, tmp_path):
    (tmp_path / "state").mkdir(mode=0o751)
    (tmp_path / "state").chmod(0o751)
    manager = make(mode, state_dir=tmp_path / "state")
    manager.sync_eliminations([row("a")])
    manager.save_eliminations()
    assert stat.S_IMODE((tmp_path / "state" / "eliminations.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o751


def test_file_modes_are_a_parameter(make, mode, tmp_path):
    manager = make(mode, state_dir=tmp_path / "state", files_mode=0o640)
    manager.sync_eliminations([row("a")])
    manager.save_eliminations()
    assert stat.S_IMODE((tmp_path / "state" / "eliminations.json").stat().st_mode) == 0o640


# ---------------------------------------------------------------------- RPC mode


@pytest.mark.parametrize("where", [{"port": 0}, {"port": None}, {"address": ("127.0.0.1", 0)}], ids=str)
def test_it_serves_on_a_port_or_a_unix_socket(make, where):
    manager = make("rpc", **where)
    assert (manager.port is None) == (where.get("port", 0) is None)
    manager.add_elimination("a", row("a"))
    assert EliminationReader(manager.name).is_hotkey_eliminated("a")
    assert psutil.Process(manager.server_pid).is_running()


OTHER_MANAGER = """
import sys
from shmelim import EliminationManager
try:
    EliminationManager(None, None, None, name=sys.argv[1], port=None, state_dir=sys.argv[2])
except Exception as error:
    print(type(error).__name__, error)
"""


def refused(manager, tmp_path):
    command = [sys.executable, "-c", OTHER_MANAGER, manager.name, str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    manager.add_elimination("a", row("a"))  # it goes on
    return done.stdout


def test_a_second_one_elsewhere_is_refused_while_a_server_of_the_name_lives(make, tmp_path):
    manager = make("rpc")
    assert "Error" in (said := refused(manager, tmp_path))
    assert manager.name in said


def test_a_refused_one_says_what_the_caller_wants_instead(make, tmp_path):
    said = refused(make("rpc"), tmp_path)
    assert "EliminationReader" in said
    assert "EliminationClient" in said


def test_reads_ask_nobody(make):
    """The server is stopped meanwhile."""
    manager = make("rpc", enable_health_check=False)
    manager.sync_eliminations([row("a"), row("b")])
    manager.update_metagraph(["m", "n"])
    manager.update_metagraph(["n"])
    departed = manager.get_departed_hotkeys()
    hang(manager.server_pid)
    try:
        assert manager.is_hotkey_eliminated("a")
        assert manager.get_elimination("a") == manager.hotkey_in_eliminations("a") == row("a")
        assert manager.get_elimination("m") is manager.hotkey_in_eliminations("m") is None
        assert manager.get_eliminated_hotkeys() == {"a", "b"}
        assert manager.get_eliminations_from_memory() == [row("a"), row("b")]
        assert manager.eliminations == manager.get_eliminations_dict() == {"a": row("a"), "b": row("b")}
        assert manager.is_hotkey_re_registered("m") is False
        assert manager.departed_hotkeys == manager.get_departed_hotkeys() == departed
        assert manager.get_departed_hotkey_info("m") == departed["m"]
        assert manager.get_departed_hotkey_info("a") is None
    finally:
        os.kill(manager.server_pid, signal.SIGCONT)


def test_a_state_of_a_backtest_ends_with_its_server(make, unused_name):
    name = unused_name()
    manager = make("rpc", is_backtesting=True, name=name)
    manager.add_elimination("a", row("a"))
    manager.shutdown()
    assert make("rpc", is_backtesting=True, name=name).eliminations == {}


# ---------------------------------------------------------------------- collaborators


def test_each_collaborator_can_be_replaced_and_the_next_call_uses_the_new_one(validate, mode, tmp_path):
    validator = validate(mode)
    manager = validator.manager
    for round_number in (1, 2, 3):
        fresh = Validator(tmp_path / "miners")
        fresh.manager, fresh.now_ms, hotkey = manager, validator.now_ms, f"miner{round_number}"
        fresh.epoch.value = validator.epoch.value
        for name in (*OTHERS, "metagraph"):
            setattr(manager, name, fresh.arguments()[name])
            assert getattr(manager, name) is fresh.arguments()[name]
        manager.live_price_fetcher = fetcher = Mock()
        fetcher.price.return_value = 42.0 + round_number
        fresh.register("other", *(f"miner{n}" for n in range(1, round_number + 1)))
        fresh.open(hotkey)
        fresh.challenged(hotkey)
        validator.tick()
        assert fresh.challenge.reasons == {}
        assert fresh.is_flat(hotkey)
        assert fresh.contract.slashed(hotkey) == 1
        assert [done.held for done in fresh.done if done.what == "save"] == [[(hotkey, "BTCUSD")]]
        assert [done.hotkey for done in fresh.done if done.what == "limit orders"] == [hotkey]
        (position,) = fresh.positions.get_positions_for_one_hotkey(hotkey)
        assert position.orders[-1].price == 42.0 + round_number


@pytest.mark.parametrize("name", [*OTHERS, "metagraph", "live_price_fetcher"])
def test_a_collaborator_can_be_patched_and_comes_back(manager, name):
    before = getattr(manager, name)
    with patch.object(manager, name) as patched:
        assert getattr(manager, name) is patched
    assert getattr(manager, name) is before


# ---------------------------------------------------------------------- what reads answer


def test_none_answers_as_a_dict_would(manager):
    manager.add_elimination("a", row("a"))
    for read in (manager.is_hotkey_eliminated, manager.is_hotkey_re_registered):
        assert read(None) is False
    for read in (manager.get_elimination, manager.hotkey_in_eliminations, manager.get_departed_hotkey_info):
        assert read(None) is None
    server = manager._server_proxy
    assert server.is_hotkey_eliminated_rpc(None) is server.is_hotkey_re_registered_rpc(None) is False
    assert server.get_elimination_rpc(None) is server.get_departed_hotkey_info_rpc(None) is None


@pytest.mark.parametrize("hotkey", [b"a", 5, ["a"], 1.5], ids=repr)
def test_what_is_not_text_is_a_type_error(manager, hotkey):
    manager.add_elimination("a", row("a"))
    for call in (
        manager.is_hotkey_eliminated,
        manager.is_hotkey_re_registered,
        manager.get_elimination,
        manager.hotkey_in_eliminations,
        manager.get_departed_hotkey_info,
        manager.remove_elimination,
        manager._server_proxy.is_hotkey_eliminated_rpc,
        manager._server_proxy.get_elimination_rpc,
    ):
        with pytest.raises(TypeError):
            call(hotkey)


def test_what_is_returned_is_the_callers_own(manager):
    manager.sync_eliminations([row("a"), row("b")])
    manager.get_elimination("a")["return_info"]["n"] = 99
    manager.eliminations.pop("a")
    manager.get_eliminations_dict()["a"]["dd"] = 99
    manager.get_eliminations_from_memory()[0].clear()
    manager.get_eliminated_hotkeys().clear()
    manager.get_departed_hotkeys().clear()
    manager._server_proxy.get_elimination_rpc("a").clear()
    manager._server_proxy.get_eliminations_from_memory_rpc().clear()
    assert manager.eliminations == {"a": row("a"), "b": row("b")}


def test_re_registration_is_seen_at_once_where_the_metagraph_is(make, mode):
    manager = make(mode, Metagraph("a", "b"), None, None)
    manager.update_metagraph(["b"])
    assert manager.is_hotkey_re_registered("a") is True
    manager.metagraph.hotkeys.remove("a")
    assert manager.is_hotkey_re_registered("a") is False


def test_the_metagraph_is_asked_for_hotkeys_that_departed_only_and_its_errors_cost_nothing(make, mode):
    class Broken(Metagraph):
        asked = ()

        def has_hotkey(self, hotkey):
            self.asked = (*self.asked, hotkey)
            raise OSError("the chain does not answer")

    manager = make(mode, Broken("a", "b"), None, None)
    manager.update_metagraph(["b"])
    manager.update_metagraph(["a", "b"])
    assert manager.is_hotkey_re_registered("a") is True, "the table answers"
    assert manager.is_hotkey_re_registered("b") is False
    assert manager.is_hotkey_re_registered("never") is False
    assert set(manager.metagraph.asked) <= {"a"}


# ---------------------------------------------------------------------- changes


def test_every_change(manager):
    assert manager.add_elimination("a", row("a")) is True
    assert manager.add_elimination("a", row("a", 1)) is False
    assert manager.append_elimination_row("b", 0.5, "ZOMBIE", 7, {"BTC/USD": 1.0}, {"x": 1}) is True
    assert manager.get_elimination("b") == manager.generate_elimination_row(
        "b", 0.5, "ZOMBIE", 7, {"BTC/USD": 1.0}, {"x": 1}
    )
    assert manager.remove_elimination("a") is True
    assert manager.remove_elimination("a") is False
    assert manager.sync_eliminations([row("c"), row("d"), row("e")]) == ["b"]
    manager.delete_eliminations(["c", "e"])
    assert list(manager.eliminations) == ["d"]
    manager.write_eliminations_to_disk([row("f")])
    manager.save_eliminations()
    assert manager.get_eliminations_from_disk() == [row("f")]
    manager.clear_eliminations()
    assert manager.eliminations == {}


def test_a_deletion_of_many_and_a_sync_are_seen_whole_or_not_at_all(manager):
    rows, seen, stop, errors = [row(f"h{n}") for n in range(300)], set(), threading.Event(), []

    def look():
        try:
            while not stop.is_set():
                seen.add(len(manager.get_eliminations_dict()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=look)
    thread.start()

    def again():
        manager.sync_eliminations(rows)
        manager.delete_eliminations([one["hotkey"] for one in rows])
        return len(seen) >= 2 or errors

    until(again, "a look between a sync and a deletion")
    stop.set()
    thread.join(PATIENCE)
    assert errors == []
    assert seen == {0, 300}


def test_generated_rows_are_stored_nowhere(manager):
    generated = manager.generate_elimination_row("a", None, "ZOMBIE")
    assert (generated["dd"], generated["price_info"], generated["return_info"]) == (None, {}, {})
    assert generated["elimination_initiated_time_ms"] > START
    assert not manager.is_hotkey_eliminated("a")


def test_departures(make, mode):
    manager = make(mode)
    assert manager.update_metagraph(["a", "b"]) == []
    assert manager.update_metagraph(["b"]) == ["a"]
    assert manager.departed_hotkeys == manager.get_departed_hotkeys()
    assert manager.get_departed_hotkey_info("a")["detected_ms"] > START
    manager.update_metagraph(["a", "b"])
    assert manager.is_hotkey_re_registered("a")
    assert not manager.is_hotkey_re_registered("b")


def test_threads_share_one(manager):
    errors = []

    def work(thread):
        try:
            for n in range(15):
                hotkey = f"{thread}-{n}"
                manager.add_elimination(hotkey, row(hotkey))
                assert manager.get_elimination(hotkey) == row(hotkey)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert errors == []
    assert len(manager.get_eliminated_hotkeys()) == 60


# ---------------------------------------------------------------------- the rest


def test_the_lock_says_what_to_do_instead(manager):
    with pytest.raises(NotImplementedError, match="sync_eliminations"):
        manager.get_eliminations_lock()


def test_first_refresh_ran_is_a_property_with_a_setter(make, mode):
    manager = make(mode)
    assert manager.first_refresh_ran is False
    manager.first_refresh_ran = True
    assert manager.first_refresh_ran is True
    assert manager._server_proxy.get_first_refresh_ran_rpc() is True


def test_zombies(manager):
    assert manager.is_zombie_hotkey("a", {"b"}) is True
    assert manager.is_zombie_hotkey("b", {"b"}) is False
    assert manager.is_zombie_hotkey("DEVELOPMENT", {"b"}) is False


def test_times_of_ticks_and_whether_one_is_due(make, mode):
    manager = make(mode)
    assert manager.get_last_update_time_ms() == 0
    assert manager.refresh_allowed(10**9)
    manager.set_last_update_time()
    assert manager.get_last_update_time_ms() > START
    assert manager.refresh_allowed(10**9) is (mode == "direct")


def test_running_unit_tests_is_read_live(make):
    manager = make("direct")
    manager.set_last_update_time()
    assert manager.refresh_allowed(10**9) is True
    manager.running_unit_tests = False
    assert manager.refresh_allowed(10**9) is False
    manager.running_unit_tests = True
    assert manager.refresh_allowed(10**9) is True


def test_health(manager):
    assert manager.health_check() is True
    assert manager.health_check(START) is True


def test_it_is_a_context_manager(make, mode):
    with make(mode) as manager:
        manager.add_elimination("a", row("a"))
        pid = manager.server_pid
    assert pid is None or not psutil.pid_exists(pid)
    manager.shutdown()
    assert manager.is_hotkey_eliminated("a"), "reads go on"
    with pytest.raises(ShmelimError):
        manager.add_elimination("b", row("b"))


def test_a_loop_ticks_until_the_validator_ends(validate, mode):
    validator = validate(mode, tick_pause_s=0.01, error_pause_s=0.01)
    loop = threading.Thread(target=validator.manager.run_update_loop)
    loop.start()
    validator.register("a")
    validator.challenged("a")
    until(lambda: "a" in validator.reasons, "a tick of the loop")
    validator.ending["it"] = "ends"
    loop.join(PATIENCE)
    assert not loop.is_alive()


# ---------------------------------------------------------------------- what newer callers use


@pytest.mark.parametrize("name", ["reload_from_disk", "load_eliminations_from_disk"])
def test_reload_takes_what_stands_in_the_file(make, tmp_path, name):
    manager = make("direct", state_dir=tmp_path / "state")
    manager.sync_eliminations([row("a")])
    (tmp_path / "state" / "eliminations.json").write_text(json.dumps({"eliminations": [row("b")]}))
    getattr(manager, name)()
    assert manager.eliminations == {"b": row("b")}


def test_clear_departed_hotkeys(make, mode):
    manager = make(mode)
    manager.update_metagraph(["a", "b"])
    manager.update_metagraph(["b"])
    manager.clear_departed_hotkeys()
    assert manager.get_departed_hotkeys() == {}


def test_handle_eliminated_miner(validator):
    validator.register("a")
    validator.open("a")
    validator.manager.add_elimination("a", row("a"))
    validator.manager.handle_eliminated_miner("a", {}, validator.locks)
    assert validator.is_flat("a")


def test_first_refresh_by_methods(make, mode):
    manager = make(mode)
    assert manager.get_first_refresh_ran() is False
    manager.set_first_refresh_ran(True)
    assert manager.get_first_refresh_ran() is manager.first_refresh_ran is True


def test_local_caches_are_the_same_reads(manager):
    manager.add_elimination("a", row("a"))
    assert manager.get_eliminations_local_cache() == manager.get_eliminations_dict()


# ---------------------------------------------------------------------- other processes


def test_a_pickled_one_goes_to_children_only(manager):
    with pytest.raises((TypeError, RuntimeError)):
        pickle.dumps(manager)


def test_after_its_end_the_name_can_be_served_again(make, unused_name):
    name = unused_name()
    make("rpc", name=name).shutdown()
    with contextlib.suppress(NotServingError):
        assert EliminationReader(name).get_eliminated_hotkeys() == set()
    make("rpc", name=name).add_elimination("a", row("a"))
    assert EliminationReader(name).is_hotkey_eliminated("a")
