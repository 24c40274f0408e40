"""What a process pays that only wants to know who is eliminated: the modules it loads, and their memory."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from crashing import WATCHDOG
from serving import row

from shmelim.eliminations.record import encode
from shmelim.eliminations.rows import Row, row_entry
from shmelim.shm import SharedNamespace, TableWriter
from shmelim.table import Writer

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAVY = {
    "asyncio",
    "click",
    "dataclasses",
    "logging",
    "multiprocessing",
    "numpy",
    "platformdirs",
    "psutil",
    "rich",
    "setproctitle",
    "slack_sdk",
    "sqlite3",
    "ssl",
    "subprocess",
    "tempfile",
}
MOST_MODULES = 140
MOST_KILOBYTES = 9 * 1024

MEASURE = """
import sys

def kilobytes(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what))

bare = kilobytes("VmHWM")
if sys.argv[2] == "eliminations":
    from shmelim import EliminationReader

    reader = EliminationReader(sys.argv[1])
    answers = [*map(reader.is_hotkey_eliminated, "ab"), reader.get_elimination("a")["hotkey"]]
    many = reader.are_eliminated
else:
    from shmelim.table import Reader

    reader = Reader(sys.argv[1])
    answers = ["a" in reader, "b" in reader, *reader.snapshot()]
    many = reader.contains_many
# Without what an editable installation has every process load.
modules = sorted(name for name in sys.modules if not name.startswith(("__editable__", "_distutils_hack")))
peak = kilobytes("VmHWM")
batch = many(["a", "b"]).tolist()
print(dict(answers=answers, modules=modules, kilobytes=peak - bare, batch=batch, later="numpy" in sys.modules))
"""


@pytest.fixture
def served(table_name: str) -> Iterator[str]:
    """The name of a table in which ``a`` is eliminated."""
    with TableWriter(SharedNamespace(table_name)) as writer:
        writer.load([row_entry(Row("a", 1, encode(row("a")), None, None, registered=False))])
        yield table_name


@pytest.fixture(params=["eliminations", "table"])
def reads(request: pytest.FixtureRequest) -> str:
    """What is read."""
    return str(request.param)


@pytest.fixture(params=["0", "1"], ids=["as built", "pure"])
def measured(request: pytest.FixtureRequest, served: str, reads: str) -> dict[str, Any]:
    """What a new process says of itself that attached, checked two keys and read a record."""
    environment = os.environ | {"SHMELIM_PURE": request.param}
    with Writer(served) as table:
        table.put("a", 1)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, served, reads],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return dict(ast.literal_eval(done.stdout))


def test_a_reader_loads_few_modules_and_none_that_is_heavy(measured: dict[str, Any]) -> None:
    assert measured["answers"] == [True, False, "a"]
    assert HEAVY.isdisjoint(measured["modules"]), HEAVY.intersection(measured["modules"])
    assert len(measured["modules"]) <= MOST_MODULES, measured["modules"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_reader_takes_little_memory(measured: dict[str, Any]) -> None:
    assert measured["kilobytes"] <= MOST_KILOBYTES


def test_numpy_is_loaded_by_the_first_batch(measured: dict[str, Any]) -> None:
    assert measured["batch"] == [True, False]
    assert measured["later"]
    assert "numpy" not in measured["modules"]


@pytest.mark.parametrize("module", ["shmelim", "shmelim.eliminations", "shmelim.shm", "shmelim.table"])
def test_a_package_alone_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert HEAVY.isdisjoint(ast.literal_eval(loaded)), loaded


FORK = """
import os, sys, threading

from shmelim import EliminationReader

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            loading.set()
            forking.wait()

loading, forking = threading.Event(), threading.Event()
sys.meta_path.insert(0, Finder())
os.register_at_fork(before=forking.set)
reader = EliminationReader(sys.argv[1])
thread = threading.Thread(target=reader.are_eliminated, args=(["a"],))
thread.start()
loading.wait()
pid = os.fork()
answers = reader.are_eliminated(["a", "b"]).tolist()
if pid == 0:
    os._exit(0 if answers == [True, False] and reader.verify() == 1 else 1)
print(answers, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_child_forked_while_another_thread_loads_numpy_can_use_it(served: str) -> None:
    """The lock of a module that is being imported is not released in a child, where its holder does not exist."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, served], stdout=subprocess.PIPE, text=True, check=True, timeout=WATCHDOG
    )
    assert done.stdout == "[True, False] 0\n"


SERVER = """
import sys
from pathlib import Path

from shmelim import EliminationManagerServer
import shmelim.eliminations.serve
from shmelim.shm import READ_PATH

with EliminationManagerServer(None, Path(sys.argv[1])) as server:
    row = {"hotkey": "a", "dd": 0.1, "reason": "LIQUIDATED", "elimination_initiated_time_ms": 1_700_000_000_000}
    server.add_elimination_rpc("a", row)
    server.sync_eliminations_rpc([row | {"hotkey": f"b{n}"} for n in range(2000)])
with EliminationManagerServer(None, Path(sys.argv[1])) as server:
    assert len(server.get_eliminations_from_memory_rpc()) == 2000
print(READ_PATH, "numpy" in sys.modules)
"""


def test_a_compiled_server_needs_no_numpy(tmp_path: Path) -> None:
    """With it the imports of a server take half as long again and more, and the process 13 MB."""
    done = subprocess.run([sys.executable, "-c", SERVER, tmp_path], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() in (["native", "False"], ["pure", "True"])
