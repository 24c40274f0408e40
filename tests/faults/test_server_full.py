"""No room: on the disk of the store, of the files, and in shared memory. Nothing is applied, and all goes on."""

import ctypes
import os
import resource
import subprocess
import threading
from pathlib import Path

import pytest
from crashing import call
from serving import row, state_in_files, state_in_table

from shmelim import EliminationManagerServer, EliminationReader
from shmelim.errors import SegmentFullError, StoreError
from shmelim.shm import SharedNamespace
from shmelim.system import durable

_CLONE_NEWNS = 0x20000


def _mounts_possible():
    if os.geteuid() != 0:
        return False
    # Two mount namespaces deep, nothing of this is seen by anybody else.
    probe = "mount -t tmpfs none /mnt"
    return subprocess.run(["unshare", "-m", "sh", "-c", probe], capture_output=True, check=False).returncode == 0


own_mounts = pytest.mark.skipif(not _mounts_possible(), reason="needs root and a mount namespace of its own")


def with_small_tmpfs(path, size, work):
    """Run something in a child for which `path` is a file system of `size` bytes; return what it returns."""

    def run():
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(_CLONE_NEWNS) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True)
        return work()

    return call(run)


def fill_up(directory):
    """Take all room there is; returns the file to remove again."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


def nothing_of(server, hotkey):
    """A refused change is neither in the table nor in the store nor in the history."""
    assert not server.is_hotkey_eliminated_rpc(hotkey)
    assert server._state.read(lambda store: store.get(hotkey)) is None
    assert server.get_history_rpc(hotkey) == []
    return True


def problems(server):
    """What a server says is wrong, but for the disk, which is nearly full all the time."""
    found = server.health_check_rpc()["problems"]
    assert "disk_nearly_full" in {problem["name"] for problem in found}
    return [problem for problem in found if problem["name"] != "disk_nearly_full"]


class TestDiskOfTheStore:
    @own_mounts
    def test_full_refuses_the_change_and_works_again_when_there_is_room(self, tmp_path):
        def work():
            with EliminationManagerServer(state_dir=tmp_path / "state", files="off") as server:
                server.add_elimination_rpc("a", row("a"))
                filler = fill_up(tmp_path)
                refused = []
                for n in range(40):
                    before = state_in_table(server.reader)
                    try:
                        server.add_elimination_rpc(f"h{n}", row(f"h{n}", pad=5000))
                        wrong = []
                    except StoreError as error:
                        wrong = ["commit_failed"]
                        refused.append(error)
                        assert state_in_table(server.reader) == before
                        nothing_of(server, f"h{n}")
                    # Reading goes on.
                    assert server.get_elimination_rpc("a") == row("a")
                    assert [problem["name"] for problem in problems(server)] == wrong
                assert refused
                assert all("shmelim.sqlite" in str(error) and error.hint for error in refused)
                filler.unlink()
                assert server.add_elimination_rpc("b", row("b", pad=5000)) is True
                assert problems(server) == []
                before = state_in_table(server.reader)
            with EliminationManagerServer(state_dir=tmp_path / "state", files="off") as server:
                assert state_in_table(server.reader) == before
            return len(refused)

        assert with_small_tmpfs(tmp_path, 600_000, work) > 0

    def test_a_limit_on_the_size_of_files_does_the_same(self, tmp_path):
        def work():
            with EliminationManagerServer(state_dir=tmp_path, durability="process", files="off") as server:
                server.add_elimination_rpc("a", row("a"))
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
                refused = None
                for n in range(200):
                    try:
                        server.add_elimination_rpc(f"h{n}", row(f"h{n}", pad=10_000))
                    except StoreError:
                        refused = f"h{n}"
                        break
                assert refused
                nothing_of(server, refused)
                server._state.read(lambda store: store.check())
                # A small one may still fit or not; it is whole either way.
                before = state_in_table(server.reader)
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                assert server.add_elimination_rpc(refused, row(refused, pad=10_000)) is True
                assert len(state_in_table(server.reader).eliminations) == len(before.eliminations) + 1
            with EliminationManagerServer(state_dir=tmp_path, files="off") as server:
                return server.is_hotkey_eliminated_rpc(refused)

        assert call(work)

    @own_mounts
    def test_full_at_the_start_is_a_clear_error(self, tmp_path):
        def work():
            fill_up(tmp_path)
            with pytest.raises(StoreError) as caught:
                EliminationManagerServer(state_dir=tmp_path / "state")
            return str(caught.value)

        assert str(tmp_path) in with_small_tmpfs(tmp_path, 100_000, work)

    @own_mounts
    @pytest.mark.parametrize("size", [50_000, 100_000, 150_000])
    def test_a_start_for_which_there_is_no_room_leaves_no_part_of_a_store(self, tmp_path, size):
        def work():
            with pytest.raises(StoreError):
                EliminationManagerServer(state_dir=tmp_path / "state")
            return sorted(path.name for path in (tmp_path / "state").iterdir())

        assert "sqlite." not in " ".join(with_small_tmpfs(tmp_path, size, work))


class TestAFileThatIsMountedByItself:
    @own_mounts
    def test_cannot_be_replaced_and_the_problem_says_what_to_do(self, tmp_path):
        def work():
            state, outside = tmp_path / "state", tmp_path / "outside.json"
            state.mkdir()
            (state / "eliminations.json").touch()
            outside.write_text('{"eliminations": []}')
            mounted = str(state / "eliminations.json")
            subprocess.run(["mount", "--bind", str(outside), mounted], check=True)
            with EliminationManagerServer(state_dir=state, durability="process") as server:
                server.add_elimination_rpc("a", row("a"))
                (problem,) = problems(server)
                assert problem["name"] == "files_behind"
                assert "mount its directory instead" in problem["remedy"]
                assert [one["hotkey"] for one in server.get_eliminations_from_disk_rpc()] == ["a"]
                with pytest.raises(StoreError, match="mount its directory instead"):
                    server.save_eliminations_rpc()
            subprocess.run(["umount", mounted], check=True)
            return outside.read_text()

        assert with_small_tmpfs(tmp_path, 20_000_000, work) == '{"eliminations": []}'


class TestDiskOfTheFiles:
    @own_mounts
    def test_full_the_change_stands_and_the_files_come_when_there_is_room(self, tmp_path):
        """The store has room left in its own log; a new copy of the JSON file has none."""

        def work():
            with EliminationManagerServer(state_dir=tmp_path / "state", durability="process") as server:
                server.sync_eliminations_rpc([row(f"h{n}", pad=300) for n in range(500)])
                filler = fill_up(tmp_path)
                os.truncate(filler, filler.stat().st_size - 150_000)
                assert server.remove_elimination_rpc("h0") is True
                with pytest.raises(StoreError):
                    server.save_eliminations_rpc()
                health = server.health_check_rpc()
                assert health["status"] == "degraded"
                (problem,) = problems(server)
                assert problem["name"] == "files_behind"
                assert "eliminations.json" in problem["text"]
                assert not server.is_hotkey_eliminated_rpc("h0")
                assert not list((tmp_path / "state").glob("*.tmp"))
                filler.unlink()
                while problems(server):
                    os.sched_yield()
                state = state_in_table(server.reader)
                assert state_in_files(tmp_path / "state") == state.without_registered()
                return True

        assert with_small_tmpfs(tmp_path, 4_000_000, work)

    def test_full_by_what_the_system_says_the_change_stands(self, tmp_path, monkeypatch):
        real = durable.tempfile.mkstemp

        def full(*_args, **_kwargs):
            raise OSError(28, "No space left on device")

        with EliminationManagerServer(state_dir=tmp_path) as server:
            monkeypatch.setattr(durable.tempfile, "mkstemp", full)
            assert server.append_elimination_row_rpc("a", 1.0, "ZOMBIE") is True
            assert "No space left" in str(server.health_check_rpc()["problems"])
            monkeypatch.setattr(durable.tempfile, "mkstemp", real)
            server.save_eliminations_rpc()
            assert state_in_files(tmp_path) == state_in_table(server.reader).without_registered()


class TestSharedMemory:
    @own_mounts
    def test_full_refuses_what_does_not_fit_and_goes_on_with_what_does(self, table_name, tmp_path):
        def work():
            namespace = SharedNamespace(table_name)
            with EliminationManagerServer(namespace, tmp_path, durability="process", files="off") as server:
                reader = EliminationReader(table_name)
                server.sync_eliminations_rpc([row(f"h{n}") for n in range(20)])
                for _ in range(3):
                    before = state_in_table(reader)
                    with pytest.raises(SegmentFullError) as caught:
                        server.add_elimination_rpc("large", row("large", pad=900_000))
                    assert "/dev/shm" in caught.value.hint
                    with pytest.raises(SegmentFullError):
                        server.sync_eliminations_rpc([row(f"many{n}", pad=2000) for n in range(600)])
                    assert state_in_table(reader) == before
                    nothing_of(server, "large")
                    nothing_of(server, "many5")
                    assert server.add_elimination_rpc("h3", row("h3", 7)) is False
                    assert server.remove_elimination_rpc("h3") is True
                    assert server.add_elimination_rpc("h3", row("h3")) is True
                assert len(list(Path("/dev/shm").glob("shmelim.*"))) == 3  # root, data, lock
                before = state_in_table(reader)
            with EliminationManagerServer(namespace, tmp_path, durability="process", files="off") as server:
                assert state_in_table(server.reader) == before
                assert state_in_table(reader) == before
                return True

        assert with_small_tmpfs("/dev/shm", 2_000_000, work)

    @own_mounts
    def test_full_at_a_first_start_is_a_clear_error_and_at_a_later_one_costs_nothing(self, table_name, tmp_path):
        def work():
            namespace = SharedNamespace(table_name)
            with EliminationManagerServer(namespace, tmp_path, files="off") as server:
                server.sync_eliminations_rpc([row(f"h{n}") for n in range(20)])
                before = state_in_table(server.reader)
            filler = fill_up(Path("/dev/shm"))
            reader = EliminationReader(table_name)
            with pytest.raises(SegmentFullError):
                EliminationManagerServer(SharedNamespace(f"{table_name}x"), tmp_path / "other", files="off")
            # One that adopts its table needs no room.
            EliminationManagerServer(namespace, tmp_path, files="off").close()
            assert state_in_table(reader) == before
            filler.unlink()
            with EliminationManagerServer(namespace, tmp_path, files="off"):
                assert state_in_table(reader) == before
                return True

        assert with_small_tmpfs("/dev/shm", 4_000_000, work)

    def test_full_for_one_caller_is_none_of_the_others_business(self, table_name, tmp_path, monkeypatch):
        """The same without a mount: the system says that there is no room for large segments."""
        create = SharedNamespace.create_data

        def limited(self, generation, size):
            if size > 8 << 20:
                raise SegmentFullError(f"no room for {size:,} bytes", hint="enlarge /dev/shm")
            return create(self, generation, size)

        monkeypatch.setattr(SharedNamespace, "create_data", limited)
        with EliminationManagerServer(SharedNamespace(table_name), tmp_path, durability="process") as server:
            refused, added = [], []

            def large():
                for n in range(5):
                    try:
                        server.sync_eliminations_rpc([row(f"large{n}-{m}", pad=100_000) for m in range(40)])
                    except SegmentFullError as error:
                        refused.append(error)

            def small(number):
                hotkeys = [f"h{number}-{n}" for n in range(40)]
                added.extend([server.add_elimination_rpc(hotkey, row(hotkey)) for hotkey in hotkeys])

            threads = [threading.Thread(target=large)]
            threads += [threading.Thread(target=small, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(refused) == 5
            assert added == [True] * 160
            assert server.reader.get_eliminated_hotkeys() == {f"h{n}-{m}" for n in range(4) for m in range(40)}
            nothing_of(server, "large0-0")
            state = state_in_table(server.reader)
        with EliminationManagerServer(SharedNamespace(table_name), tmp_path) as server:
            assert state_in_table(server.reader) == state
