"""Logs that fill no disk and hold up nobody."""

import io
import logging
import os
import signal
import threading

import pytest
from ledger import held_elsewhere
from waiting import PATIENCE, until

from shmelim.system.background import Background, BackgroundStream, Descriptor
from shmelim.system.logs import LimitedLog, log_problems, log_without_waiting
from shmelim.system.problems import Problems


class Stuck(logging.Handler):
    """A handler that hangs in its first line until it may go on."""

    def __init__(self):
        super().__init__()
        self.go_on = threading.Event()
        self.lines = []

    def emit(self, record):
        self.go_on.wait(PATIENCE)
        self.lines.append(self.format(record))


@pytest.fixture
def logger():
    """A logger of its own, as it was found."""
    logger = logging.getLogger("test-logs")
    yield logger
    logger.handlers = []
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def stuck(logger):
    handler = Stuck()
    logger.addHandler(handler)
    yield handler
    handler.go_on.set()


def in_child(work):
    """Run something in a forked child; whether it was true there."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(PATIENCE))  # ends a child that waits for ever
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


# ------------------------------------------------------------------ limited lines


def test_a_limited_log_works_in_a_child_that_was_forked_while_its_lock_was_held(caplog):
    log = LimitedLog(logging.getLogger("flood"))
    with held_elsewhere(log._lock):
        assert in_child(lambda: log(logging.WARNING, "a", "in the child") is None)


def test_a_topic_that_is_held_back_holds_back_no_other(caplog):
    log = LimitedLog(logging.getLogger("flood"), burst=1)
    for topic in "aab":
        log(logging.WARNING, topic, topic)
    assert caplog.messages == ["a", "b"]


def test_a_clock_that_a_test_has_stopped_holds_back_no_line_for_ever(caplog, monkeypatch):
    """freezegun stops `time.monotonic`."""
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    log = LimitedLog(logging.getLogger("flood"), burst=1, interval=1e-9)
    log(logging.WARNING, "a", "first")
    log(logging.WARNING, "a", "second")
    assert caplog.messages == ["first", "second"]


# ------------------------------------------------------------------ problems


def test_a_problem_is_logged_when_it_is_raised_gets_worse_and_ends(caplog):
    problems = Problems()
    log_problems(problems, logging.getLogger("subject"))
    problems.report("full", "little room", severity="notice", remedy="make room")
    problems.report("full", "still little room", severity="notice")
    problems.report("full", "no room", severity="failing", subject="")
    problems.report("slow", "it waits", subject="disk")
    problems.clear("full")
    assert [(record.levelname, record.getMessage().replace("0.0 s", "T")) for record in caplog.records] == [
        ("WARNING", "full: little room; make room"),
        ("CRITICAL", "full: no room"),
        ("ERROR", "slow (disk): it waits"),
        ("WARNING", "full: over after T: no room"),
    ]


def test_a_problem_that_comes_and_goes_is_limited(caplog):
    problems = Problems()
    log_problems(problems, logging.getLogger("subject"))
    for _ in range(1000):
        problems.report("full", "no room")
        problems.clear("full")
    assert len(caplog.records) < 20


# ------------------------------------------------------------------ nobody waits


def test_no_line_waits_for_a_handler_that_hangs_and_what_is_dropped_is_counted(logger, stuck):
    with log_without_waiting():
        for number in range(3000):
            logger.warning("line %d", number)
        stuck.go_on.set()
    assert stuck.lines[:1000] == [f"line {number}" for number in range(1000)]
    assert "2000 lines were not logged: whoever reads the log was too slow" in stuck.lines
    assert logger.handlers == [stuck]


def test_the_end_does_not_wait_long_for_a_handler_that_hangs(logger, stuck, monkeypatch):
    monkeypatch.setattr("shmelim.system.logs._AT_THE_END", 0.01)
    with log_without_waiting():
        logger.warning("a line")
    assert logger.handlers == [stuck]
    assert stuck.lines == []


def test_arguments_are_those_of_the_moment_and_filters_are_asked_where_the_line_is_logged(logger, stuck):
    asked = []
    stuck.addFilter(lambda record: asked.append(threading.current_thread()) or record.levelno > logging.INFO)
    stuck.setLevel(logging.INFO)
    things = [1]
    logger.setLevel(logging.DEBUG)
    with log_without_waiting():
        logger.warning("things: %s", things)
        logger.info("filtered")
        logger.debug("below the level")
        things.append(2)
        stuck.go_on.set()
    assert stuck.lines == ["things: [1]"]
    assert asked == [threading.main_thread()] * 2


def test_traces_and_wrong_arguments_reach_the_handler(logger):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    errors = []
    handler.handleError = errors.append
    logger.addHandler(handler)
    with log_without_waiting():
        logger.error("it failed", exc_info=ZeroDivisionError("on purpose"))
        logger.warning("%d things", "no number")
    assert "it failed" in stream.getvalue()
    assert "ZeroDivisionError: on purpose" in stream.getvalue()
    assert len(errors) == 1


def test_handlers_that_are_added_meanwhile_are_taken_in_by_another_block_and_stay_when_it_ends(logger, stuck):
    with log_without_waiting():
        outer = list(logger.handlers)
        late = Stuck()
        logger.addHandler(late)
        with log_without_waiting():
            assert logger.handlers[0] is outer[0]
            logger.warning("a line")  # neither hangs
            stuck.go_on.set()
            late.go_on.set()
        assert logger.handlers == [outer[0], late]
    assert logger.handlers == [stuck, late]
    assert (stuck.lines, late.lines) == (["a line"], ["a line"])


def test_a_forked_child_logs_as_ever_and_what_waits_is_the_parents(logger, stuck):
    with log_without_waiting():
        logger.warning("of the parent")
        (handler,) = logger.handlers

        def child():
            stuck.go_on.set()
            logger.warning("of the child")
            if stuck.lines != ["of the child"]:
                return False
            with log_without_waiting():  # a server of its own, with a thread of its own
                logger.warning("in the background")
                return handler not in logger.handlers and logger.handlers[0].drain(PATIENCE)

        with held_elsewhere(handler._background._changed):  # a lock that is held at the fork is free in the child
            assert in_child(child)
        stuck.go_on.set()
    assert stuck.lines == ["of the parent"]


def test_a_handler_of_stderr_hangs_outside_of_the_lock_of_stderr(logger, monkeypatch):
    """A thread that hung inside would keep the interpreter from ending."""
    reading, writing = os.pipe()
    monkeypatch.setattr("shmelim.system.logs._AT_THE_END", 0.01)
    with os.fdopen(writing, "w") as stderr, os.fdopen(reading) as pipe:
        monkeypatch.setattr("sys.stderr", stderr)
        logger.addHandler(logging.StreamHandler())
        with log_without_waiting():
            for _ in range(10):
                logger.warning("x" * 20_000)  # more than the pipe holds
        stderr.flush()
        assert [len(pipe.readline()) for _ in range(10)] == [20_001] * 10


def test_what_nobody_wants_to_log_reaches_stderr_all_the_same(monkeypatch):
    """By logging's handler of last resort."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stderr, os.fdopen(reading) as pipe:
        monkeypatch.setattr("sys.stderr", stderr)
        last = logging.lastResort
        with log_without_waiting():
            assert logging.lastResort is not last
            logging.lastResort.handle(logging.makeLogRecord({"msg": "a line", "levelno": logging.WARNING}))
        assert logging.lastResort is last
        assert pipe.readline() == "a line\n"


