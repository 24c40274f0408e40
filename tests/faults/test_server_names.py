"""The names in /dev/shm vanish under a living server: it makes them again, or says that another has them."""

from pathlib import Path

import pytest
from serving import row
from waiting import until

from shmelim import EliminationReader
from shmelim.errors import AlreadyServingError
from shmelim.shm import SharedNamespace, TableWriter


def unlink(name):
    for path in Path("/dev/shm").glob(f"shmelim.{name}*"):
        path.unlink()


def test_the_server_publishes_again_and_every_reader_moves(start, table_name):
    server = start()
    server.add_elimination_rpc("a", row("a"))
    attached = EliminationReader(table_name)
    root = attached._table.identity().root_id
    unlink(table_name)
    until(lambda: attached._table.identity().root_id != root, "another root")
    server.add_elimination_rpc("b", row("b"))
    assert list(attached) == list(EliminationReader(table_name)) == ["a", "b"]
    assert server.health_check_rpc()["status"] == "ok"


def test_a_name_that_another_has_is_a_problem_and_fails_changes(start, table_name):
    server = start()
    server.add_elimination_rpc("a", row("a"))
    unlink(table_name)
    with TableWriter(SharedNamespace(table_name)) as other:
        other.load([(b"b", 1, b"", None)])
        # Raised when the names are missing; only then does it find who has them.
        until(lambda: any("are not made again" in problem.text for problem in server.problems.standing()))
        assert server.health_check_rpc()["status"] == "failing"
        with pytest.raises(AlreadyServingError, match="another writer has taken the name"):
            server.add_elimination_rpc("c", row("c"))
        assert EliminationReader(table_name).table.entries == 1
