"""Every kind of error has its line, its hint and its exit code."""

import json
import subprocess
import sys

import click
import pytest
from invoking import CliRunner

from shmelim.cli import failure
from shmelim.cli.main import cli
from shmelim.cli.options import DEFAULT_NAME, NAME_VARIABLE
from shmelim.errors import KeyFileError, NotServingError, OutcomeUnknownError, ShmelimError


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (click.UsageError("no"), failure.USAGE, "no"),
        (NotServingError("nobody"), failure.NOT_SERVING, "nobody"),
        (failure.RefusedError("bad row"), failure.NO, "bad row"),
        (failure.FileProblemError("no file"), failure.ERROR, "no file"),
        (KeyFileError("no key"), failure.ERROR, "no key"),
        (OutcomeUnknownError("who knows"), failure.ERROR, "who knows"),
        (OSError(28, "No space left on device", "/x"), failure.ERROR, "/x: No space left on device"),
        (ValueError("odd"), failure.ERROR, "odd"),
        (KeyError("surprise"), failure.ERROR, "unexpected KeyError: 'surprise'"),
    ],
)
def test_exit_codes(error, code, message):
    found = failure.describe(error, "mainnet")
    assert (found.message, found.exit_code) == (message, code)


def test_who_is_not_served_is_told_how_to_start():
    assert failure.describe(NotServingError("x"), "mainnet").hint == "start it with `shmelim serve --name mainnet`"


def test_an_error_is_one_line_and_a_hint_and_obeyed_by_no_terminal(capsys):
    failure.show(failure.Failure("two\nlines \x1b[2J", "do\nthis", 4), as_json=False)
    assert capsys.readouterr().err == "error: two lines \\x1b[2J\nhint: do this\n"


def test_an_error_as_json_has_the_same_keys_always(capsys):
    failure.show(failure.Failure("a", None, 4), as_json=True)
    assert json.loads(capsys.readouterr().err) == {"error": "a", "hint": None}


@pytest.fixture
def run(monkeypatch):
    monkeypatch.delenv(NAME_VARIABLE, raising=False)
    return lambda *arguments, **more: CliRunner(**more).invoke(cli, arguments, prog_name="shmelim")


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("check",),
        ("check", ""),
        ("check", "x" * 256),
        ("check", "--nope", "a"),
        ("get",),
        ("list", "--departed", "--reason", "ZOMBIE"),
        ("add", "a"),
        ("add", "a", "--reason", "ZOMBIE", "--dd", "much"),
        ("add", "a", "--reason", "ZOMBIE", "--time-ms", "-1"),
        ("remove",),
        ("remove", "a", "b"),
        ("sync",),
        ("export",),
        ("history", "--limit", "0"),
        ("status", "--name", "Bad!"),
        ("--name", "seventeen-letters", "status"),
        ("status", "--owner", "-1"),
        ("serve", "--port", "65536"),
        ("serve", "--durability", "none"),
        ("serve", "--files", "never"),
        ("serve", "--ready-fd", "777"),
        ("demo", "--seconds", "0"),
        ("demo", "--readers", "0"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_usage(run, arguments, as_json):
    result = run(*arguments[:1], *arguments[1:], *(["--json"] if as_json and arguments[0] != "--name" else []))
    assert result.exit_code == failure.USAGE
    assert result.stdout == ""
    if "--json" in arguments or (as_json and arguments[0] != "--name"):
        assert set(json.loads(result.stderr)) == {"error", "hint"}
    else:
        first, second = result.stderr.splitlines()
        assert first.startswith("error: ")
        assert second.startswith("hint: see `shmelim")


def test_a_bad_name_in_the_environment_is_named(run):
    result = run("status", env={NAME_VARIABLE: "Not A Name"})
    assert result.exit_code == failure.USAGE
    assert NAME_VARIABLE in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("status", "--verify"),
        ("check", "a"),
        ("get", "a"),
        ("list",),
        ("list", "--departed"),
        ("add", "a", "--reason", "ZOMBIE"),
        ("remove", "a"),
        ("export", "-"),
        ("history",),
    ],
    ids=" ".join,
)
def test_nothing_served_is_its_own_exit_code(run, tmp_path, new_name, arguments):
    tmp_path.chmod(0o700)
    env = {NAME_VARIABLE: new_name(), "XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    result = run(*arguments, env=env)
    assert result.exit_code == failure.NOT_SERVING
    assert "shmelim serve --name" in result.stderr
    assert json.loads(run(*arguments, "--json", env=env).stderr)["error"]


def test_sync_of_nobody(run, tmp_path, new_name):
    file = tmp_path / "eliminations.json"
    file.write_text('{"eliminations": []}')
    assert run("sync", str(file), env={NAME_VARIABLE: new_name()}).exit_code == failure.NOT_SERVING


def test_a_name_before_or_after_the_command_and_from_the_environment(run, new_name):
    first, second = new_name(), new_name()
    assert repr(first) in run("--name", first, "status").stderr
    assert repr(first) in run("status", "--name", first).stderr
    assert repr(second) in run("--name", first, "status", "--name", second).stderr
    assert repr(second) in run("status", env={NAME_VARIABLE: second}).stderr
    assert repr(first) in run("status", "--name", first, env={NAME_VARIABLE: second}).stderr


def test_debug_shows_the_traceback_and_nothing_else_does(run, new_name, monkeypatch):
    assert "Traceback" not in run("status", "--name", new_name()).stderr
    assert "Traceback" in run("status", "--debug", "--name", new_name()).stderr
    assert "Traceback" in run("status", "--name", new_name(), env={"SHMELIM_DEBUG": "1"}).stderr


def test_every_command_has_a_help_with_its_options(run):
    listed = run("--help").stdout
    assert DEFAULT_NAME in listed
    for name in cli.list_commands(None):
        assert f"\n  {name} " in listed
        result = run(name, "--help")
        assert result.exit_code == 0
        assert f"Usage: shmelim {name} " in result.stdout
        assert "--name" in result.stdout
        assert "--json" in result.stdout
        assert "For example:\n    shmelim " in result.stdout, name


def test_without_a_command_it_shows_the_help(run):
    for arguments in ((), ("slash",)):
        result = run(*arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == run(*arguments, "--help").stdout


@pytest.mark.parametrize(
    ("words", "offered"),
    [("shmelim de", ["debts", "demo"]), ("shmelim slash r", ["re-arm", "release", "resolve"])],
)
def test_a_shell_can_complete_commands(run, words, offered):
    env = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_SHMELIM_COMPLETE": "bash_complete"}
    result = run(env=env)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.partition(",")[2] for line in result.stdout.splitlines()] == offered


def test_help_and_version_load_no_command_and_nothing_that_takes_long():
    code = (
        "import sys; from shmelim.cli.main import cli\n"
        "try: cli(['--help'], prog_name='shmelim')\n"
        "except SystemExit: pass\n"
        "print(*(name for name in sys.modules if name.startswith('shmelim.cli')), 'rich' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    *loaded, rich = said.splitlines()[-1].split()
    assert set(loaded) == {
        "shmelim.cli",
        *(f"shmelim.cli.{name}" for name in ("main", "failure", "options", "output", "streams")),
    }
    assert rich == "False"


def test_the_version(run):
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("shmelim")


class _ShmelimSubclassError(ShmelimError):
    pass


def test_an_error_of_the_package_that_nobody_listed():
    assert failure.describe(_ShmelimSubclassError("x", hint="y"), "n") == failure.Failure("x", "y", failure.ERROR)
