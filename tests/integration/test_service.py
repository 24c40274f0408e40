"""The service base, in direct mode and in every way to start a server: calls, health checks, restarts, endings."""

import contextlib
import logging
import os
import threading
from pathlib import Path

import psutil
import pytest
from ledger import (
    Alerts,
    Clock,
    ClosureLedger,
    EntryPointLedger,
    Ledger,
    LedgerServer,
    core_of,
    hang,
    is_alive,
    kill,
    pid_after,
)
from waiting import PATIENCE, until

from shmelim.channel import ChannelClient, PickleCodec, load_key
from shmelim.errors import (
    CallerFaultError,
    ChannelError,
    MessageTooLargeError,
    NotServingError,
    OutcomeUnknownError,
    UnknownMethodError,
)
from shmelim.service import RPCServiceBase

WAYS = {
    "direct": (Ledger, {"running_unit_tests": True}),
    "fresh": (Ledger, {"start_method": None}),
    "fork": (Ledger, {"start_method": "fork"}),
    "spawn": (Ledger, {"start_method": "spawn"}),
    "forkserver": (Ledger, {"start_method": "forkserver"}),
    "closure": (ClosureLedger, {}),
    "entry point, fork": (EntryPointLedger, {"start_method": "fork"}),
    "entry point, spawn": (EntryPointLedger, {"start_method": "spawn"}),
}
RPC = [way for way in WAYS if way != "direct"]


@pytest.fixture
def make(tmp_path):
    """Make services; what is left of them afterwards is shut down."""
    with contextlib.ExitStack() as stack:

        def make(way="fork", *, directory=tmp_path, **options):
            kind, more = WAYS[way]
            return stack.enter_context(kind(directory, **more, **options))

        yield make


def levels(alerts):
    return [level for level, _ in alerts.messages]


# ------------------------------------------------------------------ the same in every way


@pytest.mark.parametrize("way", WAYS)
def test_a_life_from_the_first_call_over_two_restarts_to_the_end(make, way, tmp_path):
    clock, alerts = Clock(), Alerts()
    service = make(
        way,
        enable_health_check=True,
        health_check_interval_s=60,
        slack_notifier=alerts,
        clock_ms=clock,
        connect_wait=PATIENCE,
    )
    assert service.enter("one") == "one"
    assert service.entries() == ["one"]
    assert (service.pid() == os.getpid()) == (way == "direct")
    with pytest.raises(TypeError, match="an entry is text, not 5"):
        service.enter(5)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        service._server_proxy.fail_rpc()
    assert service.health_check()
    (tmp_path / "status").write_text("sick")
    assert service.health_check()  # not yet time
    assert service.health_check(clock.later(60)) is False
    (told,) = alerts.of("error")
    assert told.endswith(": health check failed: status error: the status is 'sick'")
    (tmp_path / "status").write_text("degraded")  # is well enough
    assert service.health_check(clock.later(60))
    assert levels(alerts) == ["error", "success"]
    if way != "direct":
        title = "vali_LedgerServer"
        assert " ".join(psutil.Process(service.server_pid).cmdline()).rstrip() == title
        assert service._server_process.daemon
        address, first = service.address, kill(service)
        assert service.pid() == pid_after(service, first)
        service.restart_server()
        assert service.pid() == service.server_pid
        assert service.address == address
        assert service.entries() == ["one"]
        until(lambda: len(alerts.messages) == 4)
        assert levels(alerts) == ["error", "success"] * 2
    process, told = service._server_process, len(alerts.messages)
    service.shutdown()
    service.shutdown()
    assert process is None or not process.is_alive()
    assert (tmp_path / "closed").exists() == (way != "closure")  # whose target does not close its server
    assert service.health_check(clock.later(60)) is False
    assert len(alerts.messages) == told


@pytest.mark.parametrize("way", ["direct", "fork"])
def test_without_health_checks_everything_is_well(make, way, tmp_path):
    service = make(way)
    (tmp_path / "status").write_text("sick")
    assert service.health_check()
    assert service.health_check(0)


def test_in_direct_mode_there_is_nothing_but_the_object(make):
    before = psutil.Process().children(recursive=True)
    service = make("direct", enable_health_check=True)
    assert service._server_proxy.local_method() == "local"
    assert service.server_pid is None
    assert service.address is None
    assert psutil.Process().children(recursive=True) == before
    with pytest.raises(ChannelError, match="is in direct mode: it has no server process to restart"):
        service.restart_server()


