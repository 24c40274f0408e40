"""Alerts over real HTTP on loopback: to a webhook that is well, slow, full, broken, silent or not there."""

import contextlib
import gc
import http.server
import json
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import pytest
from ledger import Clock, Ledger, held_elsewhere, kill
from reference_validator.managed import Managed
from waiting import PATIENCE, until

from shmelim.errors import MissingExtraError
from shmelim.notify import SlackNotifier
from shmelim.notify.problems import ProblemMessages
from shmelim.system.problems import Problems

SECRET = "T0SECRET/B0SECRET/x0SECRET"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


class Slack:
    """A webhook that keeps what it gets, and answers as it is told: (status, headers), or a function."""

    def __init__(self):
        slack = self
        self.answers = []  # for the next requests; then 200
        self.texts = []  # of all requests
        self.accepted = []  # of those that were answered with 200
        self.go_on = threading.Event()  # ends every delay

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path.endswith(SECRET)
                slack.texts.append(body["text"])
                answer = slack.answers.pop(0) if slack.answers else (200, {})
                if callable(answer):
                    answer = answer(self)
                if answer is None:
                    return
                status, headers = answer
                if status == 200:
                    slack.accepted.append(body["text"])
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<!doctype html><title>Sign in</title>")

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/{SECRET}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def hang(self, _handler):
        self.go_on.wait(PATIENCE)

    def close(self):
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def slack():
    slack = Slack()
    yield slack
    slack.close()


@pytest.fixture
def make(slack):
    made = []

    def make(url=None, **options):
        options = {"interval": 0.0, "retry_delay": 0.001, "timeout": PATIENCE} | options
        made.append(SlackNotifier(url or slack.url, **options))
        return made[-1]

    yield make
    slack.go_on.set()
    for notifier in made:
        notifier.close(0)


def test_levels(slack, make):
    notifier = make()
    for level in ("info", "success", "warning", "error", "fantasy"):
        assert notifier.send_message(f"this is {level}", level=level)
    assert notifier.send_message("this is nothing")
    assert notifier.flush(PATIENCE)
    signs = [text.split(" ")[0] for text in slack.accepted]
    assert signs == ["\u2139\ufe0f", "✅", "⚠️", "❌", "\u2139\ufe0f", "\u2139\ufe0f"]
    assert [text.split(" ", 1)[1] for text in slack.accepted][3] == "this is error"
    assert notifier.stats() == {"sent": 6, "held_back": 0, "dropped": 0, "failed": 0, "queued": 0}


def test_the_source_and_slacks_control_characters(slack, make):
    notifier = make(source="validator-1")
    notifier.send_message("<!channel> a & b > c", "error")
    notifier.send_message("x" * 100_000)
    assert notifier.flush(PATIENCE)
    assert slack.accepted[0] == "❌ [validator-1] &lt;!channel&gt; a &amp; b &gt; c"
    assert len(slack.accepted[1]) < 4000


