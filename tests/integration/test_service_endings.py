"""The end of a service, as its calls, signal handlers and its other objects see it: an end, no failure."""

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from ledger import Alerts, Clock, Ledger, LedgerServer, core_of, is_alive, kill
from waiting import PATIENCE, until

from shmelim.channel import PickleCodec
from shmelim.errors import ChannelError, KeyFileError
from shmelim.service import RPCServiceBase, owner
from shmelim.service.settings import ServiceSettings

TESTS = str(Path(__file__).parents[1])
fork = multiprocessing.get_context("fork")


class SlowServer(LedgerServer):
    """Answers when it is told to."""

    def __init__(self, directory):
        if (directory / "hang").exists():
            (directory / "hanging").touch()
            threading.Event().wait(PATIENCE)
        super().__init__(directory)

    def slow_rpc(self):
        (self.directory / "entered").touch()
        until((self.directory / "go on").exists)
        return "finished"

    def close(self):
        super().close()


class SlowLedger(Ledger):
    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            SlowServer, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )


# ------------------------------------------------------------------ signal handlers


HANDLING = """
import faulthandler, itertools, signal, sys
from ledger import Ledger
from waiting import PATIENCE

def main():
    faulthandler.dump_traceback_later(PATIENCE / 2, exit=True)
    service, steps = Ledger(sys.argv[1]), itertools.count()
    service.pid()

    def interrupt(frame, event, _):
        # When the n-th function of the channel is entered or left.
        if "shmelim/channel" in frame.f_code.co_filename and next(steps) == int(sys.argv[2]):
            sys.setprofile(None)
            signal.raise_signal(signal.SIGALRM)

    signal.signal(signal.SIGALRM, lambda *_: service.shutdown())
    sys.setprofile(interrupt)
    try:
        while True:
            service.pid()
    except ConnectionError as error:
        print("ended", flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("step", range(0, 40, 5))
def test_shutdown_by_a_signal_handler_in_the_middle_of_a_call(tmp_path, step):
    program = tmp_path / "program.py"
    program.write_text(HANDLING)
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), str(step)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([TESTS, *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "ended\n", done.stderr
    assert (tmp_path / "closed").exists()


def test_shutdown_by_a_signal_handler_in_the_middle_of_a_start(make_ledger):
    """The lock of all starts is held by the thread that the handler interrupts."""
    service = make_ledger()

    def start_and_end(address, authkey, server_ready):
        process = Ledger._start_server_process(service, address, authkey, server_ready)
        service.shutdown()  # as a handler would
        started.append(process)
        return process

    started = []
    service._start_server_process = start_and_end
    with pytest.raises(ChannelError, match="was shut down"):
        service.restart_server()
    assert not started[0].is_alive()


def test_shutdown_by_a_signal_handler_before_the_first_connection(tmp_path, monkeypatch):
    made = []

    class Interrupted(owner.ChannelClient):
        def __init__(self, *arguments, **options):
            made.append(core_of(service).server)
            service.shutdown()  # as a handler would
            super().__init__(*arguments, **options)

    monkeypatch.setattr(owner, "ChannelClient", Interrupted)
    service = Ledger.__new__(Ledger)
    with pytest.raises(ChannelError, match="was shut down"):
        service.__init__(tmp_path, connect_delay=PATIENCE)
    assert made
    assert not is_alive(made[0].pid)


COMMITTING = """
import signal, sys
from pathlib import Path
from shmelim import EliminationManager

manager = EliminationManager(None, None, None, name=sys.argv[1], port=None, state_dir=sys.argv[2],
                             runtime_base=sys.argv[3])
signal.signal(signal.SIGALRM, lambda *_: manager.shutdown())
done = 0
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    while True:
        manager.add_elimination(f"hotkey-{done}", {"hotkey": f"hotkey-{done}", "reason": "ZOMBIE", "dd": 1.0,
            "elimination_initiated_time_ms": 1_700_000_000_000, "price_info": {}, "return_info": {}})
        done += 1
except ConnectionError as error:
    print(done, "ended", type(error).__name__, flush=True)
