"""Files that were imported are not merged again after a recovery, and so do not undo later changes."""

import json
import shutil

import msgspec
import pytest
from serving import row

from shmelim import EliminationManagerServer
from shmelim.eliminations import holding
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.errors import StoreError
from shmelim.shm import SharedNamespace


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"eliminations": [row("a"), row("b")]}))
    return path


@pytest.fixture
def undone(start, other):
    """An import of which a part was undone later."""
    with start(other) as server:
        server.remove_elimination_rpc("a")
        # A table that is made anew carries the origin on.
        server.sync_eliminations_rpc([row("b"), *(row(f"h{n}") for n in range(1200))])
        server.sync_eliminations_rpc([row("b")])


def damage(state_dir):
    with (state_dir / FILE_NAME).open("r+b") as file:
        file.write(b"\xff" * 100)


@pytest.mark.usefixtures("undone")
class TestAfterARecoveryFromSharedMemory:
    def test_they_are_not_merged_again(self, state_dir, start, other):
        for _ in range(2):
            damage(state_dir)
            with start(other) as server:
                assert server.get_eliminated_hotkeys_rpc() == {"b"}

    def test_another_file_is_merged(self, tmp_path, state_dir, start, other):
        damage(state_dir)
        (tmp_path / "new.json").write_text(json.dumps({"eliminations": [row("c")]}))
        with start(other, tmp_path / "new.json") as server:
            assert server.get_eliminated_hotkeys_rpc() == {"b", "c"}

    def test_a_table_that_does_not_tell_is_no_reason_to_merge(self, state_dir, start, other, monkeypatch, caplog):
        def earlier(directory, _imported):
            return msgspec.msgpack.encode({"state_dir": str(directory.resolve())})

        with monkeypatch.context() as patch:
            patch.setattr(holding, "origin_record", earlier)
            start().close()
        damage(state_dir)
        with start(other) as server:
            assert server.get_eliminated_hotkeys_rpc() == {"b"}
        assert "is not imported" in caplog.text


@pytest.mark.usefixtures("undone")
class TestAfterARecoveryFromTheFiles:
    @pytest.fixture(autouse=True)
    def only_files(self, undone, table_name, state_dir):
        SharedNamespace(table_name).remove()
        damage(state_dir)

    def test_they_are_skipped_with_a_warning(self, start, other, caplog):
        for _ in range(2):
            with start(other) as server:
                assert server.get_eliminated_hotkeys_rpc() == {"b"}
        assert caplog.text.count(f"{other} is not imported: the state was restored from the JSON files") == 1

    def test_they_are_skipped_also_when_they_are_named_later(self, state_dir, start, other):
        start().close()
        # The doubt outlives a recovery from shared memory too.
        damage(state_dir)
        start().close()
        with start(other) as server:
            assert server.get_eliminated_hotkeys_rpc() == {"b"}

    def test_another_content_is_merged_at_the_next_start(self, start, other):
        start(other).close()
        other.write_text(other.read_text() + "\n")
        with start(other) as server:
            assert server.get_eliminated_hotkeys_rpc() == {"a", "b"}

    def test_a_missing_file_is_still_an_error(self, tmp_path, start):
        with pytest.raises(StoreError, match="nowhere"):
            start(tmp_path / "nowhere.json")


def test_a_state_that_moved_is_told_by_its_directory(tmp_path, table_name, state_dir, start, undone):
    shutil.move(state_dir, tmp_path / "elsewhere")
    damage(tmp_path / "elsewhere")
    with EliminationManagerServer(
        SharedNamespace(table_name), tmp_path / "elsewhere", replace_published=True
    ) as server:
        assert [event["action"] for event in server.get_history_rpc(limit=None)][-1] == "recover"


def test_a_file_with_both_is_merged_whole(tmp_path, start):
    both = tmp_path / "both.json"
    content = {"eliminations": [row("a"), 17], "departed_hotkeys": {"gone": {"detected_ms": 5}, "": {}}}
    both.write_text(json.dumps(content))
    server = start(both)
    assert server.get_eliminated_hotkeys_rpc() == {"a"}
    assert server.get_departed_hotkeys_rpc() == {"gone": {"detected_ms": 5}}
    kept = [json.loads(path.read_text())["rows"][0]["row"] for path in tmp_path.glob("both.json.quarantine-*")]
    assert sorted(map(str, kept)) == ["17", "{}"]
