"""Managers whose state is the JSON files of a directory, one beside the other; and when files wait in RPC mode."""

import json

import pytest
from serving import row

from shmelim import EliminationManager
from shmelim.eliminations.files import mirror
from shmelim.eliminations.state import changes
from shmelim.errors import DamagedFileError, StoreError


@pytest.fixture
def files(tmp_path):
    return tmp_path / "files"


@pytest.fixture
def of_files(managers, files):
    return lambda **options: managers(running_unit_tests=True, files_dir=files, **options)


@pytest.mark.parametrize("reload", ["reload_from_disk", "load_eliminations_from_disk"])
def test_a_manager_reads_what_another_one_wrote(of_files, files, reload):
    first, second = of_files(), of_files()
    first.sync_eliminations([row("a"), row("b")])
    first.update_metagraph(["m", "n"])
    first.update_metagraph(["n"])
    assert second.eliminations == {}
    getattr(second, reload)()
    assert second.eliminations == {"a": row("a"), "b": row("b")}
    assert second.get_departed_hotkeys() == first.get_departed_hotkeys()
    second.remove_elimination("a")
    assert list(first.eliminations) == ["a", "b"]
    assert first.get_eliminations_from_disk() == [row("b")]
    getattr(first, reload)()
    assert list(first.eliminations) == ["b"]


def test_what_changes_no_row_does_not_write_over_what_another_one_wrote(of_files, files):
    manager = of_files()
    manager._server_proxy.eliminate_rpc("a", row("a"), ["positions"])
    manager.save_eliminations()
    of_files().add_elimination("b", row("b"))
    assert manager._server_proxy.settle_debt_rpc("a", "positions")
    manager.sync_eliminations([row("a")])
    assert [
        found["hotkey"] for found in json.loads((files / "eliminations.json").read_text())["eliminations"]
    ] == [
        *("a", "b"),
    ]


@pytest.mark.parametrize(
    "use",
    [
        lambda manager: manager.get_eliminations_from_disk(),
        lambda manager: manager.sync_eliminations([]),
        lambda manager: manager.shutdown(),
        lambda manager: (manager.reload_from_disk(), manager.shutdown()),
    ],
    ids=["disk", "sync", "shutdown", "reload"],
)
def test_a_manager_that_changed_nothing_writes_over_nothing(of_files, files, use):
    of_files().shutdown()
    first, second = of_files(), of_files()
    first.add_elimination("a", row("a"))
    first.update_metagraph(["m", "n"])
    first.update_metagraph(["n"])
    use(second)
    third = of_files()
    assert list(third.eliminations) == ["a"]
    assert list(third.get_departed_hotkeys()) == ["m"]


def test_a_manager_that_changed_one_file_leaves_the_other_to_who_changed_that(of_files):
    first, second = of_files(), of_files()
    first.update_metagraph(["m", "n"])
    first.update_metagraph(["n"])
    second.add_elimination("a", row("a"))
    assert list(of_files().get_departed_hotkeys()) == ["m"]
    first.update_metagraph(["n", "o"])
    assert list(of_files().eliminations) == ["a"]


def test_a_manager_that_has_taken_default_departures_leaves_the_eliminations_to_who_changed_them(
    of_files, tmp_path
):
    default = tmp_path / "default.json"
    default.write_text(json.dumps(["m"]))
    first, second = of_files(default_departed=default), of_files(default_departed=default)
    first.add_elimination("a", row("a"))
    assert second.get_eliminations_from_disk() == [row("a")]
    assert list(of_files().get_departed_hotkeys()) == ["m"]


def test_a_change_that_comes_right_after_a_reload_is_written(of_files, monkeypatch):
    manager = of_files()
    manager.add_elimination("a", row("a"))
    state = manager._server_proxy._state
    commit = state.commit

    def with_another(change, *args, **kwargs):
        result = commit(change, *args, **kwargs)
        commit(changes.remove, ["a"])  # by another thread, whose write waits until the files are no longer at rest
        return result

    with monkeypatch.context() as patch:
        patch.setattr(state, "commit", with_another)
        manager.reload_from_disk()
    assert manager.eliminations == {}
    assert manager.get_eliminations_from_disk() == []


