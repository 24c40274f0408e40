"""One teller: the epoch that a manager takes, and what is refused to those who speak under another, or under none.

The process that makes a manager takes an epoch; its copies and the server that it starts, restarts included, have
it from there. It travels with a connection's hello. A client without one speaks for a person.
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
from dataclasses import dataclass

from shmelim.channel import Caller, current_caller
from shmelim.errors import EpochError


def new_epoch() -> str:
    """Return an epoch that nobody else has, as people are told of it: whose it is, and since when."""
    now = dt.datetime.now(dt.UTC)
    return f"process {os.getpid()} since {now:%Y-%m-%dT%H:%M:%SZ}, {secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Teller:
    """Who tells a server what the validator does: the manager of this epoch; anybody where it is "".

    Calls that come from the server's own process are never refused.
    """

    epoch: str

    def __post_init__(self) -> None:
        if not isinstance(self.epoch, str):
            raise TypeError(f"epoch must be text, not {self.epoch!r:.100}")

    def check(self) -> Caller | None:
        """Return who makes the call of this thread; EpochError if that is a copy of another manager."""
        caller = current_caller()
        if caller is None or caller.epoch in {"", self.epoch}:
            return caller
        whose = f"the manager is that of {self.epoch}" if self.epoch else "no manager started this server"
        raise EpochError(
            f"this is a copy of the manager of {caller.epoch}, and by now {whose}",
            hint="end this process: the validator that it belonged to has ended",
        )

    def check_tells(self, what: str) -> None:
        """Raise EpochError if the call of this thread is not the manager's to make, while there is one."""
        caller = self.check()
        if self.epoch and caller is not None and not caller.epoch:
            raise EpochError(
                f"only the manager of {self.epoch} may {what} here",
                hint="a client may change eliminations; what the validator sees and pays is the manager's",
            )
