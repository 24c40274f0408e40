"""A manager's life and end, and what direct mode and a server in a process of its own each do."""

from __future__ import annotations

import gc
import inspect
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from serving import listing, row, state_in_store
from test_manager import Metagraph, Untouchable

from shmelim import EliminationClient, EliminationManager, EliminationReader
from shmelim.eliminations.serve import start_elimination_manager_server
from shmelim.errors import AlreadyServingError, ChannelError, NotServingError
from shmelim.shm import SharedNamespace


class TestLife:
    def test_is_a_context_manager(self, make_manager, direct):
        with make_manager() as manager:
            manager.add_elimination("a", row("a"))
            pid = manager.server_pid
        assert direct or not psutil.pid_exists(pid)
        manager.shutdown()

    def test_reads_go_on_after_the_end_and_changes_say_what_is_wrong(self, make_manager):
        manager = make_manager()
        manager.add_elimination("a", row("a"))
        manager.live_price_fetcher = fetcher = object()
        manager.shutdown()
        assert manager.is_hotkey_eliminated("a")
        assert manager.live_price_fetcher is fetcher
        with pytest.raises(ChannelError):
            manager.add_elimination("b", row("b"))

    def test_the_state_outlives_it(self, make_manager, tmp_path, new_name):
        place = {"state_dir": tmp_path / "kept", "name": new_name()}
        with make_manager(**place) as manager:
            manager.add_elimination("a", row("a"))
            manager.update_metagraph(["m", "n"])
            manager.update_metagraph(["n"])
        again = make_manager(**place)
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

    def test_threads_share_one(self, make_manager):
        manager = make_manager()
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

    def test_backtesting_writes_nothing(self, make_manager, tmp_path):
        before = listing(tmp_path)
        with make_manager(
            Metagraph("a", "b"), None, None, is_backtesting=True, state_dir=tmp_path / "none"
        ) as manager:
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
