"""What stands in a service's place for its server, where there is none."""

from __future__ import annotations

from typing import NoReturn

from shmelim.errors import ChannelError


class Absent:
    """No server: every remote method that one might have raises ``ChannelError``, and says why.

    Parameters
    ----------
    why
        The message.
    hint
        What to do about it.

    """

    def __init__(self, why: str, hint: str | None = None) -> None:
        self._why = why
        self._hint = hint

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python asks for such names itself
            raise AttributeError(name)
        raise self.error()

    def error(self) -> ChannelError:
        """Return what a call raises."""
        return ChannelError(self._why, hint=self._hint)

    def __repr__(self) -> str:
        return f"<no server: {self._why}>"
