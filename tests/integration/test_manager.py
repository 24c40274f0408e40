"""What a validator holds, in both modes by the same test bodies; what reads and changes say is in test_api*.py."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
from serving import row

from shmelim import EliminationManager, RPCServiceBase, ValidatorEnvironment
from shmelim.errors import NoCollaboratorsError

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


class TestConstructor:
    def test_takes_what_the_field_passes(self):
        parameters = inspect.signature(EliminationManager).parameters.values()
        positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
        assert list(positional.items()) == list(FIELD_SIGNATURE.items())
        others = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert others
        assert all(p.default is not inspect.Parameter.empty for p in others)

    def test_calls_no_collaborator(self, make_manager):
        manager = make_manager(
            Metagraph("a"),
            Untouchable(),
            Untouchable(),
            contract_manager=Untouchable(),
            position_locks=Untouchable(),
            limit_order_manager=Untouchable(),
            slack_notifier=Untouchable(),
        )
        assert manager.get_eliminated_hotkeys() == set()

    def test_looks_at_the_metagraph(self, make_manager):
        manager = make_manager(Metagraph("a", "b"), None, None)
        assert manager.snapshot().registered == {"a", "b"}

    @pytest.mark.parametrize("metagraph", [None, Metagraph(), Mock()], ids=["none", "empty", "mock"])
    def test_can_do_without_one(self, make_manager, metagraph):
        manager = make_manager(metagraph, None, None)
        assert manager.snapshot().registered == set()

    def test_use_ipc_is_ignored_and_said_to_be(self, make_manager):
        with pytest.warns(DeprecationWarning, match="use_ipc"):
            manager = make_manager(use_ipc=True)
        manager.add_elimination("a", row("a"))
        assert manager.is_hotkey_eliminated("a")

    def test_without_use_ipc_nothing_is_warned(self, make_manager, recwarn):
        make_manager()
        assert not [
            w for w in recwarn if issubclass(w.category, DeprecationWarning) and "use_ipc" in str(w.message)
        ]

    def test_loads_the_default_departed_file(self, make_manager, tmp_path):
        path = tmp_path / "default.json"
        path.write_text('["x", "y"]')
        manager = make_manager(Metagraph("x"), None, None, default_departed=path)
        assert manager.get_departed_hotkeys() == {"x": {"detected_ms": 0}, "y": {"detected_ms": 0}}
        assert manager.is_hotkey_re_registered("x")
        assert not manager.is_hotkey_re_registered("y")

    def test_refuses_a_setting_that_does_not_exist(self, make_manager):
        with pytest.raises(TypeError, match="retries"):
            make_manager(retries=3)

    @pytest.mark.parametrize(
        ("options", "error", "names"),
        [
            ({"files": "of"}, ValueError, "current, lagged, off"),
            ({"durability": "mains"}, ValueError, "durability"),
            ({"name": "Bad Name"}, ValueError, "Bad Name"),
        ],
    )
    def test_refuses_what_cannot_be(self, make_manager, tmp_path, options, error, names):
        with pytest.raises(error, match=names):
            make_manager(state_dir=tmp_path / "state", **options)

    def test_a_text_is_no_list_of_hotkeys(self, make_manager):
        metagraph = Metagraph()
        metagraph.hotkeys = "abc"
        assert make_manager(metagraph, None, None).snapshot().registered == set()

    def test_no_list_at_all_is_named(self, make_manager):
        manager = make_manager()
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

    def test_is_a_service(self, make_manager):
        manager = make_manager()
        assert isinstance(manager, RPCServiceBase)
        assert manager.service_name == "EliminationManagerServer"

    def test_the_lock_is_gone_and_the_message_says_what_to_do(self, make_manager):
        with pytest.raises(NotImplementedError, match=r"sync_eliminations.*snapshot"):
            make_manager().get_eliminations_lock()

    def test_zombies(self, make_manager):
        manager = make_manager()
        assert manager.is_zombie_hotkey("a", {"b"})
        assert not manager.is_zombie_hotkey("b", {"b"})
        assert not manager.is_zombie_hotkey("DEVELOPMENT", {"b"})

    def test_first_refresh_ran(self, make_manager):
        manager = make_manager()
        assert manager.first_refresh_ran is False
        manager.first_refresh_ran = True
        assert manager.first_refresh_ran is True

    def test_generates_rows(self, make_manager):
        manager = make_manager()
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

    def test_times_of_ticks(self, make_manager):
        manager = make_manager()
        assert manager.get_last_update_time_ms() == 0
        manager.set_last_update_time()
        assert manager.get_last_update_time_ms() > 1_700_000_000_000

    def test_an_interval_counts_outside_of_direct_mode(self, make_manager, direct):
        manager = make_manager()
        assert manager.refresh_allowed(10**9)
        manager.set_last_update_time()
        assert manager.refresh_allowed(10**9) is direct

    def test_health(self, make_manager):
        assert make_manager().health_check() is True

    def test_names_its_mode_and_place(self, make_manager, direct):
        assert ("direct" in repr(make_manager())) is direct


class TestCollaborators:
    @pytest.mark.parametrize("name", COLLABORATORS)
    def test_the_next_call_uses_the_new_one(self, make_manager, name):
        manager = make_manager()
        seen = manager._processor.context.collaborators
        for collaborator in (Untouchable(), Untouchable()):
            setattr(manager, name, collaborator)
            assert getattr(seen, name) is getattr(manager, name) is collaborator

    @pytest.mark.parametrize("name", COLLABORATORS)
    def test_can_be_patched_and_comes_back(self, make_manager, name):
        manager = make_manager()
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

    def test_the_server_processes_where_it_has_collaborators(self, make_manager, direct):
        manager = make_manager(Metagraph("a"), None, None)
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

    def test_a_tick_sees_a_new_metagraph(self, make_manager):
        manager = make_manager(Metagraph("a", "b"), None, None)
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
    def manager(self, make_manager, tmp_path):
        return make_manager(state_dir=tmp_path / "state")

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
    def test_without_files_nothing_happens(self, make_manager, tmp_path, options):
        (tmp_path / "other").mkdir()
        manager = make_manager(state_dir=tmp_path / "other", **options)
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
    def manager(self, make_manager, position):
        environment = ValidatorEnvironment(price_source=lambda _pair, info, _ms: ("of the record", info))
        manager = make_manager(Metagraph("a"), Positions(position), None, environment=environment)
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
    make_manager, direct, tmp_path, monkeypatch, setting, given, error
):
    """An empty text is what a variable gives that is not set; it must not mean the current directory."""
    if setting == ("runtime_base" if direct else "files_dir"):
        pytest.skip("the mode has none")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=setting):
        make_manager(**{setting: given})
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("given", ["eliminations.json", Path("eliminations.json"), b"x", 5, None, [""], [5]])
def test_a_single_import_is_not_taken_for_a_list_of_letters(make_manager, given):
    with pytest.raises((TypeError, ValueError), match="imports"):
        make_manager(imports=given)
