"""What a validator holds, in both modes by the same test bodies; what reads and changes say is in test_api*.py."""

from __future__ import annotations

import gc
import inspect
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from unittest.mock import Mock, patch

import psutil
import pytest
from serving import listing, row, state_in_store

from shmelim import EliminationClient, EliminationManager, EliminationReader, RPCServiceBase, ValidatorEnvironment
from shmelim.eliminations.serve import start_elimination_manager_server
from shmelim.errors import AlreadyServingError, ChannelError, NoCollaboratorsError, NotServingError
from shmelim.shm import SharedNamespace

READS = [
    "get_departed_hotkey_info_local_cache",
    "get_elimination_local_cache",
    "get_eliminations_local_cache",
    "are_eliminated",
    "departed_hotkeys",
    "eliminations",
    "get_departed_hotkey_info",
    "get_departed_hotkeys",
    "get_elimination",
    "get_eliminated_hotkeys",
    "get_eliminations_dict",
    "get_eliminations_from_memory",
    "hotkey_in_eliminations",
    "is_hotkey_eliminated",
    "is_hotkey_re_registered",
]
CHANGES = [
    "clear_departed_hotkeys",
    "load_eliminations_from_disk",
    "reload_from_disk",
    "set_first_refresh_ran",
    "add_elimination",
    "append_elimination_row",
    "clear_eliminations",
    "delete_eliminations",
    "remove_elimination",
    "save_eliminations",
    "sync_eliminations",
    "update_metagraph",
    "write_eliminations_to_disk",
]
THE_REST = [
    "get_first_refresh_ran",
    "handle_eliminated_miner",
    "first_refresh_ran",
    "generate_elimination_row",
    "get_eliminations_from_disk",
    "get_eliminations_lock",
    "get_last_update_time_ms",
    "handle_first_refresh",
    "handle_mdd_eliminations",
    "handle_perf_ledger_eliminations",
    "health_check",
    "is_zombie_hotkey",
    "handle_departed",
    "settle_debts",
    "handle_zombies",
    "delete_expired",
    "process_eliminations",
    "refresh_allowed",
    "run_update_loop",
    "set_last_update_time",
    "shutdown",
]
COLLABORATORS = [
    "challengeperiod_manager",
    "contract_manager",
    "limit_order_manager",
    "live_price_fetcher",
    "metagraph",
    "position_locks",
    "position_manager",
]
# As the field's callers pass them, and in this order.
FIELD_SIGNATURE = {
    "metagraph": inspect.Parameter.empty,
    "position_manager": inspect.Parameter.empty,
    "challengeperiod_manager": inspect.Parameter.empty,
    "running_unit_tests": False,
    "shutdown_dict": None,
    "use_ipc": False,
    "is_backtesting": False,
    "shared_queue_websockets": None,
    "contract_manager": None,
    "position_locks": None,
    "sync_in_progress": None,
    "slack_notifier": None,
    "sync_epoch": None,
    "limit_order_manager": None,
}


class Metagraph:
    def __init__(self, *hotkeys):
        self.hotkeys = list(hotkeys)

    def has_hotkey(self, hotkey):
        return hotkey in self.hotkeys


class Untouchable:
    """A collaborator that must not be called."""

    def __getattr__(self, name):
        if name.startswith("__"):  # mocks ask for these
            raise AttributeError(name)
        raise AssertionError(f"{name} was asked for")


@pytest.fixture(params=["direct", "rpc"])
def direct(request):
    return request.param == "direct"


@pytest.fixture
def make(managers, direct):
    def make(*args, **options):
        options.setdefault("start_method", "fork")  # the quickest; tests of that process do not
        return managers(*args, running_unit_tests=direct, **options)

    return make