def test_repetitions_are_held_back_and_counted(slack, make, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("shmelim.notify.slack.monotonic", clock)
    notifier = make(repeat_after=60_000)
    assert notifier.send_message("down", "error")
    for _ in range(7):
        assert not notifier.send_message("down", "error")
    assert notifier.send_message("down", "warning")  # another level is another message
    assert notifier.send_message("up", "success")
    clock.now += 59_999
    assert not notifier.send_message("down", "error")
    clock.now += 1
    assert notifier.send_message("down", "error")
    assert not notifier.send_message("down", "error")
    clock.now += 60_000
    assert notifier.send_message("down", "error")
    clock.now += 60_000
    assert notifier.send_message("down", "error")
    assert notifier.flush(PATIENCE)
    assert [text for text in slack.accepted if text.startswith("❌")] == [
        "❌ down",
        "❌ down (repeated 8 times meanwhile)",
        "❌ down (repeated 1 times meanwhile)",
        "❌ down",
    ]
    assert notifier.stats()["held_back"] == 9


def test_a_bounded_number_of_messages_is_remembered(slack, make):
    notifier = make(max_queued=1000, repeat_after=1000)
    assert all(notifier.send_message(str(number)) for number in range(300))
    assert not notifier.send_message("299")
    assert notifier.send_message("0")  # so long ago that it is forgotten


def test_the_rate_is_bounded_after_a_burst(slack, make):
    notifier = make(burst=3, interval=3600.0)
    for number in range(10):
        assert notifier.send_message(f"message {number}")
    until(lambda: (notifier.stats()["sent"], notifier.stats()["queued"]) == (3, 7))
    assert not notifier.flush(0)
    assert len(slack.accepted) == 3
    assert notifier.close(PATIENCE)  # at the end nothing waits for its turn any more
    assert len(slack.accepted) == 10


def test_the_rate_recovers_with_time(slack, make):
    notifier = make(burst=1, interval=0.03)
    began = time.monotonic()
    for number in range(5):
        notifier.send_message(f"message {number}")
    assert notifier.flush(PATIENCE)
    assert time.monotonic() - began >= 4 * 0.03
    assert slack.accepted == [f"\u2139\ufe0f message {number}" for number in range(5)]


def test_a_full_queue_drops_and_says_so(slack, make):
    slack.answers = [lambda _: (slack.go_on.wait(PATIENCE), (200, {}))[1]]
    notifier = make(max_queued=2)
    assert notifier.send_message("first")
    until(lambda: slack.texts)
    assert notifier.send_message("second")
    for _ in range(3):
        assert not notifier.send_message("lost")
    assert notifier.stats()["dropped"] == 3
    slack.go_on.set()
    assert notifier.flush(PATIENCE)
    assert notifier.send_message("lost")  # nobody has seen it, so it is no repetition
    assert notifier.flush(PATIENCE)
    assert slack.accepted == [
        "\u2139\ufe0f first",
        "\u2139\ufe0f second",
        "⚠️ 3 messages were dropped: too many waited",
        "\u2139\ufe0f lost",
    ]


@pytest.mark.parametrize(
    "refusal", [(429, {"Retry-After": "0.01"}), (429, {"Retry-After": "soon"}), (500, {}), (503, {})]
)
def test_what_is_refused_for_now_is_tried_again(slack, make, refusal):
    slack.answers = [refusal, refusal]
    notifier = make()
    notifier.send_message("important")
    notifier.send_message("the next one")
    assert notifier.flush(PATIENCE)
    assert len(slack.texts) == 4
    assert slack.accepted == ["\u2139\ufe0f important", "\u2139\ufe0f the next one"]


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_page_to_which_a_redirection_led_is_no_delivery(slack, make, status):
    slack.answers = [(status, {"Location": slack.url})]
    notifier = make(max_tries=1)
    notifier.send_message("hello")
    assert notifier.flush(PATIENCE)
    assert notifier.stats() == {"sent": 0, "held_back": 0, "dropped": 0, "failed": 1, "queued": 0}
    assert len(slack.texts) == 1


def test_retry_after_is_obeyed(slack, make):
    slack.answers = [(429, {"Retry-After": "3600"})]
    notifier = make()
    notifier.send_message("important")
    until(lambda: slack.texts)
    assert not notifier.flush(0.05)
    assert len(slack.texts) == 1
    assert notifier.close(PATIENCE)
    assert slack.accepted == ["\u2139\ufe0f important"]


def test_what_is_refused_for_ever_is_not_tried_again(slack, make, caplog):
    slack.answers = [(404, {}), (403, {})]
    notifier = make()
    notifier.send_message("one")
    notifier.send_message("two")
    notifier.send_message("three")
    assert notifier.flush(PATIENCE)
    assert slack.texts == ["\u2139\ufe0f one", "\u2139\ufe0f two", "\u2139\ufe0f three"]
    assert notifier.stats()["failed"] == 2
    assert "not delivered (HTTP status 404): \u2139\ufe0f one" in caplog.text


def test_tries_have_an_end(slack, make, caplog):
    slack.answers = [(500, {})] * 3
    notifier = make(max_tries=3)
    notifier.send_message("one")
    notifier.send_message("two")
    assert notifier.flush(PATIENCE)
    assert slack.accepted == ["\u2139\ufe0f two"]
    assert len(slack.texts) == 4


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_refused_connection(make, caplog):
    notifier = make(f"http://127.0.0.1:{free_port()}/services/{SECRET}", max_tries=2)
    assert notifier.send_message("hello")
    until(lambda: notifier.stats()["failed"] == 1)
    assert "Connection refused" in caplog.text


def test_a_connection_that_breaks(slack, make):
    slack.answers = [lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)]
    notifier = make()
    notifier.send_message("hello")
    assert notifier.flush(PATIENCE)
    assert slack.accepted == ["\u2139\ufe0f hello"]


