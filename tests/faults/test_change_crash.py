"""kill -9 at every line of a change: afterwards it is there or not, in store, table and files alike."""

import random
import shutil
import sys
import threading

import pytest
from crashing import Child, Counter, kill_self, package_files
from serving import row, state_in_files, state_in_table

from shmelim import EliminationManagerServer, EliminationReader
from shmelim.eliminations.files import mirror
from shmelim.shm import SharedNamespace

_TRACED = frozenset(
    package_files(
        "eliminations/state/thread.py",
        "eliminations/state/changes.py",
        "eliminations/files/mirror.py",
        "shm/writer.py",
    )
)

BASE = [row(f"h{n}", n) for n in range(6)]


def _fill(server):
    server.sync_eliminations_rpc(BASE)
    server.update_metagraph_rpc(["m1", "m2", "h1"])
    server.save_eliminations_rpc()


CHANGES = {
    "add": lambda server: server.add_elimination_rpc("new", row("new", 7)),
    "update": lambda server: server.add_elimination_rpc("h3", row("h3", 70)),
    "eliminate": lambda server: server.eliminate_rpc("new", row("new", 7), ["positions", "slash"]),
    "remove": lambda server: server.remove_elimination_rpc("h2"),
    "append": lambda server: server.append_elimination_row_rpc("new", 1.0, "ZOMBIE", 5),
    "sync": lambda server: server.sync_eliminations_rpc([row("h5", 50), row("new", 7), row("h1", 1)]),
    "depart": lambda server: server.update_metagraph_rpc(["m1", "h2"]),
    "grow": lambda server: server.sync_eliminations_rpc(
        BASE + [row(f"large{n}", n, pad=60_000) for n in range(9)]
    ),
}


def _at_line(number, act, count):
    """From now on count the lines that all threads run in the traced files; at one of them, act."""
    lock = threading.Lock()

    def inside(_frame, event, _arg):
        if event == "line":
            with lock:
                count.value += 1
                here = count.value == number
            if here:
                act()
        return inside

    def outside(frame, _event, _arg):
        return inside if frame.f_code.co_filename in _TRACED else None

    sys.settrace(outside)
    return outside


class Crash:
    """One change from one state, made again and again by a server that dies at another line each time."""

    def __init__(self, new_name, tmp_path, change):
        self.new_name, self.tmp_path = new_name, tmp_path
        self.change = CHANGES[change]
        self.prepared = tmp_path / "prepared"
        with EliminationManagerServer(None, self.prepared, durability="process") as server:
            _fill(server)
            self.before = state_in_table(server.reader)
        shutil.copytree(self.prepared, tmp_path / "after")
        with EliminationManagerServer(None, tmp_path / "after", durability="process") as server:
            self.change(server)
            self.after = state_in_table(server.reader)
        assert self.before != self.after

    def at(self, number):
        """Die at a line; say how many lines there were, and check what is left. True if it died there."""
        name = self.new_name()
        directory = self.tmp_path / f"state-{number}"
        shutil.copytree(self.prepared, directory)
        acknowledged, count = Counter(), Counter()

        def run():
            mirror._COALESCE = 0.0
            # The writing thread is traced from its start, and waits for the change.
            holder = []
            threading.settrace(lambda *args: holder[0](*args) if holder else None)
            server = EliminationManagerServer(SharedNamespace(name), directory, durability="process")
            server.save_eliminations_rpc()
            holder.append(_at_line(number, kill_self, count))
            self.change(server)
            acknowledged.value = 1
            server.save_eliminations_rpc()
            sys.settrace(None)
            kill_self()

        with Child(run) as child:
            assert child.wait() == -9
        reader = EliminationReader(name)
        left = state_in_table(reader)
        allowed = [self.after] if acknowledged.value else [self.before, self.after]
        assert left in allowed, f"line {number}: the table that the dead left is neither before nor after"
        with EliminationManagerServer(SharedNamespace(name), directory, durability="process") as server:
            state = state_in_table(server.reader)
            assert state in allowed, f"line {number}: neither before nor after"
            # What readers saw is still there.
            assert left == self.before or state == self.after
            assert state_in_table(reader) == state
            server.save_eliminations_rpc()
            assert state_in_files(directory) == state.without_registered()
            actions = [event["action"] for event in server.get_history_rpc(limit=None)]
            assert "import" not in actions, f"line {number}: a file was taken for somebody else's"
        SharedNamespace(name).remove()
        shutil.rmtree(directory)
        return count.value

    def lines(self):
        """How many lines there are when nobody dies before the end."""
        return self.at(1 << 30)


@pytest.mark.parametrize("change", CHANGES)
def test_at_some_lines_of_a_change(new_name, tmp_path, change):
    crash = Crash(new_name, tmp_path, change)
    lines = crash.lines()
    assert lines > 100
    stride = lines // 5
    offset = random.randrange(1, stride + 1)
    print(f"{lines} lines, every {stride}th from {offset}")
    for number in range(offset, lines + 1, stride):
        crash.at(number)


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
def test_at_every_line_of_a_change(new_name, tmp_path, change):
    crash = Crash(new_name, tmp_path, change)
    lines = crash.lines()
    for number in range(1, lines + 1):
        crash.at(number)
