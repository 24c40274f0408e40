"""A real engine, real processes, and what may go wrong with them: all become equal again, nothing else suffers.

How long it took is printed (``pytest -s``), and judged by nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Self

import pytest
from engines import RealEngine
from fleet_processes import Fleet, change, needs_engine
from serving import Served, row
from waiting import until

from shmelim import EliminationReader
from shmelim.errors import StaleError
from shmelim.fleet import publishing
from shmelim.fleet.messages import unpack_head
from shmelim.fleet.redis_engine import RedisEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_engine


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
