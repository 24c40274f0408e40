"""``shmelim backup``, ``verify``, ``restore``, ``forget`` and ``slash release``, with and without a server."""

import json
import os
import resource
import shutil
import signal
import stat
import tempfile
from pathlib import Path

import pytest
from crashing import Child, call, kill_self
from invoking import CliRunner
from serving import listing, row, state_in_store

from shmelim import EliminationManagerServer
from shmelim.cli import output
from shmelim.cli.main import cli
from shmelim.eliminations.starting import keeping
from shmelim.eliminations.starting.registry import Memory, Registry
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import StoreError
from shmelim.shm import SharedNamespace, TableWriter


@pytest.fixture
def place(monkeypatch):
    """Where runtime and state directories are, and the registry; a socket's path must be short."""
    base = Path(tempfile.mkdtemp(prefix="shmelim-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    monkeypatch.setenv("XDG_STATE_HOME", str(base / "state"))
    monkeypatch.setenv("SHMELIM_REGISTRY", str(base / "registry"))
    yield base
    shutil.rmtree(base)


@pytest.fixture
def server(place, serve):
    """A server with eliminations, a departure, a debt and a slash; it ends before its place is removed."""
    served = serve(runtime_base=place / "shmelim", durability="process")
    with served.client() as client:
        client.sync_eliminations([row("a"), row("b")])
        client.update_metagraph(["a", "gone"])
        client.update_metagraph(["a"])
        for hotkey in ("slashed", "owing"):
            client._call("eliminate_rpc", (hotkey, row(hotkey), ["slash"]))
        client._call("begin_slash_rpc", ("slashed", "token"))
        client._call("settle_debt_rpc", ("slashed", "slash", "token"))
    return served


@pytest.fixture
def run(server):
    def run(*arguments, stdin=None):
        env = {"SHMELIM_NAME": server.name, "COLUMNS": "200"}
        return CliRunner().invoke(cli, arguments, prog_name="shmelim", input=stdin, env=env)

    return run


def document(result, code=0):
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def spoil(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))


def what_is_in(directory):
    with Store.read_only(directory) as store:
        return store.counts(), store.debts(), store.slashes(), store.events(limit=None)


def name_registry(place, server):
    return Registry(place / "registry", server.name)


# ------------------------------------------------------------------ backup and verify


def test_a_backup_while_serving_has_everything(run, server, place):
    target = place / "backups" / "one"
    found = document(run("backup", str(target), "--json"))
    assert (found["eliminated"], found["departed"], found["backup"]) == (4, 1, str(target))
    assert what_is_in(target) == what_is_in(server.state_dir)
    with Store.read_only(target) as copied, Store.read_only(server.state_dir) as store:
        assert (copied.store_id, copied.commit_number) == (store.store_id, store.commit_number)
        assert (found["store_id"], found["commit"]) == (store.store_id.hex(), store.commit_number)
    assert sorted(path.name for path in target.iterdir()) == ["backup.json", FILE_NAME]
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert not list(target.parent.glob(".*"))
    with server.client() as client:
        assert client.add_elimination("later", row("later"))
    assert document(run("verify", str(target), "--json"))["whole"] is True


def test_a_backup_without_a_server(run, server, place):
    server.stop()
    assert run("backup", str(place / "one")).stdout.startswith("backed up: commit")
    assert what_is_in(place / "one") == what_is_in(server.state_dir)


def test_a_backup_never_takes_the_place_of_anything(run, server, place):
    (place / "one").mkdir()
    assert run("backup", str(place / "one")).exit_code == 0
    before = listing(place / "one")
    result = run("backup", str(place / "one"))
    assert result.exit_code == 4
    assert "exists already" in result.stderr
    assert listing(place / "one") == before
    result = run("backup", str(place / "two"), "--state-dir", str(place))
    assert result.exit_code == 4
    assert not (place / "two").exists()
    with server.client() as client:
        assert len(client) == 4


def test_a_backup_onto_a_file_system_of_its_own_says_to_name_a_directory_in_it(run, server, place, monkeypatch):
    """As a volume of a container is, whose name nothing can take."""
    volume = place / "volume"
    volume.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)
    result = run("backup", str(volume))
    assert result.exit_code == 4
    assert "name a directory in it" in result.stderr
    assert list(volume.iterdir()) == []