class TestConstructor:
    def test_takes_what_the_field_passes(self):
        parameters = inspect.signature(EliminationManager).parameters.values()
        positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
        assert list(positional.items()) == list(FIELD_SIGNATURE.items())
        others = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert others
        assert all(p.default is not inspect.Parameter.empty for p in others)

    def test_calls_no_collaborator(self, make):
        manager = make(
            Metagraph("a"),
            Untouchable(),
            Untouchable(),
            contract_manager=Untouchable(),
            position_locks=Untouchable(),
            limit_order_manager=Untouchable(),
            slack_notifier=Untouchable(),
        )
        assert manager.get_eliminated_hotkeys() == set()

    def test_looks_at_the_metagraph(self, make):
        manager = make(Metagraph("a", "b"), None, None)
        assert manager.snapshot().registered == {"a", "b"}

    @pytest.mark.parametrize("metagraph", [None, Metagraph(), Mock()], ids=["none", "empty", "mock"])
    def test_can_do_without_one(self, make, metagraph):
        manager = make(metagraph, None, None)
        assert manager.snapshot().registered == set()

    def test_use_ipc_is_ignored_and_said_to_be(self, make):
        with pytest.warns(DeprecationWarning, match="use_ipc"):
            manager = make(use_ipc=True)
        manager.add_elimination("a", row("a"))
        assert manager.is_hotkey_eliminated("a")

    def test_without_use_ipc_nothing_is_warned(self, make, recwarn):
        make()
        assert not [
            w for w in recwarn if issubclass(w.category, DeprecationWarning) and "use_ipc" in str(w.message)
        ]

    def test_loads_the_default_departed_file(self, make, tmp_path):
        path = tmp_path / "default.json"
        path.write_text('["x", "y"]')
        manager = make(Metagraph("x"), None, None, default_departed=path)
        assert manager.get_departed_hotkeys() == {"x": {"detected_ms": 0}, "y": {"detected_ms": 0}}
        assert manager.is_hotkey_re_registered("x")
        assert not manager.is_hotkey_re_registered("y")

    def test_refuses_a_setting_that_does_not_exist(self, make):
        with pytest.raises(TypeError, match="retries"):
            make(retries=3)

    @pytest.mark.parametrize(
        ("options", "error", "names"),
        [
            ({"files": "of"}, ValueError, "current, lagged, off"),
            ({"durability": "mains"}, ValueError, "durability"),
            ({"name": "Bad Name"}, ValueError, "Bad Name"),
        ],
    )
    def test_refuses_what_cannot_be(self, make, tmp_path, options, error, names):
        with pytest.raises(error, match=names):
            make(state_dir=tmp_path / "state", **options)

    def test_a_text_is_no_list_of_hotkeys(self, make):
        metagraph = Metagraph()
        metagraph.hotkeys = "abc"
        assert make(metagraph, None, None).snapshot().registered == set()

    def test_no_list_at_all_is_named(self, make):
        manager = make()
        for call in (manager.sync_eliminations, manager.update_metagraph, manager.delete_eliminations):
            with pytest.raises(TypeError, match=r"must be a list .*not NoneType"):
                call(None)


class TestTheFace:
    def test_every_method_stands_on_the_class(self):
        mock = Mock(spec=EliminationManager)
        own = ["environment", "port", "reader", "running_unit_tests", "service_name", "slack_notifier"]
        for name in [*READS, *CHANGES, *THE_REST, *COLLABORATORS, *own, "_server_proxy"]:
            assert hasattr(EliminationManager, name), name
            getattr(mock, name)
        with pytest.raises(AttributeError):
            mock.no_such_method  # noqa: B018

    def test_is_a_service(self, make):
        manager = make()
        assert isinstance(manager, RPCServiceBase)
        assert manager.service_name == "EliminationManagerServer"

    def test_the_lock_is_gone_and_the_message_says_what_to_do(self, make):
        with pytest.raises(NotImplementedError, match=r"sync_eliminations.*snapshot"):
            make().get_eliminations_lock()

    def test_zombies(self, make):
        manager = make()
        assert manager.is_zombie_hotkey("a", {"b"})
        assert not manager.is_zombie_hotkey("b", {"b"})
        assert not manager.is_zombie_hotkey("DEVELOPMENT", {"b"})

    def test_first_refresh_ran(self, make):
        manager = make()
        assert manager.first_refresh_ran is False
        manager.first_refresh_ran = True
        assert manager.first_refresh_ran is True

    def test_generates_rows(self, make):
        manager = make()
        generated = manager.generate_elimination_row("a", 0.1, "ZOMBIE", 5, {"BTC/USD": 1.0}, {"x": 1})
        assert generated == {
            "hotkey": "a",
            "dd": 0.1,
            "reason": "ZOMBIE",
            "elimination_initiated_time_ms": 5,
            "price_info": {"BTC/USD": 1.0},
            "return_info": {"x": 1},
        }
        assert not manager.is_hotkey_eliminated("a")

    def test_times_of_ticks(self, make):
        manager = make()
        assert manager.get_last_update_time_ms() == 0
        manager.set_last_update_time()
        assert manager.get_last_update_time_ms() > 1_700_000_000_000

    def test_an_interval_counts_outside_of_direct_mode(self, make, direct):
        manager = make()
        assert manager.refresh_allowed(10**9)
        manager.set_last_update_time()
        assert manager.refresh_allowed(10**9) is direct

    def test_health(self, make):
        assert make().health_check() is True

    def test_names_its_mode_and_place(self, make, direct):
        assert ("direct" in repr(make())) is direct


