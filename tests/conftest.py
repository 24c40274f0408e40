"""What every test may ask for: names of tables that nobody else uses, and proof that none is left behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import secrets
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from segments import published_segments_of, segments_of
from serving import Served
from waiting import until

from shmelim import EliminationManager
from shmelim.eliminations.rules import deadlines
from shmelim.shm import READ_PATH, Namespace, PrivateNamespace, SharedNamespace, adoption, writer
from shmelim.shm.image import Image
from shmelim.system import forks
from shmelim.system.logs import LimitedLog
from shmelim.table.naming import TableNamespace

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

# Where this is set, thousands of processes would compile what they import, and each of ours all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

_SHM = Path("/dev/shm")
_PREFIX = f"t{secrets.token_hex(3)}"
_numbers = itertools.count()

# A machine that is busy with something else makes an example slow, and no test fail.
hypothesis.settings.register_profile("shmelim", deadline=None)
hypothesis.settings.load_profile("shmelim")


_TESTS = Path(__file__).parent
# What runs in a minute with `-m quick`: no server process, or few.
_QUICK = (
    "unit/",
    "contract/test_2_",
    "contract/test_3_",
)
# Examples that start servers, type checkers, hunts for leaks, and reads overtaken at each access.
_SLOW = (
    "unit/test_documents",
    "unit/test_face",
    "unit/test_native",
    "unit/test_shm_overlap",
    "unit/test_calls.py::test_a_type_checker",
)
_LONGEST = 3600  # seconds that a long test may take


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is quick by where it stands, so that no test has to say so, and give long ones their time."""
    for item in items:
        where = str(item.path.relative_to(_TESTS)) if item.path.is_relative_to(_TESTS) else ""
        slow = item.get_closest_marker("long") or f"{where}::{item.name}".startswith(_SLOW)
        if where.startswith(_QUICK) and not slow:
            item.add_marker(pytest.mark.quick)
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(_LONGEST))


def pytest_collection_finish() -> None:
    """Keep what thousands of tests are made of out of each look for garbage, which took a third of a second."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    return f"shmelim: {READ_PATH} read path"


@contextlib.contextmanager
def _ending_children() -> Iterator[None]:
    """End a forked child that comes back: it would run all tests that are left, and answer for this process."""
    me = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != me:
            traceback.print_exc()
            os._exit(99)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    with _ending_children():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Generator[None, object, object]:
    with _ending_children():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def _registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have names remembered where nobody else looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHMELIM_REGISTRY", str(tmp_path_factory.mktemp("registry")))
        yield


@pytest.fixture(autouse=True)
def _no_lines_held_back() -> None:
    """Let each test log what it may in a fresh process: what repeats is held back for the whole process."""
    for owner in list(forks._owners):
        if isinstance(owner, LimitedLog):
            owner._topics.clear()


@pytest.fixture
def new_name() -> Iterator[Callable[[], str]]:
    """Make unused table names; afterwards each may have its root and the current data segment, and no more."""
    names: list[str] = []

    def make() -> str:
        names.append(f"{_PREFIX}-{next(_numbers)}")
        return names[-1]

    yield make
    left = {(kind, name): kind(name) for kind in (segments_of, published_segments_of) for name in names}
    for name in names:
        SharedNamespace(name).remove()
        TableNamespace(name).remove()
        assert segments_of(name) == published_segments_of(name) == []
    leaked = {name: segments for (_, name), segments in left.items() if len(segments) > 2}
    assert not leaked, f"more than a root and one data segment: {leaked}"


@pytest.fixture
def table_name(new_name: Callable[[], str]) -> str:
    """One unused table name."""
    return new_name()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for sockets, whose path must be short; to be named before `serve`, whose servers end first."""
    with tempfile.TemporaryDirectory(prefix="shmelim-") as directory:
        yield Path(directory)


@pytest.fixture
def serve(new_name: Callable[[], str], tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start servers in processes of their own; whatever of them still runs afterwards is killed."""
    with contextlib.ExitStack() as stack:

        def start(name: str | None = None, **options: Any) -> Served:
            name = name or new_name()
            options.setdefault("state_dir", tmp_path / f"state-of-{name}")
            return stack.enter_context(Served(name, **options))

        yield start


@pytest.fixture
def managers(new_name: Callable[[], str], tmp_path: Path) -> Iterator[Callable[..., EliminationManager]]:
    """Make managers without collaborators, each with a name, a port and a state of its own; afterwards all end."""
    with contextlib.ExitStack() as stack:

        def make(*args: Any, **options: Any) -> EliminationManager:
            name = options.setdefault("name", new_name())
            # A socket's path must be short, which tmp_path is not.
            if "runtime_base" not in options:
                options["runtime_base"] = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shmelim-")))
            if not options.get("running_unit_tests"):
                options.setdefault("state_dir", tmp_path / f"state-of-{name}")
            options.setdefault("durability", "process")
            if "address" not in options:
                options.setdefault("port", None)
            return stack.enter_context(EliminationManager(*(args or (None, None, None)), **options))

        yield make


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What is stuck waits for this; at the end of the test at the latest it opens, and all threads come back."""
    event = threading.Event()
    yield event
    event.set()
    until(lambda: deadlines.left_behind() == [])


@pytest.fixture(params=["shared", "private"])
def namespace(request: pytest.FixtureRequest, new_name: Callable[[], str]) -> Namespace:
    """A namespace of each kind: what a table does must not depend on where its memory is."""
    return SharedNamespace(new_name()) if request.param == "shared" else PrivateNamespace()


@pytest.fixture(params=["native", "pure"])
def image(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Image]:
    """Have each kind of image written by the writers of a test: the compiled one, and its reference."""
    kind, check = Image, adoption.check_copy
    if request.param == "native":
        fast = pytest.importorskip(
            "shmelim.shm.fast_image", reason="the extension is not built", exc_type=ImportError
        )
        kind, check = fast.NativeImage, fast.check_copy
    monkeypatch.setattr(writer, "Image", kind)
    monkeypatch.setattr(writer, "check_copy", check)
    return kind


@pytest.fixture(scope="session", autouse=True)
def _no_segment_outlives_the_run() -> Iterator[None]:
    yield
    assert not list(_SHM.glob(f"shmelim*.{_PREFIX}*"))
