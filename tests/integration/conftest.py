"""What several of these tests begin with: a validator, a manager, a service, a channel, a server for commands."""

from __future__ import annotations

import contextlib
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apis
import pytest
from commanding import B, Server, runner, serving
from ledger import Ledger
from reference_validator import Managed
from targets import KEY, Target
from waiting import PATIENCE

from shmelim import EliminationManagerServer
from shmelim.channel import ChannelClient, ChannelServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from click.testing import Result
    from serving import Served

    from shmelim import EliminationManager


@pytest.fixture
def make(new_name: Callable[[], str], tmp_path: Path) -> Iterator[Callable[..., Managed]]:
    """Make one in the mode that is named; all are closed at the end."""
    made: list[Managed] = []

    def start(mode: str, **options: Any) -> Managed:
        made.append(Managed(mode, new_name(), tmp_path, **options))
        return made[-1]

    yield start
    for managed in made:
        managed.close()


@pytest.fixture(params=["direct", "rpc"])
def managed(request: pytest.FixtureRequest, make: Callable[..., Managed]) -> Managed:
    """One in each mode."""
    return make(request.param)


@pytest.fixture
def directly(make: Callable[..., Managed]) -> Managed:
    return make("direct")


@pytest.fixture
def in_rpc_mode(make: Callable[..., Managed]) -> Managed:
    return make("rpc")


@pytest.fixture(
    params=[
        "in memory",
        "with files",
        "served",
        "direct manager",
        "manager",
        pytest.param("over tcp", marks=pytest.mark.long),
    ]
)
def api(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    serve: Callable[..., Served],
    managers: Callable[..., EliminationManager],
) -> Iterator[apis.Api]:
    """The methods of a server, reached in each way."""
    if request.param == "in memory":
        with EliminationManagerServer() as server:
            yield apis.Direct(server)
    elif request.param == "with files":
        with EliminationManagerServer(state_dir=tmp_path / "state", durability="process") as server:
            yield apis.Direct(server)
    elif request.param.endswith("manager"):
        yield apis.Managed(managers(running_unit_tests=request.param == "direct manager", start_method="fork"))
    else:
        served = serve(durability="process", port=0 if request.param == "over tcp" else None)
        with_client = served.client()
        yield apis.Remote(with_client)
        with_client.close()


@pytest.fixture(params=["direct", "rpc"])
def direct(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "direct")


@pytest.fixture
def make_manager(
    managers: Callable[..., EliminationManager],
    direct: bool,
) -> Callable[..., EliminationManager]:
    """Make managers without a validator around them, in each mode."""

    def make(*args: Any, **options: Any) -> EliminationManager:
        options.setdefault("start_method", "fork")  # the quickest; tests of that process do not
        return managers(*args, running_unit_tests=direct, **options)

    return make


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the commands of a whole module ask."""
    departed = Path(sys.modules["shmelim"].__file__).parent / "data" / "default_departed_hotkeys.json"
    with serving(
        f"cli-{secrets.token_hex(4)}", tmp_path_factory.mktemp("c"), "--default-departed", str(departed)
    ) as server:
        yield server


@pytest.fixture
def run(served: Server) -> Callable[..., Result]:
    """Run a command that asks it; nobody is eliminated there."""
    client = served.client()
    client.clear_eliminations()
    client.update_metagraph([B])
    client.close()
    return runner(served.name, served.home)


@pytest.fixture
def make_ledger(tmp_path: Path) -> Iterator[Callable[..., Ledger]]:
    """Make services that are not eliminations; all are shut down at the end."""
    with contextlib.ExitStack() as stack:

        def make(kind: type[Ledger] = Ledger, *, directory: Path = tmp_path, **options: Any) -> Ledger:
            return stack.enter_context(kind(directory, **options))

        yield make


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str | tuple[str, int]:
    """Where a channel can be served, of each kind."""
    return str(tmp_path / "s") if request.param == "unix" else ("127.0.0.1", 0)


@pytest.fixture
def target() -> Iterator[Target]:
    """What a channel serves; calls that hang end with the test at the latest."""
    target = Target()
    yield target
    target.release.set()


@pytest.fixture
def server(target: Target, address: str | tuple[str, int]) -> Iterator[ChannelServer]:
    """A channel's server in this process."""
    with ChannelServer(target, address, KEY, service_name="svc") as server:
        target.server = server
        yield server
        target.release.set()


@pytest.fixture
def client(server: ChannelServer) -> Iterator[ChannelClient]:
    """A client of that server."""
    with ChannelClient(server.address, KEY, timeout=PATIENCE) as client:
        yield client