def test_a_direct_server_is_never_replaced(make, tmp_path):
    clock, alerts = Clock(), Alerts()
    service = make("direct", enable_health_check=True, slack_notifier=alerts, clock_ms=clock)
    server = service._server_proxy
    (tmp_path / "status").write_text("sick")
    for _ in range(5):
        assert service.health_check(clock.later(60)) is False
    assert service._server_proxy is server
    assert "no automatic restart" in alerts.of("error")[1]


# ------------------------------------------------------------------ addresses and keys


def test_a_unix_socket_instead_of_a_port(make, tmp_path):
    service = make(address=tmp_path / "s")
    assert service.port is None
    assert service.address == str(tmp_path / "s")
    assert service.enter("one") == "one"
    service.shutdown()
    assert not (tmp_path / "s").exists()


def test_the_system_chooses_a_port_once(make):
    service = make(port=0)
    port = service.port
    assert service.address == ("127.0.0.1", port)
    assert port > 0
    pid_after(service, kill(service))
    assert service.port == port
    assert service.pid() == service.server_pid


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("S", None), "a port or an address"),
        (("S", 70_000), "0 to 65535"),
        (("", 0), "cannot name a service"),
        (("a\nb", 0), "cannot name a service"),
        ((" a", 0), "cannot name a service"),
        (("x" * 61, 0), "cannot name a service"),
    ],
)
def test_impossible_arguments(arguments, error):
    class Service(RPCServiceBase):
        def _create_direct_server(self):
            raise AssertionError

        def _start_server_process(self, address, authkey, server_ready):
            raise AssertionError

    with pytest.raises(ValueError, match=error):
        Service(*arguments)
    with pytest.raises(ValueError, match="a port or an address"):
        Service("S", 1, address="/tmp/s")
    with pytest.raises(ValueError, match="stop_timeout must be 0 or more"):
        Service("S", 1, stop_timeout=-1)
    with pytest.raises(ValueError, match="connect_tries must be 1 or more"):
        Service("S", 1, connect_tries=0)
    with pytest.raises(TypeError, match="redy_timeout"):
        Service("S", 1, redy_timeout=1)


def test_both_methods_must_be_written():
    class Half(RPCServiceBase):
        def _create_direct_server(self):
            pass

    with pytest.raises(TypeError, match="_start_server_process"):
        Half("S", 0)


def test_a_key_file_lets_other_clients_in_over_restarts(make, tmp_path):
    key_path = tmp_path / "key"
    service = make(key_path=key_path)
    with ChannelClient(service.address, lambda: load_key(key_path), timeout=PATIENCE) as client:
        assert client.call("pid_rpc") == service.server_pid
        service.restart_server()
        assert client.call("pid_rpc") == service.server_pid
    assert key_path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("way", RPC)
def test_the_key_is_in_no_argument_environment_log_or_repr(make, way, caplog):
    caplog.set_level(logging.DEBUG)
    service = make(way, enable_health_check=True)
    key = core_of(service).key.for_server()
    assert len(key) == 32
    service.restart_server()
    process = psutil.Process(service.server_pid)
    shown = "".join(
        [
            caplog.text,
            *map(repr, vars(service).values()),
            *map(repr, vars(core_of(service)).values()),
            repr(service),
            repr(service._server_process),
            repr(service._server_proxy),
            Path(f"/proc/{process.pid}/cmdline").read_bytes().decode("latin-1"),
            Path(f"/proc/{process.pid}/environ").read_bytes().decode("latin-1"),
            " ".join(psutil.Process().cmdline()),
            repr(os.environ),
        ]
    )
    for form in (key.decode("latin-1"), key.hex(), repr(key)[2:-1]):
        assert form not in shown


def test_each_service_has_a_key_of_its_own(make, tmp_path):
    (tmp_path / "other").mkdir()
    first, second = make(), make(directory=tmp_path / "other")
    assert core_of(first).key.for_server() != core_of(second).key.for_server()


# ------------------------------------------------------------------ calls


def test_only_remote_methods_can_be_called(make):
    service = make()
    proxy = service._server_proxy
    for name in ("local_method", "_hidden_rpc", "close"):
        with pytest.raises(AttributeError):
            getattr(proxy, name)
    for name in ("local_method", "_hidden_rpc", "close", "__init__", "never"):
        with pytest.raises(UnknownMethodError, match="has no remote method"):
            core_of(service).client.call(name)
    with pytest.raises(UnknownMethodError, match="pid_rpc"):
        proxy.pit_rpc()


def test_no_call_blocks_for_ever(make):
    service = make(call_timeout=0.1)
    with pytest.raises(OutcomeUnknownError, match=r"hang_rpc was sent .* no reply came in time"):
        service._server_proxy.hang_rpc()
    assert service.enter("the service goes on") == "the service goes on"


