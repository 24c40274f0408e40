"""A real engine, real processes, and what may go wrong with them: all become equal again, nothing else suffers.

How long it took is printed (``pytest -s``), and judged by nobody.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from engines import PROGRAM, RealEngine
from invoking import CliRunner
from msgspec import structs
from serving import Served, row
from waiting import until

from bench.fleet import Delay
from shmelim import EliminationReader
from shmelim.cli.demo import hosts
from shmelim.cli.main import cli
from shmelim.errors import NotServingError, StaleError
from shmelim.fleet import publishing
from shmelim.fleet.engine import EngineError, Id, LogAheadError
from shmelim.fleet.messages import pack, unpack_head
from shmelim.fleet.redis_engine import RedisEngine, place_of
from shmelim.watch import seeing
from shmelim.watch.metrics import text_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="redis-server is not installed (apt-get install redis-server)"
)


_stamps = itertools.count(1)


class Process:
    """A command that runs, and what it says."""

    def __init__(self, *arguments: str, within: tuple[str, ...] = (), **environment: str) -> None:
        command = [*within, sys.executable, "-m", "shmelim", *arguments, "--json"]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.lines: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.lines.append(json.loads(line))

    @property
    def events(self) -> list[dict[str, Any]]:
        return [each for each in self.lines if "event" in each]

    def said(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == event]

    def has_said(self, event: str, times: int = 1) -> None:
        def enough() -> bool:
            assert self._process.poll() is None or len(self.said(event)) >= times, self._process.stderr.read()
            return len(self.said(event)) >= times

        until(enough, f"{event}, said {times} times")

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        return self._end(signal.SIGTERM)

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def wait(self) -> tuple[int, str]:
        code = self._process.wait(60)
        self._thread.join()
        return code, self._process.stderr.read()

    def _end(self, number: int) -> int:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        code = self._process.wait(60)
        self._thread.join()
        self._process.stdout.close()
        self._process.stderr.close()
        return code


class Fleet:
    """A server, an engine, a publisher, and followers into tables of other names."""

    def __init__(self, served: Served, engine: RealEngine, stack: contextlib.ExitStack) -> None:
        self.served, self.engine = served, engine
        self._stack = stack

    def publish(self, *options: str, url: str = "", within: tuple[str, ...] = ()) -> Process:
        directory = str(self.served.state_dir)
        arguments = [
            "--to",
            url or self.engine.url,
            "--name",
            self.served.name,
            "--state-dir",
            directory,
            "--beat",
            "0.1",
        ]
        return self._started("publish", *arguments, *options, within=within)

    def follow(self, name: str, *options: str, url: str = "", within: tuple[str, ...] = ()) -> Process:
        where = ["--from", url or self.engine.url, "--name", self.served.name, "--as", name]
        return self._started("follow", *where, *options, within=within)

    def _started(self, *arguments: str, within: tuple[str, ...]) -> Process:
        process = Process(*arguments, within=within, SHMELIM_RUNTIME_DIR=str(self.served.runtime))
        self._stack.callback(process.kill)
        return process

    def is_equal(self, name: str) -> bool:
        try:
            theirs = EliminationReader(name).snapshot()
        except NotServingError:
            return False
        return theirs[1:] == self.served.reader().snapshot()[1:]

    def becomes_equal(self, name: str, after: str = "") -> None:
        began = time.perf_counter()
        until(lambda: self.is_equal(name), f"{name} equal")
        if after:
            print(f"{after}: equal after {time.perf_counter() - began:.2f} s")

    def line(self, name: str) -> int:
        return until(lambda: EliminationReader(name).position, "a position").line


@pytest.fixture
def fleet(serve) -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        served = serve(files="off", sync_guard="off")
        served.client().sync_eliminations([row(f"h{n}") for n in range(100)])
        yield Fleet(served, stack.enter_context(RealEngine()), stack)


@pytest.fixture
def name(new_name) -> str:
    return new_name()


def change(fleet: Fleet) -> None:
    hotkey = f"new{next(_stamps)}"
    fleet.served.client().add_elimination(hotkey, row(hotkey))


def test_what_is_acknowledged_is_visible_on_the_follower_and_nothing_else(fleet, name):
    publisher, follower = fleet.publish(), fleet.follow(name)
    follower.has_said("following")
    fleet.becomes_equal(name)
    client, reader = fleet.served.client(), EliminationReader(name)
    late = []
    for number in range(50):
        hotkey = f"late{number}"
        client.add_elimination(hotkey, row(hotkey))
        began = time.perf_counter()
        until(lambda hotkey=hotkey: reader.is_hotkey_eliminated(hotkey))
        late.append(time.perf_counter() - began)
    late.sort()
    print(f"acknowledged to visible: p50 {late[25] * 1e3:.1f} ms, worst {late[-1] * 1e3:.1f} ms")
    assert reader.get_elimination("late7") == row("late7")
    until(lambda: 0 < (reader.staleness or 0) < 5)
    assert reader.source == f"{fleet.engine.url} {fleet.served.name}"
    assert publisher.stop() == follower.stop() == 0
    assert publisher.said("error") == follower.said("error") == []


class TestKilled:
    def test_a_follower(self, fleet, name):
        fleet.publish()
        follower = fleet.follow(name)
        follower.has_said("following")
        fleet.becomes_equal(name)
        line, root = fleet.line(name), EliminationReader(name)._table._view.root.identity
        follower.kill()
        change(fleet)
        fleet.follow(name)
        fleet.becomes_equal(name, "follower killed")
        assert fleet.line(name) == line
        assert EliminationReader(name)._table._view.root.identity == root

    def test_a_publisher(self, fleet, name):
        publisher = fleet.publish()
        follower = fleet.follow(name)
        follower.has_said("following")
        line = fleet.line(name)
        publisher.kill()
        change(fleet)
        fleet.publish()
        fleet.becomes_equal(name, "publisher killed")
        assert fleet.line(name) == line  # it went on from what the head says

    def test_the_engine(self, fleet, name):
        publisher, follower = fleet.publish(), fleet.follow(name)
        follower.has_said("following")
        fleet.engine.kill()
        began = time.perf_counter()
        for _ in range(20):
            change(fleet)  # which asks nobody there
        print(f"20 changes with a dead engine: {time.perf_counter() - began:.3f} s")
        publisher.has_said("error")
        follower.has_said("error")
        assert fleet.engine.url.removeprefix("unix://") in publisher.said("error")[0]["error"]
        assert EliminationReader(name).is_hotkey_eliminated("h1")
        fleet.engine.start()
        fleet.becomes_equal(name, "engine killed, and empty")
        publisher.has_said("error_over")

    def test_the_server(self, fleet, name):
        fleet.publish()
        follower = fleet.follow(name)
        follower.has_said("following")
        fleet.served.kill()
        served = fleet.served = Served(
            fleet.served.name, fleet.served.state_dir, runtime_base=fleet.served.runtime, files="off"
        )
        with served:
            change(fleet)
            fleet.becomes_equal(name, "server killed")


class TestTheEngineLoses:
    def test_everything(self, fleet, name):
        fleet.publish()
        fleet.follow(name).has_said("following")
        line = fleet.line(name)
        fleet.engine.client().flushall()
        change(fleet)
        fleet.becomes_equal(name, "flushed")
        until(lambda: fleet.line(name) > line, "a higher line")

    def test_the_log(self, fleet, name):
        fleet.publish()
        follower = fleet.follow(name)
        follower.has_said("following")
        fleet.becomes_equal(name)
        follower.kill()
        for _ in range(5):
            change(fleet)
        log = f"shmelim:{{{fleet.served.name}}}:log"
        # Its snapshot is older than what is trimmed.
        until(lambda: fleet.engine.client().xlen(log) > 5)
        fleet.engine.client().xtrim(log, maxlen=0, approximate=False)
        fleet.follow(name)
        fleet.becomes_equal(name, "log trimmed away")

    def test_its_tail(self, fleet, name):
        fleet.publish()
        fleet.follow(name).has_said("following")
        fleet.becomes_equal(name)
        keys = fleet.engine.client().keys("*")
        kept = {key: fleet.engine.client().dump(key) for key in keys}
        for _ in range(5):
            change(fleet)
        fleet.becomes_equal(name)
        with fleet.engine.client().pipeline() as asked:  # back to what it was, in one step
            asked.flushall()
            for key, value in kept.items():
                asked.restore(key, 0, value)
            asked.execute()
        change(fleet)
        fleet.becomes_equal(name, "engine rolled back")

    def test_its_head_and_what_was_in_its_log(self, fleet, name):
        """A stream that was emptied goes on to refuse what is not above all that it ever had."""
        first = fleet.publish()
        fleet.follow(name).has_said("following")
        fleet.becomes_equal(name)
        first.kill()
        key = f"shmelim:{{{fleet.served.name}}}"
        engine = RedisEngine(fleet.engine.url, fleet.served.name)
        term = unpack_head(engine.look().head).term
        with fleet.engine.client().pipeline() as asked:
            asked.delete(f"{key}:head")
            asked.xtrim(f"{key}:log", maxlen=0, approximate=False)
            asked.execute()
        assert engine.top().term == term
        change(fleet)
        second = fleet.publish()
        fleet.becomes_equal(name, "head and log emptied")
        assert second.said("error") == []
        assert unpack_head(engine.look().head).term == term + 1
        engine.close()


class TestFailover:
    """A replica takes the engine's place, as of when it last heard of it."""

    @pytest.fixture
    def replica(self, fleet) -> Iterator[RealEngine]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        client = fleet.engine.client()
        client.config_set("bind", "127.0.0.1")
        client.config_set("port", port)
        with RealEngine("--replicaof", f"127.0.0.1 {port}") as replica:
            yield replica

    @staticmethod
    def takes_the_place_of(replica: RealEngine, engine: RealEngine) -> None:
        replica.client().replicaof("NO", "ONE")
        engine.kill()
        replica.socket.rename(engine.socket)

    @staticmethod
    def has_what(replica: RealEngine, fleet: Fleet) -> bool:
        key = f"shmelim:{{{fleet.served.name}}}:head"
        return fleet.engine.client().get(key) == replica.client().get(key) is not None

    def test_to_one_that_is_behind(self, fleet, replica, name):
        fleet.publish()
        fleet.follow(name).has_said("following")
        fleet.becomes_equal(name)
        until(lambda: self.has_what(replica, fleet), "replicated")
        replica.client().replicaof("NO", "ONE")
        for _ in range(5):
            change(fleet)
        fleet.becomes_equal(name)
        line = fleet.line(name)
        self.takes_the_place_of(replica, fleet.engine)
        change(fleet)
        fleet.becomes_equal(name, "failover to a replica that is behind")
        until(lambda: fleet.line(name) > line, "a higher line")

    def test_to_one_that_is_level(self, fleet, replica, name):
        publisher = fleet.publish()
        fleet.follow(name).has_said("following")
        fleet.becomes_equal(name)
        publisher.pause()  # so that it says nothing more that the replica may not hear of
        fleet.engine.client().ping()
        until(lambda: self.has_what(replica, fleet), "replicated")
        line = fleet.line(name)
        self.takes_the_place_of(replica, fleet.engine)
        publisher.go_on()
        change(fleet)
        fleet.becomes_equal(name, "failover to a replica that is level")
        assert fleet.line(name) == line
        assert publisher.said("leading")[0]["line"] == line


