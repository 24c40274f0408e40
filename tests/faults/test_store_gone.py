"""The state directory, or the database in it, deleted or replaced under a running server."""

import os
import shutil

import pytest
from serving import row, state_in_store, state_in_table

from shmelim.eliminations.store.opening import LOG_SUFFIXES
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import StoreError


def _delete_directory(state_dir):
    shutil.rmtree(state_dir)


def _delete_files(state_dir):
    for path in state_dir.glob(f"{FILE_NAME}*"):
        path.unlink()


def _replace(state_dir):
    for suffix in ("-wal", "-shm"):
        (state_dir / f"{FILE_NAME}{suffix}").unlink()
    with Store.open(state_dir / "other"):
        pass
    (state_dir / "other" / FILE_NAME).replace(state_dir / FILE_NAME)


def _move_directory(state_dir):
    state_dir.rename(state_dir.with_name("moved"))


@pytest.mark.parametrize("harm", [_delete_directory, _delete_files, _replace, _move_directory])
def test_changes_are_refused_whole(state_dir, start, harm):
    server = start(files="off")
    server.add_elimination_rpc("a", row("a"))
    server.update_metagraph_rpc(["m"])
    before = state_in_table(server.reader)
    harm(state_dir)
    for _ in range(3):
        for change in (
            lambda: server.add_elimination_rpc("b", row("b")),
            lambda: server.remove_elimination_rpc("a"),
            lambda: server.sync_eliminations_rpc([]),
            lambda: server.update_metagraph_rpc([]),
        ):
            with pytest.raises(StoreError, match="not applied") as caught:
                change()
            assert str(state_dir / FILE_NAME) in str(caught.value)
            assert "restart" in caught.value.hint
            assert state_in_table(server.reader) == before


def _delete(path):
    path.unlink()


def _replace_by_a_copy(path):
    path.with_suffix(".copy").write_bytes(path.read_bytes())
    path.with_suffix(".copy").replace(path)


@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize("harm", [_delete, _replace_by_a_copy])
@pytest.mark.parametrize("suffix", LOG_SUFFIXES)
def test_without_its_log_no_change_is_acknowledged_that_a_kill_would_lose(
    state_dir, start, tmp_path, suffix, harm, is_linked
):
    place = state_dir
    if is_linked:
        (place := tmp_path / "elsewhere").mkdir()
        with Store.open(place):
            pass
        state_dir.mkdir(mode=0o700)
        (state_dir / FILE_NAME).symlink_to(place / FILE_NAME)
    server = start(files="off")
    server.add_elimination_rpc("a", row("a"))
    log = place / f"{FILE_NAME}{suffix}"
    harm(log)
    for _ in range(2):
        with pytest.raises(StoreError, match="while it was in use; the change was not applied") as caught:
            server.add_elimination_rpc("b", row("b"))
        assert str(log) in str(caught.value)
        assert "restart" in caught.value.hint
    assert any(problem["name"] == "commit_failed" for problem in server.health_check_rpc()["problems"])
    # What a kill would leave now.
    shutil.copytree(place, killed := tmp_path / "killed")
    assert [name for name, _ in state_in_store(killed).eliminations] == ["a"]
    server.close()
    with start(files="off") as again:
        assert again.add_elimination_rpc("b", row("b"))
    assert [name for name, _ in state_in_store(place).eliminations] == ["a", "b"]


def test_a_log_without_a_name_is_not_given_one_by_making_it_longer(state_dir):
    with Store.open(state_dir) as store:
        log = state_dir / f"{FILE_NAME}-wal"
        log.unlink()
        store.lengthen_log()
        assert not log.exists()


def test_the_hint_restores_everything_that_was_acknowledged(state_dir, start):
    server = start()
    server.add_elimination_rpc("a", row("a"))
    before = state_in_table(server.reader)
    _delete_directory(state_dir)
    with pytest.raises(StoreError) as caught:
        server.add_elimination_rpc("b", row("b"))
    assert "--adopt-published" in caught.value.hint
    server.close()
    with start(adopt_published=True) as again:
        assert state_in_table(again.reader) == before
        again.add_elimination_rpc("b", row("b"))
    assert [name for name, _ in state_in_store(state_dir).eliminations] == ["a", "b"]


def test_put_back_it_is_used_again(state_dir, start):
    server = start(files="off")
    server.add_elimination_rpc("a", row("a"))
    _move_directory(state_dir)
    with pytest.raises(StoreError, match="was deleted while it was in use"):
        server.add_elimination_rpc("b", row("b"))
    state_dir.with_name("moved").rename(state_dir)
    assert server.add_elimination_rpc("b", row("b"))
    server.close()
    assert [name for name, _ in state_in_store(state_dir).eliminations] == ["a", "b"]


def test_a_change_of_the_working_directory_is_no_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store.open("state") as store:
        os.chdir("/")
        with store.transaction():
            store.set_meta("a", 1)
        assert store.meta("a") == 1
