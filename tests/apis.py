"""A server, a client and a manager behind the same names, for the test bodies of test_api*.py."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest


class Api:
    """What a reader is, and `rpc` to call any remote method."""

    def __len__(self):
        return len(self.reader)

    def __contains__(self, hotkey):
        return hotkey in self.reader

    def __iter__(self):
        return iter(self.reader)


class Direct(Api):
    """A server object in this process behind the names that a client has; reads go to its reader."""

    def __init__(self, server):
        self.server, self.reader = server, server.reader

    def __getattr__(self, name):
        if hasattr(self.server.reader, name):
            return getattr(self.server.reader, name)
        return getattr(self.server, f"{name}_rpc")

    def rpc(self, name, *args):
        return getattr(self.server, f"{name}_rpc")(*args)


class Remote(Api):
    """A client of a server in another process."""

    def __init__(self, client):
        self.client = self.reader = client

    def __getattr__(self, name):
        if hasattr(self.client, name):
            return getattr(self.client, name)
        return lambda *args: self.rpc(name, *args)

    def rpc(self, name, *args):
        return self.client._call(f"{name}_rpc", args)


class Managed(Api):
    """What a validator holds; what it does not have is asked of its reader."""

    def __init__(self, manager):
        self.manager, self.reader = manager, manager.reader

    def __getattr__(self, name):
        return getattr(self.manager if hasattr(self.manager, name) else self.reader, name)

    def rpc(self, name, *args):
        return getattr(self.manager._server_proxy, f"{name}_rpc")(*args)

    def health_check(self):
        return self.rpc("health_check")


def nothing_applied(api, before):
    assert api.snapshot() == before
    return True


@contextmanager
def refused(error, value, match=None):
    """Which of the values that one server is asked with is not refused, a failure says."""
    try:
        yield
    except error as refusal:
        assert match is None or re.search(match, str(refusal)), f"{value!r}: {refusal}"  # noqa: PT017
    else:
        pytest.fail(f"{value!r} was not refused")
