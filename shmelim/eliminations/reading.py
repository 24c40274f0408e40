"""The methods that read the state, for an object that has a reader but is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from shmelim.eliminations.entry import Status
    from shmelim.eliminations.reader import EliminationReader, Snapshot

__all__ = ["Reading"]


class Reading:
    """The reads of :class:`~shmelim.eliminations.reader.EliminationReader`, by way of ``self._reader``.

    All answer from memory, without asking the server; what they return is the caller's own.
    """

    _reader: EliminationReader

    def is_hotkey_eliminated(self, hotkey: str) -> bool:
        """Tell whether a hotkey is eliminated. One probe of shared memory."""
        return self._reader.is_hotkey_eliminated(hotkey)

    def is_hotkey_re_registered(self, hotkey: str) -> bool:
        """Tell whether a hotkey that once left the metagraph is in it now. One probe of shared memory."""
        return self._reader.is_hotkey_re_registered(hotkey)

    def status(self, hotkey: str) -> Status:
        """Return all that is known of a hotkey, as flags. One probe of shared memory."""
        return self._reader.status(hotkey)

    def are_eliminated(self, hotkeys: Iterable[str]) -> NDArray[np.bool_]:
        """Tell of many hotkeys whether they are eliminated, all as of one version."""
        return self._reader.are_eliminated(hotkeys)

    def get_elimination(self, hotkey: str) -> dict[str, Any] | None:
        """Return a hotkey's elimination record, or None."""
        return self._reader.get_elimination(hotkey)

    def hotkey_in_eliminations(self, hotkey: str) -> dict[str, Any] | None:
        """Return a hotkey's elimination record, or None."""
        return self._reader.get_elimination(hotkey)

    def get_eliminated_hotkeys(self) -> set[str]:
        """Return the hotkeys that are eliminated."""
        return self._reader.get_eliminated_hotkeys()

    def get_eliminations_from_memory(self) -> list[dict[str, Any]]:
        """Return all elimination records, in the order of first elimination."""
        return self._reader.get_eliminations_from_memory()

    def get_eliminations_dict(self) -> dict[str, dict[str, Any]]:
        """Return all elimination records by hotkey, in the order of first elimination."""
        return self._reader.get_eliminations_dict()

    @property
    def eliminations(self) -> dict[str, dict[str, Any]]:
        """A copy of all elimination records by hotkey: changing it changes nothing else."""
        return self._reader.get_eliminations_dict()

    def get_departed_hotkeys(self) -> dict[str, dict[str, int]]:
        """Return ``{hotkey: {"detected_ms": …}}`` of all that left the metagraph, in the order they did."""
        return self._reader.get_departed_hotkeys()

    @property
    def departed_hotkeys(self) -> dict[str, dict[str, int]]:
        """A copy of :meth:`get_departed_hotkeys`."""
        return self._reader.get_departed_hotkeys()

    def get_departed_hotkey_info(self, hotkey: str) -> dict[str, int] | None:
        """Return ``{"detected_ms": …}`` of a hotkey that left the metagraph once, or None."""
        return self._reader.get_departed_hotkey_info(hotkey)

    def snapshot(self) -> Snapshot:
        """Return everything as of one version."""
        return self._reader.snapshot()