def test_a_backup_is_made_in_no_place_that_somebody_else_prepared(run, server, place):
    (place / "elsewhere").mkdir()
    (place / ".one.part").symlink_to(place / "elsewhere")
    assert run("backup", str(place / "one")).exit_code == 0
    assert not (place / "one").is_symlink()
    assert not list((place / "elsewhere").iterdir())


def test_two_backups_to_one_place_at_once_are_one_and_a_refusal(server, place, monkeypatch):
    describe = keeping._describe

    def describe_after_another(*arguments):
        monkeypatch.setattr(keeping, "_describe", describe)
        keeping.back_up(server.state_dir, place / "one")
        return describe(*arguments)

    monkeypatch.setattr(keeping, "_describe", describe_after_another)
    with pytest.raises(StoreError) as refused:
        keeping.back_up(server.state_dir, place / "one")
    assert str(place / "one") in str(refused.value)
    assert [finding.problem for finding in keeping.check_backup(place / "one")] == [None, None]
    assert not list(place.glob(".one.*"))


def test_what_a_killed_backup_left_is_removed_by_the_next(server, place, monkeypatch):
    monkeypatch.setattr(keeping, "_describe", lambda *_: kill_self())
    with Child(lambda: keeping.back_up(server.state_dir, place / "one")) as child:
        assert child.wait() == -signal.SIGKILL
    monkeypatch.undo()
    assert list(place.glob(".one.*"))
    keeping.back_up(server.state_dir, place / "one")
    assert not list(place.glob(".one.*"))


def test_a_backup_goes_where_a_link_leads(run, server, place):
    (place / "disk").mkdir()
    (place / "one").symlink_to(place / "disk")
    assert run("backup", str(place / "one")).exit_code == 0
    assert document(run("verify", str(place / "one"), "--json"))["whole"] is True
    assert (place / "disk" / FILE_NAME).exists()


@pytest.mark.parametrize("what", [FILE_NAME, "backup.json"])
def test_a_pipe_in_a_backup_is_not_waited_for(run, server, place, what):
    run("backup", str(place / "one"))
    (place / "one" / what).unlink()
    os.mkfifo(place / "one" / what)
    found = document(run("verify", str(place / "one"), "--json"), 1)
    assert "not a file" in str(found["findings"])
    assert run("restore", str(place / "one"), "--state-dir", str(place / "other"), "--yes").exit_code == 4


@pytest.mark.parametrize("harm", ["store", "manifest", "no manifest", "another store", "a log"])
def test_a_backup_that_is_not_whole_is_found_out_and_not_restored(run, server, place, harm):
    target = place / "one"
    run("backup", str(target))
    if harm == "store":
        spoil(target / FILE_NAME, 5000)
    elif harm == "manifest":
        (target / "backup.json").write_text("{")
    elif harm == "no manifest":
        (target / "backup.json").unlink()
    elif harm == "a log":
        with server.client() as client:
            client.add_elimination("later", row("later"))
        shutil.copy(server.state_dir / f"{FILE_NAME}-wal", target)
    else:
        with Store.open(target) as store, store.transaction():
            store.set_meta("by", "hand")
    found = document(run("verify", str(target), "--json"), 1)
    assert found["whole"] is False
    assert [finding for finding in found["findings"] if finding["problem"]]
    server.stop()
    before = listing(server.state_dir)
    assert run("restore", str(target), "--yes").exit_code == 4
    assert listing(server.state_dir) == before


def test_verify_looks_at_all_that_there_is(run, server):
    with server.client() as client:
        client.save_eliminations()
    found = document(run("verify", "--json"))
    assert [finding["what"] for finding in found["findings"]] == ["table", "store", "file", "file", "registry"]
    assert found["whole"] is True
    server.stop()
    assert run("verify").exit_code == 0


