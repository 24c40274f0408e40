"""What tests of faults share: server objects over shared memory, a state directory, a fleet of processes."""

import contextlib

import pytest
from serving import row

from shmelim import EliminationManagerServer
from shmelim.shm import SharedNamespace


@pytest.fixture
def state_dir(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def start(table_name, state_dir):
    """Start a server object, importing files if any are given; all are closed at the end."""
    servers = []

    def make(*imports, **options):
        options.setdefault("durability", "process")
        servers.append(
            EliminationManagerServer(SharedNamespace(table_name), state_dir, imports=imports, **options)
        )
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def fleet(serve):
    from engines import RealEngine
    from fleet_processes import Fleet

    with contextlib.ExitStack() as stack:
        served = serve(files="off", sync_guard="off")
        served.client().sync_eliminations([row(f"h{n}") for n in range(100)])
        yield Fleet(served, stack.enter_context(RealEngine()), stack)


@pytest.fixture
def name(new_name):
    return new_name()