class TestCollaborators:
    @pytest.mark.parametrize("name", COLLABORATORS)
    def test_the_next_call_uses_the_new_one(self, make, name):
        manager = make()
        seen = manager._processor.context.collaborators
        for collaborator in (Untouchable(), Untouchable()):
            setattr(manager, name, collaborator)
            assert getattr(seen, name) is getattr(manager, name) is collaborator

    @pytest.mark.parametrize("name", COLLABORATORS)
    def test_can_be_patched_and_comes_back(self, make, name):
        manager = make()
        if name != "live_price_fetcher":
            setattr(manager, name, before := object())
        else:
            before = manager.live_price_fetcher
        with patch.object(manager, name) as patched:
            assert getattr(manager._processor.context.collaborators, name) is patched
        assert getattr(manager, name) is before

    def test_in_direct_mode_the_server_carries_the_price_fetcher(self, managers):
        manager = managers(running_unit_tests=True)
        with patch.object(manager._server_proxy, "live_price_fetcher") as fetcher:
            assert manager.live_price_fetcher is fetcher
            assert manager._processor.context.collaborators.live_price_fetcher is fetcher
        manager.live_price_fetcher = fetcher = object()
        assert manager._server_proxy.live_price_fetcher is fetcher

    def test_the_server_processes_where_it_has_collaborators(self, make, direct):
        manager = make(Metagraph("a"), None, None)
        for name in (
            "process_eliminations_rpc",
            "handle_perf_ledger_eliminations_rpc",
            "handle_mdd_eliminations_rpc",
            "handle_first_refresh_rpc",
        ):
            if direct:
                getattr(manager._server_proxy, name)()
            else:
                with pytest.raises(NoCollaboratorsError, match="EliminationManager"):
                    getattr(manager._server_proxy, name)()

    def test_a_tick_sees_a_new_metagraph(self, make):
        manager = make(Metagraph("a", "b"), None, None)
        manager.metagraph = Metagraph("a")
        manager.process_eliminations()
        assert list(manager.departed_hotkeys) == ["b"]
        manager.metagraph.hotkeys.append("b")
        manager.set_last_update_time()
        manager.update_metagraph(manager.metagraph.hotkeys)
        assert manager.is_hotkey_re_registered("b")


class TestFilesOfOthers:
    """``load_eliminations_from_disk``: a file that somebody else put there is taken over, as at a start."""

    @pytest.fixture
    def manager(self, make, tmp_path):
        return make(state_dir=tmp_path / "state")

    @pytest.fixture
    def path(self, manager, tmp_path):
        manager.sync_eliminations([row("a"), row("b")])
        manager.save_eliminations()
        return tmp_path / "state" / "eliminations.json"

    def test_takes_an_edit_and_says_so(self, manager, path):
        path.write_text(json.dumps({"eliminations": [row("b"), row("c")]}))
        manager.load_eliminations_from_disk()
        assert manager.eliminations == {"b": row("b"), "c": row("c")}
        assert (
            "put there by somebody else"
            in next(e for e in manager.get_history() if e["action"] == "import")["note"]
        )
        manager.add_elimination("d", row("d"))
        manager.save_eliminations()
        assert list(path.parent.glob("*edited*")) == [], "what was taken over is ours to overwrite"
        assert [each["hotkey"] for each in manager.get_eliminations_from_disk()] == ["b", "c", "d"]

    def test_leaves_alone_what_the_server_wrote(self, manager, path):
        before = manager.reader.version, len(manager.get_history())
        manager.reload_from_disk()
        assert (manager.reader.version, len(manager.get_history())) == before

    def test_takes_departures_too(self, manager, path):
        path.with_name("departed_hotkeys.json").write_text(
            json.dumps({"departed_hotkeys": {"x": {"detected_ms": 5}}})
        )
        manager.load_eliminations_from_disk()
        assert manager.get_departed_hotkeys() == {"x": {"detected_ms": 5}}

    def test_a_damaged_file_is_moved_aside_and_costs_nothing(self, manager, path):
        path.write_text("{")
        manager.load_eliminations_from_disk()
        assert list(manager.eliminations) == ["a", "b"]
        assert list(path.parent.glob("*damaged*"))

    @pytest.mark.parametrize("options", [{"files": "off"}, {"is_backtesting": True}], ids=repr)
    def test_without_files_nothing_happens(self, make, tmp_path, options):
        (tmp_path / "other").mkdir()
        manager = make(state_dir=tmp_path / "other", **options)
        manager.add_elimination("a", row("a"))
        (tmp_path / "other" / "eliminations.json").write_text(json.dumps({"eliminations": []}))
        manager.load_eliminations_from_disk()
        assert list(manager.eliminations) == ["a"]