# ------------------------------------------------------------------ in the background


def test_a_forked_child_has_a_queue_of_its_own():
    go_on, done = threading.Event(), []
    background = Background(lambda item: (go_on.wait(PATIENCE), done.append(item)), lambda count: -count)
    background.put("of the parent")

    def child():
        go_on.set()
        background.put("of the child")
        return background.drain(PATIENCE) and done == ["of the child"]

    with held_elsewhere(background._changed):
        assert in_child(child)
    go_on.set()
    assert background.drain(PATIENCE)
    assert done == ["of the parent"]


def test_drops_are_counted_and_said_as_soon_as_there_is_room():
    go_on, done = threading.Event(), []
    background = Background(
        lambda item: (go_on.wait(PATIENCE), done.append(item)), lambda count: -count, capacity=4
    )
    for number in range(10):
        background.put(number)
    go_on.set()
    assert background.drain(PATIENCE)
    assert done == [0, 1, 2, 3, -6]
    background.put(11)
    assert background.drain(PATIENCE)
    assert done[-1] == 11


def test_what_the_work_raises_ends_nothing():
    done = []
    background = Background(lambda item: done.append(1 // item), lambda _count: 0)
    for item in (1, 0, 1):
        background.put(item)
    assert background.drain(PATIENCE)
    assert done == [1, 1]


def test_the_thread_ends_with_the_work():
    background = Background(lambda _item: None, lambda _count: None)
    background.put(1)
    assert background.drain(PATIENCE)
    until(lambda: background._thread is None)


def test_where_no_thread_can_be_started_the_item_is_dropped_and_counted(monkeypatch):
    done = []
    background = Background(done.append, lambda count: f"{count} dropped")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda _self: (_ for _ in ()).throw(RuntimeError("no more")))
        background.put("a")
    background.put("b")
    assert background.drain(PATIENCE)
    assert done == ["b", "1 dropped"]


def test_a_descriptor_that_does_not_block_is_waited_for():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    text = "é" * 100_000
    found = []
    thread = threading.Thread(target=lambda: found.append(os.fdopen(reading).read()))
    thread.start()
    Descriptor(writing).write(text)
    os.close(writing)
    thread.join(PATIENCE)
    assert found == [text]


def test_a_stream_keeps_pieces_whole_and_in_order():
    reading, writing = os.pipe()
    stream = BackgroundStream(writing)
    for number in range(500):
        stream.write(f"line {number} \ud800\n")
    assert stream.drain(PATIENCE)
    assert not stream.isatty()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read().splitlines() == [f"line {number} \\ud800" for number in range(500)]