@pytest.mark.parametrize("harm", ["store", "file", "table", "registry", "older", "another table"])
def test_verify_says_what_is_wrong(run, server, place, harm):
    with server.client() as client:
        client.save_eliminations()
    server.stop()
    if harm == "store":
        with (server.state_dir / FILE_NAME).open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * 4096)
    elif harm == "file":
        (server.state_dir / "eliminations.json").write_text('{"eliminations": [17]}')
    elif harm == "table":
        segment = next(Path("/dev/shm").glob(f"shmelim.{server.name}.[0-9]*"))
        content = segment.read_bytes()
        spoil(segment, content.index(b"elimination_initiated_time_ms"))
        spoil(segment, content.rindex(b"elimination_initiated_time_ms"))
    elif harm == "another table":
        SharedNamespace(server.name).remove()
        options = {"registry": None, "replace_published": True}
        EliminationManagerServer(SharedNamespace(server.name), place / "other", **options).close()
        harm = "table"
    elif harm == "registry":
        name_registry(place, server).remember(Memory("ab" * 16, "/elsewhere", 1, 1, 1, 1))
    else:
        memory = name_registry(place, server).recall()
        name_registry(place, server).remember(
            Memory(memory.store_id, memory.directory, memory.commit + 1, 1, 1, 1)
        )
        harm = "registry"
    found = document(run("verify", "--json"), 1)
    wrong = {finding["what"] for finding in found["findings"] if finding["problem"]}
    assert wrong == ({"store", "registry"} if harm == "store" and "registry" in wrong else {harm})


def test_verify_knows_a_copy_that_went_its_own_way(run, server, place):
    server.stop()
    copy = shutil.copytree(server.state_dir, place / "copy")
    for directory, registry in (server.state_dir, place / "registry"), (copy, None):
        namespace = SharedNamespace(server.name) if registry else None
        with EliminationManagerServer(namespace, directory, registry=registry) as served:
            served.add_elimination_rpc(directory.name, row(directory.name))
    assert run("verify").exit_code == 0
    found = document(run("verify", "--json", "--state-dir", copy), 1)
    told = {finding["what"]: finding["problem"] for finding in found["findings"] if finding["problem"]}
    assert told.keys() == {"table", "registry"}
    assert all("another copy of the store" in problem for problem in told.values())


def test_verify_where_there_is_nothing(run):
    assert run("verify", "--name", "nobody").exit_code == 3


# ------------------------------------------------------------------ restore


def test_a_restored_state_is_served_and_holds_money(run, server, place):
    target = place / "one"
    run("backup", str(target))
    backed_up = state_in_store(target)
    shutil.rmtree(target)
    run("backup", str(target))
    with server.client() as client:
        client.remove_elimination("a")
        client.add_elimination("later", row("later"))
        client.save_eliminations()
    server.stop()
    with Store.read_only(server.state_dir) as store:
        store_id, last = store.store_id, store.commit_number
    found = document(run("restore", str(target), "--yes", "--json"))
    assert found["restored"] is True
    assert found["commit"] > last
    assert Path(found["kept"]).name.startswith(f"{FILE_NAME}.replaced-")
    assert state_in_store(server.state_dir) == backed_up
    with server.start().client() as client:
        # The newer files are not taken for a person's work.
        assert client.get_eliminated_hotkeys() == {"a", "b", "slashed", "owing"}
        with Store.read_only(server.state_dir) as store:
            assert store.store_id == store_id
        (held,) = [problem for problem in client.health_check()["problems"] if problem["name"] == "money_held"]
        assert "restored" in held["text"]
        assert "slash release" in held["remedy"]
        assert client._call("begin_slash_rpc", ("owing", "another")) is False
        assert document(run("slash", "release", "--yes", "--json"))["released"] is True
        assert client._call("begin_slash_rpc", ("owing", "another")) is True
        assert not [problem for problem in client.health_check()["problems"] if problem["name"] == "money_held"]
        assert run("slash", "release", "--yes").exit_code == 1
        actions = [event["action"] for event in client.get_history()]
        assert "restore" in actions
        assert "hold" in actions
        assert "release" in actions


def test_a_backup_does_not_become_the_state_itself(run, server, place, monkeypatch):
    run("backup", str(place / "one"))
    server.stop()
    monkeypatch.chdir(place)
    result = run("restore", "one", "--state-dir", f"{place}/./one", "--yes")
    assert result.exit_code == 4
    assert "must not become the state" in result.stderr
    assert run("verify", "one").exit_code == 0


