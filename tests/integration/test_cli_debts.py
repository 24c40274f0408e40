"""``shmelim debts``, ``slash resolve`` and what ``status`` says of both, against a real server and without one."""

import json
import os
import signal
from functools import partial

import pytest
from crashing import call
from invoking import CliRunner
from serving import row

from shmelim import EliminationClient
from shmelim.cli import output
from shmelim.cli.main import cli
from shmelim.eliminations.debts.states import new_attempt
from shmelim.watch import asking

A = "5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs"
B = "5C5GANtAKokcPvJBGyLcFgY5fYuQaXC3MpVt75codZbLLZrZ"


@pytest.fixture
def server(short_path, serve):
    """A server with two eliminations, of which A's slash is in doubt."""
    served = serve(runtime_base=short_path / "shmelim", durability="process")
    owe(served, A)
    owe(served, B)
    change(served, "fail_debt_rpc", B, "positions", "no price for BTC/USD")
    doubt(served, A)
    return served


def change(served, method, *arguments, **options):
    client = served.client()
    try:
        return client._call(method, arguments, options)
    finally:
        client.close()


def owe(served, hotkey):
    assert change(served, "eliminate_rpc", hotkey, row(hotkey), ["limit_orders", "positions", "slash"]) == "added"


def doubt(served, hotkey, token=None):
    token = token or new_attempt()
    assert change(served, "begin_slash_rpc", hotkey, token)
    assert change(served, "fail_debt_rpc", hotkey, "slash", "the chain did not answer", token, in_doubt=True)


@pytest.fixture
def run(server):
    def run(*arguments, stdin=None):
        env = {
            "XDG_RUNTIME_DIR": str(server.runtime.parent),
            "XDG_STATE_HOME": str(server.runtime.parent / "state"),
            "SHMELIM_NAME": server.name,
            "COLUMNS": "200",
        }
        return CliRunner().invoke(cli, arguments, prog_name="shmelim", input=stdin, env=env)

    return run


@pytest.fixture
def at_a_terminal(monkeypatch):
    monkeypatch.setattr(output, "can_ask", lambda: True)


def document(result, code=0):
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def slash_of(run, hotkey):
    found = document(run("debts", hotkey, "--json"))["debts"]
    return next((debt["state"] for debt in found if debt["kind"] == "slash"), None)


# ------------------------------------------------------------------ debts


def test_debts_are_listed(run):
    lines = [line.split("\t") for line in run("debts").stdout.splitlines()]
    assert [(*line[:2], line[3], *line[7:]) for line in lines] == [
        (A, "limit_orders", "owed", "0", "-"),
        (A, "positions", "owed", "0", "-"),
        (A, "slash", "in_doubt", "1", "the chain did not answer"),
        (B, "limit_orders", "owed", "0", "-"),
        (B, "positions", "owed", "1", "no price for BTC/USD"),
        (B, "slash", "owed", "0", "-"),
    ]
    assert run("debts", B).stdout.splitlines() == ["\t".join(line) for line in lines[3:]]
    found = document(run("debts", "--json"))
    assert (found["source"], found["count"]) == ("server", 6)
    assert found["debts"][2]["in_doubt_since_ms"] > 0
    assert run("debts", "unknown").stdout == ""


def test_what_a_server_that_hangs_does_not_answer_is_read_from_the_store(run, server, monkeypatch):
    commands = (("debts",), ("history", A), ("slash", "list"))
    listed = [run(*command).stdout for command in commands]
    monkeypatch.setattr(asking, "EliminationClient", partial(EliminationClient, timeout=0.3))
    os.kill(server.pid, signal.SIGSTOP)
    try:
        assert [run(*command).stdout for command in commands] == listed
        assert document(run("debts", "--json"))["source"] == "store"
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_what_a_server_that_hangs_does_not_answer_the_page_reads_from_the_store(server, monkeypatch):
    testing = pytest.importorskip("starlette.testclient")
    from shmelim.watch import web

    monkeypatch.setattr(asking, "EliminationClient", partial(EliminationClient, timeout=0.3))
    os.kill(server.pid, signal.SIGSTOP)
    try:
        page = testing.TestClient(web.make_app(server.name), "http://localhost").get(f"/miner?hotkey={A}").text
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert "the server cannot be asked" in page
    assert "in_doubt" in page
    assert "Nothing is on record" not in page


