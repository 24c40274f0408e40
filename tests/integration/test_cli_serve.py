"""The life of a server on the command line: its start, its end, and everything that keeps it from starting."""

import json
import os
import pty
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from commanding import A, B, T, environment, row, runner, serving, write
from invoking import CliRunner
from waiting import PATIENCE, until

from shmelim import EliminationManagerServer, EliminationReader
from shmelim.cli.main import cli
from shmelim.errors import NotServingError
from shmelim.shm import SharedNamespace


@pytest.fixture
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def name(table_name):
    return table_name


def attempt(name, home, *arguments, **more):
    """Run a server that is not expected to start."""
    (home / "run").mkdir(mode=0o700, exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "shmelim", "serve", "--name", name, *arguments],
        env={**os.environ, **environment(home)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        **more,
    )


def refused(process, *words, code=4):
    assert process.returncode == code, process.stderr
    assert process.stdout == ""
    lines = process.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    for word in words:
        assert word in process.stderr


def test_the_ready_line_says_what_is_served_and_where(name, home):
    file = write(home / "eliminations.json", [row(A), row(B)])
    with serving(name, home, "--import", file) as server:
        line = server.said().splitlines()[-1]
        assert line.startswith(f"serving {name!r}: 2 eliminated, 0 departed; channel {home}/run/")
        assert line.endswith(f"; state {home}/state/shmelim/{name}")
        key = (home / "run" / "shmelim" / name / "key").read_bytes()
        assert key.hex() not in server.said()
        assert server.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_and_quietly(name, home, number):
    with serving(name, home) as server:
        server.client().add_elimination(A, row(A))
        assert server.end(number) == 0
        assert server.said().count("\n") == 1
    assert (home / "state" / "shmelim" / name / "eliminations.json").exists()


@pytest.mark.parametrize("umask", [0, 0o777])
def test_what_it_makes_is_its_users_and_nobody_elses_whatever_the_umask(name, home, umask):
    before = os.umask(umask)
    try:
        with serving(name, home) as server:
            server.client().add_elimination(A, row(A))
            assert server.end() == 0
    finally:
        os.umask(before)
    found = [path for place in ("run/shmelim", "state/shmelim") for path in (home / place).rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in found}
    assert {path.name for path in found} >= {"key", "lock", "eliminations.json", "shmelim.sqlite"}
    assert modes == {path: 0o700 if path.is_dir() else 0o600 for path in found}


def test_verbose_says_more(name, home):
    with serving(name, home, "-v") as server:
        assert "info: " in server.said()


def test_a_second_one_fails_at_once_and_names_the_first(name, home, tmp_path):
    with serving(name, home) as server:
        pid = str(server.process.pid)
        refused(attempt(name, home), repr(name), pid)
        refused(attempt(name, home, "--state-dir", str(tmp_path / "other")), repr(name), pid)
        process = attempt(name, home, "--json")
        assert pid in json.loads(process.stderr)["error"]
        assert EliminationReader(name).writer.alive


def test_a_second_one_says_of_a_first_that_is_stopped_what_it_is(name, home):
    with serving(name, home) as server:
        pid = server.process.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            until(lambda: EliminationReader(name).writer.hangs)
            refused(attempt(name, home), f"by process {pid}", "hangs or is stopped", f"kill -KILL {pid}")
            refused(attempt(name, home, "--runtime-dir", str(home / "other")), f"kill -KILL {pid}")
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: EliminationReader(name).writer.alive)
        assert not EliminationReader(name).writer.hangs


def test_two_names_cannot_share_a_state_directory(new_name, home, tmp_path):
    with serving(new_name(), home, "--state-dir", str(tmp_path)):
        refused(attempt(new_name(), home, "--state-dir", str(tmp_path)), "in use by another server")


def test_another_directory_is_refused_with_the_ways_out(name, home, tmp_path):
    with serving(name, home) as server:
        server.client().add_elimination(A, row(A))
        assert server.end() == 0
        other, ways = str(tmp_path / "other"), ("--adopt-published", "--replace-published")
        refused(attempt(name, home, "--state-dir", other), "1 eliminated", *ways)
        with serving(name, home, "--state-dir", other, "--adopt-published") as adopting:
            assert "1 eliminated" in adopting.said()
            assert "money_held" in adopting.said()
            assert adopting.end() == 0
    both = attempt(name, home, "--adopt-published", "--replace-published")
    refused(both, "contradict", code=2)


