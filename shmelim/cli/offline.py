"""Asking the store itself, where no server answers; nothing there is changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from shmelim.eliminations.runtime import RuntimeDirectory, default_state_directory
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.errors import ChannelError, KeyFileError, NotServingError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def from_store(name: str, read: Callable[[Path], T], why: ChannelError | NotServingError) -> T:
    """Read the store that the last server of a name used, or the one that the name has by default.

    Parameters
    ----------
    name
        The name.
    read
        Called with the state directory.
    why
        Why the server cannot be asked; raised where there is no store either.

    """
    try:
        announced = RuntimeDirectory(name).server().state_dir
    except (NotServingError, KeyFileError):
        announced = None
    directory = default_state_directory(name) if announced is None else Path(announced)
    try:
        return read(directory)
    except StoreError as error:
        if (directory / FILE_NAME).exists():
            raise
        raise why from error