def test_debts_without_a_server(run, server):
    listed = run("debts").stdout
    server.kill()
    assert run("debts").stdout == listed
    assert document(run("debts", "--json"))["source"] == "store"
    result = run("debts", "--name", "nobody")
    assert (result.exit_code, result.stdout) == (3, "")


def test_what_an_error_says_reaches_no_terminal_as_a_command(run, server):
    change(server, "fail_debt_rpc", B, "positions", "\x1b[2J")
    assert "\x1b" not in run("debts").stdout


# ------------------------------------------------------------------ status


@pytest.mark.parametrize("alive", [True, False])
def test_status_tells_of_debts_and_doubts(run, server, alive):
    if not alive:
        server.kill()
    result = run("status", "--json")
    # Degraded; or the server does not answer, or nobody serves any more, which a heartbeat shows after a while.
    assert result.exit_code in ({1} if alive else {2, 3})
    found = json.loads(result.stdout)
    assert (found["debts"], found["slashes_in_doubt"]) == (6, [A])
    assert (found["server"] is not None) is alive
    lines = dict(line.split("\t", 1) for line in run("status").stdout.splitlines())
    assert lines["debts"] == "6"
    assert lines["slashes in doubt"].startswith(f"{A}: settle with `shmelim slash resolve HOTKEY --made`")
    if alive:
        assert found["server"]["problems"][0]["text"].endswith(f": {A}")
        assert lines["problems"].startswith("slashes_in_doubt, degraded since 20")
        assert lines["problems"].endswith("settle them with `shmelim slash resolve`)")


def test_status_when_nothing_is_in_doubt(run, server):
    assert run("slash", "resolve", A, "--made", "--yes").exit_code == 0
    lines = dict(line.split("\t", 1) for line in run("status").stdout.splitlines())
    assert (lines["debts"], lines["slashes in doubt"], lines["problems"]) == ("5", "none", "none")


def test_status_when_nobody_knows(run, server):
    server.kill()
    (server.state_dir / "shmelim.sqlite").unlink()
    found = json.loads(run("status", "--json").stdout)
    assert (found["debts"], found["slashes_in_doubt"]) == (None, None)
    lines = dict(line.split("\t", 1) for line in run("status").stdout.splitlines())
    assert lines["debts"] == "-"
    assert "slashes in doubt" not in lines


# ------------------------------------------------------------------ slash resolve


def test_resolve_as_made(run, server):
    result = run("slash", "resolve", A, "--made", "--yes")
    assert (result.exit_code, result.stdout) == (0, f"resolved: {A}: the slash was made\n")
    assert slash_of(run, A) is None
    (event,) = [e for e in document(run("history", A, "--json"))["events"] if e["action"] == "resolve"]
    assert event["note"].endswith(": made")
    assert event["uid"] is not None


def test_resolve_as_not_made(run):
    result = run("slash", "resolve", A, "--not-made", "--yes")
    assert (result.exit_code, result.stdout) == (
        0,
        f"resolved: {A}: the slash was not made; it is owed again\n",
    )
    assert slash_of(run, A) == "owed"


def test_resolve_of_an_elimination_that_was_taken_back(run):
    assert run("remove", A).exit_code == 0
    result = run("slash", "resolve", A, "--not-made", "--yes")
    assert result.stdout == f"resolved: {A}: the slash was not made; it rests, as he is not eliminated\n"
    assert slash_of(run, A) == "owed"


def test_resolve_as_json(run):
    found = document(run("slash", "resolve", A, "--made", "--yes", "--json"))
    debt = found.pop("debt")
    assert (debt["hotkey"], debt["state"]) == (A, "in_doubt")
    assert found == {"name": found["name"], "hotkey": A, "made": True, "resolved": True}


