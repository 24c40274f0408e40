"""What an engine may be and do: not well, secured, odd; and the protocol that is spoken with it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from engines import RealEngine
from fleet_processes import Fleet, change, needs_engine
from waiting import until

from shmelim import EliminationReader
from shmelim.fleet.engine import EngineError, Id, LogAheadError
from shmelim.fleet.redis_engine import RedisEngine, place_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_engine


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