class Position:
    """An open position that keeps the price source of its flat order."""

    position_uuid, is_closed_position, orders, closed_with = "uuid", False, (), None

    def __init__(self, trade_pair):
        self.trade_pair = trade_pair

    @staticmethod
    def generate_fake_flat_order(_position, _time_ms, _fetcher, source):
        return source

    def add_order(self, order, _fetcher):
        self.closed_with, self.is_closed_position = order, True


class Positions:
    """A position manager with one position."""

    perf_ledger_manager = None

    def __init__(self, position):
        self.position = position

    def get_positions_for_one_hotkey(self, hotkey, only_open_positions=False):
        return [self.position]

    def get_miner_position_by_uuid(self, hotkey, uuid):
        return self.position

    def save_miner_position(self, position, delete_open_position_if_exists=True):
        pass


class Pair(str):
    """A trade pair, as a key of callers' price sources."""

    __slots__ = ()
    trade_pair_id = "BTCUSD"


class TestHandleEliminatedMiner:
    @pytest.fixture
    def position(self):
        return Position(Pair("BTC/USD"))

    @pytest.fixture
    def manager(self, make, position):
        environment = ValidatorEnvironment(price_source=lambda _pair, info, _ms: ("of the record", info))
        manager = make(Metagraph("a"), Positions(position), None, environment=environment)
        manager.add_elimination("a", row("a"))
        return manager

    def test_closes_with_the_callers_price_source(self, manager, position):
        manager.handle_eliminated_miner("a", {Pair("BTC/USD"): "the caller's"}, None)
        assert position.closed_with == "the caller's"

    @pytest.mark.parametrize("sources", [None, {}, {Pair("ETH/USD"): "another's"}], ids=repr)
    def test_closes_with_the_records_prices_otherwise(self, manager, position, sources):
        manager.handle_eliminated_miner("a", sources)
        assert position.closed_with == ("of the record", row("a")["price_info"])

    def test_limit_orders_go_first_and_their_failure_stops_nothing(self, manager, position):
        manager.limit_order_manager = orders = Mock()
        orders.delete_all_limit_orders_for_hotkey.side_effect = OSError("away")
        manager.handle_eliminated_miner("a")
        orders.delete_all_limit_orders_for_hotkey.assert_called_once_with("a")
        assert position.is_closed_position

    def test_nothing_is_closed_of_a_miner_who_is_not_eliminated(self, manager, position):
        manager.handle_eliminated_miner("b")
        assert not position.is_closed_position