def test_a_hanging_server_fails_its_health_check(make):
    clock, alerts = Clock(), Alerts()
    service = make(
        enable_health_check=True,
        health_check_timeout=0.1,
        max_consecutive_failures=2,
        slack_notifier=alerts,
        clock_ms=clock,
        stop_timeout=0.05,
    )
    first = service.server_pid
    hang(first)
    assert service.health_check() is False
    assert service.health_check(clock.later(60)) is False
    assert service.health_check(clock.later(60))
    assert service.pid() == service.server_pid != first
    assert not is_alive(first)
    assert levels(alerts) == ["error", "warning", "success"]


def test_calls_wait_for_the_next_server_if_they_may(make):
    service = make(connect_wait=PATIENCE)
    dead = kill(service)
    assert service.pid() == pid_after(service, dead)


def test_calls_without_a_server_say_so(make):
    service = make(connect_wait=0.0, restart_on_exit=False)
    kill(service)
    with pytest.raises(NotServingError, match="nobody serves at"):
        service.enter("never")
    service.restart_server()
    assert service.entries() == []


def test_the_limit_of_messages_is_the_services(make):
    service = make(max_message=20_000)
    with pytest.raises(MessageTooLargeError):
        service.enter("x" * 30_000)


class SlowServer(LedgerServer):
    def _begin(self, what):
        self.enter_rpc(f"{what} begun")
        until((self.directory / "go on").exists)
        return os.getpid()

    def repeatable_rpc(self):
        return self._begin("repeatable")

    def once_rpc(self):
        return self._begin("once")


class SlowLedger(Ledger):
    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            SlowServer, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )


def test_idempotent_calls_are_repeated_others_never(tmp_path):
    """The server dies with both requests in its hands: only what was said to be repeatable is repeated."""
    with SlowLedger(tmp_path, idempotent=["repeatable_rpc"], connect_wait=PATIENCE) as service:
        outcomes = {}

        def call(name):
            try:
                outcomes[name] = getattr(service._server_proxy, f"{name}_rpc")()
            except OutcomeUnknownError as error:
                outcomes[name] = type(error)

        threads = [threading.Thread(target=call, args=(name,)) for name in ("repeatable", "once")]
        for thread in threads:
            thread.start()
        journal = tmp_path / "journal"
        until(lambda: len(journal.read_text().splitlines()) == 2)
        dead = kill(service)
        (tmp_path / "go on").touch()
        for thread in threads:
            thread.join(PATIENCE)
        assert outcomes == {"repeatable": pid_after(service, dead), "once": OutcomeUnknownError}
        assert sorted(service.entries()) == ["once begun", "repeatable begun", "repeatable begun"]


def test_rich_values_with_a_codec_that_carries_them(tmp_path):
    with PickledService("Rich", 0, codec=PickleCodec(), call_timeout=PATIENCE) as service:
        assert service._server_proxy.echo_rpc(Rich(5)) == Rich(5)
        with pytest.raises(TypeError, match="cannot be sent"):
            service._server_proxy.echo_rpc(lambda: None)
        with pytest.raises(TypeError, match="cannot be sent"):
            service._server_proxy.unpicklable_rpc()
        service.restart_server()
        assert service._server_proxy.echo_rpc({Rich(6)}) == {Rich(6)}


class Rich:
    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return self.value == other.value

    def __hash__(self):
        return hash(self.value)


class RichServer:
    def echo_rpc(self, value):
        return value

    def unpicklable_rpc(self):
        return lambda: None


class PickledService(RPCServiceBase):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._initialize_service()

    def _create_direct_server(self):
        return RichServer()

    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(RichServer, address=address, authkey=authkey, server_ready=server_ready)


# ------------------------------------------------------------------ restarts


def test_two_restarts_for_one_failure_are_one(make):
    service = make()
    failing = core_of(service).page.server
    assert core_of(service).restart(failing)
    pid = service.server_pid
    assert not core_of(service).restart(failing)
    assert service.server_pid == pid
    assert core_of(service).restart(core_of(service).page.server)
    assert service.server_pid != pid


def test_threads_that_all_see_a_server_hang_restart_it_once(make):
    service = make(
        enable_health_check=True, max_consecutive_failures=1, health_check_timeout=0.2, stop_timeout=0.1
    )
    alerts = service.slack_notifier = Alerts()
    hang(service.server_pid)
    barrier = threading.Barrier(8)

    def check():
        barrier.wait(PATIENCE)
        service.health_check(10**15)

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert levels(alerts) == ["error", "warning", "success"]
    assert service.pid() == service.server_pid