@pytest.mark.usefixtures("at_a_terminal")
def test_resolve_asks_first(run):
    result = run("slash", "resolve", A, "--not-made", stdin="n\n")
    assert result.exit_code == 1
    assert result.stdout.endswith("nothing was changed\n")  # an older click's runner shows the answer before it
    assert "NOT made" in result.stderr
    assert "the chain did not answer" in result.stderr
    assert slash_of(run, A) == "in_doubt"
    result = run("slash", "resolve", A, "--made", "--json", stdin="no\n")
    assert (result.exit_code, json.loads(result.stdout.splitlines()[-1])["resolved"]) == (1, False)
    assert slash_of(run, A) == "in_doubt"
    assert run("slash", "resolve", A, "--made", stdin="y\n").exit_code == 0
    assert slash_of(run, A) is None


@pytest.mark.usefixtures("at_a_terminal")
def test_no_answer_is_no_yes(run):
    assert run("slash", "resolve", A, "--not-made", stdin="").exit_code == 130
    assert slash_of(run, A) == "in_doubt"


def test_without_a_terminal_nobody_is_asked(run):
    result = run("slash", "resolve", A, "--made", stdin="y\n")
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert slash_of(run, A) == "in_doubt"


def test_resolve_must_say_which(run):
    result = run("slash", "resolve", A, "--yes")
    assert result.exit_code == 2
    assert "--made or --not-made" in result.stderr
    assert "shmelim slash resolve --help" in result.stderr


def test_where_none_is_in_doubt(run):
    for hotkey, problem in (("unknown", "no slash of unknown is in doubt"), (B, "is owed, not in doubt")):
        result = run("slash", "resolve", hotkey, "--made", "--yes")
        assert (result.exit_code, result.stdout) == (1, "")
        assert problem in result.stderr
        assert "hint: " in result.stderr
    assert run("slash", "resolve", B, "--made", "--yes", "--json").stderr.startswith('{"error": ')
    assert slash_of(run, B) == "owed"


def test_where_a_process_is_at_it(run, server):
    token = new_attempt()
    change(server, "begin_slash_rpc", B, token)
    for answer in ("--made", "--not-made"):
        result = run("slash", "resolve", B, answer, "--yes")
        assert result.exit_code == 1
        assert f"process {token.partition('-')[0]} has begun the slash" in result.stderr
    assert slash_of(run, B) == "attempting"


def test_where_somebody_was_quicker(run, server, monkeypatch):
    def resolve(client, hotkey, made, *_cause):
        client._call("resolve_slash_rpc", (hotkey, made))
        return client._call("resolve_slash_rpc", (hotkey, made))

    monkeypatch.setattr(EliminationClient, "resolve_slash", resolve)
    result = run("slash", "resolve", A, "--made", "--yes")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no slash of" in result.stderr


def test_resolve_without_a_server(run, server):
    server.kill()
    result = run("slash", "resolve", A, "--made", "--yes")
    assert result.exit_code == 3


# ------------------------------------------------------------------ slash list


def test_slashes_that_were_made_are_listed(run, server):
    assert run("slash", "list").stdout == ""
    assert run("slash", "resolve", A, "--made", "--yes").exit_code == 0
    assert change(server, "begin_slash_rpc", B, "t")
    assert change(server, "settle_debt_rpc", B, "slash", "t")
    listed = run("slash", "list").stdout
    lines = [line.split("\t") for line in listed.splitlines()]
    assert [(line[0], line[3], *line[5:7]) for line in lines] == [
        (A, "made", "2023-11-14 22:13:20", "hand"),
        (B, "made", "2023-11-14 22:13:20", "contract"),
    ]
    assert run("slash", "list", B).stdout == listed.splitlines(keepends=True)[1]
    found = document(run("slash", "list", "--json"))
    assert (found["source"], found["count"]) == ("server", 2)
    assert found["slashes"][0]["made_ms"] > 0
    server.kill()
    assert run("slash", "list").stdout == listed
    assert document(run("slash", "list", "--json")) == found | {"source": "store"}
    assert run("slash", "list", "--name", "nobody").exit_code == 3