def test_a_hanging_slack_holds_up_nobody(slack, make):
    slack.answers = [slack.hang] * 4
    notifier = make(max_queued=50)
    longest = 0.0
    for number in range(200):
        began = time.perf_counter()
        notifier.send_message(f"message {number}")
        longest = max(longest, time.perf_counter() - began)
    assert notifier.stats()["dropped"] == 150
    began = time.monotonic()
    assert not notifier.flush(0.05)
    assert not notifier.close(0.05)
    assert (
        time.monotonic() - began < PATIENCE / 2
    )  # a call that waited for the hanging answer would take twice that
    assert longest < PATIENCE / 2


def test_an_answer_that_takes_too_long_is_a_failed_try(slack, make):
    slack.answers = [slack.hang]
    notifier = make(timeout=0.05)
    notifier.send_message("hello")
    assert notifier.flush(PATIENCE)
    assert slack.accepted == ["\u2139\ufe0f hello"]


class Unprintable:
    def __str__(self):
        raise RuntimeError("no text")


def test_it_never_raises(slack, make, monkeypatch):
    notifier = make()
    assert notifier.send_message(Unprintable()) is False
    assert notifier.send_message(None, level=None)
    assert notifier.send_message("\ud800 lone", level=["unhashable"]) is False
    assert notifier.send_message("\ud800 lone")
    assert notifier.flush(PATIENCE)
    with monkeypatch.context() as patch:
        patch.setattr(
            threading.Thread, "start", lambda _self: (_ for _ in ()).throw(RuntimeError("no more threads"))
        )
        assert notifier.send_message("while there are no threads") is False
    assert notifier.send_message("while there are no threads"), "it was not taken, so it is no repetition"
    assert notifier.flush(PATIENCE)
    assert slack.accepted[-2:] == [
        "\u2139\ufe0f while there are no threads",
        "⚠️ 1 messages were dropped: too many waited",
    ]
    notifier.close()
    assert notifier.send_message("after the end") is False


def test_the_url_is_shown_nowhere(slack, make, caplog):
    caplog.set_level(logging.DEBUG)
    slack.answers = [(404, {}), (500, {}), lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)]
    notifier = make(max_tries=2)
    for number in range(4):
        notifier.send_message(f"message {number}")
    assert notifier.flush(PATIENCE)
    refused = make(f"http://127.0.0.1:{free_port()}/services/{SECRET}", max_tries=1)
    refused.send_message("hello")
    refused.flush(PATIENCE)
    assert "not delivered" in caplog.text
    shown = caplog.text + repr(notifier) + str(notifier)
    assert "SECRET" not in shown


@pytest.mark.parametrize(
    "url", ["", "ftp://host/SECRET", "host/SECRET", "http://", "http://ho st/SECRET", "http://[/SECRET"]
)
def test_what_is_not_a_url_is_refused(url):
    with pytest.raises(ValueError, match="not an http") as caught:
        SlackNotifier(url)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("figures", [{"burst": 0}, {"max_queued": 0}, {"max_tries": 0}, {"interval": -1}])
def test_impossible_figures(figures):
    with pytest.raises(ValueError, match=f"^{next(iter(figures))} must be [01] or more"):
        SlackNotifier("http://host/", **figures)


