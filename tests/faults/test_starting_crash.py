"""A start that adopts, takes over, replaces or is restored, and is killed at any line: the next one is right."""

import random
import shutil
import sys

import pytest
from crashing import Child, Counter, at_line, kill_self, package_files
from serving import row, state_in_store, state_in_table

from shmelim import EliminationManagerServer, EliminationReader
from shmelim.eliminations.record import prepare
from shmelim.eliminations.starting import keeping
from shmelim.eliminations.starting.registry import Registry
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import StateConflictError
from shmelim.shm import SharedNamespace

_TRACED = package_files(
    "eliminations/starting/beginning.py",
    "eliminations/starting/keeping.py",
    "eliminations/starting/recovery.py",
    "eliminations/starting/registry.py",
    "eliminations/starting/replacement.py",
    "eliminations/store/copying.py",
    "eliminations/store/database.py",
    "eliminations/server.py",
    "shm/adoption.py",
    "shm/writer.py",
    "system/durable.py",
)


class Place:
    """A name with its directory, registry and a second directory, and what was last acknowledged under it."""

    def __init__(self, base, name):
        self.base, self.name = base, name
        self.state_dir, self.other = base / "state", base / "other"
        self.registry = base / "registry"

    def start(self, directory=None, **options):
        options = {"durability": "process", "registry": self.registry, "files": "off"} | options
        return EliminationManagerServer(SharedNamespace(self.name), directory or self.state_dir, **options)

    def fill(self):
        with self.start() as server:
            server.sync_eliminations_rpc([row(f"h{n}", n) for n in range(6)])
            server.update_metagraph_rpc(["m1", "m2"])
            server.update_metagraph_rpc(["m2"])
            server.add_elimination_rpc("late", row("late", 7))
            server.remove_elimination_rpc("h2")
            return state_in_table(server.reader)

    def published(self):
        return state_in_table(EliminationReader(self.name))

    def remove(self):
        SharedNamespace(self.name).remove()
        shutil.rmtree(self.base)


def held(server):
    return "money_held" in {problem["name"] for problem in server.health_check_rpc()["problems"]}


class Adopts:
    """The table is behind by some commits, as a server leaves it that dies between commit and publishing."""

    def prepare(self, place):
        self.before = place.fill()
        self.reader = EliminationReader(place.name)
        with Store.open(place.state_dir) as store:
            with store.transaction():
                store.put_elimination(*prepare(row("c")))
            with store.transaction():
                store.remove_eliminations(["h0"])
        self.after = state_in_store(place.state_dir)

    def run(self, place):
        place.start()

    def check(self, place):
        # Readers are on one of the two states at any time.
        assert state_in_table(self.reader) in (self.before, self.after)
        with place.start() as server:
            assert state_in_table(server.reader) == state_in_table(self.reader) == self.after
            assert not held(server)


class TakesOver:
    """An empty directory takes over what is published."""

    def prepare(self, place):
        self.before = place.fill()
        self.reader = EliminationReader(place.name)

    def run(self, place):
        place.start(place.other, adopt_published=True)

    def check(self, place):
        assert state_in_table(self.reader) == self.before
        # Either it has begun, and nobody has to say so again, or it has not.
        try:
            server = place.start(place.other)
        except StateConflictError:
            server = place.start(place.other, adopt_published=True)
        with server:
            assert held(server)
            assert state_in_table(server.reader) == state_in_table(self.reader) == self.before
        assert state_in_store(place.other) == self.before


class Replaces:
    """An older store takes the place of what is published."""

    def prepare(self, place):
        self.before = place.fill()
        shutil.copytree(place.state_dir, place.other)
        with place.start() as server:
            server.add_elimination_rpc("lost", row("lost"))
        shutil.rmtree(place.state_dir)
        place.other.rename(place.state_dir)
        self.newer = place.published()
        self.reader = EliminationReader(place.name)

    def run(self, place):
        place.start(replace_published=True)

    def check(self, place):
        assert state_in_table(self.reader) in (self.before, self.newer)
        try:
            server = place.start()
        except StateConflictError:
            assert state_in_table(self.reader) == self.newer
            server = place.start(replace_published=True)
        with server:
            assert held(server)
            assert state_in_table(server.reader) == state_in_table(self.reader) == self.before


class IsRestored:
    """A backup takes the place of a store, and is served."""

    def prepare(self, place):
        self.before = place.fill()
        keeping.back_up(place.state_dir, place.base / "backup")
        with place.start() as server:
            server.add_elimination_rpc("since", row("since"))
            self.newer = state_in_table(server.reader)

    def run(self, place):
        keeping.restore(place.base / "backup", place.state_dir, Registry(place.registry, place.name))

    def check(self, place):
        with place.start() as server:
            found = state_in_table(server.reader)
            assert (found, held(server)) in ((self.before, True), (self.newer, False))
        with place.start() as server:
            assert state_in_table(server.reader) == found
        keeping.restore(place.base / "backup", place.state_dir, Registry(place.registry, place.name))
        with place.start() as server:
            assert (state_in_table(server.reader), held(server)) == (self.before, True)


class Recovers:
    """A damaged store is made anew from what is published."""

    def prepare(self, place):
        self.before = place.fill()
        with (place.state_dir / FILE_NAME).open("r+b") as file:
            file.write(b"\xff" * 100)
        self.reader = EliminationReader(place.name)

    def run(self, place):
        place.start()

    def check(self, place):
        assert state_in_table(self.reader) == self.before
        with place.start() as server:
            assert held(server)
            assert state_in_table(server.reader) == state_in_table(self.reader) == self.before
        assert state_in_store(place.state_dir) == self.before


CASES = [Adopts, TakesOver, Replaces, IsRestored, Recovers]


def killed_at(case, place, number):
    """Have it killed at a line; returns whether it ran that far."""
    lines = Counter()

    def run():
        at_line(number, kill_self, files=_TRACED, lines=lines)
        case.run(place)
        sys.settrace(None)
        kill_self()

    with Child(run) as child:
        assert child.wait() == -9
    return lines.value >= number


def at_lines(case, tmp_path, new_name, stride):
    number = random.randrange(1, stride + 1)
    print(f"every {stride}th line from {number}")
    count = 0
    while True:
        place = Place(tmp_path / f"{number}", new_name())
        place.base.mkdir()
        made = case()
        made.prepare(place)
        reached = killed_at(made, place, number)
        try:
            made.check(place)
        except BaseException:
            print(f"killed at line {number}")
            raise
        place.remove()
        if not reached:
            break
        number += stride
        count += 1
    assert count * stride > 100


@pytest.mark.parametrize("case", CASES)
def test_at_some_lines(case, tmp_path, new_name):
    at_lines(case, tmp_path, new_name, 61)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_at_every_line(case, tmp_path, new_name):
    at_lines(case, tmp_path, new_name, 1)
