"""One teller: a manager's copies speak under its epoch, and nobody else tells what the validator sees."""

from __future__ import annotations

import multiprocessing

import pytest
from ledger import kill, pid_after
from waiting import PATIENCE, until

from shmelim import EliminationClient, EpochError


def epoch_of(manager):
    health = manager._server_proxy.health_check_rpc()
    return health["epoch"], health["teller"]


def client_of(manager):
    return EliminationClient(manager.name, runtime_base=manager._options.runtime_base)


def tell(manager, results):
    try:
        results.put(manager.update_metagraph(["a"]))
    except EpochError as error:
        results.put(str(error))


def copy_waits(manager, go, results):
    go.wait(PATIENCE)
    tell(manager, results)


def test_an_epoch_outlives_restarts_and_deaths_of_the_server(managers):
    manager = managers()
    first = epoch_of(manager)
    assert first[0] == 1
    manager.restart_server()
    assert epoch_of(manager) == first
    pid_after(manager, kill(manager))
    until(lambda: epoch_of(manager) == first)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_copies_speak_under_it_however_they_were_started(managers, method):
    manager = managers()
    manager.update_metagraph(["a", "b"])
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=tell, args=(manager, results))
    child.start()
    assert results.get(timeout=PATIENCE) == ["b"]
    child.join(PATIENCE)


def test_a_copy_of_an_earlier_manager_is_told_of_both(managers, new_name, tmp_path):
    where = {"name": new_name(), "state_dir": tmp_path / "state", "runtime_base": tmp_path.parent.parent / "r"}
    context = multiprocessing.get_context("fork")
    results, go = context.Queue(), context.Event()
    first = managers(**where, port=0)
    address = first.address
    whose = epoch_of(first)
    # Its own channel stays open to it, as to a copy whose manager was killed: nobody told it of the end.
    child = context.Process(target=copy_waits, args=(first, go, results))
    child.start()
    first.shutdown()
    second = managers(**where, address=address)
    now = epoch_of(second)
    assert now[0] == whose[0] + 1
    second.update_metagraph(["b", "c"])
    go.set()
    said = results.get(timeout=PATIENCE)
    child.join(PATIENCE)
    assert whose[1] in said
    assert now[1] in said
    assert second.get_departed_hotkeys() == {}


def answers_late(manager, go, results):
    """The contract's answer to a slash that this copy began while its manager lived."""
    proxy = manager._server_proxy
    proxy.eliminate_rpc("a", {"hotkey": "a", "reason": "PLAGIARISM"}, ["slash"])
    assert proxy.begin_slash_rpc("a", "mine")
    results.put("begun")
    go.wait(PATIENCE)
    try:
        results.put(proxy.settle_debt_rpc("a", "slash", "mine"))
        proxy.remove_elimination_rpc("a")
    except EpochError:
        results.put("refused")


def test_the_late_answer_of_an_earlier_managers_copy_settles_its_slash(managers, new_name, tmp_path):
    """Its validator was killed while the contract took the collateral; it may change nothing else."""
    where = {"name": new_name(), "state_dir": tmp_path / "state", "runtime_base": tmp_path.parent.parent / "r"}
    context = multiprocessing.get_context("fork")
    results, go = context.Queue(), context.Event()
    first = managers(**where, port=0)
    child = context.Process(target=answers_late, args=(first, go, results))
    child.start()
    assert results.get(timeout=PATIENCE) == "begun"
    address = first.address
    first.shutdown()
    second = managers(**where, address=address)
    assert [debt["state"] for debt in second.get_debts()] == ["attempting"]
    go.set()
    assert [results.get(timeout=PATIENCE) for _ in range(2)] == [True, "refused"]
    child.join(PATIENCE)
    assert second.get_debts() == []
    assert [slash["outcome"] for slash in second.get_slashes("a")] == ["made"]
    assert "a" in second.eliminations


def test_a_person_changes_eliminations_and_neither_tells_nor_pays(managers):
    manager = managers()
    manager.append_elimination_row("x", 0.1, "PLAGIARISM")
    manager._server_proxy.eliminate_rpc("y", {"hotkey": "y", "reason": "PLAGIARISM"}, ["slash"])
    with client_of(manager) as client:
        assert client.remove_elimination("x") is True
        for call in (
            lambda: client.update_metagraph([]),
            lambda: client._call("begin_slash_rpc", ("y", "token")),
        ):
            with pytest.raises(EpochError, match="only the manager of process") as caught:
                call()
            assert epoch_of(manager)[1] in str(caught.value)
    assert [debt["state"] for debt in manager._server_proxy.get_debts_rpc("y")] == ["owed"]


def test_where_no_manager_is_a_person_tells(serve):
    served = serve()
    with served.client() as client:
        client.update_metagraph(["a", "b"])
        assert client.update_metagraph(["a"]) == ["b"]


def test_a_loop_ends_when_its_owner_shuts_the_manager_down(managers):
    manager = managers()
    loop = multiprocessing.get_context("fork").Process(target=manager.run_update_loop)
    loop.start()
    until(lambda: manager._server_proxy.health_check_rpc()["last_tick_ms"] is not None)
    manager.shutdown()
    loop.join(PATIENCE)
    assert loop.exitcode == 0