def test_somebody_who_writes_into_the_log_stops_nobody(fleet, name):
    publisher, follower = fleet.publish(), fleet.follow(name)
    follower.has_said("following")
    fleet.becomes_equal(name)
    line = fleet.line(name)
    fleet.engine.client().xadd(f"shmelim:{{{fleet.served.name}}}:log", {"m": "does it work?"})
    change(fleet)
    fleet.becomes_equal(name, "somebody else's entry in the log")
    assert fleet.line(name) == line
    publisher.has_said("error_over")
    follower.has_said("engine_data_over")


def test_a_log_that_nothing_is_above_needs_a_person(fleet):
    publisher = fleet.publish()
    publisher.has_said("leading")
    highest = (1 << 64) - 1
    fleet.engine.client().xadd(f"shmelim:{{{fleet.served.name}}}:log", {"m": ""}, id=f"{highest}-{highest}")
    code, told = publisher.wait()
    assert code == 4
    assert "delete what stands under the name" in told


def test_a_publisher_that_hung_while_another_took_over_ends(fleet, name):
    first = fleet.publish()
    first.has_said("leading")
    fleet.follow(name).has_said("following")
    first.pause()
    second = fleet.publish()
    second.has_said("leading")
    change(fleet)
    fleet.becomes_equal(name)
    first.go_on()
    code, told = first.wait()
    assert (code, "another publisher has taken over" in told) == (4, True)
    change(fleet)
    fleet.becomes_equal(name, "a publisher that hung")
    assert second.said("error") == []