# ------------------------------------------------------------------ slash re-arm, release, and causes


def test_rearm_says_what_it_will_do_and_does_it(run):
    assert run("slash", "re-arm", A, "--yes").exit_code == 1
    run("slash", "resolve", A, "--made", "--yes")
    looked = run("slash", "re-arm", A, "--dry-run")
    assert (looked.exit_code, looked.stdout) == (0, "nothing was changed\n")
    assert "made " in looked.stderr
    assert "for any rule" in looked.stderr
    assert run("slash", "list").stdout != ""
    assert run("slash", "re-arm", A, "--rule", "drawdown", "--yes").exit_code == 1
    found = document(run("slash", "re-arm", A, "--yes", "--json"))
    assert [each["hotkey"] for each in found.pop("slashes")] == [A]
    assert found == {"name": found["name"], "hotkey": A, "rearmed": True}
    assert run("slash", "list").stdout == ""


def test_release_says_what_would_be_made_and_releases_all(run, server):
    assert run("slash", "release", "--yes").exit_code == 1
    client = server.client()
    assert client._call("begin_slash_rpc", (B, "t"), {"most_per_hour": 0}) is False
    looked = run("slash", "release", "--dry-run")
    assert (looked.exit_code, looked.stdout) == (0, "nothing was changed\n")
    assert "slashes within an hour" in looked.stderr
    assert f"would be made: {B} (any rule), share the contract's own" in looked.stderr
    assert client.get_money_held() is not None
    found = document(run("slash", "release", "--yes", "--json"))
    assert found["released"] is True
    assert client._call("begin_slash_rpc", (B, "t"), {"most_per_hour": 0}) is True
    client.close()


def test_of_several_in_doubt_one_must_be_named(run, server):
    hotkey = "twice"
    for rule in ("drawdown", "perf_ledger"):
        change(server, "eliminate_rpc", hotkey, row(hotkey), ["slash"], None, rule, 0.25)
        doubt(server, hotkey)
        change(server, "remove_elimination_rpc", hotkey)
    refused = run("slash", "resolve", hotkey, "--made", "--yes")
    assert refused.exit_code == 1
    assert "2 slashes of twice are in doubt: drawdown; perf_ledger" in refused.stderr
    looked = run("slash", "resolve", hotkey, "--made", "--rule", "drawdown", "--dry-run")
    assert (looked.exit_code, looked.stdout) == (0, "nothing was changed\n")
    assert "share       0.25" in looked.stderr
    assert run("slash", "resolve", hotkey, "--made", "--rule", "drawdown", "--yes").exit_code == 0
    (made,) = document(run("slash", "list", hotkey, "--json"))["slashes"]
    assert made["rule"] == "drawdown"
    assert slash_of(run, hotkey) == "in_doubt"


# ------------------------------------------------------------------ the client


def test_the_client_lists_and_resolves(server):
    client = server.client()
    try:
        assert [debt["kind"] for debt in client.get_debts(A)] == ["limit_orders", "positions", "slash"]
        assert len(client.get_debts()) == 6
        assert client.resolve_slash(A, made=True) is True
        assert [slash["hotkey"] for slash in client.get_slashes()] == [A]
        assert client.get_slashes(B) == []
        assert client.resolve_slash(A, made=True) is False
        with pytest.raises(TypeError, match="made"):
            client.resolve_slash(A, made="no")
    finally:
        client.close()


def test_debts_survive_the_death_of_the_server(server):
    client = server.client(connect_wait=10.0)
    try:
        assert client._call("begin_slash_rpc", (B, "token"))
        before = client.get_debts()
        server.kill()
        server.start()
        assert client.get_debts() == before
        assert client._call("begin_slash_rpc", (B, "another")) is False
        assert client._call("get_replacements_rpc") == 0
    finally:
        client.close()


def test_one_of_several_processes_gets_the_slash(server):
    def try_it():
        client = server.client()
        try:
            return client._call("begin_slash_rpc", (B, new_attempt()))
        finally:
            client.close()

    assert sorted(call(try_it) for _ in range(3)) == [False, False, True]
