"""Every command against a real server: how it ends, as a program of its own and where it is used wrongly."""

import os
import subprocess
import sys

import pytest
from commanding import A, T, environment, row, write
from waiting import PATIENCE

# ------------------------------------------------------------------ as programs of their own


def start(served, *arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "shmelim", *arguments],
        env={**os.environ, **environment(served.home), "SHMELIM_NAME": served.name},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more},
    )


def test_a_reader_who_goes_away_ends_it_quietly(run, served, tmp_path):
    file = write(tmp_path / "eliminations.json", [row(f"{number:0200}") for number in range(2000)])
    run("sync", file)
    process = start(served, "list")
    assert process.stdout.readline().startswith("0" * 199)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(PATIENCE) == 141


def test_what_an_encoding_lacks_is_escaped(run, served):
    run("add", "größer日", "--reason", "ZOMBIE", "--time-ms", str(T))
    process = subprocess.run(
        [sys.executable, "-m", "shmelim", "list"],
        env={
            **os.environ,
            **environment(served.home),
            "SHMELIM_NAME": served.name,
            "PYTHONIOENCODING": "latin-1",
        },
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(b"gr\xf6\xdfer\\u65e5\t")


# ------------------------------------------------------------------ what is asked wrongly


MISTYPED = "{0!r} is not a valid SS58 address"


@pytest.mark.parametrize("odd", [A[:-1], f"{A} "], ids=["short", "blank"])
def test_every_command_that_finds_nothing_of_a_mistyped_hotkey_says_so(run, odd):
    for words in (("get",), ("remove",), ("history",), ("debts",), ("returned",), ("slash", "list")):
        assert MISTYPED.format(odd) in run(*words, odd).stderr, words
        assert "not a valid" not in run(*words, A).stderr, words
    for words in (("slash", "re-arm"), ("slash", "resolve", "--made"), ("add", "--reason", "ZOMBIE")):
        said = run(*words, odd)
        assert said.stderr.startswith(f"note: {MISTYPED.format(odd)}\n"), words
    assert said.exit_code == 0


@pytest.mark.parametrize("wrong", [("--reason", " "), ("--reason", "ZOMBIE", "--dd", "nan")])
def test_add_refuses_what_says_nothing(run, wrong):
    found = run("add", A, *wrong)
    assert found.exit_code == 2
    assert run("check", A).exit_code == 0


@pytest.mark.parametrize(
    "wrong",
    [
        ("readers", "--interval", "nan"),
        ("top", "--interval", "nan"),
        ("demo", "--seconds", "nan"),
        ("publish", "--to", "redis://127.0.0.1", "--beat", "nan"),
        ("add", A, "--reason", "ZOMBIE", "--dd", "inf"),
        ("history", "--limit", "9" * 30),
        ("watch", "--count", "9" * 30),
    ],
)
def test_a_number_that_is_none_is_wrong_use(run, wrong):
    found = run(*wrong)
    assert found.exit_code == 2
    assert f"Invalid value for '{wrong[-2]}'" in found.stderr


@pytest.mark.parametrize("odd", ["-1", str(1 << 64)])
@pytest.mark.parametrize("words", [("watch", "--since"), ("slash", "resolve", A, "--made", "--registration")])
def test_a_number_that_no_version_and_no_registration_has_is_wrong_usage(run, words, odd):
    said = run(*words, odd)
    assert (said.exit_code, f"{odd} is" in said.stderr) == (2, True)


@pytest.mark.parametrize("odd", ["yesterday", " ", "-5", "2026-13-01", "1e400"])
@pytest.mark.parametrize(
    "words",
    [("list", "--as-of={}"), ("diff", "--", "{}"), ("rollback", "--to={}"), ("history", "--prune-before={}")],
    ids=lambda words: words[0],
)
def test_what_is_no_moment_is_wrong_usage(run, words, odd):
    said = run(*(word.format(odd) for word in words))
    assert (said.exit_code, "is not a moment" in said.stderr, "--help" in said.stderr) == (2, True, True)


def test_what_is_to_come_is_not_answered(run):
    for words in (
        ("list", "--as-of", "2999-01-01"),
        ("get", A, "--as-of", "32472144000000"),
        ("diff", "2999-01-01"),
        ("rollback", "--to", "2999-01-01", "--yes"),
        ("history", "--prune-before", "2999-01-01", "--yes"),
    ):
        said = run(*words)
        assert (said.exit_code, "is in the future: it is 20" in said.stderr) == (2, True), words


@pytest.mark.parametrize(
    "words",
    [
        ("slash", "resolve", A, "--made", "--not-made", "--yes"),
        ("slash", "resolve", A, "--yes"),
        ("verify", "backup", "--state-dir", "state"),
        ("missing", "--yes"),
        ("list", "--departed", "--as-of", "1"),
        ("serve", "--adopt-published", "--replace-published"),
        ("history", "--yes"),
    ],
    ids=" ".join,
)
def test_options_that_exclude_each_other_are_wrong_usage(run, words):
    said = run(*words)
    assert (said.exit_code, said.stdout) == (2, "")


@pytest.mark.parametrize(
    "words",
    [("verify",), ("history",), ("backup", "new"), ("publish", "--to", "redis://127.0.0.1:1/0")],
    ids=lambda words: words[0],
)
def test_a_state_directory_that_is_not_there_is_named(run, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run(*words, "--state-dir", "no/such")
    assert said.exit_code == (1 if words == ("verify",) else 4)
    assert "no store" in said.stdout + said.stderr
    assert "no/such" in said.stdout + said.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_leads_in_a_circle_is_an_error_with_a_hint(run, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for command in (
        ["export", str(loop)],
        ["sync", str(loop)],
        ["serve", "--state-dir", str(loop), "--name", "other"],
    ):
        result = run(*command)
        assert result.exit_code == 4, result.stderr
        assert "unexpected" not in result.stderr
