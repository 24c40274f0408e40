"""The loop: in a thread, and in a process of its own that is told to end in the worst moments."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import freezegun
import pytest
from reference_validator import Managed
from waiting import PATIENCE, until

from shmelim.eliminations.debts.states import ATTEMPTING, IN_DOUBT
from shmelim.eliminations.rows import Status
from shmelim.eliminations.rules import deadlines, loop, tick
from shmelim.system.processes import title_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FORK = multiprocessing.get_context("fork")
AT_ONCE = {"tick_pause_s": 0.0, "error_pause_s": 0.0}


@pytest.fixture
def make(new_name: Callable[[], str], tmp_path: Path) -> Iterator[Callable[..., Managed]]:
    with contextlib.ExitStack() as stack:
        yield lambda mode, **figures: stack.enter_context(Managed(mode, new_name(), tmp_path, **figures))


@contextlib.contextmanager
def in_a_thread(managed: Managed) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=managed.manager.run_update_loop, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        managed.validator.ending["now"] = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


# ---------------------------------------------------------------------- in a thread


@pytest.mark.parametrize("mode", ["direct", "rpc"])
def test_loop_ticks_until_the_validator_ends(make: Callable[..., Managed], mode: str) -> None:
    managed = make(mode, tick_pause_s=0.0)
    managed.validator.register("a")
    before = signal.getsignal(signal.SIGTERM)
    with in_a_thread(managed) as thread:
        managed.validator.probation.fail("a", "PLAGIARISM", None)
        until(lambda: not managed.validator.probation.failed)
        managed.validator.ending["now"] = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert signal.getsignal(signal.SIGTERM) is before
    assert managed.reasons == {"a": "PLAGIARISM"}


@pytest.mark.parametrize("mode", ["direct", "rpc"])
def test_each_pass_looks_at_the_metagraph_though_no_tick_is_due(make: Callable[..., Managed], mode: str) -> None:
    managed = make(mode, tick_pause_s=0.0)
    managed.validator.register("a", "b")
    with in_a_thread(managed):
        until(lambda: Status.REGISTERED in managed.manager.reader.status("a"))
        managed.validator.deregister("a")
        until(lambda: "a" in managed.manager.get_departed_hotkeys())
        managed.validator.register("a")
        until(lambda: managed.manager.reader.is_hotkey_re_registered("a"))


def test_end_of_the_validator_is_noticed_in_the_midst_of_the_longest_pause(make: Callable[..., Managed]) -> None:
    managed = make("direct", tick_pause_s=3600.0, error_pause_s=3600.0)
    managed.validator.faults.fail("liquidated")
    with in_a_thread(managed) as thread:
        until(lambda: managed.alerts)
        managed.validator.ending["now"] = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert loop._LOOK_AGAIN + deadlines._LOOK_AGAIN + deadlines._GRACE < 2.0, "what is promised is 2 s"


def test_a_pause_ends_where_a_test_stops_the_time() -> None:
    with freezegun.freeze_time("2030-01-01"):
        loop._pause(0.01, lambda: False)


def test_loop_pauses_while_a_sync_is_in_progress(make: Callable[..., Managed]) -> None:
    managed = make("direct", tick_pause_s=0.0)
    looks: list[None] = []

    class Flag:
        @property
        def value(self) -> bool:
            looks.append(None)
            return self.set

        set = True

    managed.manager.sync_in_progress = flag = Flag()
    managed.validator.faults.passed.clear()
    with in_a_thread(managed):
        until(lambda: len(looks) > 10)
        assert managed.validator.faults.count("registry") == 0
        flag.set = False
        until(lambda: managed.validator.faults.count("registry"))


def test_a_sync_that_never_ends_is_told(make: Callable[..., Managed]) -> None:
    managed = make("direct", longest_sync_s=0.01, tick_pause_s=0.0)
    managed.manager.sync_in_progress = flag = SimpleNamespace(value=True)
    with in_a_thread(managed):
        until(lambda: managed.alerts)
        assert "sync_in_progress has been true for more than" in managed.alerts[0]
        flag.value = False
        until(lambda: not managed.manager._processor.context.alerts.standing())
    assert len(managed.alerts) == 1


def names_in_health(managed: Managed) -> set[tuple[str, str]]:
    health = managed.manager._server_proxy.health_check_rpc()
    return {(problem["name"], problem["subject"]) for problem in health["problems"]}


def test_a_sync_that_never_ends_is_in_the_health_though_nothing_is_processed(make: Callable[..., Managed]) -> None:
    managed = make("rpc", longest_sync_s=0.01, tick_pause_s=0.0)
    managed.manager.sync_in_progress = flag = SimpleNamespace(value=True)
    with in_a_thread(managed):
        until(lambda: ("loop", "sync") in names_in_health(managed), "the problem in the health")
        flag.value = False
        until(lambda: names_in_health(managed) == set(), "its end")


@pytest.mark.parametrize("name", ["sync_in_progress", "sync_epoch"])
def test_a_value_whose_lock_is_never_released_is_in_the_health(
    make: Callable[..., Managed], gate: threading.Event, name: str
) -> None:
    """As that of a multiprocessing.Value is when a process was killed while it held it."""

    class Locked:
        @property
        def value(self) -> bool:
            return not gate.wait()

    # Long enough for everything else, however busy the machine is.
    managed = make("rpc", call_deadline_s=2.0, **AT_ONCE)
    setattr(managed.manager, name, Locked())
    with in_a_thread(managed):
        until(lambda: ("loop", "tick") in names_in_health(managed), "the problem in the health")
        gate.set()
        until(lambda: names_in_health(managed) == set(), "its end")


def test_loop_survives_every_exception_and_tells_of_each_once(make: Callable[..., Managed]) -> None:
    managed = make("direct", **AT_ONCE)

    class Broken:
        looks = 0

        @property
        def value(self) -> bool:
            self.looks += 1
            raise OSError("the validator's shared value is gone")

    managed.manager.sync_in_progress = broken = Broken()
    with in_a_thread(managed):
        until(lambda: broken.looks > 20)
        assert len(managed.alerts) == 1
        managed.manager.sync_in_progress = None
        managed.validator.register("a")
        managed.validator.lose("a", 0.2)
        until(lambda: managed.validator.collateral.slashes() == ["a"])


@pytest.mark.parametrize("error", [asyncio.CancelledError(), SystemExit(1), BaseException("odd")])
@pytest.mark.parametrize("point", ["liquidated", "store"])
def test_loop_in_a_thread_survives_what_no_handler_of_errors_catches(
    make: Callable[..., Managed], error: BaseException, point: str
) -> None:
    managed = make("direct", **AT_ONCE)
    managed.validator.register("a", "b")
    for hotkey in ("a", "b"):
        managed.validator.open_position(hotkey)
        managed.validator.lose(hotkey, 0.2)
    lasting = managed.validator.faults.fail(point, error, hotkey=None if point == "liquidated" else "a", times=3)
    with in_a_thread(managed) as thread:
        until(lambda: lasting.happened == 3 and managed.validator.is_flat("a") and managed.validator.is_flat("b"))
        assert thread.is_alive()
    assert 1 <= len(managed.alerts) <= 2, "told once, by whoever noticed it"


def test_loop_that_ends_unasked_says_so(make: Callable[..., Managed], caplog: pytest.LogCaptureFixture) -> None:
    managed = make("direct", **AT_ONCE)
    managed.validator.faults.fail("liquidated", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        managed.manager.run_update_loop()
    [alert] = managed.alerts
    assert "has ended, though nobody asked it to" in alert
    assert "KeyboardInterrupt" in alert
    assert alert in caplog.messages


def test_sys_exit_in_the_main_thread_ends_the_loop(make: Callable[..., Managed]) -> None:
    """It is a signal's, as far as anybody can tell: a validator's own handler may raise it."""
    managed = make("direct", **AT_ONCE)
    managed.validator.faults.fail("liquidated", SystemExit(3))
    with pytest.raises(SystemExit):
        managed.manager.run_update_loop()
    assert len(managed.alerts) == 1


def test_loop_pauses_longer_after_a_tick_that_failed(
    make: Callable[..., Managed], monkeypatch: pytest.MonkeyPatch
) -> None:
    managed = make("direct", tick_pause_s=1.0, error_pause_s=10.0)
    managed.validator.faults.fail("liquidated")
    pauses: list[float] = []

    def pause(seconds: float, _stopping: Any) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            managed.validator.ending["now"] = True
        if len(pauses) == 1:
            managed.validator.faults.fail("has failed", BaseException("odd"))

    monkeypatch.setattr(loop, "_pause", pause)
    managed.manager.run_update_loop()
    assert pauses == [10.0, 10.0, 1.0]


def test_failure_is_not_forgotten_by_pauses_for_syncs(make: Callable[..., Managed]) -> None:
    """The server is away, and syncs come and go: what failed was told, and nothing has gone well since."""
    managed = make("direct", **AT_ONCE)
    looks: list[bool] = []

    class Flag:
        @property
        def value(self) -> bool:
            looks.append(len(looks) % 2 == 0)
            return looks[-1]

    managed.manager.sync_in_progress = Flag()
    managed.manager._processor.context.state._manager = lambda: None
    with in_a_thread(managed):
        until(lambda: len(looks) > 40)
    assert len(managed.alerts) == 1


@pytest.mark.parametrize("make_event", [threading.Event, FORK.Event])
def test_event_can_say_that_the_validator_ends(make: Callable[..., Managed], make_event: Any) -> None:
    managed = make("direct", **AT_ONCE)
    managed.manager.shutdown_dict = event = make_event()
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    thread = threading.Thread(target=managed.manager.run_update_loop, daemon=True)
    thread.start()
    until(lambda: managed.reasons)
    assert thread.is_alive()
    event.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_loop_ends_when_nobody_can_be_asked_whether_to(
    make: Callable[..., Managed], caplog: pytest.LogCaptureFixture
) -> None:
    managed = make("direct", **AT_ONCE)

    class Gone:
        def __bool__(self) -> bool:
            raise EOFError("the process that has it is gone")

    managed.manager.shutdown_dict = Gone()
    managed.validator.faults.passed.clear()
    managed.manager.run_update_loop()
    assert "cannot be asked any more" in caplog.text
    assert managed.validator.faults.count("registry") == 0, "there was no tick"


# ---------------------------------------------------------------------- in a process of its own


@contextlib.contextmanager
def in_a_process(managed: Managed) -> Iterator[Any]:
    process = FORK.Process(target=managed.manager.run_update_loop, daemon=True)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def ends(process: Any) -> bool:
    """Whether a SIGTERM ends it."""
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    return not process.is_alive()


class Hanging:
    """A managed value whose process does not answer."""

    def __init__(self, gate: threading.Event) -> None:
        self.gate = gate

    def __len__(self) -> int:
        self.gate.wait()
        return 0


def test_a_shutdown_dict_that_hangs_stops_neither_the_loop_nor_sigterm(
    make: Callable[..., Managed], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tick, "_SHUTDOWN_S", 0.2)
    managed = make("rpc")
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    managed.manager.shutdown_dict = Hanging(gate)
    with in_a_process(managed) as process:
        until(lambda: managed.reasons == {"a": "MAX_TOTAL_DRAWDOWN"})
        until(lambda: ("shutdown", "shutdown_dict") in names_in_health(managed))
        assert ends(process)


def test_process_of_the_loop_ends_on_sigterm_though_the_thread_that_started_it_blocks_it(
    make: Callable[..., Managed],
) -> None:
    managed = make("rpc")
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        with in_a_process(managed) as process:
            until(lambda: managed.reasons == {"a": "MAX_TOTAL_DRAWDOWN"})
            assert ends(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_process_of_the_loop_ends_on_sigterm_and_carries_a_title(make: Callable[..., Managed]) -> None:
    managed = make("rpc")
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    with in_a_process(managed) as process:
        until(lambda: managed.manager.is_hotkey_eliminated("a"))
        assert title_of(process.pid) == "vali_EliminationProcessing"
        assert ends(process)
        assert process.exitcode == 0


def forever(waiting: Any) -> None:
    """Wait as Python code waits, for what does not come."""
    waiting.set()
    threading.Event().wait()


@pytest.mark.parametrize("point", ["liquidated", "cancel", "store", "slash", "slash!"])
def test_sigterm_ends_a_process_whose_collaborator_hangs(make: Callable[..., Managed], point: str) -> None:
    managed = make("rpc", slash_deadline_s=1.0, slash_lease_s=0, **AT_ONCE)
    validator = managed.validator
    validator.register("a")
    validator.open_position("a")
    validator.lose("a", 0.2)
    waiting = FORK.Event()
    validator.faults.at(point, lambda: forever(waiting))
    with in_a_process(managed) as process:
        assert waiting.wait(PATIENCE)
        assert ends(process)
    validator.faults.clear()
    if point.startswith("slash"):
        assert [(debt["kind"], debt["state"]) for debt in managed.debts] == [("slash", ATTEMPTING)]
    # What is left is made by the next process.
    managed.restart()
    managed.tick()
    assert managed.validator.is_flat("a")
    assert len(managed.validator.collateral.slashes()) <= 1
    states = [debt["state"] for debt in managed.debts]
    assert states == ([IN_DOUBT] if point.startswith("slash") else [])


def test_sigterm_lets_the_miner_at_hand_be_finished(make: Callable[..., Managed]) -> None:
    managed = make("rpc", **AT_ONCE)
    validator = managed.validator
    validator.register("a", "b")
    for hotkey in ("a", "b"):
        validator.open_position(hotkey)
        validator.lose(hotkey, 0.2)
    validator.faults.at("store", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with in_a_process(managed) as process:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert managed.reasons == {"a": "MAX_TOTAL_DRAWDOWN", "b": "MAX_TOTAL_DRAWDOWN"}
    assert [validator.is_flat(hotkey) for hotkey in ("a", "b")] == [True, False]
    assert validator.collateral.slashes() == [], "all positions come before the first slash"
    managed.restart()
    managed.tick()
    assert [managed.validator.is_flat(hotkey) for hotkey in ("a", "b")] == [True, True]
    assert managed.validator.collateral.slashes() == ["a", "b"]


def test_a_ctrl_c_of_the_terminal_ends_no_process_of_the_loop(make: Callable[..., Managed]) -> None:
    """It reaches every process of the group; what it means is for the one to decide that made the manager."""
    managed = make("rpc", **AT_ONCE)
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    with in_a_process(managed) as process:
        until(lambda: managed.reasons == {"a": "MAX_TOTAL_DRAWDOWN"})
        os.kill(process.pid, signal.SIGINT)
        process.join(0.5)
        assert process.is_alive()
        managed.manager.shutdown()
        process.join(PATIENCE)
        assert process.exitcode == 0


def test_loop_leaves_signal_handlers_as_it_found_them(make: Callable[..., Managed]) -> None:
    managed = make("rpc", **AT_ONCE)
    found = FORK.SimpleQueue()

    def run() -> None:
        def own(*_: object) -> None:
            """Stand in for a handler of the validator."""

        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, own)
        managed.validator.faults.at("liquidated", lambda: os.kill(os.getpid(), signal.SIGTERM))
        managed.manager.run_update_loop()
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]
        found.put((handlers == [own, own], signal.getitimer(signal.ITIMER_REAL)))

    process = FORK.Process(target=run, daemon=True)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert found.get() == (True, (0.0, 0.0))
