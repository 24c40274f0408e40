"""Asking the server, or the store itself where none answers; nothing is changed there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.runtime import RuntimeDirectory, default_state_directory
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import KeyFileError, NotServingError, StoreError

Rows = list[dict[str, Any]]


def ask(
    name: str, server: Callable[[EliminationClient], Rows], store: Callable[[Store], Rows]
) -> tuple[Rows, str]:
    """Return the rows that the server or the store has, and who answered: "server" or "store".

    The store is the one that the last server of the name used, or else the one that the name has by default. Where
    there is none either, what the server's absence raised is raised.
    """
    try:
        with contextlib.closing(EliminationClient(name)) as client:
            return server(client), "server"
    except (NotServingError, KeyFileError) as error:
        try:
            announced = RuntimeDirectory(name).server().state_dir
        except (NotServingError, KeyFileError):
            announced = None
        directory = default_state_directory(name) if announced is None else Path(announced)
        try:
            with Store.read_only(directory) as opened:
                return store(opened), "store"
        except StoreError as damaged:
            if (directory / FILE_NAME).exists():
                raise
            raise error from damaged
