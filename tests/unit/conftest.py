"""What several of these tests begin with: a server without processes that owes nothing yet."""

import pytest
from owing import a_server


@pytest.fixture(params=["memory", "disk"])
def server(request, tmp_path):
    with a_server(request.param, tmp_path) as server:
        yield server