def test_a_forked_child_sends_its_own_messages_and_none_of_the_parents(slack, make):
    slack.answers = [lambda _: (slack.go_on.wait(PATIENCE), (200, {}))[1]]
    notifier = make()
    notifier.send_message("of the parent")
    notifier.send_message("of the parent, too")
    until(lambda: slack.texts)
    with held_elsewhere(notifier._changed):  # a lock that is held at the fork is free in the child
        pid = os.fork()
        if pid == 0:
            signal.alarm(2 * int(PATIENCE))  # ends a child that waits for ever
            done = notifier.send_message("of the child") and notifier.flush(PATIENCE)
            os._exit(0 if done else 1)
    assert os.waitpid(pid, 0)[1] == 0
    slack.go_on.set()
    assert notifier.flush(PATIENCE)
    assert sorted(slack.accepted) == [
        "\u2139\ufe0f of the child",
        "\u2139\ufe0f of the parent",
        "\u2139\ufe0f of the parent, too",
    ]


def send_and_return(notifier):
    notifier.send_message("from the process")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_of_multiprocessing_sends_before_it_ends(slack, make, method):
    notifier = make(exit_timeout=PATIENCE)
    process = multiprocessing.get_context(method).Process(target=send_and_return, args=(notifier,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert slack.accepted == ["\u2139\ufe0f from the process"]


def test_it_is_pickled_to_a_starting_process_only(make):
    with pytest.raises(RuntimeError):
        pickle.dumps(make())


SCRIPT = """
import sys
from shmelim.notify import SlackNotifier
notifier = SlackNotifier(sys.stdin.readline().strip(), exit_timeout=float(sys.argv[1]))
notifier.send_message("last words", level="warning")
"""


def run_script(url, exit_timeout):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(exit_timeout)], stdin=subprocess.PIPE, text=True)
    process.stdin.write(url + "\n")
    process.stdin.close()
    try:
        return process.wait(PATIENCE)
    finally:
        process.send_signal(signal.SIGKILL)


def test_last_words_leave_before_the_process_does(slack):
    assert run_script(slack.url, PATIENCE) == 0
    assert slack.accepted == ["⚠️ last words"]


def test_a_hanging_slack_does_not_keep_a_process_from_ending(slack):
    slack.answers = [slack.hang]
    assert run_script(slack.url, 0.1) == 0
    assert slack.accepted == []


def test_it_leaves_nothing_behind(slack, make):
    notifier = SlackNotifier(slack.url)
    notifier.send_message("hello")
    assert notifier.flush(PATIENCE)
    until(lambda: not any(thread.name == "shmelim-background" for thread in threading.enumerate()))
    gone = weakref.ref(notifier)
    del notifier
    gc.collect()
    assert gone() is None


def test_no_outage_of_a_service_is_held_back_as_a_repetition(slack, make, tmp_path):
    """Two quick ones, and a third of the object that comes after."""
    notifier, told = make(), 0
    for outages in (2, 1):
        with Ledger(
            tmp_path,
            enable_health_check=True,
            health_check_interval_s=0,
            max_consecutive_failures=1,
            slack_notifier=notifier,
        ) as service:
            for number in range(told + 1, told + outages + 1):
                kill(service)
                until(service.health_check)
                until(lambda: sum(notifier.stats()[what] for what in ("sent", "queued")) == 2 * number)  # noqa: B023
            told += outages
    assert notifier.flush(PATIENCE)
    assert notifier.stats()["held_back"] == 0
    assert [text.split()[0] for text in slack.accepted] == ["❌", "✅"] * 3


# ---------------------------------------------------------------------- the outbox


DOWN = (503, {})