def test_where_names_are_remembered(name, home, tmp_path):
    with serving(name, home, "--registry", str(tmp_path / "registry")) as server:
        server.client().add_elimination(A, row(A))
        assert server.end() == 0
    assert json.loads((tmp_path / "registry" / f"{name}.json").read_text())["eliminated"] == 1
    SharedNamespace(name).remove()
    shutil.rmtree(home / "state")
    refused(attempt(name, home, "--registry", str(tmp_path / "registry")), "registry remembers 1 eliminated")
    with serving(name, home, "--registry", "off") as server:
        assert ": 0 eliminated" in server.said()


def test_a_new_store_is_refused_where_one_must_exist(name, home):
    refused(attempt(name, home, "--must-exist"), "must_exist")
    with serving(name, home) as server:
        assert server.end() == 0
    with serving(name, home, "--must-exist") as server:
        assert server.end() == 0


def test_a_port_in_use(name, home):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(attempt(name, home, "--port", str(port)), str(port), "in use")


def test_a_port_of_its_own(name, home):
    with serving(name, home, "--port", "0") as server:
        assert "; state " in server.said()
        assert "channel 127.0.0.1:" in server.said()
        run = runner(name, home)
        assert run("add", A, "--reason", "ZOMBIE").exit_code == 0
        assert json.loads(run("status", "--json").stdout)["channel"]["address"].startswith("127.0.0.1:")


@pytest.mark.parametrize("option", ["--import", "--default-departed"])
@pytest.mark.parametrize(
    ("content", "problem"), [(None, "does not exist"), ("directory", "is a directory"), ("{", "not JSON")]
)
def test_what_is_not_such_a_file_is_refused(name, home, option, content, problem):
    file = home / "given.json"
    if content == "directory":
        file.mkdir()
    elif content is not None:
        file.write_text(content)
    refused(attempt(name, home, option, str(file)), str(file), problem)
    with pytest.raises(NotServingError):
        EliminationReader(name)


