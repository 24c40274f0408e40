"""Clients of a server that is only starting, or has come back at another address."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import pytest
from serving import row

from shmelim import EliminationClient, NotServingError
from shmelim.channel import ChannelServer
from shmelim.eliminations.serve import ServeOptions, Service

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_waiting_covers_the_channel_and_not_only_the_table(
    table_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that comes when the table is published and the channel is not up yet gets both."""
    published, asked = threading.Event(), threading.Event()
    start = ChannelServer.start

    def slowly(channel: ChannelServer) -> ChannelServer:
        published.set()
        assert asked.wait(30)
        return start(channel)

    monkeypatch.setattr(ChannelServer, "start", slowly)
    found = []

    def come() -> None:
        assert published.wait(30)
        with pytest.raises(NotServingError):
            EliminationClient(table_name, runtime_base=tmp_path)
        threading.Timer(0.0, asked.set).start()
        found.append(EliminationClient(table_name, wait=30, runtime_base=tmp_path))

    coming = threading.Thread(target=come)
    coming.start()
    with Service(ServeOptions(table_name, state_dir=tmp_path / "state", runtime_base=tmp_path)):
        coming.join(60)
        assert found[0].add_elimination("a", row("a"))
        found[0].close()


@pytest.mark.parametrize("wait", [math.inf, 1e12])
def test_who_waits_for_ever_is_let_in_at_once_where_there_is_a_server(
    table_name: str, tmp_path: Path, wait: float
) -> None:
    with (
        Service(ServeOptions(table_name, state_dir=tmp_path / "state", runtime_base=tmp_path)),
        EliminationClient(table_name, wait=wait, runtime_base=tmp_path) as client,
    ):
        assert client.add_elimination("a", row("a"))


def test_a_server_that_comes_back_elsewhere_is_found(table_name: str, tmp_path: Path) -> None:
    def serve(**options: int) -> Service:
        return Service(ServeOptions(table_name, state_dir=tmp_path / "state", runtime_base=tmp_path, **options))

    with serve():
        client = EliminationClient(table_name, runtime_base=tmp_path)
        client.add_elimination("a", row("a"))
    with pytest.raises(NotServingError):
        client.add_elimination("b", row("b"))
    with serve(port=0):
        client.add_elimination("b", row("b"))
        assert list(client) == ["a", "b"]
    client.close()


def test_statuses_are_those_of_one_version(serve: Callable[..., object]) -> None:
    client = serve().client()
    client.add_elimination("a", row("a"))
    client.update_metagraph(["b", "c"])
    client.update_metagraph(["c"])
    found = client.statuses(["a", "b", "c", "d", "\ud800"])
    assert [int(status) for status in found] == [1, 2, 4, 0, 0]
    with pytest.raises(TypeError):
        client.statuses("a")