KILLED = """
import os, signal, sys
from shmelim.notify import SlackNotifier
notifier = SlackNotifier(sys.argv[1], outbox=sys.argv[2])
for number in range(3):
    assert notifier.send_message(f"alert {number}", level="error")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_had_to_say_is_delivered_by_the_next_in_order(slack, make, tmp_path):
    nobody = f"http://127.0.0.1:{free_port()}/services/{SECRET}"
    command = [sys.executable, "-c", KILLED, nobody, str(tmp_path / "outbox")]
    assert subprocess.run(command, timeout=PATIENCE, check=False).returncode == -signal.SIGKILL
    notifier = make(outbox=tmp_path / "outbox")
    assert notifier.send_message("alert 3", level="error")
    assert notifier.flush(PATIENCE)
    assert slack.accepted == [f"❌ alert {number}" for number in range(4)]
    assert list((tmp_path / "outbox").glob("*.msg")) == []


def test_a_message_is_tried_until_it_is_delivered_and_meanwhile_that_is_said(slack, make, tmp_path):
    slack.answers = [DOWN] * 12
    notifier = make(outbox=tmp_path / "outbox", retry_delay=0.0)
    began = time.time_ns() // 1_000_000
    slack.answers.insert(6, lambda _: (slack.go_on.wait(PATIENCE), DOWN)[1])
    notifier.send_message("first")
    notifier.send_message("second")
    until(lambda: len(slack.texts) == 7)
    waiting, since_ms, why = notifier.undelivered()
    assert (waiting, why) == (2, "HTTP status 503")
    assert began <= since_ms <= time.time_ns() // 1_000_000
    slack.go_on.set()
    assert notifier.flush(PATIENCE)
    assert slack.accepted == ["\u2139\ufe0f first", "\u2139\ufe0f second"]
    assert notifier.undelivered() is None
    assert notifier.stats() == {"sent": 2, "held_back": 0, "dropped": 0, "failed": 0, "queued": 0}


def test_without_an_outbox_a_message_is_tried_until_it_is_delivered_too(slack, make):
    slack.answers = [DOWN] * 12
    notifier = make(retry_delay=0.0)
    notifier.send_message("first")
    assert notifier.flush(PATIENCE)
    assert slack.accepted == ["\u2139\ufe0f first"]


def test_what_waits_in_an_outbox_is_bounded_private_and_whole(slack, make, tmp_path):
    slack.answers = [slack.hang] * 2
    notifier = make(outbox=tmp_path / "outbox", max_queued=2)
    assert [notifier.send_message(text) for text in ("one", "two\nlines", "three")] == [True, True, False]
    assert notifier.stats()["dropped"] == 1
    files = list((tmp_path / "outbox").iterdir())
    assert (tmp_path / "outbox").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert SECRET not in "".join(path.read_text() for path in files)


def test_a_webhook_that_was_revoked_is_waited_for_and_a_message_that_slack_refuses_is_not(slack, make, tmp_path):
    slack.answers = [(404, {}), (410, {}), (400, {})]
    notifier = make(outbox=tmp_path / "outbox", retry_delay=0.0)
    notifier.send_message("odd")
    notifier.send_message("good")
    assert notifier.flush(PATIENCE)
    assert slack.accepted == ["\u2139\ufe0f good"]
    assert notifier.stats()["failed"] == 1


def test_several_processes_share_an_outbox_and_each_message_leaves_once(slack, make, tmp_path):
    notifier = make(outbox=tmp_path / "outbox", exit_timeout=PATIENCE)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=send_many, args=(notifier, name)) for name in "abc"]
    for process in processes:
        process.start()
    send_many(notifier, "d")
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert notifier.flush(PATIENCE)
    assert sorted(slack.accepted) == sorted(
        f"\u2139\ufe0f {name}{number}" for name in "abcd" for number in range(5)
    )
    for name in "abcd":
        mine = [text for text in slack.accepted if name in text]
        assert mine == sorted(mine)


def send_many(notifier, name):
    for number in range(5):
        assert notifier.send_message(f"{name}{number}")


def test_an_outbox_that_cannot_be_used_costs_no_message(slack, make, tmp_path):
    notifier = make(outbox=tmp_path / "outbox")
    (tmp_path / "outbox").rmdir()
    assert notifier.send_message("hello")
    assert notifier.flush(PATIENCE)
    assert slack.accepted == ["\u2139\ufe0f hello"]


def undelivered_in(managed):
    problems = managed.manager._server_proxy.health_check_rpc()["problems"]
    return [problem for problem in problems if problem["name"] == "alerts_undelivered"]


def test_a_validator_whose_slack_is_away_says_so_in_its_health_and_tells_after_its_restart(slack, make, tmp_path):
    refused = threading.Event()

    def down(_handler):
        refused.set()
        return DOWN

    slack.answers = [down] * 1000
    with Managed("direct", "unused", tmp_path) as managed:
        managed.manager.slack_notifier = make(outbox=tmp_path / "outbox")
        managed.validator.register("a")
        managed.validator.lose("a", 0.2)
        managed.validator.faults.fail("slash")
        managed.tick()
        assert refused.wait(PATIENCE)
        until(managed.manager.slack_notifier.undelivered)
        managed.tick()
        [problem] = undelivered_in(managed)
        assert problem["since_ms"] > 0
        assert problem["remedy"]
        assert "HTTP status 503" in problem["text"]
        managed.manager.slack_notifier.close(PATIENCE)
        slack.answers = []
        managed.restart()
        managed.manager.slack_notifier = notifier = make(outbox=tmp_path / "outbox")
        assert notifier.flush(PATIENCE)
        assert "nobody knows whether it was made" in slack.accepted[0]
        managed.tick()
        assert undelivered_in(managed) == []


def test_a_fork_while_a_message_is_sent_leaves_nobody_locked_out(slack, make, tmp_path):
    """The child has a copy of what is locked then, for as long as it lives."""
    asked, go_on, pipe = threading.Event(), threading.Event(), os.pipe()

    def slow(_handler):
        asked.set()
        go_on.wait(PATIENCE)
        return DOWN

    slack.answers = [slow]
    notifier = make(outbox=tmp_path / "outbox", retry_delay=0.01)
    assert notifier.send_message("in doubt", "error")
    assert asked.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        os.read(pipe[0], 1)
        os._exit(0)
    try:
        go_on.set()
        assert notifier.flush(PATIENCE)
        assert len(slack.accepted) == 1
    finally:
        os.write(pipe[1], b"x")
        os.waitpid(child, 0)


def test_a_repetition_keeps_no_other_message_waiting(slack, make):
    notifier, problems = make(), Problems()
    messages = ProblemMessages(problems, lambda: notifier, ends=False)
    for _ in range(3):
        problems.report("positions", "no price", subject="a")
        problems.clear("positions", "a")
    problems.report("slash in doubt", "nobody knows", subject="b")
    messages.report_undelivered(problems)
    assert not problems.stands("alerts_undelivered")
    assert notifier.flush(PATIENCE)
    assert [text.removeprefix("❌ ") for text in slack.accepted] == ["no price", "nobody knows"]


@pytest.mark.parametrize("later", [False, True])
def test_a_manager_gives_its_notifier_an_outbox_in_its_state_directory(slack, make, managers, tmp_path, later):
    """Also one that is assigned when there is a manager."""
    slack.answers = [DOWN] * 1000
    notifier = make()
    given = {} if later else {"slack_notifier": notifier}
    manager = managers(running_unit_tests=True, state_dir=tmp_path / "state", **given)
    if later:
        manager.slack_notifier = notifier
    assert manager.slack_notifier is notifier
    assert notifier.send_message("hello")
    assert len(list((tmp_path / "state" / "alerts").glob("*.msg"))) == 1


def test_without_slack_sdk_a_webhook_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "slack_sdk", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'shmelim\[slack\]'"):
        SlackNotifier(f"https://hooks.slack.invalid/services/{SECRET}")
    with pytest.raises(ValueError, match="not an http"):  # what is wrong by itself is told first
        SlackNotifier("hooks")


def test_an_answer_that_does_not_end_is_named(make, monkeypatch):
    """Each piece of it comes in time, and no other alert leaves meanwhile."""
    monkeypatch.setattr("shmelim.notify.slack._LONG_MS", 200)
    ended = threading.Event()

    def drip():
        with listener, contextlib.suppress(OSError):
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not ended.wait(0.01):
                    peer.sendall(b"x")

    listener = socket.create_server(("127.0.0.1", 0))
    dripping = threading.Thread(target=drip)
    dripping.start()
    notifier = make(f"http://127.0.0.1:{listener.getsockname()[1]}/hook", max_tries=1)
    try:
        notifier.send_message("hello")
        found = until(notifier.undelivered, "what is undelivered")
        assert (found.messages, found.why) == (1, "the answer does not end")
    finally:
        ended.set()
        dripping.join(PATIENCE)
    assert notifier.flush(PATIENCE)
    assert notifier.undelivered() is None
