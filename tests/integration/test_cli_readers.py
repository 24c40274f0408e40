"""`shmelim readers` and `top`, and the counts of readers among the metrics."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from typing import TYPE_CHECKING, Any

import pytest
from invoking import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from serving import row
from waiting import PATIENCE

from shmelim.cli.main import cli
from shmelim.eliminations.record import encode
from shmelim.eliminations.rows import Row, row_entry
from shmelim.shm import SharedNamespace, TableWriter
from shmelim.watch.metrics import text_of
from shmelim.watch.readers import Readers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READING = """
import sys
from shmelim import EliminationReader
reader = EliminationReader(sys.argv[1])
for line in sys.stdin:
    for _ in range(int(line)):
        reader.is_hotkey_eliminated("a")
        reader.is_hotkey_eliminated("b")
    print("done", flush=True)
"""
HOSTILE = "\x1b[31mred\n"


class Process:
    """A process that reads as much as it is told."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-c", READING, name, HOSTILE]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid

    def read(self, times: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(times, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)


@pytest.fixture
def name(table_name: str) -> Iterator[str]:
    """The name of a table in which ``a`` is eliminated."""
    with TableWriter(SharedNamespace(table_name)) as writer:
        writer.load([row_entry(Row("a", 1, encode(row("a")), None, None, registered=False))])
        writer.beat()
        yield table_name


@pytest.fixture
def start(name: str) -> Iterator[Callable[[], Process]]:
    """Start processes that read the table."""
    started: list[Process] = []

    def begin() -> Process:
        started.append(Process(name))
        return started[-1]

    yield begin
    for each in started:
        each.kill()


def run(name: str, *arguments: str) -> Any:
    environment = {"SHMELIM_NAME": name, "COLUMNS": "300"}
    return CliRunner().invoke(cli, arguments, prog_name="shmelim", env=environment)


def samples(name: str) -> dict[str, float]:
    families = text_string_to_metric_families(text_of(name).decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_readers_lists_who_reads_and_how_much(name: str, start: Callable[[], Process]) -> None:
    first, second = start(), start()
    first.read(10)
    second.read(3)
    result = run(name, "readers", "--json", "--interval", "0")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(each["pid"], each["checks"], each["hits"]) for each in found["readers"]] == [
        (first.pid, 20, 10),
        (second.pid, 6, 3),
    ]
    assert found["total"] == {
        "checks": 26,
        "hits": 13,
        "batches": 0,
        "records": 0,
        "snapshots": 0,
        "retries": 0,
    }
    for each in found["readers"]:
        assert each["uid"] == os.geteuid()
        assert each["checks_per_s"] is None
        assert HOSTILE in each["title"]
    first.kill()
    found = json.loads(run(name, "readers", "--json", "--interval", "0").stdout)
    assert [each["pid"] for each in found["readers"]] == [second.pid]
    assert found["total"]["checks"] == 26


def test_looking_makes_nobody_a_reader(name: str) -> None:
    for command in ("readers", "names", "metrics"):
        assert run(name, command, "--json").exit_code == 0
    assert json.loads(run(name, "readers", "--json", "--interval", "0").stdout)["readers"] == []


def test_what_strangers_call_themselves_is_shown_escaped(name: str, start: Callable[[], Process]) -> None:
    start().read(1)
    for command in ("readers", "top"):
        result = run(name, command, "--interval", "0.1")
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.stdout
        assert r"\x1b[31mred\n" in result.stdout
        assert len(result.stdout.splitlines()) == 1


def test_rates_are_what_was_read_between_two_looks(
    name: str, start: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("shmelim.system.clock.monotonic", lambda: now)
    reader, readers = start(), Readers(name)
    reader.read(5)
    assert [each["checks_per_s"] for each in readers.look()["readers"]] == [None]
    reader.read(20)
    late = start()
    late.read(1)
    now += 4.0
    assert [(each["checks_per_s"], each["hits_per_s"]) for each in readers.look()["readers"]] == [
        (10.0, 5.0),
        (0.5, 0.25),
    ]
    now += 1.0
    assert [each["checks_per_s"] for each in readers.look()["readers"]] == [0.0, 0.0]


def test_top_prints_once_into_a_pipe_who_reads_most_first(
    name: str, start: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    idle, busy = start(), start()
    idle.read(1)
    busy.read(1)
    monkeypatch.setattr("shmelim.cli.readers.time.sleep", lambda _: busy.read(50))
    found = json.loads(run(name, "top", "--json").stdout)
    assert [each["pid"] for each in found["readers"]] == [busy.pid, idle.pid]
    found = json.loads(run(name, "top", "--json", "--sort", "since").stdout)
    assert [each["pid"] for each in found["readers"]] == [idle.pid, busy.pid]


@pytest.mark.parametrize(("how", "status"), [(b"xq", 0), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_top_on_a_terminal_goes_on_until_it_is_ended_and_leaves_the_terminal_as_it_was(
    name: str, start: Callable[[], Process], how: bytes | signal.Signals, status: int
) -> None:
    reading = start()
    reading.read(1)
    main, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    command = [sys.executable, "-m", "shmelim", "top", "--name", name, "--interval", "0.1"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "40"}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    try:
        shown = b""
        while shown.count(b"checks in all") < 3:
            shown += os.read(main, 65536)
        if isinstance(how, bytes):
            os.write(main, how)
        else:
            process.send_signal(how)
        while b"\x1b[?1049l" not in shown:  # back from the other screen
            shown += os.read(main, 65536)
        assert process.wait(PATIENCE) == status
        assert str(reading.pid).encode() in shown
        assert b"\x1b[31mred" not in shown
        assert termios.tcgetattr(terminal) == before
    finally:
        process.kill()
        process.wait(PATIENCE)
        os.close(main)
        os.close(terminal)


def test_top_ends_with_its_terminal(name: str) -> None:
    """Who has another controlling terminal, or none, gets no SIGHUP."""
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "shmelim", "top", "--name", name, "--interval", "0.1"]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=os.environ | {"TERM": "xterm"}
    )
    try:
        os.close(terminal)
        shown = b""
        while b"checks in all" not in shown:
            shown += os.read(main, 65536)
        os.close(main)
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait(PATIENCE)


def test_top_shows_who_reads_long_before_its_interval_is_over(name: str) -> None:
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "shmelim", "top", "--name", name, "--interval", "3600"]
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    try:
        shown = b""
        while b"checks in all" not in shown:
            shown += os.read(main, 65536)
        os.write(main, b"q")
        while b"\x1b[?1049l" not in shown:
            shown += os.read(main, 65536)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait(PATIENCE)
        os.close(main)
        os.close(terminal)


@pytest.mark.parametrize("kind", ["dumb", "", None])
def test_top_looks_once_where_a_terminal_cannot_be_drawn_on(
    name: str, start: Callable[[], Process], kind: str | None
) -> None:
    reading = start()
    reading.read(1)
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "shmelim", "top", "--name", name, "--interval", "0.1"]
    environment = os.environ | {"TERM": kind or ""}
    if kind is None:
        del environment["TERM"]
    try:
        result = subprocess.run(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment,
            timeout=PATIENCE,
            check=False,
        )
        assert result.returncode == 0
        shown = os.read(main, 65536)
        assert str(reading.pid).encode() in shown
        assert b"\x1b" not in shown
    finally:
        os.close(main)
        os.close(terminal)


@pytest.mark.parametrize("command", ["readers", "top"])
def test_a_name_that_nobody_served_is_an_error_with_a_hint(table_name: str, command: str) -> None:
    result = run(table_name, command)
    assert result.exit_code == 3
    assert f"shmelim serve --name {table_name}" in result.stderr
    assert run(table_name, command, "--interval", "-1").exit_code == 2
    assert "For example:" in run(table_name, command, "--help").stdout


def test_metrics_of_readers_are_exact_and_never_go_back(name: str, start: Callable[[], Process]) -> None:
    """Ten processes read, and three of them are killed."""
    processes = [start() for _ in range(10)]
    for times, process in enumerate(processes, 1):
        process.read(times)
    expected = {"shmelim_read_checks_total": 110.0, "shmelim_read_hits_total": 55.0}
    assert expected.items() <= samples(name).items()
    assert samples(name)["shmelim_readers"] == 10.0
    for process in processes[:3]:
        process.kill()
    processes[-1].read(1)
    found = samples(name)
    assert found["shmelim_readers"] == 7.0
    assert found["shmelim_read_checks_total"] == 112.0
    assert found["shmelim_read_hits_total"] == 56.0
    labels = [line for line in text_of(name).decode().splitlines() if line.startswith("shmelim_read")]
    assert len(labels) == 7, "one series each, however many read"