class TestLife:
    def test_is_a_context_manager(self, make, direct):
        with make() as manager:
            manager.add_elimination("a", row("a"))
            pid = manager.server_pid
        assert direct or not psutil.pid_exists(pid)
        manager.shutdown()

    def test_reads_go_on_after_the_end_and_changes_say_what_is_wrong(self, make):
        manager = make()
        manager.add_elimination("a", row("a"))
        manager.live_price_fetcher = fetcher = object()
        manager.shutdown()
        assert manager.is_hotkey_eliminated("a")
        assert manager.live_price_fetcher is fetcher
        with pytest.raises(ChannelError):
            manager.add_elimination("b", row("b"))

    def test_the_state_outlives_it(self, make, tmp_path, new_name):
        place = {"state_dir": tmp_path / "kept", "name": new_name()}
        with make(**place) as manager:
            manager.add_elimination("a", row("a"))
            manager.update_metagraph(["m", "n"])
            manager.update_metagraph(["n"])
        again = make(**place)
        assert again.eliminations == {"a": row("a")}
        assert list(again.get_departed_hotkeys()) == ["m"]

    def test_one_that_is_forgotten_ends(self, direct, new_name, tmp_path):
        with tempfile.TemporaryDirectory(prefix="shmelim-") as base:
            manager = EliminationManager(
                None, None, None, direct, name=new_name(), port=None, runtime_base=Path(base), state_dir=tmp_path
            )
            pid, server = manager.server_pid, manager._server_proxy
            gone = weakref.ref(manager)
            del manager
            gc.collect()
            assert gone() is None
            if direct:
                assert server._stopped.is_set()
            else:
                assert not psutil.pid_exists(pid)

    def test_threads_share_one(self, make):
        manager = make()
        errors = []

        def work(thread):
            try:
                for n in range(20):
                    manager.add_elimination(f"{thread}-{n}", row(f"{thread}-{n}"))
                    assert manager.get_elimination(f"{thread}-{n}") == row(f"{thread}-{n}")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert len(manager.get_eliminated_hotkeys()) == 80

    def test_backtesting_writes_nothing(self, make, tmp_path):
        before = listing(tmp_path)
        with make(Metagraph("a", "b"), None, None, is_backtesting=True, state_dir=tmp_path / "none") as manager:
            manager.sync_eliminations([row("a"), row("b")])
            manager.process_eliminations()
            manager.save_eliminations()
            assert manager.get_eliminations_from_disk() == [row("a"), row("b")]
        assert listing(tmp_path) == before
        assert not (tmp_path / "none").exists()


class TestDirectMode:
    def test_leaves_no_trace(self, managers, tmp_path):
        children = psutil.Process().children()
        before = listing(tmp_path)
        manager = managers(running_unit_tests=True)
        manager.sync_eliminations([row("a")])
        assert not list(Path("/dev/shm").glob(f"*{manager.name}*"))
        assert psutil.Process().children() == children
        assert listing(tmp_path) == before
        assert list(Path(manager._options.runtime_base).iterdir()) == []
        assert manager.address is None

    def test_two_do_not_share(self, managers):
        first, second = managers(running_unit_tests=True), managers(running_unit_tests=True)
        first.add_elimination("a", row("a"))
        assert not second.is_hotkey_eliminated("a")

    def test_two_of_one_name_do_not_share(self, managers):
        first = managers(running_unit_tests=True, name="shmelim")
        second = managers(running_unit_tests=True, name="shmelim")
        first.add_elimination("a", row("a"))
        assert not second.is_hotkey_eliminated("a")

    def test_a_later_one_of_a_state_directory_takes_it_over_and_the_earlier_one_says_so(self, managers, tmp_path):
        place = tmp_path / "state"
        first = managers(running_unit_tests=True, state_dir=place)
        first.add_elimination("a", row("a"))
        (tmp_path / "link").symlink_to(place)
        second = managers(running_unit_tests=True, state_dir=tmp_path / "link")
        assert second.eliminations == {"a": row("a")}
        with pytest.raises(ChannelError, match=r"a later manager of this process has taken .* over"):
            first.add_elimination("b", row("b"))
        assert first.is_hotkey_eliminated("a"), "reads go on"
        first.shutdown()
        second.add_elimination("b", row("b"))
        second.shutdown()
        assert managers(running_unit_tests=True, state_dir=place).eliminations.keys() == {"a", "b"}

    def test_the_proxy_is_the_server_object(self, managers):
        manager = managers(running_unit_tests=True)
        assert type(manager._server_proxy).__name__ == "EliminationManagerServer"
        assert manager._server_proxy.add_elimination_rpc("a", row("a")) is True
        assert manager.is_hotkey_eliminated("a")

    def test_cannot_be_pickled(self, managers):
        with pytest.raises((TypeError, RuntimeError)):
            pickle.dumps(managers(running_unit_tests=True))


