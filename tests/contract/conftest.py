"""Names, places and managers for the contract tests, by public names only; nothing of them outlives a test."""

import contextlib
import itertools
import secrets
import tempfile
from pathlib import Path

import pytest
from contract_services import WAYS
from contract_validator import Validator

from shmelim import EliminationManager

_PREFIX = f"c{secrets.token_hex(3)}"
_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _places():
    """Let every default place of this user be a short temporary directory (a socket's path must be short)."""
    with tempfile.TemporaryDirectory(prefix="c-", dir="/tmp") as base, pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
            (Path(base) / variable).mkdir(mode=0o700)
            patch.setenv(variable, f"{base}/{variable}")
        patch.setenv("SHMELIM_REGISTRY", f"{base}/registry")
        yield


@pytest.fixture(scope="session")
def unused_name():
    """Make names that nobody has served yet; what was published under them is removed in the end."""
    names = []

    def make():
        names.append(f"{_PREFIX}-{next(_numbers)}")
        return names[-1]

    yield make
    for name in names:
        for left in Path("/dev/shm").glob(f"*{name}*"):
            left.unlink()


@pytest.fixture(scope="module")
def _shared(unused_name):
    """One manager in each mode for all tests of a module that leave nothing behind but departures."""
    with contextlib.ExitStack() as stack:
        made = {}

        def get(mode):
            if mode not in made:
                where = {"running_unit_tests": True} if mode == "direct" else {"name": unused_name(), "port": None}
                made[mode] = stack.enter_context(EliminationManager(None, None, None, **where))
            return made[mode]

        yield get


@pytest.fixture(params=["direct", "rpc"])
def mode(request):
    return request.param


@pytest.fixture
def manager(_shared, mode):
    """A manager without collaborators and without eliminations, in each mode."""
    manager = _shared(mode)
    manager.clear_eliminations()
    return manager


@pytest.fixture
def make(unused_name):
    """Make managers of their own; the mode is an argument, and every other is the manager's."""
    with contextlib.ExitStack() as stack:

        def make(mode, *args, **options):
            if mode == "direct":
                options["running_unit_tests"] = True
            else:
                options.setdefault("name", unused_name())
                options.setdefault("port", None)
            if "metagraph" not in options:
                args = args or (None, None, None)
            return stack.enter_context(EliminationManager(*args, **options))

        yield make


@pytest.fixture
def validate(make, tmp_path):
    """Make validators with a manager each."""

    def validate(mode, **figures):
        options = figures.pop("options", {})
        validator = Validator(tmp_path / "miners", **figures)
        options.setdefault("state_dir", tmp_path / "state")
        validator.manager = make(mode, **validator.arguments(), **options)
        validator.manager.live_price_fetcher = validator.prices
        return validator

    return validate


@pytest.fixture
def direct(validate):
    return validate("direct")


@pytest.fixture
def validator(validate, mode):
    return validate(mode)


@pytest.fixture
def start(tmp_path):
    """Start services in any way; what is left of them afterwards is shut down."""
    started = []

    def start(way="default", kind=None, **options):
        usual, more = WAYS[way]
        started.append((kind or usual)(tmp_path, **more | options))
        return started[-1]

    yield start
    for service in started:
        service.shutdown()
