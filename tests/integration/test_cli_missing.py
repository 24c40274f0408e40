"""``shmelim missing``, against a real server."""

import json

import pytest
from invoking import CliRunner

from shmelim.cli import output
from shmelim.cli.main import cli

EVERYBODY = [f"h{number:02}" for number in range(44)]
GONE = EVERYBODY[:11]


@pytest.fixture
def server(short_path, serve):
    """A server whose metagraph lost a quarter of all at once."""
    served = serve(runtime_base=short_path / "shmelim", durability="process")
    client = served.client()
    client.update_metagraph(EVERYBODY)
    client.update_metagraph(EVERYBODY[11:])
    client.close()
    return served


@pytest.fixture
def run(server):
    def run(*arguments, stdin=None):
        env = {"XDG_RUNTIME_DIR": str(server.runtime.parent), "SHMELIM_NAME": server.name}
        return CliRunner().invoke(cli, ["missing", *arguments], env=env, input=stdin)

    return run


def departed(server):
    client = server.client()
    try:
        return list(client.get_departed_hotkeys())
    finally:
        client.close()


def test_missing_are_listed(run, server):
    assert run().stdout.splitlines() == GONE
    found = json.loads(run("--json").stdout)
    assert (found["count"], found["missing"], found["accepted"]) == (11, GONE, [])
    assert departed(server) == []


def test_loss_is_accepted(run, server):
    result = run("--accept", "--yes")
    assert (result.exit_code, result.stdout) == (0, "departed: 11 hotkeys\n")
    assert departed(server) == GONE
    result = run("--accept", "--yes")
    assert (result.exit_code, result.stdout) == (1, "nothing was changed\n")
    assert run().stdout == ""


def test_nothing_is_accepted_unasked(run, server, monkeypatch):
    assert run("--accept").exit_code == 2
    monkeypatch.setattr(output, "can_ask", lambda: True)
    assert run("--accept", stdin="n\n").exit_code == 1
    assert departed(server) == []
    found = run("--accept", "--json", stdin="y\n")
    assert json.loads(found.stdout)["accepted"] == GONE
    assert departed(server) == GONE
