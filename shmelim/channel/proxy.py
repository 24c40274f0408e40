"""Remote methods that look like methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmelim.channel.dispatch import is_remote_name
from shmelim.errors import UnknownMethodError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmelim.channel.client import ChannelClient


class Proxy:
    """The remote methods of a :class:`ChannelClient`, as methods. Thread-safe; cannot be pickled.

    Only names that end in ``_rpc`` and do not start with an underscore become calls, so that no protocol method of
    Python ever does. Made by :meth:`ChannelClient.proxy`.
    """

    def __init__(
        self,
        client: ChannelClient,
        *,
        timeout: float | None,
        idempotent: frozenset[str],
        methods: frozenset[str] = frozenset(),
    ) -> None:
        self._client = client
        self._timeout = timeout
        self._idempotent = idempotent
        self._methods = methods

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not is_remote_name(name, self._methods):
            raise UnknownMethodError(f"{name!r} is no name of a remote method", hint="they all end in _rpc")

        def remote_method(*args: Any, **kwargs: Any) -> Any:
            return self._client.call(
                name, args, kwargs, timeout=self._timeout, idempotent=name in self._idempotent
            )

        remote_method.__name__ = remote_method.__qualname__ = name
        self.__dict__[name] = remote_method  # the next access finds it without coming here
        return remote_method

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._client!r}>"
