"""What several of these tests begin with: a validator with a manager of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from reference_validator import Managed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


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