def test_a_second_publisher_takes_over_and_the_first_one_ends(fleet, name):
    first = fleet.publish()
    first.has_said("leading")
    fleet.follow(name).has_said("following")
    line = fleet.line(name)
    second = fleet.publish()
    second.has_said("leading")
    code, told = first.wait()
    assert code == 4
    assert "another publisher has taken over" in told
    change(fleet)
    fleet.becomes_equal(name, "second publisher")
    assert fleet.line(name) == line


def test_another_store_is_refused_under_the_name_until_it_is_to_take_over(fleet, name, serve):
    first = fleet.publish()
    fleet.follow(name).has_said("following")
    fleet.becomes_equal(name)
    reader, line = EliminationReader(name), fleet.line(name)
    other = serve(files="off")
    other.client().add_elimination("of the other", row("of the other"))
    code, told = fleet.publish("--state-dir", str(other.state_dir)).wait()
    assert code == 4
    assert "belongs to the store" in told
    assert "--take-over" in told
    change(fleet)
    fleet.becomes_equal(name)
    assert first.said("error") == []
    fleet.publish("--state-dir", str(other.state_dir), "--take-over").has_said("leading")
    code, told = first.wait()
    assert (code, "another publisher has taken over" in told) == (4, True)
    until(lambda: reader.get_eliminations_dict() == other.reader().get_eliminations_dict(), "the other store's")
    until(lambda: fleet.line(name) > line, "a higher line")


def test_who_must_not_trade_on_what_is_old_is_refused_until_it_is_young_again(fleet, name):
    publisher = fleet.publish()
    fleet.follow(name).has_said("following")
    fleet.becomes_equal(name)
    careful = EliminationReader(name, max_staleness=3, when_stale="refuse")
    strict = EliminationReader(name, max_staleness=3, when_stale="raise")
    until(lambda: not careful.is_hotkey_eliminated("nobody"), "it is young")
    publisher.kill()
    until(lambda: careful.is_hotkey_eliminated("nobody"), "it is old")
    with pytest.raises(StaleError, match=fleet.engine.url):
        strict.is_hotkey_eliminated("nobody")
    fleet.publish()
    until(lambda: not careful.is_hotkey_eliminated("nobody"), "it is young again")


def test_a_store_that_was_restored_begins_a_new_line(fleet, name, tmp_path):
    fleet.publish()
    fleet.follow(name).has_said("following")
    shmelim = [sys.executable, "-m", "shmelim"]
    at = ["--name", fleet.served.name]
    environment = os.environ | {"SHMELIM_RUNTIME_DIR": str(fleet.served.runtime)}
    subprocess.run([*shmelim, "backup", str(tmp_path / "backup"), *at], check=True, env=environment, stdout=-3)
    for _ in range(3):
        change(fleet)
    fleet.becomes_equal(name)
    line = fleet.line(name)
    fleet.served.stop()
    subprocess.run(
        [*shmelim, "restore", str(tmp_path / "backup"), *at, "--state-dir", str(fleet.served.state_dir), "--yes"],
        check=True,
        env=environment,
        stdout=-3,
    )
    served = fleet.served = Served(
        fleet.served.name,
        fleet.served.state_dir,
        runtime_base=fleet.served.runtime,
        files="off",
        replace_published=True,
    )
    with served:
        for _ in range(3):
            change(fleet)
        fleet.becomes_equal(name, "store restored")
        until(lambda: fleet.line(name) > line)


