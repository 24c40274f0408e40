"""SPEC 3: the remote methods of `EliminationManagerServer`, called by `_server_proxy` in both modes."""

import pytest
from contract_marks import words
from contract_validator import START, Metagraph, row

from shmelim import EliminationManagerServer

ELEVEN = words("""
    health_check is_hotkey_eliminated get_elimination get_eliminated_hotkeys get_eliminations_from_memory
    add_elimination remove_elimination sync_eliminations clear_eliminations is_hotkey_re_registered
    get_departed_hotkeys
""")
OTHERS = words("""
    get_eliminations_from_disk get_eliminations_dict append_elimination_row delete_eliminations
    save_eliminations write_eliminations_to_disk get_departed_hotkey_info process_eliminations
    handle_perf_ledger_eliminations handle_mdd_eliminations handle_first_refresh is_zombie_hotkey
    get_first_refresh_ran set_first_refresh_ran update_metagraph get_history
""")


@pytest.fixture
def server(manager):
    return manager._server_proxy


@pytest.fixture
def new(make, mode):
    """A server that nobody has used yet."""
    return make(mode)._server_proxy


@pytest.mark.parametrize("name", [*ELEVEN, *OTHERS])
def test_every_method_is_there(name):
    assert callable(getattr(EliminationManagerServer, f"{name}_rpc"))


def test_there_is_no_lock(server):
    assert not hasattr(EliminationManagerServer, "get_eliminations_lock_rpc")
    with pytest.raises(AttributeError):
        server.get_eliminations_lock_rpc()


# ---------------------------------------------------------------------- the eleven


def test_health_check(new):
    new.sync_eliminations_rpc([row("a"), row("b")])
    new.update_metagraph_rpc(["m", "n"])
    new.update_metagraph_rpc(["n"])
    health = new.health_check_rpc()
    assert health["status"] == "ok"
    assert health["timestamp_ms"] > START
    assert (health["num_eliminations"], health["num_departed_hotkeys"]) == (2, 1)


def test_is_hotkey_eliminated(server):
    server.add_elimination_rpc("a", row("a"))
    assert server.is_hotkey_eliminated_rpc("a") is True
    assert server.is_hotkey_eliminated_rpc("b") is False


def test_get_elimination(server):
    server.add_elimination_rpc("a", row("a"))
    assert server.get_elimination_rpc("a") == row("a")
    assert server.get_elimination_rpc("b") is None


def test_reads_of_all(server):
    server.sync_eliminations_rpc([row("b"), row("a")])
    hotkeys = server.get_eliminated_hotkeys_rpc()
    assert (hotkeys, type(hotkeys)) == ({"a", "b"}, set)
    assert server.get_eliminations_from_memory_rpc() == [row("b"), row("a")]
    assert server.get_eliminations_dict_rpc() == {"b": row("b"), "a": row("a")}
    assert list(server.get_eliminations_dict_rpc()) == ["b", "a"]


def test_add_elimination_says_whether_it_is_new(server):
    assert server.add_elimination_rpc("a", row("a")) is True
    assert server.add_elimination_rpc("a", row("a", 1)) is False
    assert server.add_elimination_rpc("a", row("a", 1)) is False
    assert server.get_elimination_rpc("a") == row("a", 1)


def test_remove_elimination_says_whether_there_was_one(server):
    server.add_elimination_rpc("a", row("a"))
    assert server.remove_elimination_rpc("a") is True
    assert server.remove_elimination_rpc("a") is False
    assert server.get_eliminations_from_memory_rpc() == []


def test_sync_returns_the_removed_hotkeys(server):
    assert server.sync_eliminations_rpc([row("a"), row("b"), row("c")]) == []
    assert server.sync_eliminations_rpc([row("c", 1), row("d")]) == ["a", "b"]
    assert server.get_eliminations_dict_rpc() == {"c": row("c", 1), "d": row("d")}


def test_clear_eliminations(server):
    server.sync_eliminations_rpc([row("a"), row("b")])
    server.clear_eliminations_rpc()
    assert server.get_eliminations_from_memory_rpc() == []


def test_departures_and_registrations(new):
    assert new.update_metagraph_rpc(["a", "b", "c"]) == []
    assert new.update_metagraph_rpc({"b", "c"}) == ["a"]
    departed = new.get_departed_hotkeys_rpc()
    assert departed == {"a": {"detected_ms": departed["a"]["detected_ms"]}}
    assert departed["a"]["detected_ms"] > START
    assert new.get_departed_hotkey_info_rpc("a") == departed["a"]
    assert new.get_departed_hotkey_info_rpc("b") is None
    assert new.is_hotkey_re_registered_rpc("a") is False
    new.update_metagraph_rpc(["a", "b", "c"])
    assert new.is_hotkey_re_registered_rpc("a") is True
    assert new.is_hotkey_re_registered_rpc("b") is False


# ---------------------------------------------------------------------- those that callers also use


def test_append_elimination_row(server):
    assert server.append_elimination_row_rpc("a", 0.5, "ZOMBIE", 7, {"BTC/USD": 1.0}, {"x": 1}) is True
    assert server.get_elimination_rpc("a") == {
        "hotkey": "a",
        "dd": 0.5,
        "reason": "ZOMBIE",
        "elimination_initiated_time_ms": 7,
        "price_info": {"BTC/USD": 1.0},
        "return_info": {"x": 1},
    }
    server.append_elimination_row_rpc("b", None, "LIQUIDATED")
    assert server.get_elimination_rpc("b")["elimination_initiated_time_ms"] > START
    assert (
        server.append_elimination_row_rpc("b", None, reason="ZOMBIE", t_ms=8, price_info={}, return_info={})
        is False
    )