class FaultyServer(LedgerServer):
    def health_check_rpc(self):
        raise self.error


class PoorServer(FaultyServer):
    error = MemoryError()


class CutOffServer(FaultyServer):
    error = CallerFaultError("cannot connect to another service: Too many open files")


@pytest.mark.parametrize("kind", [PoorServer, CutOffServer])
def test_a_server_that_wants_for_memory_or_descriptors_is_no_fault_of_who_checks_it(tmp_path, kind):
    """It was never restarted: who checked took the error for its own."""

    class Service(Ledger):
        def _start_server_process(self, address, authkey, server_ready):
            ready = {"address": address, "authkey": authkey, "server_ready": server_ready}
            return self._spawn_server(kind, self.directory, **ready)

    with Service(tmp_path, enable_health_check=True, max_consecutive_failures=1) as service:
        pid = service.server_pid
        assert service.health_check() is False
        assert service.server_pid != pid


def test_automatic_restart_can_be_off_and_on_again(make):
    clock, alerts = Clock(), Alerts()
    service = make(
        enable_health_check=True,
        enable_auto_restart=False,
        slack_notifier=alerts,
        clock_ms=clock,
        connect_wait=0.0,
    )
    dead = kill(service)
    until(lambda: alerts.of("error"))  # of the owner
    for _ in range(5):
        assert service.health_check(clock.later(60)) is False
    with pytest.raises(NotServingError):
        service.pid()
    until(lambda: len(alerts.of("error")) == 2)
    assert "no automatic restart" in alerts.of("error")[1]
    service.restart_server()  # by hand
    assert service.health_check(clock.later(60))
    assert len(alerts.of("success")) == 1
    dead = kill(service)
    until(lambda: len(alerts.of("error")) == 3)
    service.enable_auto_restart = True
    pid_after(service, dead)


@pytest.mark.parametrize("itself", [True, False])
def test_a_restart_that_fails_is_tried_again_and_told_once(make, tmp_path, itself):
    """By the owner's thread, or by the checks where nobody else restarts."""
    clock, alerts = Clock(), Alerts()
    service = make(
        enable_health_check=True,
        max_consecutive_failures=1,
        slack_notifier=alerts,
        clock_ms=clock,
        restart_on_exit=itself,
        restart_pause=0.01,
    )
    service.directory = tmp_path / "missing"
    kill(service)
    for _ in range(3):
        assert service.health_check(clock.later(60)) is False
    until(lambda: len(alerts.of("error")) == 2)
    assert "FileNotFoundError" in alerts.of("error")[1]
    service.directory = tmp_path
    until(lambda: service.health_check(clock.later(60)))
    until(lambda: alerts.of("success"))
    assert levels(alerts) == ["error", "error", *(() if itself else ("warning",)), "success"]


@pytest.mark.parametrize(
    "lacking", ["what is given cannot be pickled", "the key's directory", "the socket's directory"]
)
def test_what_the_next_server_needs_is_looked_at_before_this_one_is_ended(make, tmp_path, lacking):
    place = tmp_path / "place"
    place.mkdir()
    where = {"address": place / "s"} if "socket" in lacking else {"key_path": place / "key"}
    service = make("fresh", enable_health_check=True, max_consecutive_failures=1, **where)
    alerts, pid = Alerts(), service.pid()
    service.slack_notifier = alerts
    if "pickled" in lacking:
        factory, arguments, *rest = service._server_process.recipe
        service._server_process.recipe = (factory, (*arguments, threading.Lock()), *rest)
    else:
        place.rename(tmp_path / "elsewhere")
        place.touch()
    with pytest.raises(ChannelError, match="LedgerServer goes on with its server, since another could not"):
        service.restart_server()
    (tmp_path / "status").write_text("sick")
    for number in range(1, 4):
        assert service.health_check(60_000.0 * number) is False
    assert is_alive(pid)
    assert service.server_pid == pid
    assert levels(alerts) == ["error", "error"]
    assert "goes on with its server" in alerts.of("error")[1]
    (tmp_path / "status").unlink()
    assert service.health_check(10**9) is True


def test_after_shutdown_nothing_is_restarted(make):
    service = make(enable_health_check=True)
    service.shutdown()
    with pytest.raises(ChannelError, match="was shut down"):
        service.restart_server()
    with pytest.raises(ChannelError):
        service.enter("never")
    with pytest.raises(RuntimeError):
        service._initialize_service()
