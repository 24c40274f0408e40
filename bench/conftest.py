"""The contenders as fixtures: each runs once a suite, filled to the size that a benchmark asks for."""

from __future__ import annotations

import pytest

from bench.contenders import CONTENDERS
from bench.records import records


@pytest.fixture(scope="session", params=CONTENDERS, ids=lambda contender: contender.label)
def contender(request):
    running = request.param()
    yield running
    running.close()


@pytest.fixture
def filled(request, contender):
    """The contender with as many records as the benchmark's ``size`` parameter says."""
    size = request.getfixturevalue("size")
    contender.sync(records(size))
    return contender