def test_the_history_names_a_backup_so_that_it_is_found_from_anywhere(run, server, place, monkeypatch):
    run("backup", str(place / "one"))
    server.stop()
    monkeypatch.chdir(place)
    assert run("restore", "one", "--yes").exit_code == 0
    notes = [event["note"] for event in document(run("history", "--json"))["events"]]
    assert f"restored from the backup {place / 'one'}" in notes


def test_restore_asks_and_is_refused_while_it_is_served(run, server, place, monkeypatch):
    run("backup", str(place / "one"))
    result = run("restore", str(place / "one"), "--yes")
    assert result.exit_code == 4
    assert "already served" in result.stderr
    assert "stop that server first" in result.stderr
    server.stop()
    before = listing(server.state_dir)
    assert run("restore", str(place / "one")).exit_code == 2
    monkeypatch.setattr(output, "can_ask", lambda: True)
    assert run("restore", str(place / "one"), stdin="n\n").exit_code == 1
    assert listing(server.state_dir) == before
    assert run("restore", str(place / "one"), stdin="y\n").exit_code == 0


def test_restore_into_another_directory_of_a_served_name_is_refused(run, server, place):
    with EliminationManagerServer(state_dir=place / "foreign", durability="process") as foreign:
        foreign.sync_eliminations_rpc([row("x")])
    run("backup", str(place / "one"), "--state-dir", str(place / "foreign"))
    result = run("restore", str(place / "one"), "--state-dir", str(place / "other"), "--yes")
    assert result.exit_code == 4
    assert "already served" in result.stderr
    assert not (place / "other").exists()
    # The registry knows the state that is served, and not the other.
    server.kill()
    with server.start().client() as client:
        assert len(client) == 4


def test_restore_into_the_directory_of_another_name_that_is_served_is_refused(run, server, place, new_name):
    run("backup", str(place / "one"))
    result = run(
        "restore", str(place / "one"), "--name", new_name(), "--state-dir", str(server.state_dir), "--yes"
    )
    assert result.exit_code == 4
    assert "in use by another server" in result.stderr


def test_a_disk_that_is_full_is_the_backups_own(tmp_path):
    state = tmp_path / "state"
    with EliminationManagerServer(None, state) as server:
        server.sync_eliminations_rpc([row(f"h{n}") | {"note": "x" * 300} for n in range(1000)])

    def back_up():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(StoreError) as caught:
            keeping.back_up(state, tmp_path / "volume" / "one")
        return str(caught.value)

    assert f"cannot be copied to {tmp_path / 'volume'}" in call(back_up)
    assert list((tmp_path / "volume").iterdir()) == []


def test_a_restore_that_no_registry_can_remember_says_that_it_is_done(run, server, place):
    run("backup", str(place / "one"))
    server.stop()
    (place / "file").touch()
    refused = run("restore", str(place / "one"), "--yes", "--registry", str(place / "file"))
    assert refused.exit_code == 4
    assert f"{server.state_dir} is restored, but the registry" in refused.stderr


def test_restore_takes_no_links_place(run, server, place):
    """A store that a link leads to another disk would stay there, and the state be on this one."""
    run("backup", str(place / "one"))
    server.stop()
    there = place / "volume.sqlite"
    (server.state_dir / FILE_NAME).rename(there)
    (server.state_dir / FILE_NAME).symlink_to(there)
    result = run("restore", str(place / "one"), "--yes")
    assert result.exit_code == 4
    assert f"is a link to {there}" in result.stderr
    assert "remove the link" in result.stderr
    assert (server.state_dir / FILE_NAME).is_symlink()
    (server.state_dir / FILE_NAME).unlink()
    assert run("restore", str(place / "one"), "--yes").exit_code == 0
    assert there.exists()


