"""What is seen of a fleet of real processes, on its hosts and in the demo."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fleet_processes import Process, change, needs_engine, shown, stamps
from invoking import CliRunner
from msgspec import structs
from serving import row
from waiting import until

from bench.fleet import Delay
from shmelim import EliminationReader
from shmelim.cli.demo import fleet as demo_fleet
from shmelim.cli.main import cli
from shmelim.fleet import publishing
from shmelim.fleet.engine import Id
from shmelim.fleet.messages import pack, unpack_head
from shmelim.fleet.redis_engine import RedisEngine
from shmelim.watch import seeing
from shmelim.watch.metrics import text_of

if TYPE_CHECKING:
    pass

pytestmark = needs_engine


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
            client.add_elimination("watched", row("watched", next(stamps)))

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
            if stop.wait(0.002):  # as many changes as show an age that is wrong by a look
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
        found, missing = demo_fleet.make_hosts(3, undo)
        assert not found
        assert "root" in missing

    def refuse(*arguments):
        if arguments[:2] == ("link", "add"):
            raise subprocess.CalledProcessError(2, "ip", stderr="RTNETLINK answers: Operation not permitted\n")
        made.append(arguments)

    made: list[tuple[str, ...]] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(demo_fleet.shutil, "which", lambda _name: "/usr/sbin/ip")
    monkeypatch.setattr(demo_fleet, "_ip", refuse)
    with contextlib.ExitStack() as undo:
        found, missing = demo_fleet.make_hosts(3, undo)
        assert not found
        assert missing == "no network namespace can be made: RTNETLINK answers: Operation not permitted"
    assert [each[:2] for each in made if each[0] == "netns"] == [("netns", "add"), ("netns", "delete")]
