"""Which service object of this process has which address, so that two of them never take it from each other.

Other processes are told apart by :mod:`shmelim.service.ownership`. Within one process the later of two objects
of one service takes the address over, as when a name is bound anew, and the earlier one is ended for good: else
each of them, when it restarts its server, would end the other's. Objects of different services are refused.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol

from shmelim.channel.address import describe
from shmelim.errors import ChannelError
from shmelim.system import forks

if TYPE_CHECKING:
    from shmelim.channel.address import Location


class Claimant(Protocol):
    """Who may have an address."""

    @property
    def identity(self) -> tuple[str, str | None]:
        """What the objects of one service have in common: its name and the path of its key."""

    @property
    def refusal(self) -> str | None:
        """Why it serves no more, None if it does."""

    def give_way(self, why: str) -> None:
        """End for good, and return when the address is free."""


# Read and written inside forks.creating_descriptors, so that no child is forked in between; nothing blocks there.
_holders: dict[Location, weakref.ref[Claimant]] = {}


def claim(location: Location, claimant: Claimant, *, takes_over: bool) -> None:
    """Make an address a claimant's own.

    Parameters
    ----------
    location
        The address.
    claimant
        Who wants it.
    takes_over
        Whether it may end an earlier object of its service that has it.

    Raises
    ------
    ChannelError
        Another living object of this process has it.

    """
    with forks.creating_descriptors:
        reference = _holders.get(location)
        holder = None if reference is None else reference()
        if holder is claimant:
            return
        if holder is not None and holder.refusal is None:
            name, other = claimant.identity[0], holder.identity[0]
            if holder.identity != claimant.identity or not takes_over:
                raise ChannelError(
                    f"{name} cannot be served: {describe(location)} is in use by another {other} of this process",
                    hint="shut that down first, or choose another address",
                )
        else:
            holder = None
        _holders[location] = weakref.ref(claimant)
    if holder is not None:
        holder.give_way(f"a later {name} of this process has taken {describe(location)}")


def give_up(location: Location, claimant: Claimant) -> None:
    """Give an address back, if the claimant has it."""
    with forks.creating_descriptors:
        reference = _holders.get(location)
        if reference is not None and reference() in (claimant, None):
            del _holders[location]
