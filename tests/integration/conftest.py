"""What several of these tests begin with: a validator with a manager of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from reference_validator import Managed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(params=["direct", "rpc"])
def managed(request: pytest.FixtureRequest, new_name: Callable[[], str], tmp_path: Path) -> Iterator[Managed]:
    """One in each mode."""
    with Managed(request.param, new_name(), tmp_path) as made:
        yield made


@pytest.fixture
def directly(new_name: Callable[[], str], tmp_path: Path) -> Iterator[Managed]:
    """One in direct mode."""
    with Managed("direct", new_name(), tmp_path) as made:
        yield made