def test_restore_where_nothing_is_left(run, server, place):
    run("backup", str(place / "one"))
    server.stop()
    with Store.read_only(server.state_dir) as store:
        last = store.commit_number
    shutil.rmtree(server.state_dir)
    SharedNamespace(server.name).remove()
    found = document(run("restore", str(place / "one"), "--yes", "--json"))
    assert found["kept"] is None
    # The registry has outlived it.
    assert found["commit"] > last
    with server.start().client() as client:
        assert len(client) == 4


# ------------------------------------------------------------------ forget


def test_a_forgotten_name_leaves_its_state_and_nothing_else(run, server, place):
    result = run("forget", "--yes")
    assert result.exit_code == 1
    assert "stop it first" in result.stderr
    server.stop()
    before = listing(server.state_dir)
    assert run("forget").exit_code == 2
    found = document(run("forget", "--yes", "--json"))
    assert (found["forgotten"], found["state_dir"]) == (True, str(server.state_dir))
    assert listing(server.state_dir) == before
    assert not list(Path("/dev/shm").glob(f"shmelim.{server.name}*"))
    assert name_registry(place, server).recall() is None
    assert not (place / "shmelim" / server.name).exists()


def test_forget_names_no_state_that_is_not_there(run, server, place, new_name):
    run("backup", str(place / "one"))
    name = new_name()
    two = str(place / "two")
    assert run("restore", str(place / "one"), "--name", name, "--state-dir", two, "--yes").exit_code == 0
    assert document(run("forget", "--name", name, "--yes", "--json"))["state_dir"] == two
    with TableWriter(SharedNamespace(name), source="redis://engine") as writer:
        writer.load([])
    assert document(run("forget", "--name", name, "--yes", "--json"))["state_dir"] is None


def test_a_name_of_which_there_is_nothing_is_not_forgotten(run, server, place):
    server.stop()
    assert run("forget", "--yes").exit_code == 0
    for words in (["--yes"], ["--yes", "--registry", "off"]):
        found = run("forget", *words)
        assert (found.exit_code, found.stdout) == (3, "")
        assert f"nothing is known of the name {server.name!r}" in found.stderr
    # Each of them alone is to be forgotten.
    (place / "shmelim" / server.name).mkdir()
    assert run("forget", "--yes").exit_code == 0
    Path("/dev/shm", f"shmelim.{server.name}.lock").touch(0o600)
    assert run("forget", "--yes").exit_code == 0
    name_registry(place, server).path.write_text("{}")
    assert run("forget", "--yes").exit_code == 0
    assert run("forget", "--yes").exit_code == 3


def test_the_name_of_a_server_that_was_killed_just_now_is_forgotten(run, server):
    server.kill()
    assert run("forget", "--yes").exit_code == 0


def test_forget_finds_the_runtime_directory_from_another_environment(run, server, place, monkeypatch):
    server.stop()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place / "elsewhere"))
    monkeypatch.delenv("SHMELIM_RUNTIME_DIR", raising=False)
    assert run("forget", "--yes").exit_code == 0
    assert not (place / "shmelim" / server.name).exists()


def test_forget_removes_nothing_that_no_server_made_and_says_what_stays(run, server, place):
    server.stop()
    runtime = place / "shmelim" / server.name
    (runtime / "a-persons.sqlite").write_text("theirs")
    found = run("forget", "--yes", "--json")
    assert (found.exit_code, found.stdout) == (4, "")
    said = json.loads(found.stderr)["error"]
    assert f"is forgotten, but its runtime directory {runtime} stays: Directory not empty" in said
    assert [path.name for path in runtime.iterdir()] == ["a-persons.sqlite"]
    assert not list(Path("/dev/shm").glob(f"shmelim.{server.name}*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_forget_says_whose_a_runtime_directory_is_that_stays(table_name):
    home = Path(tempfile.mkdtemp(prefix="shmelim-"))
    home.chmod(0o755)
    (home / table_name).mkdir()
    os.seteuid(65534)
    try:
        words = ["forget", "--yes", "--name", table_name, "--registry", "off", "--runtime-dir", str(home)]
        found = CliRunner().invoke(cli, words)
    finally:
        os.seteuid(0)
    assert found.exit_code == 4
    assert "Permission denied; this process runs as user 65534" in " ".join(found.stderr.split())
    shutil.rmtree(home)
    SharedNamespace(table_name).remove()
