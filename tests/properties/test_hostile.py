"""What strangers chose (hotkeys, reasons, keys, errors) reaches terminal, log and Slack escaped, in one line."""

import contextlib
import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invoking import CliRunner
from ledger import Alerts
from reference_validator.managed import Managed
from reference_validator.scoring import NothingMovedError
from serving import row

from shmelim.cli.main import cli
from shmelim.notify import SlackNotifier
from shmelim.system.problems import Problems
from shmelim.system.text import get_logger

NASTY = [
    "\x1b[2J\x1b[31m", "\x1b]0;title\x07", "\n", "\r\n", "\r", "\t", "\0", "\x7f", "\x9b31m", "\u202e", "\u2066",
    "\u200b", "\u2028", "\ufeff", "<!channel>", "<@U0>", "<http://evil|ok>", "&lt;", "*bold*", "'; rm -rf ~ #",
    "\n2026-01-01T00:00:00.000Z error: forged", "-", "\\x1b", "%s", "{0}", "[red]", "ünïcode", "😀",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=["Cs"]), max_size=4)))
short = texts.map("".join).filter(lambda text: 0 < len(text.encode()) <= 200)
hostile = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def harmful(text, *, allowed="\n\t"):
    return sorted({char for char in text if not char.isprintable() and char not in allowed})


# ------------------------------------------------------------------ the terminal


@pytest.fixture
def run(short_path, serve):
    served = serve(runtime_base=short_path / "shmelim", durability="process")
    places = {"XDG_RUNTIME_DIR": str(short_path), "XDG_STATE_HOME": str(short_path / "state")}
    env = places | {"SHMELIM_NAME": served.name}
    with served.client() as client:
        yield SimpleNamespace(
            client=client, cli=lambda *args: CliRunner().invoke(cli, args, prog_name="shmelim", env=env)
        )


@hostile
@given(hotkeys=st.lists(short, min_size=1, max_size=3, unique=True), reason=short, key=short, words=short)
def test_no_command_shows_what_a_terminal_would_obey(run, hotkeys, reason, key, words):
    client, at = run.client, [event["id"] for event in run.client.get_history(limit=1)]
    client.clear_eliminations(force=True)
    for hotkey in hotkeys:
        record = {**row(hotkey, reason=reason), f"k{key}": {key: words}}
        client._call("eliminate_rpc", (hotkey, record, ["positions", "slash"]))
        client._call("fail_debt_rpc", (hotkey, "positions", words))
        client._call("begin_slash_rpc", (hotkey, f"token-of-{len(hotkey)}"))
        client._call("settle_debt_rpc", (hotkey, "slash", f"token-of-{len(hotkey)}", False, words))
    problem = {"name": key, "subject": hotkeys[0], "text": words, "severity": "degraded", "remedy": reason}
    client._call("report_processing_rpc", (None, 300_000.0, [problem | {"since_ms": 1_800_000_000_000}]))
    first, last = hotkeys[0], hotkeys[-1]
    for command in (
        ("list",), ("get", "--", *hotkeys), ("check", "--", first), ("history",), ("debts",), ("slash", "list"),
        ("health",), ("status",), ("diff", str(at[0] if at else 0)), ("slash", "re-arm", "--dry-run", "--", first),
        ("slash", "resolve", "--made", "--yes", "--", first), ("get", "--", words), ("get", "--as-of", words, "x"),
        ("remove", "--", last), ("--debug", words),
    ):  # fmt: skip
        result = run.cli(*command)
        assert harmful(result.stdout + result.stderr) == [], command
        if command == ("list",):
            assert len(result.stdout.splitlines()) == len(hotkeys)
        if command[0] in ("list", "get", "history", "debts", "health", "status", "diff"):
            assert run.cli(command[0], "--json", *command[1:]).stdout.isascii()


# ------------------------------------------------------------------ the log, and what people are told


@contextlib.contextmanager
def logged():
    """The log as a validator writes it, with a formatter of its own."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("LINE %(levelname)s %(message)s"))
    logging.getLogger("shmelim").addHandler(handler)
    try:
        yield stream
    finally:
        logging.getLogger("shmelim").removeHandler(handler)


def one_line_each(stream):
    lines = stream.getvalue().split("\n")[:-1]
    assert harmful("\n".join(lines), allowed="\n") == []
    assert [line for line in lines if not line.startswith(("LINE ", "  "))] == []
    return lines


@hostile
@given(hotkey=short, other=short, words=short)
def test_neither_log_nor_slack_nor_health_obeys_what_a_miner_chose(tmp_path_factory, hotkey, other, words):
    with logged() as stream, Managed("direct", "unused", tmp_path_factory.mktemp("hostile")) as managed:
        told = managed.manager.slack_notifier = Alerts()
        validator = managed.validator
        validator.probation.fail(hotkey, "PLAGIARISM", None)
        validator.probation.fail(other, "PLAGIARISM", None)
        validator.faults.fail("slash", ValueError(words), hotkey=hotkey)
        validator.faults.fail("slash", NothingMovedError(words), hotkey=other)
        validator.faults.fail("cancel", OSError(words), hotkey=hotkey)
        validator.faults.fail("liquidated", RuntimeError(words))
        managed.tick()
        problems = managed.manager._server_proxy.health_check_rpc()["problems"]
    assert len(one_line_each(stream)) > 1
    assert told.messages
    for text in [text for _, text in told.messages] + [f"{each['text']}{each['remedy']}" for each in problems]:
        assert harmful(text, allowed="") == []


@given(text=short, source=short)
def test_nothing_in_a_message_means_something_to_slack(text, source):
    bodies = []
    with pytest.MonkeyPatch.context() as patch:
        answer = SimpleNamespace(status_code=200, headers={}, body="ok")
        patch.setattr(SlackNotifier, "_post", lambda _, body: bodies.append(body) or answer)
        notifier = SlackNotifier("http://127.0.0.1/", source=source)
        notifier.send_message(text, level="error")
        assert notifier.close(10)
    [body] = bodies
    assert harmful(body, allowed="\n") == []
    assert "<" not in body
    assert ">" not in body
    assert body.count("\n") == text.count("\n"), "a name is no line of its own"


@given(text=short, remedy=short)
def test_a_problem_is_one_line_wherever_it_is_shown(text, remedy):
    problems = Problems()
    problems.report("bad", text, remedy=remedy)
    [problem] = problems.standing()
    assert harmful(str(problem), allowed="") == []


@pytest.mark.parametrize("error", [ValueError("all\nLINE INFO fine\x1b[2J"), KeyError("\u202e")])
def test_a_trace_forges_no_line_of_the_log(error):
    with logged() as stream:
        get_logger("shmelim.processing").error("it failed for %s", "a\nLINE INFO b", exc_info=error)
    first, *trace = one_line_each(stream)
    assert first == "LINE ERROR it failed for a\\nLINE INFO b"
    assert trace
    assert all(line.startswith("  ") for line in trace)


def test_every_logger_of_the_package_escapes():
    package = Path(sys.modules["shmelim"].__file__).parent
    # These say where the log of all goes.
    allowed = {"system/text.py", "cli/serve.py", "cli/streams.py"}
    plain = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if "logging.getLogger(" in line and ">>>" not in line
    }
    assert plain == allowed