"""


def test_shutdown_by_a_signal_handler_while_a_change_commits(tmp_path, table_name):
    """The change gets its answer or an error that says what is known; what was acknowledged is there."""
    state = tmp_path / "state"
    with tempfile.TemporaryDirectory(prefix="s-") as runtime:
        done = subprocess.run(
            [sys.executable, "-c", COMMITTING, table_name, str(state), runtime],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([TESTS, *sys.path])},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    acknowledged, word, _ = done.stdout.split()
    assert word == "ended", done.stderr
    present = len(json.loads((state / "eliminations.json").read_text())["eliminations"])
    assert int(acknowledged) <= present <= int(acknowledged) + 1


# ------------------------------------------------------------------ the owner's own calls


@pytest.mark.parametrize("stop_timeout", [2 * PATIENCE, float("inf")])
def test_shutdown_lets_the_owners_running_calls_finish(make_ledger, tmp_path, stop_timeout):
    service = make_ledger(SlowLedger, stop_timeout=stop_timeout)
    answers = []
    caller = threading.Thread(target=lambda: answers.append(service._server_proxy.slow_rpc()))
    caller.start()
    until((tmp_path / "entered").exists)
    ending = threading.Thread(target=service.shutdown)
    ending.start()
    until(lambda: service.has_ended)
    with pytest.raises(ChannelError, match="LedgerServer was shut down"):
        service.pid()
    (tmp_path / "go on").touch()
    ending.join(PATIENCE)
    caller.join(PATIENCE)
    assert answers == ["finished"]


def test_shutdown_does_not_wait_for_a_restart_under_way(make_ledger, tmp_path):
    service = make_ledger(SlowLedger, ready_timeout=4 * PATIENCE)
    (tmp_path / "hang").touch()
    errors = []

    def restart():
        try:
            service.restart_server()
        except ChannelError as error:
            errors.append(str(error))

    thread = threading.Thread(target=restart)
    thread.start()
    until((tmp_path / "hanging").exists)
    ending = threading.Thread(target=service.shutdown)
    ending.start()
    ending.join(PATIENCE / 2)
    assert not ending.is_alive()
    thread.join(PATIENCE)
    assert errors == ["LedgerServer was shut down"]
    assert not service._server_process.is_alive()


@pytest.mark.parametrize("direct", [True, False])
def test_after_the_end_everything_says_so(make_ledger, direct, caplog):
    service = make_ledger(running_unit_tests=direct)
    service.shutdown()
    for use in (service.pid, service.restart_server, lambda: service._server_proxy.anything):
        with pytest.raises(ChannelError, match="LedgerServer was shut down"):
            use()
    assert not service._server_proxy
    assert "restarting" not in caplog.text
    assert service.has_ended
    assert "no server: LedgerServer was shut down" in repr(service._server_proxy)


class Forgetful(RPCServiceBase):
    def _create_direct_server(self):
        raise AssertionError

    def _start_server_process(self, address, authkey, server_ready):
        raise AssertionError


@pytest.mark.parametrize("direct", [True, False])
def test_without_a_server_everything_says_what_to_do(direct):
    service = Forgetful("Forgetful", 0, direct)
    assert RPCServiceBase._server_proxy is None  # for mocks of the class
    with pytest.raises(ChannelError, match=r"Forgetful has no server yet \(call _initialize_service\(\) first\)"):
        service._server_proxy.enter_rpc("one")
    assert not hasattr(service._server_proxy, "__len__")
    with pytest.raises(ChannelError, match="is in direct mode" if direct else "has no server yet"):
        service.restart_server()
    assert service.health_check()  # which is off
    service.enable_health_check = True
    assert service.health_check() is False


# ------------------------------------------------------------------ two objects of one process


def test_a_name_can_be_bound_anew(tmp_path):
    """The new object is made while the old one still lives."""
    service = Ledger(tmp_path)
    port, first = service.port, service.server_pid
    service = Ledger(tmp_path, port)
    assert not is_alive(first)
    assert service.pid() == service.server_pid
    service.restart_server()
    assert service.pid() == service.server_pid
    service.shutdown()


@pytest.mark.parametrize("key", [None, "key"])
def test_the_earlier_object_gives_way_for_good(make_ledger, tmp_path, key):
    clock, alerts = Clock(), Alerts()
    options = {
        "enable_health_check": True,
        "max_consecutive_failures": 1,
        "slack_notifier": alerts,
        "clock_ms": clock,
        "key_path": None if key is None else tmp_path / key,
    }
    first = make_ledger(**options)
    second = make_ledger(port=first.port, **options)
    pid = second.server_pid
    for use in (first.pid, first.restart_server):
        with pytest.raises(ChannelError, match="a later LedgerServer of this process has taken"):
            use()
    for _ in range(3):
        clock.later(60)
        assert first.health_check() is False
        assert second.health_check() is True
    first.shutdown()
    assert second.pid() == second.server_pid == pid
    assert alerts.messages == []


def test_the_earlier_object_goes_on_where_the_later_one_cannot_have_a_server(make_ledger, tmp_path):
    first = make_ledger(key_path=tmp_path / "key")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(KeyFileError, match=r"LedgerServer cannot be served: the key file .* has mode 0644"):
        make_ledger(port=first.port, key_path=tmp_path / "key")
    (tmp_path / "key").chmod(0o600)
    assert first.pid() == first.server_pid


@pytest.mark.parametrize("other", ["other key", "no key", "other name", "not replacing"])
def test_another_service_of_this_process_is_refused(make_ledger, tmp_path, other):
    class Other(Ledger):
        def __init__(self, directory, port, **options):
            RPCServiceBase.__init__(self, "OtherServer", port, **options)
            self.directory = directory
            self._initialize_service()

    first = make_ledger(key_path=tmp_path / "a")
    pid = first.server_pid
    kind, options = {
        "other key": (Ledger, {"key_path": tmp_path / "b"}),
        "no key": (Ledger, {}),
        "other name": (Other, {"key_path": tmp_path / "a"}),
        "not replacing": (Ledger, {"key_path": tmp_path / "a", "replace_stale": False}),
    }[other]
    with pytest.raises(ChannelError, match=r"is in use by another LedgerServer of this process \(shut that down"):
        make_ledger(kind, port=first.port, **options)
    assert first.pid() == first.server_pid == pid
    first.restart_server()
    first.shutdown()
    assert make_ledger(kind, port=first.port, **options).pid() != pid


def test_another_name_of_the_same_address_helps_nobody(make_ledger, tmp_path):
    first = make_ledger(key_path=tmp_path / "a")
    with pytest.raises(
        ChannelError, match=f"is in use by process {first.server_pid}, the server of a process that"
    ):
        make_ledger(address=("localhost", first.port), key_path=tmp_path / "b")
    assert first.pid() == first.server_pid


def test_an_object_that_was_shut_down_is_in_nobodys_way(make_ledger, tmp_path):
    first = make_ledger(key_path=tmp_path / "a")
    first.shutdown()
    second = make_ledger(port=first.port, key_path=tmp_path / "b")
    assert second.pid() == second.server_pid


def test_a_forked_child_knows_that_its_copy_holds_nothing(make_ledger, tmp_path):
    first = make_ledger(key_path=tmp_path / "a")
    here, there = fork.Pipe()

    def take():
        try:
            Ledger(tmp_path, first.port, key_path=tmp_path / "b")
        except ChannelError as error:
            there.send(str(error))

    child = fork.Process(target=take)
    child.start()
    child.join(PATIENCE)
    assert f"is in use by process {first.server_pid}, the server of a process that lives" in here.recv()


# ------------------------------------------------------------------ what cannot be checked


class Unchecked:
    def pid_rpc(self):
        return os.getpid()


class UncheckedService(Ledger):
    def _create_direct_server(self):
        return Unchecked()

    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(Unchecked, address=address, authkey=authkey, server_ready=server_ready)


@pytest.mark.parametrize("direct", [True, False])
def test_a_server_without_the_method_is_not_restarted(make_ledger, direct, caplog):
    clock, alerts = Clock(), Alerts()
    service = make_ledger(
        UncheckedService,
        running_unit_tests=direct,
        enable_health_check=True,
        slack_notifier=alerts,
        clock_ms=clock,
    )
    pid = service.server_pid
    for _ in range(5):
        assert service.health_check(clock.later(60)) is True
    assert service.server_pid == pid
    ((level, text),) = alerts.messages
    assert level == "warning"
    assert (
        "health cannot be checked, and counts as good: LedgerServer has no remote method 'health_check_rpc'"
        in text
    )
    assert caplog.text.count("cannot be checked") == 1


# ------------------------------------------------------------------ what is said


def test_a_plain_death_is_logged_without_tracebacks(make_ledger, caplog):
    service = make_ledger(enable_health_check=True, health_check_interval_s=0, enable_auto_restart=False)
    kill(service)
    with caplog.at_level(logging.DEBUG):
        assert service.health_check() is False
    assert "nobody serves at" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_direct_service_is_nowhere(tmp_path):
    with Ledger(tmp_path, address=tmp_path / "s", running_unit_tests=True) as service:
        assert service.address is None
        assert "direct" in repr(service)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"call_timout": 3}, TypeError, r"Ledger has no setting 'call_timout'; did you mean 'call_timeout'\?"),
        ({"ready_timeout": "3"}, TypeError, "Ledger: ready_timeout must be a number, not '3'"),
        ({"stop_timeout": True}, TypeError, "Ledger: stop_timeout must be a number, not True"),
        ({"connect_tries": 2.5}, TypeError, "Ledger: connect_tries must be a whole number"),
        ({"call_timeout": float("nan")}, ValueError, "Ledger: call_timeout must be 0 or more and finite, not nan"),
        ({"call_timeout": float("inf")}, ValueError, "Ledger: call_timeout must be 0 or more and finite, not inf"),
        ({"call_timeout": 0}, ValueError, "Ledger: call_timeout must be more than 0"),
        ({"health_check_timeout": 0.0}, ValueError, "Ledger: health_check_timeout must be more than 0"),
        ({"ready_timeout": 0}, ValueError, "Ledger: ready_timeout must be more than 0"),
        ({"connect_wait": -1}, ValueError, "Ledger: connect_wait must be 0 or more and finite, not -1"),
        (
            {"health_check_timeout": 10**30},
            ValueError,
            "Ledger: health_check_timeout must be 0 to 9,223,372,036",
        ),
        ({"start_method": "bogus"}, ValueError, "Ledger: start_method must be None or one of fork"),
        ({"start_method": 5}, TypeError, "Ledger: start_method must be a name"),
        ({"replace_stale": "no"}, TypeError, "Ledger: replace_stale must be True or False"),
        ({"idempotent": "pid_rpc"}, TypeError, "Ledger: idempotent must be a collection of names, not 'pid_rpc'"),
        ({"codec": "json"}, TypeError, "Ledger: codec must be a codec"),
        ({"codec": PickleCodec}, TypeError, "Ledger: codec must be a codec"),
        ({"clock_ms": 5}, TypeError, "Ledger: clock_ms must be a function"),
        ({"max_message": 10_000}, ValueError, "Ledger: max_message must be 16384 to 2,147,483,647, not 10000"),
        ({"slack_notifier": "https://hooks.slack.com/a"}, TypeError, "slack_notifier must be .*SlackNotifier"),
        ({"health_check_interval_ms": "60"}, TypeError, "health_check_interval_ms must be a number, not '60'"),
        ({"port": True}, TypeError, r"a TCP address is \(host, port\), not \('127.0.0.1', True\)"),
        ({"health_check_interval_s": "60"}, TypeError, "health_check_interval_s must be a number, not '60'"),
        ({"health_check_interval_s": float("nan")}, ValueError, "health_check_interval_s must be 0 or more"),
        ({"health_check_interval_ms": -1}, ValueError, "health_check_interval_ms must be 0 or more"),
        ({"max_consecutive_failures": "3"}, TypeError, "max_consecutive_failures must be a whole number, not '3'"),
        ({"max_consecutive_failures": 0}, ValueError, "max_consecutive_failures must be 1 or more, not 0"),
    ],
)
def test_impossible_settings_name_service_and_setting(tmp_path, settings, kind, message):
    with pytest.raises(kind, match=message):
        Ledger(tmp_path, **settings)


@pytest.mark.parametrize("name", ["restart_pause_most", "release_timeout", "stop_timeout", "connect_delay"])
def test_for_ever_is_a_time_that_threads_can_wait(name):
    """Whoever watched the server failed each second, and no server came back."""
    assert threading.Lock().acquire(timeout=getattr(ServiceSettings(**{name: float("inf")}), name))


def test_what_may_be_changed_at_any_time_is_checked_then_too(tmp_path):
    with Ledger(tmp_path, running_unit_tests=True) as service:
        with pytest.raises(TypeError, match="max_consecutive_failures must be a whole number, not None"):
            service.max_consecutive_failures = None
        with pytest.raises(ValueError, match="health_check_interval_s must be 0 or more, not -1"):
            service.health_check_interval_s = -1
        service.health_check_interval_ms = 500
        assert (service.health_check_interval_s, service.max_consecutive_failures) == (0.5, 3)


def test_a_time_that_is_no_number_is_refused_and_spoils_no_later_check(make_ledger):
    service = make_ledger(enable_health_check=True)
    with pytest.raises(TypeError, match="current_time_ms must be a number of milliseconds, not 'now'"):
        service.health_check("now")
    assert service.health_check()


@pytest.mark.parametrize("method", [None, "fork"])
def test_a_daemonic_process_may_have_a_server_in_a_fresh_interpreter_only(tmp_path, method):
    here, there = fork.Pipe()

    def own():
        try:
            service = Ledger(tmp_path, start_method=method)
            there.send(service.pid())
            threading.Event().wait(PATIENCE)
        except ChannelError as error:
            there.send(error)

    process = fork.Process(target=own, name="worker", daemon=True)
    process.start()
    assert here.poll(PATIENCE)
    found = here.recv()
    if method is None:
        assert is_alive(found)
        process.terminate()  # which it does not survive; its server sees that
        process.join(PATIENCE)
        until(lambda: not is_alive(found))
    else:
        assert "daemonic processes are not allowed to have children" in found.message
        assert "daemon=False" in found.hint
    process.join(PATIENCE)