def test_a_large_sync_comes_in_parts_and_at_once(fleet, name):
    fleet.publish()
    fleet.follow(name).has_said("following")
    fleet.becomes_equal(name)
    reader, counts, stop = EliminationReader(name), set(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            counts.add(len(reader))

    watching = threading.Thread(target=watch)
    watching.start()
    fleet.served.client().sync_eliminations([row(f"big{n}", pad=500) for n in range(5000)])
    fleet.becomes_equal(name, "sync of 5,000")
    stop.set()
    watching.join()
    assert counts == {100, 5000}


class TestHold:
    def test_followers_keep_what_they_have(self, fleet, name):
        publisher, follower = fleet.publish(), fleet.follow(name)
        follower.has_said("following")
        fleet.becomes_equal(name)
        engine, reader = RedisEngine(fleet.engine.url, fleet.served.name), EliminationReader(name)
        until(lambda: reader.as_of)
        engine.hold(b"look first")
        publisher.has_said("held")
        change(fleet)
        as_of = reader.as_of
        # Beats come, and say that something newer is there.
        before = engine.look().head
        until(lambda: engine.look().head != before)
        assert not fleet.is_equal(name)
        engine.hold(None)
        fleet.becomes_equal(name)
        until(lambda: reader.as_of > as_of)
        publisher.has_said("held_over")
        engine.close()

    def test_what_the_guard_noticed_waits_for_somebody(self, fleet, name):
        fleet.served.stop()
        options = {"runtime_base": fleet.served.runtime, "files": "off"}
        served = fleet.served = Served(fleet.served.name, fleet.served.state_dir, **options)
        with served:
            publisher = fleet.publish("--hold-guarded")
            fleet.follow(name).has_said("following")
            fleet.becomes_equal(name)
            served.client().sync_eliminations([row(f"h{n}") for n in range(10)])
            publisher.has_said("held")
            assert len(EliminationReader(name)) == 100
            served.client().acknowledge()
            fleet.becomes_equal(name)


class Network:
    """Two hosts, as network namespaces with one cable: where the engine is, and ``far`` from it."""

    ADDRESS, FAR = "10.0.0.1", "10.0.0.2"

    def __init__(self) -> None:
        mark = secrets.token_hex(3)
        self._here, self._far = f"shmelim-{mark}a", f"shmelim-{mark}b"
        self.here, self.far = (("ip", "netns", "exec", each) for each in (self._here, self._far))

    def __enter__(self) -> Self:
        for namespace in (self._here, self._far):
            if not self._ip("netns", "add", namespace):
                self.__exit__()
                pytest.skip("this user may not make network namespaces")
        cable = ["type", "veth", "peer", "name", "cable", "netns", self._far]
        assert self._ip("-n", self._here, "link", "add", "cable", *cable)
        for namespace, address in ((self._here, self.ADDRESS), (self._far, self.FAR)):
            assert self._ip("-n", namespace, "address", "add", f"{address}/24", "dev", "cable")
            assert self._ip("-n", namespace, "link", "set", "cable", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in (self._here, self._far):
            self._ip("netns", "delete", namespace)

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """What is sent arrives at the engine, and no answer comes back, nor any refusal."""
        # A route that goes nowhere would not do: what comes from where nothing can be sent is dropped as well.
        neighbour = ["-n", self._here, "neighbour", "replace", self.FAR, "dev", "cable"]
        assert self._ip(*neighbour, "lladdr", "02:00:00:00:00:01", "nud", "permanent")
        yield
        address = self._address_of_cable()
        assert self._ip(*neighbour, "lladdr", address, "nud", "reachable")

    def _address_of_cable(self) -> str:
        shown = subprocess.run(
            ["ip", "-n", self._far, "-j", "link", "show", "cable"], capture_output=True, check=True
        )
        return json.loads(shown.stdout)[0]["address"]

    @staticmethod
    def _ip(*arguments: str) -> bool:
        try:
            return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False


class TestAHostThatIsCutOff:
    @pytest.fixture
    def network(self) -> Iterator[Network]:
        with Network() as network:
            yield network

    @pytest.fixture
    def apart(self, serve, network) -> Iterator[Fleet]:
        options = ("--port", "6379", "--bind", network.ADDRESS, "--protected-mode", "no")
        with contextlib.ExitStack() as stack:
            served = serve(files="off", sync_guard="off")
            served.client().sync_eliminations([row(f"h{n}") for n in range(100)])
            engine = stack.enter_context(RealEngine(*options, within=network.here))
            yield Fleet(served, engine, stack)

    def test_a_follower(self, apart, network, name):
        apart.publish()
        follower = apart.follow(name, url=f"redis://{network.ADDRESS}", within=network.far)
        follower.has_said("following")
        apart.becomes_equal(name)
        reader = EliminationReader(name)
        until(lambda: reader.staleness is not None, "an age")
        line = apart.line(name)
        with network.deaf():
            began = time.clock_gettime(time.CLOCK_BOOTTIME)
            for _ in range(20):
                change(apart)
            follower.has_said("error")
            passed = time.clock_gettime(time.CLOCK_BOOTTIME) - began
            assert reader.is_hotkey_eliminated("h1")
            assert len(reader) < len(apart.served.reader())
            assert reader.staleness >= passed, "since then it cannot have heard of anything"
        apart.becomes_equal(name, "a follower cut off")
        change(apart)
        apart.becomes_equal(name)
        assert apart.line(name) == line, "it went on from its own position"
        follower.has_said("error_over")

    def test_a_publisher(self, apart, network, name):
        # Between two beats the first thing that it asks for is to append a change.
        publisher = apart.publish("--beat", "5", url=f"redis://{network.ADDRESS}", within=network.far)
        apart.follow(name).has_said("following")
        apart.becomes_equal(name)
        line = apart.line(name)
        engine = RedisEngine(apart.engine.url, apart.served.name)
        until(lambda: unpack_head(engine.look().head).last.number >= 2, "its first beat")
        change(apart)
        apart.becomes_equal(name)
        before = unpack_head(engine.look().head).seq
        # What it asks after a beat is over, and it has heard that its change was taken.
        until(lambda: publishing.publishing(apart.served.name).seq == before, "the end of its turn")
        with network.deaf():
            began = time.perf_counter()
            for _ in range(20):
                change(apart)
            print(f"20 changes while the publisher is cut off: {time.perf_counter() - began:.3f} s")
            publisher.has_said("error")
            assert unpack_head(engine.look().head).seq > before, "the engine did what it could not confirm"
        apart.becomes_equal(name, "a publisher cut off")
        publisher.has_said("error_over")
        change(apart)  # which comes after whatever it did first
        apart.becomes_equal(name)
        assert apart.line(name) == line, "it found out what the engine had done"
        assert len(publisher.said("leading")) == 1


class TestTheSourcesHostKnowsOfThePublisher:
    def problems(self, fleet) -> list[tuple[str, str]]:
        return [(each["name"], each["severity"]) for each in seeing.see(fleet.served.name).problems]

    def test_once_it_is_dead_fails_or_was_fenced(self, fleet, monkeypatch):
        first = fleet.publish()
        first.has_said("leading")
        until(lambda: seeing.see(fleet.served.name).publishing, "it says something")
        assert self.problems(fleet) == []
        first.kill()
        monkeypatch.setattr(publishing, "_SILENT", 0.0)
        assert self.problems(fleet) == [("publisher_silent", "degraded")]
        assert b'shmelim_publisher_up{name="%s"} 0.0' % fleet.served.name.encode() in text_of(fleet.served.name)
        assert CliRunner().invoke(cli, ["status", "--name", fleet.served.name]).exit_code == 1
        second = fleet.publish()
        second.has_said("leading")
        until(lambda: self.problems(fleet) == [], "it was started again")
        fleet.engine.kill()
        until(lambda: self.problems(fleet) == [("publisher_error", "degraded")], "the engine missed")
        fleet.engine.start()
        until(lambda: self.problems(fleet) == [], "it healed")
        elsewhere = RedisEngine(fleet.engine.url, fleet.served.name)

        def taken() -> bool:
            look = elsewhere.look()
            if look.head is None:
                return False
            head = unpack_head(look.head)
            last = Id(head.last.term + 1, 0)
            theirs = structs.replace(head, owner=b"another publisher"[:16], last=last)
            return elsewhere.commit(look.head, pack(theirs), (last, b"theirs"))

        until(taken, "another one takes over")
        code, said = second.wait()
        assert (code, "taken over" in said) == (4, True)
        assert self.problems(fleet) == [("publisher_ended", "degraded")]
        third = fleet.publish()
        until(lambda: self.problems(fleet) == [], "it was started again")
        assert third.stop() == 0
        assert seeing.see(fleet.served.name).publishing is None


class TestAnEngineThatIsNotWell:
    def test_a_full_one(self, fleet, name):
        publisher = fleet.publish()
        fleet.follow(name).has_said("following")
        client = fleet.engine.client()
        client.config_set("maxmemory", "1mb")
        change(fleet)
        publisher.has_said("error")
        assert "maxmemory" in publisher.said("error")[0]["error"]
        assert "maxmemory" in publisher.said("error")[0]["hint"]
        client.config_set("maxmemory", "0")
        fleet.becomes_equal(name, "engine full")

    def test_a_hanging_one(self, fleet, name):
        publisher = fleet.publish()
        fleet.follow(name).has_said("following")
        fleet.engine.pause()
        began = time.perf_counter()
        for _ in range(20):
            change(fleet)
        print(f"20 changes with a hanging engine: {time.perf_counter() - began:.3f} s")
        publisher.has_said("error")
        fleet.engine.go_on()
        fleet.becomes_equal(name, "engine hung")

    def test_a_wrong_password_and_the_right_one(self, serve, name, tmp_path):
        served = serve(files="off")
        with contextlib.ExitStack() as stack:
            engine = stack.enter_context(RealEngine("--requirepass", "secret-of-ours"))
            fleet = Fleet(served, engine, stack)
            wrong, right = tmp_path / "wrong", tmp_path / "right"
            wrong.write_text("not-that\n")
            right.write_text("secret-of-ours\n")
            publisher = fleet.publish("--password-file", str(wrong))
            publisher.has_said("error")
            assert "password" in publisher.said("error")[0]["hint"]
            assert "not-that" not in json.dumps(publisher.events)
            wrong.write_text("secret-of-ours\n")
            publisher.has_said("leading")
            none = fleet.follow(name)
            none.has_said("error")
            assert "--password-file" in none.said("error")[0]["hint"]
            none.kill()
            fleet.follow(name, "--password-file", str(right)).has_said("following")
            fleet.becomes_equal(name)

    def test_a_password_file_that_is_away_for_a_while(self, serve, name, tmp_path):
        password = tmp_path / "password"
        password.write_text("ours\n")
        engine = RealEngine("--requirepass", "ours")
        with engine, contextlib.closing(RedisEngine(engine.url, "any", password_file=password)) as ours:
            ours.look()
            password.rename(tmp_path / "away")
            engine.client(password="ours").execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no")
            for _ in range(3):
                with pytest.raises(EngineError) as caught:
                    ours.look()
            assert str(password) in caught.value.message
            assert "may read" in caught.value.hint
            (tmp_path / "away").rename(password)
            ours.look()

    def test_one_that_answers_what_no_engine_does(self, tmp_path):
        for answer in (b":-1\r\n" * 9, b"*2\r\n:-1\r\n:0\r\n" * 9, b"*1\r\n$-1\r\n" * 9, b"*0\r\n" * 9):
            directory = tmp_path / secrets.token_hex(4)
            directory.mkdir()
            with answering(directory, answer, raw=True) as url:
                engine = RedisEngine(url, "any", deadline=0.5)
                for ask in (
                    engine.look,
                    lambda engine=engine: engine.look(Id(0, 0), 9),
                    engine.top,
                    engine.reports,
                ):
                    with pytest.raises(EngineError):
                        ask()

    def test_an_older_one(self, tmp_path):
        with answering(tmp_path, b"redis_version:6.2.14") as url, pytest.raises(EngineError) as caught:
            RedisEngine(url, "any").look()
        assert "6.2.14" in str(caught.value)
        assert "7.0" in str(caught.value)

    def test_one_that_speaks_something_else(self, tmp_path):
        with answering(tmp_path, b"220 mail.example ESMTP\r\n", raw=True) as url, pytest.raises(EngineError):
            RedisEngine(url, "any", deadline=0.5).look()


class TestWhoMayWhat:
    """The users of docs/fleet.md can do what they are for, and nothing else."""

    @pytest.fixture
    def secured(self, serve, name, tmp_path) -> Iterator[tuple[Fleet, str]]:
        served = serve(files="off")
        password = tmp_path / "password"
        password.write_text("ours\n")
        lines = (Path(__file__).parents[2] / "docs" / "fleet.md").read_text().replace(" \\\n", " ").splitlines()
        users = [line.split() for line in lines if line.startswith("    user ")]
        with contextlib.ExitStack() as stack:
            engine = stack.enter_context(RealEngine())
            for _, user, *said in users:
                rules = [each.replace("NAME", served.name).replace(">…", ">ours") for each in said]
                engine.client().execute_command("ACL", "SETUSER", user, *rules)
            engine.client().execute_command("ACL", "SETUSER", "default", "off")
            yield Fleet(served, engine, stack), str(password)

    @staticmethod
    def at(fleet: Fleet, user: str, password: str) -> RedisEngine:
        return RedisEngine(
            fleet.engine.url.replace("//", f"//{user}@"), fleet.served.name, password_file=Path(password)
        )

    def test_they_publish_follow_and_hold(self, secured, name):
        fleet, password = secured
        address, options = fleet.engine.url, ("--password-file", password)
        fleet.engine.url = address.replace("//", "//publisher@")
        publisher = fleet.publish(*options)
        publisher.has_said("leading")
        fleet.engine.url = address.replace("//", "//follower@")
        follower = fleet.follow(name, *options)
        follower.has_said("following")
        change(fleet)
        fleet.becomes_equal(name)
        until(lambda: EliminationReader(name).staleness is not None, "an age")
        fleet.engine.url = address
        self.at(fleet, "operator", password).hold(b"wait")
        publisher.has_said("held")
        follower.has_said("held")
        self.at(fleet, "operator", password).hold(None)
        assert set(self.at(fleet, "operator", password).reports())
        assert follower.stop() == 0
        assert not self.at(fleet, "follower", password).reports()
        assert not publisher.said("error")
        assert not follower.said("error")

    def test_a_follower_cannot_change_what_others_see(self, secured):
        fleet, password = secured
        publishing = self.at(fleet, "publisher", password)
        assert publishing.commit(None, b"head", (Id(1, 0), b"entry"))
        for user in ("follower", "operator"):
            engine = self.at(fleet, user, password)
            for refused in (
                lambda engine=engine: engine.commit(b"head", b"mine", (Id(2, 0), b"entry")),
                lambda engine=engine: engine.put("snapshot", 0, b"chunk"),
                lambda engine=engine: engine.trim(Id(9, 0)),
            ):
                with pytest.raises(EngineError) as caught:
                    refused()
                assert "docs/fleet.md" in str(caught.value.hint)
        with pytest.raises(EngineError):
            self.at(fleet, "follower", password).hold(b"wait")
        look = publishing.look(Id(0, 0), 9)
        assert (look.head, look.entries) == (b"head", [(Id(1, 0), b"entry")])


@contextlib.contextmanager
def answering(directory: Path, answer: bytes, *, raw: bool = False) -> Iterator[str]:
    """Something that answers every request in the same way."""
    path = f"{directory}/e"[:100]
    os.chdir(directory)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("e")
        listening.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=talk, args=(connection,), daemon=True).start()

        def talk(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                while connection.recv(65536):
                    connection.sendall(answer if raw else b"$%d\r\n%s\r\n" % (len(answer), answer))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield "unix://e" if len(path) > 90 else f"unix://{path}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


class TestProtocol:
    """The real engine does what the one in memory does."""

    @pytest.fixture
    def engine(self) -> Iterator[RedisEngine]:
        with RealEngine() as real:
            engine = RedisEngine(real.url, "name")
            yield engine
            engine.close()

    def test_a_head_is_replaced_only_where_it_is_what_was_expected(self, engine):
        assert engine.commit(None, b"one", (Id(1, 0), b"a"))
        assert not engine.commit(None, b"two", (Id(1, 1), b"b"))
        assert not engine.commit(b"other", b"two", (Id(1, 1), b"b"))
        assert engine.commit(b"one", b"two", (Id(1, 1), b"\0\xff\r\n"))
        look = engine.look(Id(0, 0), 10)
        assert (look.head, look.first, look.hold) == (b"two", Id(1, 0), None)
        assert look.entries == [(Id(1, 0), b"a"), (Id(1, 1), b"\0\xff\r\n")]
        assert abs(look.time - time.time() * 1000) < 60_000

    def test_an_id_that_is_not_higher_is_refused_and_changes_nothing(self, engine):
        assert engine.top() == Id(0, 0)
        assert engine.commit(None, b"one", (Id(2, 0), b"a"))
        engine.trim(Id(3, 0))
        assert engine.top() == Id(2, 0)
        for number in (Id(1, 9), Id(2, 0)):
            with pytest.raises(LogAheadError):
                engine.commit(b"one", b"two", (number, b"b"))
        assert engine.look().head == b"one"

    def test_snapshots_are_dropped_with_the_head_that_names_others(self, engine):
        for snapshot in ("a", "b", "c"):
            engine.put(snapshot, 0, snapshot.encode())
        assert (engine.fetch("a", 0), engine.fetch("a", 1), engine.chunks("a"), engine.chunks("z")) == (
            b"a",
            None,
            1,
            0,
        )
        assert engine.commit(None, b"one", (Id(1, 0), b""), ("b", "c"))
        assert [engine.fetch(each, 0) for each in "abc"] == [None, b"b", b"c"]
        assert not engine.commit(None, b"two", (Id(1, 1), b""), ())
        assert engine.fetch("b", 0) == b"b"

    def test_waiting_ends_with_the_first_entry_or_in_time(self, engine):
        engine.commit(None, b"one", (Id(1, 0), b"a"))
        assert engine.look(Id(1, 0), 10, 0.05).entries == []
        later = threading.Timer(0.05, engine.commit, (b"one", b"two", (Id(1, 1), b"b")))
        later.start()
        assert engine.look(Id(1, 0), 10, 2.0).entries == [(Id(1, 1), b"b")]
        later.join()

    def test_trimming_keeps_the_entry_that_is_named(self, engine):
        head = None
        for number in range(5):
            engine.commit(head, b"%d" % number, (Id(1, number), b""))
            head = b"%d" % number
        engine.trim(Id(1, 3))
        assert engine.look().first == Id(1, 3)

    def test_reports_are_forgotten_in_time(self, engine):
        engine.report("a", b"1", 60)
        engine.report("b", b"2", 0.05)
        until(lambda: engine.reports() == {"a": b"1"})
        engine.report("a", None, 0)
        assert engine.reports() == {}
        engine.hold(b"why")
        assert engine.look().hold == b"why"
        engine.hold(None)
        assert engine.look().hold is None


@pytest.mark.parametrize(
    "url",
    [
        "http://example", "redis://user:word@example", "", "engine", "redis://example?password=word",
        "rediss://example?ssl_password=word", "unix:///socket?password=word", "redis://example?socket_timeout=9",
        "rediss://example?ssl_cert_reqs=none", "rediss://example?ssl_check_hostname=no",
        "redis://example?ssl_ca_certs=/ca", "redis://example?password", "redis://example/abc", "redis://example/0/1",
    ],
)  # fmt: skip
def test_addresses_that_are_none_or_tell_a_password_or_undo_a_check_are_refused(url):
    with pytest.raises(ValueError, match="address") as caught:
        place_of(url)
    assert "word" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        ("NOPERM this user has no permissions to run the 'multi' command", "docs/fleet.md"),
        ("READONLY You can't write against a read only replica.", "primary"),
        ("MOVED 3999 127.0.0.1:6381", "that one"),
        ("LOADING Redis is loading the dataset in memory", "starting"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "maxmemory"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "--password-file"),
        ("NOAUTH Authentication required.", "--password-file"),
        ("ERR Protocol error: unauthenticated multibulk length", "--password-file"),
        ("MISCONF Redis is configured to save RDB snapshots", "its log"),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", "shmelim:{any}:*"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "'somebody'"),
    ],
)
def test_what_an_engine_refuses_comes_with_what_to_do(tmp_path, answer, hint):
    with answering(tmp_path, b"-%s\r\n" % answer.encode(), raw=True) as url, pytest.raises(EngineError) as caught:
        RedisEngine(url.replace("//", "//somebody@"), "any").hold(b"")
    assert hint in caught.value.hint