@pytest.mark.parametrize(
    "write",
    [lambda manager: manager.write_eliminations_to_disk([]), lambda manager: manager.save_eliminations()],
    ids=["write", "save"],
)
def test_what_a_manager_is_told_to_write_is_written(of_files, write):
    first, second = of_files(), of_files()
    for _ in range(2):
        first.sync_eliminations([row("a")])
        first.save_eliminations()
        write(second)
        assert first.get_eliminations_from_disk() == []


def test_files_that_are_missing_are_written_when_they_are_asked_for(of_files, files):
    manager = of_files()
    manager.save_eliminations()
    assert sorted(path.name for path in files.iterdir()) == ["departed_hotkeys.json", "eliminations.json"]


def test_a_damaged_file_is_refused_and_changes_nothing(of_files, files):
    manager = of_files()
    manager.sync_eliminations([row("a")])
    (files / "eliminations.json").write_text("{")
    with pytest.raises(DamagedFileError):
        manager.reload_from_disk()
    assert list(manager.eliminations) == ["a"]
    assert manager._server_proxy.health_check_rpc()["problems"] == []  # no commit failed
    with pytest.raises(DamagedFileError):
        of_files()
    assert sorted(path.name for path in files.iterdir()) == ["departed_hotkeys.json", "eliminations.json"]


def test_a_change_that_the_files_do_not_have_is_an_error(of_files, files, monkeypatch):
    manager = of_files()
    monkeypatch.setattr(
        mirror.files, "write_eliminations", lambda *_a, **_k: (_ for _ in ()).throw(StoreError("full"))
    )
    with pytest.raises(StoreError, match="full"):
        manager.add_elimination("a", row("a"))


def test_nobody_elses_file_is_set_aside(of_files, files):
    manager = of_files()
    manager.sync_eliminations([row("a")])
    (files / "eliminations.json").write_text(json.dumps({"eliminations": [row("of-a-person")]}))
    manager.add_elimination("b", row("b"))
    assert sorted(path.name for path in files.iterdir()) == ["departed_hotkeys.json", "eliminations.json"]
    assert manager.health_check()


@pytest.mark.parametrize("other", [{"imports": [__file__]}, {"files": "off"}, {"state_dir": "x"}])
def test_it_goes_with_nothing_that_has_another_state(of_files, other):
    with pytest.raises(ValueError, match="files are the state"):
        of_files(**other)


def test_a_default_departed_file_is_used_while_the_files_have_none(of_files, files, tmp_path):
    default = tmp_path / "default.json"
    default.write_text(json.dumps(["m"]))
    assert list(of_files(default_departed=default).get_departed_hotkeys()) == ["m"]
    (files / "departed_hotkeys.json").write_text(json.dumps(["own"]))
    assert list(of_files(default_departed=default).get_departed_hotkeys()) == ["own"]


@pytest.mark.parametrize("mode", [0o400, 0o1600, "640", True])
def test_permissions_that_are_none_are_refused(of_files, mode):
    with pytest.raises(ValueError, match="files_mode must be permissions"):
        of_files(files_mode=mode)


def test_in_rpc_mode_no_change_waits_for_a_file(managers, tmp_path):
    """Where what is to be written cannot be, whoever waits for it hears of it; a change does not."""
    state = tmp_path / "state"
    (state / ".eliminations.json.next" / "in the way").mkdir(parents=True)
    manager = managers(state_dir=state)
    manager.append_elimination_row("a", 0.1, "ZOMBIE")
    manager.delete_eliminations(["a"])
    manager.sync_eliminations([row("b")])
    for call in (manager.save_eliminations, lambda: manager.write_eliminations_to_disk([row("c")])):
        with pytest.raises(StoreError, match=r"eliminations\.json"):
            call()
    assert list(manager.eliminations) == ["c"]
    assert manager.get_eliminations_from_disk() == [row("c")]


def test_the_process_may_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with EliminationManager(None, None, None, running_unit_tests=True, files_dir="files") as manager:
        monkeypatch.chdir(tmp_path / "elsewhere")
        manager.add_elimination("a", row("a"))
    assert (tmp_path / "files" / "eliminations.json").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []
