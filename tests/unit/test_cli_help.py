"""Every command, those of groups too, says what each option is for; shells can complete them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import click
import pytest
from invoking import CliRunner

from shmelim.cli.main import cli


def commands(group=cli, path=()):
    """Yield the words and the definition of every command, those of groups in groups too."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands())


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_says_what_a_command_does_and_what_each_option_is_for(path):
    command = ALL[path]
    shown = CliRunner().invoke(cli, [*path, "--help"])
    assert shown.exit_code == 0, shown.output
    summary = command.get_short_help_str(limit=200)
    assert summary.endswith("."), summary
    assert " ".join(command.help.replace("\b", "").split())[:40] in " ".join(shown.stdout.split())
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{option.opts} says nothing"
            assert option.opts[0] in shown.stdout
    assert "None" not in shown.stdout
    assert not re.search(r"\d{19}", shown.stdout), "no bound that only the machine has"


@pytest.mark.parametrize(
    "words", ["add a --reason", "add a --bogus", "add", "fleet hold --at", "slash resolve --rule"]
)
def test_wrong_usage_of_a_command_names_the_help_of_that_command(words):
    refused = CliRunner().invoke(cli, words.split(), prog_name="shmelim")
    command = (
        "fleet hold" if words.startswith("fleet") else "slash resolve" if words.startswith("slash") else "add"
    )
    assert refused.exit_code == 2
    assert f"see `shmelim {command} --help`" in refused.stderr


def test_commands_run_where_python_keeps_no_docstrings(table_name):
    words = [sys.executable, "-OO", "-m", "shmelim"]
    for arguments, code in ((["--help"], 0), (["fleet", "--help"], 0), (["status", "--name", table_name], 3)):
        done = subprocess.run([*words, *arguments], capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


def complete(instruction, **environment):
    return subprocess.run(
        [sys.executable, "-c", "from shmelim.cli.main import main; main()"],
        env={**os.environ, "_SHMELIM_COMPLETE": instruction, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_is_given_a_script_that_it_understands(shell):
    script = complete(f"{shell}_source")
    assert f"_SHMELIM_COMPLETE={shell}_complete" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=60)


def test_completion_knows_options():
    offered = complete("bash_complete", COMP_WORDS="shmelim rollback --dry", COMP_CWORD="2")
    assert offered.splitlines() == ["plain,--dry-run"]
