"""Every command whose stdout or stderr takes nothing: closed, a full disk, a reader who went away."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest
from invoking import CliRunner
from serving import row
from waiting import PATIENCE, until

from shmelim.cli import streams
from shmelim.cli.main import cli

A = "5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs"
# Each in a child of one interpreter that has loaded everything; it ends as any Python process.
DRIVER = """
import json, os, sys
kind, wanted = sys.argv[1], json.loads(sys.stdin.read())
import shmelim.cli.main, shmelim.__main__
for group in shmelim.cli.main._COMMANDS:
    shmelim.cli.main.cli.get_command(None, group)
for number, words in enumerate(wanted):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(f"said-{number}", os.O_WRONLY | os.O_CREAT), 2)
        if kind == "closed":
            os.close(1)
            sys.stdout = None
        elif kind == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        elif kind == "stderr":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
            os.dup2(os.open(f"out-{number}", os.O_WRONLY | os.O_CREAT), 1)
        else:
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, 1)
            os.close(writing)
        sys.argv = ["shmelim", *words]
        shmelim.__main__.main()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
ENDS = {"closed": 4, "full": 4, "gone": 141}


def paths(group, *above):
    """Yield the names of every command, groups included."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        yield (*above, name)
        if isinstance(command, click.Group):
            yield from paths(command, *above, name)


# What each prints something by; those that are not here go on until they are stopped, or need more than a server.
USES = {
    "status": [], "health": [], "doctor": [], "metrics": [], "check": [A], "get": [A], "list": [],
    "add": [A, "--reason", "ZOMBIE"], "remove": ["nobody"], "sync": ["rows.json"], "debts": ["--json"],
    "slash list": ["--json"], "ack": [], "missing": ["--json"], "returned": [A, "--yes"], "history": [],
    "watch": ["--since", "{version}", "--count", "1"], "readers": ["--interval", "0", "--json"],
    "top": ["--interval", "0.1", "--json"], "names": [], "diff": ["1"], "rollback": ["--to", "1", "--dry-run"],
    "backup": ["new-{kind}"], "verify": [],
    "restore": ["backup", "--name", "nobody-has-it", "--state-dir", "other", "--yes"],
    "forget": ["--name", "nobody-has-it", "--yes"], "export": ["-"],
}  # fmt: skip


def drive(kind, place, served, commands):
    """Run commands whose stdout or stderr is of a kind; return the exit code of each, and what it said."""
    environment = {"XDG_RUNTIME_DIR": str(served.runtime), "SHMELIM_RUNTIME_DIR": str(served.runtime)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, kind],
        input=json.dumps(commands),
        cwd=place,
        env=os.environ | environment | {"SHMELIM_NAME": served.name, "XDG_STATE_HOME": str(place / "home")},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
        check=True,
    )
    codes = [int(line) for line in done.stdout.split()]
    return list(zip(codes, ((place / f"said-{n}").read_text() for n in range(len(commands))), strict=True))


@pytest.fixture
def place(tmp_path, serve):
    """A directory with what commands are given, and a server with two eliminations."""
    served = serve(durability="process")
    with served.client() as client:
        version = client.version
        client.sync_eliminations([row(A), row("other")])
    (tmp_path / "rows.json").write_text(json.dumps({"eliminations": [row(A), row("other")]}))
    command = [sys.executable, "-m", "shmelim", "backup", "--state-dir", str(served.state_dir), "backup"]
    subprocess.run([*command, "--name", served.name], cwd=tmp_path, check=True, stdout=subprocess.PIPE)
    return tmp_path, served, version


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("kind", ENDS)
def test_output_that_is_lost_ends_every_command_in_order(place, kind):
    directory, served, version = place
    assert {" ".join(path) for path in paths(cli)} >= USES.keys()
    as_json = ["--json"] if kind == "full" else []
    commands = [[], ["--version"], ["--help"], ["slash"], ["serve", "--help"]]
    for name, words in USES.items():
        commands.append([*name.split(), *(word.format(version=version, kind=kind) for word in words), *as_json])
    for words, (code, said) in zip(commands, drive(kind, directory, served, commands), strict=True):
        assert code == ENDS[kind], (words, code, said)
        if kind == "gone":
            assert "error" not in said, (words, said)
        elif "--json" in words:
            assert "could not be written" in json.loads(said)["error"], (words, said)
        else:
            error, hint = [line for line in said.splitlines() if line.startswith(("error: ", "hint: "))]
            assert error.startswith("error: the output could not be written: "), (words, said)
            assert "is done" in hint, (words, said)
        assert "Traceback" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_what_stderr_does_not_take_changes_no_exit_code_and_no_output(place):
    directory, served, _ = place
    commands = {
        ("nonsense",): 2,
        ("check", "no-address", "--json"): 0,
        ("get", "nobody"): 1,
        ("add", "one", "--reason", "A_NEW_ONE"): 0,
        ("status", "--name", "nobody-has-it"): 3,
        ("verify", "no-such-directory"): 1,
        ("returned", A, "--yes"): 1,
    }
    found = drive("stderr", directory, served, [list(words) for words in commands])
    assert [code for code, _ in found] == list(commands.values())
    assert json.loads((directory / "out-1").read_text())["eliminated"] == 0
    assert (directory / "out-3").read_text() == "added: one\n"


def test_a_pipe_that_does_not_block_gets_all_of_it():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    text = "x" * 1_000_000
    with os.fdopen(reading) as pipe, streams._Stdout(writing, "w") as raw, ThreadPoolExecutor(1) as pool:
        got = pool.submit(pipe.read, len(text))
        rest = text.encode()
        while rest:
            rest = rest[raw.write(rest) :]
        assert got.result() == text


def test_what_is_logged_is_a_line_or_part_of_the_one_document(tmp_path):
    """As where the extension was not compiled, of which every command that reads has a warning."""
    before = "import logging, sys, shmelim.shm; from shmelim.__main__ import main\n"
    before += "import shmelim.cli.status as s; s.EliminationReader = lambda name: "
    before += "(logging.getLogger('shmelim.shm').warning('reads are slow'), 1 / 0)\nmain()"

    def status(*words):
        command = [sys.executable, "-c", before, "status", "--name", "nobody-has-it", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert (done.returncode, done.stdout) == (4, "")
        return done.stderr

    assert json.loads(status("--json"))["warnings"] == ["reads are slow"]
    assert status().startswith("warning: reads are slow\nerror: unexpected ZeroDivisionError")


def test_the_log_of_a_server_is_json_from_its_first_line(tmp_path, table_name):
    code = "import logging; logging.getLogger('shmelim.shm').warning('reads are slow')\n"
    code = "import shmelim.cli.options as o; before = o.NAME.convert\ndef convert(*a):\n    " + code
    code += "    return before(*a)\no.NAME.convert = convert\nfrom shmelim.__main__ import main; main()"
    words = ["serve", "--name", table_name, "--must-exist", "--state-dir", "none"]

    def said(*how):
        command = [sys.executable, "-c", code, *words, *how]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=PATIENCE)
        return done.stderr.splitlines()

    first, *rest = said("--log-format", "json")
    assert json.loads(first)["message"] == "reads are slow"
    assert rest[0].startswith("error: ")
    first, error = map(json.loads, said("--json"))
    assert (first["message"], "has no store" in error["error"]) == ("reads are slow", True)


def test_whoever_wants_json_gets_one_document_on_stderr_too(place):
    _, served, _ = place
    for words in (
        ["add", "one", "--reason", "A_NEW_ONE"],
        ["check", "no-address"],
        ["returned", A, "--yes"],
        ["status", "--debug"],
    ):
        nobody = CliRunner().invoke(cli, [*words, "--json", "--name", "nobody-has-it"])
        assert json.loads(nobody.stderr)["error"], words
        assert nobody.stdout == ""
    assert "Traceback" in json.loads(nobody.stderr)["trace"]
    found = CliRunner().invoke(cli, ["check", "no-address", A, "--json", "--name", served.name])
    served.kill()
    until(lambda: not served.reader().writer.alive)
    dead = CliRunner().invoke(cli, ["check", "no-address", "--json", "--name", served.name])
    assert (found.stderr, dead.stderr) == ("", "")
    assert [json.loads(each.stdout)["writer_alive"] for each in (found, dead)] == [True, False]
    assert [each["ss58"] for each in json.loads(found.stdout)["hotkeys"]] == [False, True]