def test_delete_eliminations_is_one_transaction(server):
    server.sync_eliminations_rpc([row("a"), row("b"), row("c")])
    with pytest.raises((TypeError, ValueError)):
        server.delete_eliminations_rpc(["a", ""])
    assert server.get_eliminated_hotkeys_rpc() == {"a", "b", "c"}
    server.delete_eliminations_rpc(["a", "c", "never"])
    assert server.get_eliminated_hotkeys_rpc() == {"b"}


def test_write_and_save_and_what_is_on_disk(server):
    server.write_eliminations_to_disk_rpc([row("a"), row("b")])
    server.save_eliminations_rpc()
    assert server.get_eliminations_from_disk_rpc() == [row("a"), row("b")]
    assert server.get_eliminations_from_memory_rpc() == [row("a"), row("b")]


def test_first_refresh_ran(new):
    assert new.get_first_refresh_ran_rpc() is False
    new.set_first_refresh_ran_rpc(True)
    assert new.get_first_refresh_ran_rpc() is True


def test_is_zombie_hotkey(server):
    assert server.is_zombie_hotkey_rpc("a", ["b"]) is True
    assert server.is_zombie_hotkey_rpc("a", {"a", "b"}) is False
    assert server.is_zombie_hotkey_rpc("DEVELOPMENT", []) is False


@pytest.mark.parametrize("name", words("""
    process_eliminations handle_perf_ledger_eliminations handle_mdd_eliminations handle_first_refresh
"""))  # fmt: skip
def test_processing_runs_where_the_collaborators_are_and_elsewhere_says_so(make, mode, name):
    server = make(mode, Metagraph("a"), None, None)._server_proxy
    if mode == "direct":
        getattr(server, f"{name}_rpc")()
    else:
        with pytest.raises(Exception, match=f"EliminationManager.{name}"):
            getattr(server, f"{name}_rpc")()


def test_history_tells_who_changed_what(server):
    for n in (1, 2):
        server.add_elimination_rpc("a", row("a", n))
    server.remove_elimination_rpc("a")
    server.add_elimination_rpc("b", row("b"))
    events = server.get_history_rpc("a", limit=3)
    assert [(event["action"], event["old"], event["new"]) for event in events] == [
        ("remove", row("a", 2), None),
        ("update", row("a", 1), row("a", 2)),
        ("add", None, row("a", 1)),
    ]
    assert all(event["hotkey"] == "a" and event["at_ms"] > START for event in events)
    assert [event["hotkey"] for event in server.get_history_rpc(limit=2)] == ["b", "a"]
    assert server.get_history_rpc(hotkey="never") == []


def test_a_refused_change_leaves_no_event(server):
    before = server.get_history_rpc(limit=1)
    with pytest.raises(ValueError, match="'b'"):
        server.add_elimination_rpc("a", row("b"))
    server.remove_elimination_rpc("never")
    assert server.get_history_rpc(limit=1) == before


# ---------------------------------------------------------------------- order


def test_results_come_in_the_order_of_the_first_elimination(server):
    for hotkey in ("z", "a", "m"):
        server.add_elimination_rpc(hotkey, row(hotkey))
    server.add_elimination_rpc("z", row("z", 9))
    server.sync_eliminations_rpc([row(hotkey, 1) for hotkey in ("x", "m", "a", "z")])
    assert list(server.get_eliminations_dict_rpc()) == ["z", "a", "m", "x"]
    server.remove_elimination_rpc("z")
    server.add_elimination_rpc("z", row("z"))
    assert [found["hotkey"] for found in server.get_eliminations_from_memory_rpc()] == ["a", "m", "x", "z"]
    server.save_eliminations_rpc()
    assert [found["hotkey"] for found in server.get_eliminations_from_disk_rpc()] == ["a", "m", "x", "z"]


def test_of_a_hotkey_that_a_list_has_twice_the_last_record_counts(server):
    server.sync_eliminations_rpc([row("a", 1), row("b"), row("a", 2)])
    assert server.get_eliminations_dict_rpc() == {"a": row("a", 2), "b": row("b")}


# ---------------------------------------------------------------------- the keywords that callers use


def test_our_own_keywords(server):
    server.add_elimination_rpc(hotkey="a", data=row("a"))
    server.append_elimination_row_rpc(hotkey="b", current_dd=0.5, reason="ZOMBIE")
    server.delete_eliminations_rpc(hotkeys=["a"])
    assert server.get_eliminated_hotkeys_rpc() == {"b"}


def test_keyword_elimination_data(server):
    assert server.add_elimination_rpc("a", elimination_data=row("a")) is True


@pytest.mark.parametrize("keyword", ["dat", "eliminations_list"])
def test_keywords_of_a_sync(server, keyword):
    assert server.sync_eliminations_rpc(**{keyword: [row("a")]}) == []
    assert server.get_eliminated_hotkeys_rpc() == {"a"}


def test_keyword_dd(server):
    server.append_elimination_row_rpc("a", dd=0.5, reason="ZOMBIE")
    assert server.get_elimination_rpc("a")["dd"] == 0.5


def test_keyword_deleted_hotkeys(server):
    server.add_elimination_rpc("a", row("a"))
    server.delete_eliminations_rpc(deleted_hotkeys=["a"])
    assert server.get_eliminated_hotkeys_rpc() == set()


def test_keywords_of_the_manager(manager):
    manager.sync_eliminations(dat=[row("a")])
    manager.add_elimination("b", elimination_data=row("b"))
    manager.append_elimination_row("c", dd=0.5, reason="ZOMBIE")
    manager.delete_eliminations(deleted_hotkeys=["a"])
    assert manager.get_eliminated_hotkeys() == {"b", "c"}
