"""The state directory, or the database in it, deleted or replaced under a running server."""

import os
import shutil

import pytest
from serving import row, state_in_store, state_in_table

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