def _use(manager, pipe):
    """What a child does with a manager that it was given."""
    try:
        manager.add_elimination("child", row("child"))
        pipe.send([sorted(manager.eliminations), manager.is_hotkey_eliminated("parent"), manager.server_pid])
    except BaseException as error:
        pipe.send(error)
    manager.shutdown()

    def test_needs_no_place_and_warns_of_none(self, tmp_path):
        environment = {k: v for k, v in os.environ.items() if k != "XDG_RUNTIME_DIR"}
        code = "from shmelim import EliminationManager; EliminationManager(None, None, None, True).shutdown()"
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def start_by_hand(self, address, authkey, server_ready):
    """As services did before there was `_spawn_server`."""
    process = multiprocessing.get_context("spawn").Process(
        target=start_elimination_manager_server, args=(address, authkey, server_ready, self._options), daemon=True
    )
    process.start()
    return process


class TestRpcMode:
    def test_a_process_made_by_hand(self, managers, monkeypatch):
        monkeypatch.setattr(EliminationManager, "_start_server_process", start_by_hand)
        manager = managers(port=0)
        manager.add_elimination("a", row("a"))
        assert EliminationReader(manager.name).is_hotkey_eliminated("a")

    def test_port_and_address_contradict(self, managers, tmp_path):
        with pytest.raises(ValueError, match="port or an address"):
            managers(port=50123, address=str(tmp_path / "s"))

    def test_places_may_be_text(self, managers, tmp_path):
        with tempfile.TemporaryDirectory(prefix="shmelim-") as base:
            manager = managers(runtime_base=base, state_dir=str(tmp_path / "state"))
            manager.add_elimination("a", row("a"))
            assert (Path(base) / manager.name / "key").exists()
            manager.shutdown()

    def test_readers_and_clients_find_it_by_name(self, managers):
        manager = managers()
        manager.add_elimination("a", row("a"))
        assert EliminationReader(manager.name).is_hotkey_eliminated("a")
        client = EliminationClient(manager.name, runtime_base=manager._options.runtime_base)
        assert client.remove_elimination("a") is True
        assert not manager.is_hotkey_eliminated("a")
        client.close()

    @pytest.mark.parametrize("place", ["socket", "port", "address"])
    def test_serves_on(self, managers, place, tmp_path):
        where = {
            "socket": {},
            "port": {"port": 0},
            "address": {"address": ("127.0.0.1", 0)},
        }[place]
        manager = managers(**where)
        assert isinstance(manager.address, str) is (place == "socket")
        manager.add_elimination("a", row("a"))
        client = EliminationClient(manager.name, runtime_base=manager._options.runtime_base)
        assert client.get_eliminations_from_disk() == [row("a")]
        client.close()

    def test_the_port_of_the_field_is_the_default(self):
        assert inspect.signature(EliminationManager).parameters["port"].default == 50004

    def test_reads_need_no_server(self, managers):
        manager = managers()
        manager.sync_eliminations([row("a"), row("b")])
        with (
            patch.object(EliminationManager, "_call_server", Untouchable()),
            patch.object(manager, "_server_proxy", Untouchable()),
        ):
            assert manager.is_hotkey_eliminated("a")
            assert manager.get_elimination("a") == manager.hotkey_in_eliminations("a") == row("a")
            assert manager.get_eliminated_hotkeys() == set(manager.eliminations) == {"a", "b"}
            assert manager.get_eliminations_from_memory() == list(manager.get_eliminations_dict().values())
            assert not manager.is_hotkey_re_registered("a")
            assert manager.get_departed_hotkeys() == manager.departed_hotkeys == {}
            assert manager.get_departed_hotkey_info("a") is None

    def test_a_second_one_of_the_name_is_refused(self, managers):
        first = managers()
        with pytest.raises(
            AlreadyServingError, match=rf"{first.name}.*EliminationReader\('{first.name}'\).*EliminationClient"
        ):
            managers(name=first.name)
        first.add_elimination("a", row("a"))

    def test_every_change_is_durable(self, managers, tmp_path, new_name):
        manager = managers(state_dir=tmp_path / "kept")
        manager.add_elimination("a", row("a"))
        manager.remove_elimination("a")
        manager.add_elimination("b", row("b"))
        server = psutil.Process(manager.server_pid)  # now, for afterwards there is another one
        server.kill()
        server.wait()
        assert [hotkey for hotkey, _ in state_in_store(tmp_path / "kept").eliminations] == ["b"]

    def test_after_a_restart_by_hand_everything_works_again(self, managers):
        manager = managers()
        manager.add_elimination("a", row("a"))
        before = manager.server_pid
        manager.restart_server()
        assert manager.server_pid != before
        manager.add_elimination("b", row("b"))
        assert list(manager.eliminations) == ["a", "b"]

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_a_child_reads_and_changes_and_ends_nothing(self, managers, method):
        manager = managers(Metagraph("m"), None, None, start_method=method)
        manager.add_elimination("parent", row("parent"))
        context = multiprocessing.get_context(method)
        here, there = context.Pipe()
        child = context.Process(target=_use, args=(manager, there))
        child.start()
        assert here.poll(30), "the child said nothing"
        answer = here.recv()
        child.join()
        assert answer == [["child", "parent"], True, None]
        assert manager.is_hotkey_eliminated("child")
        manager.add_elimination("after", row("after"))
        assert psutil.pid_exists(manager.server_pid)

    def test_is_pickled_to_a_child_only(self, managers):
        with pytest.raises(RuntimeError):
            pickle.dumps(managers())

    def test_a_start_that_fails_says_why(self, managers, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(Exception, match="cannot be used"):
            managers(state_dir=tmp_path / "file")

    def test_an_in_memory_state_ends_with_its_server(self, managers):
        manager = managers(is_backtesting=True)
        manager.add_elimination("a", row("a"))
        manager.restart_server()
        assert manager.eliminations == {}


def test_a_name_that_nobody_serves_is_not_served_after_removal(managers):
    manager = managers()
    manager.shutdown()
    assert EliminationReader(manager.name).get_eliminated_hotkeys() == set()
    SharedNamespace(manager.name).remove()
    with pytest.raises(NotServingError, match=manager.name):
        EliminationReader(manager.name)


def test_answers_that_are_larger_than_a_message_come_whole(managers):
    manager = managers(max_message=20_000)
    rows = [row(f"h{n}", pad=500) for n in range(200)]
    hotkeys = [one["hotkey"] for one in rows]
    manager.sync_eliminations(rows)
    assert manager.get_eliminations_from_disk() == rows
    proxy = manager._server_proxy
    assert proxy.get_eliminations_from_memory_rpc() == rows
    assert list(proxy.get_eliminations_dict_rpc()) == hotkeys
    assert {event["hotkey"] for event in manager.get_history(limit=None)} >= set(hotkeys)


# ---------------------------------------------------------------------- what cannot be meant is refused


ODD_PLACES = [
    ("", ValueError),
    ("a\0b", ValueError),
    (b"bytes", TypeError),
    (5, TypeError),
    (["a"], TypeError),
]


@pytest.mark.parametrize("setting", ["state_dir", "runtime_base", "files_dir", "default_departed", "registry"])
@pytest.mark.parametrize(("given", "error"), ODD_PLACES)
def test_a_place_that_is_none_is_refused_by_name_before_anything_is_made(
    make, direct, tmp_path, monkeypatch, setting, given, error
):
    """An empty text is what a variable gives that is not set; it must not mean the current directory."""
    if setting == ("runtime_base" if direct else "files_dir"):
        pytest.skip("the mode has none")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=setting):
        make(**{setting: given})
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("given", ["eliminations.json", Path("eliminations.json"), b"x", 5, None, [""], [5]])
def test_a_single_import_is_not_taken_for_a_list_of_letters(make, given):
    with pytest.raises((TypeError, ValueError), match="imports"):
        make(imports=given)


NOWHERE = {
    "a directory that is not there": lambda place: place / "no" / "such",
    "a directory": lambda place: place,
    "a host of others": lambda _: ("192.0.2.1", 5000),  # a documentation address (RFC 5737)
    "a number": lambda _: 5000,
}


@pytest.mark.parametrize("kind", NOWHERE)
def test_where_nobody_can_listen_is_found_before_anything_is_published(managers, tmp_path, kind):
    address = NOWHERE[kind](tmp_path)
    name = f"nowhere-{os.getpid()}"
    with pytest.raises((ChannelError, TypeError)) as caught:
        managers(name=name, address=address, state_dir=tmp_path / "state")
    assert getattr(caught.value, "hint", None) is None or "is served" not in caught.value.hint
    assert not list(Path("/dev/shm").glob(f"shmelim*{name}*"))
    assert not (tmp_path / "state").exists()
