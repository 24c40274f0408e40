"""When a service ends by itself: it is forgotten, or the interpreter exits."""

from __future__ import annotations

import atexit
import logging
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from shmelim.errors import ChannelError

if TYPE_CHECKING:
    from collections.abc import Callable

_logger = logging.getLogger("shmelim.service")


class Ends(Protocol):
    """What can be ended."""

    def shutdown(self) -> None:
        """End it; idempotent."""


# Written by whoever makes a service; a set of weak references locks itself.
_living: weakref.WeakSet[Ends] = weakref.WeakSet()


def end_at_exit(service: Ends) -> None:
    """Have a service shut down when the interpreter exits, if it still lives then."""
    _living.add(service)


# Called before multiprocessing's own exit function, which was registered earlier and waits for every child.
@atexit.register
def _end_all() -> None:
    for service in list(_living):
        try:
            service.shutdown()
        except Exception:
            _logger.exception("%r could not be shut down", service)


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a bound method without keeping its object alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        alive = reference()
        if alive is None:
            raise ChannelError("the service is gone")
        return alive(*args)

    return call