def test_a_pipe_that_the_command_line_names_is_read_as_a_file(name, home):
    """As a shell makes of ``--import <(…)``: it can be opened only once."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        pipe.write(json.dumps({"eliminations": [row(A)]}))
    try:
        with serving(name, home, "--import", f"/proc/{os.getpid()}/fd/{reading}"):
            assert EliminationReader(name).get_eliminated_hotkeys() == {A}
    finally:
        os.close(reading)


def test_permissions_of_the_files_are_an_option(name, home):
    with serving(name, home, "--files-mode", "640") as server:
        with server.client() as client:
            client.save_eliminations()
            (place,) = home.glob("state/**/eliminations.json")
        assert stat.S_IMODE(place.stat().st_mode) == 0o640
    for wrong in ("rw", "400", "1640"):
        refused(attempt(name, home, "--files-mode", wrong), "640", code=2 if wrong == "rw" else 4)


def test_a_bad_row_is_set_aside_with_a_warning(name, home):
    file = write(home / "eliminations.json", [row(A), {"hotkey": B, "reason": 5}])
    with serving(name, home, "--import", file) as server:
        assert "warning: " in server.said()
        assert "'reason'" in server.said()
        reader = EliminationReader(name)
        assert reader.get_eliminated_hotkeys() == {A, B}, "no elimination is lost for a side field"
        assert reader.get_elimination(B)["reason"] == "UNKNOWN"
        assert list(home.glob("*quarantine*"))


def test_a_state_directory_that_cannot_be_used(name, home):
    file = home / "file"
    file.write_text("")
    refused(attempt(name, home, "--state-dir", str(file / "below")), str(file))


def in_a_child_without_rights(what):
    """Run a function in a forked child, as nobody where we are root, and return the two values it returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os.write(writing, json.dumps(what()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(said)


def test_a_state_directory_of_somebody_else(name):
    own = Path(tempfile.mkdtemp(prefix="shmelim-cli-"))
    forbidden = Path(tempfile.mkdtemp(prefix="shmelim-cli-"))
    try:
        (own / "run").mkdir(mode=0o700)
        forbidden.chmod(0o500)
        if os.geteuid() == 0:
            for path in (own, own / "run"):
                os.chown(path, 65534, 65534)

        def serve():
            result = runner(name, own)("serve", "--state-dir", str(forbidden / "state"))
            return result.exit_code, result.stderr

        code, said = in_a_child_without_rights(serve)
        assert code == 4
        assert str(forbidden) in said
        assert "Permission denied" in said
        assert said.count("\n") == 2
    finally:
        shutil.rmtree(own)
        shutil.rmtree(forbidden)


def test_files_that_may_not_be_read_or_written(name, home):
    place = Path(tempfile.mkdtemp(prefix="shmelim-cli-"))
    try:
        with serving(name, home):
            place.chmod(0o755)
            secret = place / "secret.json"
            secret.write_text("{}")
            secret.chmod(0)

            def ask():
                run = runner(name, home)
                return run("sync", str(secret)).stderr, run("status").stderr

            sync, status = in_a_child_without_rights(ask)
            assert str(secret) in sync
            assert "Permission denied" in sync
            assert sync.count("\n") <= 2
            if os.geteuid() == 0:
                assert "not to be trusted" in status or "may not open" in status
    finally:
        shutil.rmtree(place)


def test_a_supervisor_that_went_away_ends_nothing(name, home):
    (home / "run").mkdir(mode=0o700)
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        [sys.executable, "-m", "shmelim", "serve", "--name", name, "--ready-fd", str(writing)],
        env={**os.environ, **environment(home)},
        pass_fds=(writing,),
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert process.stderr.readline().startswith(b"serving ")
    process.terminate()
    assert process.communicate(timeout=PATIENCE)[1] == b""
    assert process.returncode == 0


def test_after_a_kill_everything_can_be_read_and_nothing_changed(name, home, tmp_path):
    with serving(name, home) as server:
        run = runner(name, home)
        run("add", A, "--reason", "ZOMBIE", "--time-ms", str(T))
        assert server.end(signal.SIGKILL) == -signal.SIGKILL

        assert run("check", A).exit_code == 1
        assert run("get", A).exit_code == 0
        assert run("list").stdout.startswith(A)
        assert json.loads(run("export", "-").stdout)["eliminations"][0]["hotkey"] == A
        for arguments in (
            ("add", B, "--reason", "ZOMBIE"),
            ("remove", A),
            ("sync", write(tmp_path / "e.json", [])),
        ):
            result = run(*arguments)
            assert result.exit_code == 3
            assert f"shmelim serve --name {name}" in result.stderr

        found = json.loads(run("history", "--json").stdout)
        assert found["source"] == "store"
        assert found["events"][0]["hotkey"] == A
        given = run("history", "--state-dir", str(home / "state" / "shmelim" / name), "--json")
        assert json.loads(given.stdout)["events"] == found["events"]

        status = json.loads(run("status", "--verify", "--json").stdout)
        assert (status["eliminated"], status["server"], status["channel"]["answers"]) == (1, None, False)
        assert status["writer"]["pid"] == server.process.pid
        until(lambda: "dead (it was serving)" in run("status").stdout, "that status calls the writer dead")


def test_after_a_stop_it_says_so_and_the_next_one_goes_on(name, home):
    run = runner(name, home)
    with serving(name, home) as server:
        run("add", A, "--reason", "ZOMBIE")
        server.end()
        assert "stopped" in run("status").stdout
        with serving(name, home):
            assert run("check", A).exit_code == 1
            assert ", alive, serving" in run("status").stdout


def test_a_damaged_store_is_a_warning_and_costs_nothing(name, home):
    run = runner(name, home)
    with serving(name, home) as server:
        run("add", A, "--reason", "ZOMBIE")
        server.end()
        store = home / "state" / "shmelim" / name / "shmelim.sqlite"
        store.write_bytes(b"x" * 4096)
        assert run("history").exit_code == 4
        with serving(name, home) as second:
            assert "damaged" in second.said()
            assert run("check", A).exit_code == 1


def test_without_a_key_nothing_can_be_changed_and_that_is_said(name, home):
    if os.geteuid() != 0:
        pytest.skip("needs another user")
    run = runner(name, home)
    with serving(name, home):
        key = home / "run" / "shmelim" / name / "key"
        key.chmod(0o666)
        result = run("add", A, "--reason", "ZOMBIE")
        assert result.exit_code == 4
        assert "key file" in result.stderr
        assert run("check", A).exit_code == 0
        assert json.loads(run("history", "--json").stdout)["source"] == "store"


def test_on_a_terminal_a_long_start_would_show_and_a_short_one_does_not(name, home):
    """The bar's code runs on a real terminal; what it shows of a start this short is nothing."""
    main, terminal = pty.openpty()
    (home / "run").mkdir(mode=0o700)
    process = subprocess.Popen(
        [sys.executable, "-m", "shmelim", "serve", "--name", name],
        env={**os.environ, **environment(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
    )
    os.close(terminal)
    seen = b""
    while b"\n" not in seen or b"serving" not in seen:
        seen += os.read(main, 4096)
    process.terminate()
    assert process.wait(PATIENCE) == 0
    os.close(main)
    assert f"serving {name!r}: 0 eliminated" in seen.decode()


# ------------------------------------------------------------------ the demo


def test_the_demo(tmp_path):
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-m", "shmelim", "demo", "--seconds", "2", "--readers", "2", "--json"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    found = json.loads(process.stdout)
    assert found["ok"]
    assert list(found["invariants"].values()) == [0] * 12
    figures = found["figures"]
    assert (figures["readers"], figures["departed_hotkeys"]) == (2, 367)
    assert [reader["errors"] for reader in found["readers"]] == [[], []]
    assert all(reader["snapshots"] > 0 and reader["checks"] > 1000 for reader in found["readers"])
    # Two parts with 40 adds, 10 removes and a sync each, the first sync, and the adds that were killed.
    assert figures["durable_adds"] >= 105
    assert figures["removes"] >= 20
    assert figures["syncs"] >= 3
    assert 0 < figures["next_server_to_its_first_change_ms"] < figures["kill_to_next_change_ms"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_broken_off_leaves_nothing(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "shmelim", "demo", "--seconds", "60", "--readers", "1"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell has its background jobs ignore SIGINT, and this run may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    announced = "shmelim-demo-*/*/server.json"
    until(lambda: list(tmp_path.glob(announced)) or process.poll() is not None, "that the demo's server runs")
    (found,) = tmp_path.glob(announced)
    name, server = found.parent.name, json.loads(found.read_text())["pid"]
    # As a terminal does it: to every process of the group.
    os.killpg(process.pid, number)
    output, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output, error.strip()) == (128 + number, "", "")
    assert list(tmp_path.iterdir()) == []
    assert not Path(f"/proc/{server}").exists()
    assert not list(Path("/dev/shm").glob(f"shmelim.{name}*"))


def test_a_demo_that_finds_something_names_it_and_ends_with_1(monkeypatch):
    from shmelim.cli.demo.scenario import Scenario

    found = {
        "invariants": {"no record was torn": 3, "no read failed": 0},
        "figures": {"checks": 5},
        "readers": [{"errors": ["get: OSError: \x1b[2J"]}],
    }
    monkeypatch.setattr(Scenario, "run", lambda _: found)
    result = CliRunner().invoke(cli, ["demo", "--json"])
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["ok"]
    result = CliRunner().invoke(cli, ["demo"])
    assert result.exit_code == 1
    assert "VIOLATED 3 times: no record was torn\nheld: no read failed\n" in result.stdout
    assert "error: get: OSError: \\x1b[2J\n" in result.stdout
    assert result.stdout.endswith("\n1 of 2 invariants held\n")


def test_a_demo_whose_server_does_not_start_is_one_line(monkeypatch, tmp_path):
    from shmelim.cli.demo import stage

    monkeypatch.setattr(stage.sys, "executable", "/bin/false")
    result = CliRunner().invoke(cli, ["demo"], env={"TMPDIR": str(tmp_path)})
    assert result.exit_code == 4
    assert "ended or hangs: it said nothing" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_before_there_is_anything_leaves_no_trace(tmp_path):
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "shmelim", "--help"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        # As from a shell, whatever the tests were started with.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == done.stdout == ""


def test_a_name_that_is_served_and_cannot_be_reached_is_not_to_be_started(name, home, monkeypatch):
    """A process that publishes by itself, or a runtime directory that this environment does not name."""
    monkeypatch.setenv("SHMELIM_RUNTIME_DIR", str(home / "elsewhere"))
    server = EliminationManagerServer(SharedNamespace(name), state_dir=home / "state", registry=None)
    try:
        found = runner(name, home / "elsewhere")("remove", "5Gx")
        assert found.exit_code == 3
        assert f"process {os.getpid()} serves" in found.stderr
        assert "--runtime-dir" in found.stderr
        assert "shmelim serve" not in found.stderr
    finally:
        server.close()
