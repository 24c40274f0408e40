"""What tests of recovery and of a lost store share: server objects over shared memory, and a state directory."""

import pytest

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