def test_a_password_that_is_refused_is_that_of_a_file_and_a_user(tmp_path):
    password = tmp_path / "password"
    password.write_text("not that")
    with RealEngine() as engine:
        engine.client().execute_command("ACL", "SETUSER", "somebody", "on", ">ours", "~*", "+@all")
        url = engine.url.replace("//", "//somebody@")
        for file, hint in ((None, "--password-file"), (password, str(password))):
            with pytest.raises(EngineError) as caught:
                RedisEngine(url, "any", password_file=file).look()
            assert hint in caught.value.hint
            assert "'somebody'" in caught.value.hint


class TestTLS:
    @pytest.fixture
    def certificates(self, tmp_path) -> dict[str, Path]:
        if (openssl := shutil.which("openssl")) is None:
            pytest.skip("openssl is not installed, so there are no certificates")
        made = {}
        for host in ("localhost", "elsewhere.example"):
            made[host] = tmp_path / host
            command = [
                openssl,
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ]
            command += ["-days", "1", "-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}"]
            command += ["-out", f"{made[host]}.pem", "-keyout", f"{made[host]}.key"]
            subprocess.run(command, check=True, capture_output=True)
        return made

    @staticmethod
    @contextlib.contextmanager
    def engine(certificate: Path) -> Iterator[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--bind", "127.0.0.1"]
        options += ["--tls-cert-file", f"{certificate}.pem", "--tls-key-file", f"{certificate}.key"]
        with RealEngine(*options):
            yield port

    def test_an_engine_is_taken_whose_certificate_is_vouched_for_and_its_own(self, certificates):
        with self.engine(certificates["localhost"]) as port:
            url = f"rediss://localhost:{port}?ssl_ca_certs={certificates['localhost']}.pem"
            engine = RedisEngine(url, "any")
            assert engine.look().head is None
            assert engine.place == f"rediss://localhost:{port}"
            engine.close()
            with pytest.raises(EngineError) as caught:
                RedisEngine(f"rediss://localhost:{port}", "any").look()
            assert "ssl_ca_certs" in caught.value.hint

    def test_another_hosts_certificate_is_refused(self, certificates):
        other = certificates["elsewhere.example"]
        with self.engine(other) as port, pytest.raises(EngineError, match=r"[Hh]ostname"):
            RedisEngine(f"rediss://localhost:{port}?ssl_ca_certs={other}.pem", "any").look()


def shown(fleet: Fleet, *arguments: str) -> tuple[int, dict[str, Any]]:
    """What a command says, as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "shmelim", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SHMELIM_RUNTIME_DIR": str(fleet.served.runtime)},
    )
    return done.returncode, json.loads(done.stdout or done.stderr)


def test_both_ends_are_seen_on_their_hosts(fleet, name):
    publisher, follower = fleet.publish(), fleet.follow(name)
    follower.has_said("following")
    until(lambda: EliminationReader(name).staleness)
    code, status = shown(fleet, "status", "--name", fleet.served.name)
    assert code == 0
    assert status["publishing"]["engine"] == fleet.engine.url
    assert status["follows"] is None
    code, status = shown(fleet, "status", "--name", name)
    assert code == 0
    assert status["follows"]["source"] == f"{fleet.engine.url} {fleet.served.name}"
    assert status["publishing"] is None
    assert shown(fleet, "health", "--name", name)[1]["status"] == "ok"
    code, answer = shown(fleet, "add", "x", "--reason", "ZOMBIE", "--name", name)
    assert code == 3
    assert fleet.engine.url in answer["error"]
    asked = ("fleet", "status", "--at", fleet.engine.url, "--name", fleet.served.name)
    until(lambda: shown(fleet, *asked)[0] == 0, "a report that says an age")  # it reports once a second
    code, answer = shown(fleet, *asked)
    assert code == 0
    assert [each["rows"] for each in answer["followers"]] == [100]
    assert answer["head"]["host"] == socket.gethostname()
    fleet.engine.kill()
    publisher.has_said("error")
    until(lambda: shown(fleet, "health", "--name", fleet.served.name)[0] == 1)
    problems = shown(fleet, "health", "--name", fleet.served.name)[1]["problems"]
    assert [each["name"] for each in problems] == ["publisher_error"]
    line = EliminationReader(name).position.line
    publishing = shown(fleet, "status", "--name", fleet.served.name)[1]["publishing"]
    assert publishing["line"] == line, "it is what it was"
    assert follower.stop() == 0
    assert shown(fleet, "health", "--name", name)[0] == 3


def test_a_name_that_nobody_publishes_is_neither_held_nor_released(fleet):
    asked = ("--at", fleet.engine.url, "--name", "nobody")
    for command in (("hold", "why"), ("release",)):
        code, answer = shown(fleet, "fleet", *command, *asked)
        assert code == 3
        assert "nothing is published under 'nobody'" in answer["error"]
    fleet.publish().has_said("leading")
    code, answer = shown(fleet, "fleet", "release", "--at", fleet.engine.url, "--name", fleet.served.name)
    assert (code, answer["held"]) == (0, None)


def test_a_report_that_cannot_be_read_hides_no_other(fleet, name):
    fleet.publish()
    fleet.follow(name).has_said("following")
    asked = ("fleet", "status", "--at", fleet.engine.url, "--name", fleet.served.name)
    until(lambda: shown(fleet, *asked)[0] == 0, "a report that says an age")
    with fleet.engine.client() as client:
        client.sadd(f"shmelim:{{{fleet.served.name}}}:reports", "z/other")
        client.set(f"shmelim:{{{fleet.served.name}}}:report:z/other", b"junk", ex=60)
    code, answer = shown(fleet, *asked)
    assert code == 1
    assert [each["who"] for each in answer["followers"]][1] == "z/other"
    assert ["error" in each for each in answer["followers"]] == [False, True]
    assert answer["head"]["host"] == socket.gethostname()


def test_a_follower_is_watched(fleet, name):
    fleet.publish()
    fleet.follow(name).has_said("following")
    fleet.becomes_equal(name)
    watching = Process("watch", "--name", name, "--count", "2")
    client, stop = fleet.served.client(), threading.Event()

    def change_on() -> None:  # until it watches
        while not stop.is_set():
            client.add_elimination("watched", row("watched", next(_stamps)))

    changing = threading.Thread(target=change_on)
    changing.start()
    code, _ = watching.wait()
    stop.set()
    changing.join()
    assert code == 0
    assert [each["hotkey"] for each in watching.lines] == ["watched", "watched"]
    assert watching.lines[1]["action"] == "update"


def test_no_age_is_younger_than_the_truth(fleet, name):
    """Held against the clock that all processes of this machine share, while the engine is killed and flushed."""
    fleet.publish()
    fleet.follow(name).has_said("following")
    fleet.becomes_equal(name)
    client, reader = fleet.served.client(), EliminationReader(name)
    acknowledged: list[float] = []
    stop = threading.Event()

    def change_on() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            hotkey = f"timed{number}"
            client.add_elimination(hotkey, row(hotkey))
            acknowledged.append(time.clock_gettime(time.CLOCK_BOOTTIME))

    changing = threading.Thread(target=change_on)
    changing.start()
    looks, young = 0, 0
    for fault in (None, fleet.engine.client().flushall, fleet.engine.kill, None):
        if fault is not None:
            fault()
        if fleet.engine.process is None:
            fleet.engine.start()
        ends = looks + 300
        while looks < ends:
            age, now = reader.staleness, time.clock_gettime(time.CLOCK_BOOTTIME)
            # What was acknowledged before the moment that it claims must be there; the claim was read first.
            here = len(reader)
            if age is not None:
                due = bisect.bisect_left(acknowledged, now - age)
                assert here >= 100 + due, f"an age of {age:.3f} s, and {100 + due - here} changes are missing"
                young += age < 1
            looks += 1
            time.sleep(0.005)  # between two looks, which wait for nothing
    stop.set()
    changing.join()
    assert young > 100
    fleet.becomes_equal(name)


def test_a_slow_engine_slows_no_change_down(fleet, name):
    slow = fleet.engine.directory / "slow"
    Delay(slow, fleet.engine.socket, 0.1)  # each way
    fleet.engine.url = f"unix://{slow}"
    publisher = fleet.publish()
    fleet.follow(name).has_said("following")
    began = time.perf_counter()
    for _ in range(20):
        change(fleet)
    print(f"20 changes with an engine that takes 200 ms: {time.perf_counter() - began:.3f} s")
    fleet.becomes_equal(name, "slow engine")
    assert publisher.said("error") == []


def test_the_demo_holds_and_leaves_nothing():
    with subprocess.Popen(
        [sys.executable, "-m", "shmelim", "demo", "--fleet", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        said, errors = demo.communicate()
    assert demo.returncode == 0, said + errors
    found = json.loads(said)
    assert len(found["faults"]) >= 6
    assert all(len(each["equal_after_s"]) == 3 for each in found["faults"])
    assert not list(Path("/dev/shm").glob(f"*{found['name'][:13]}*"))
    if found["figures"]["hosts_of_their_own"]:
        assert "a follower's network was cut for a while" in [each["fault"] for each in found["faults"]]
    assert not list(Path("/run/netns").glob(f"shmelim-demo-{demo.pid}-*"))


def test_the_demo_goes_without_hosts_of_their_own_where_they_cannot_be_made(monkeypatch):
    with monkeypatch.context() as patch, contextlib.ExitStack() as undo:
        patch.setattr(os, "geteuid", lambda: 1000)
        found, missing = hosts.make_hosts(3, undo)
        assert not found
        assert "root" in missing

    def refuse(*arguments):
        if arguments[:2] == ("link", "add"):
            raise subprocess.CalledProcessError(2, "ip", stderr="RTNETLINK answers: Operation not permitted\n")
        made.append(arguments)

    made: list[tuple[str, ...]] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(hosts.shutil, "which", lambda _name: "/usr/sbin/ip")
    monkeypatch.setattr(hosts, "_ip", refuse)
    with contextlib.ExitStack() as undo:
        found, missing = hosts.make_hosts(3, undo)
        assert not found
        assert missing == "no network namespace can be made: RTNETLINK answers: Operation not permitted"
    assert [each[:2] for each in made if each[0] == "netns"] == [("netns", "add"), ("netns", "delete")]
