"""What tables are called in shared memory, and the word in a root segment that says what is in them."""

from __future__ import annotations

import os
from typing import Final

from shmelim.errors import NotServingError
from shmelim.shm import SharedNamespace

RAW: Final = "bytes"
MSGPACK: Final = "msgpk"
OTHER: Final = "other"
"""How values are encoded: not at all, as msgpack, or in a way that only the table's users know."""


class TableNamespace(SharedNamespace):
    """Segments ``/shmelim-table.<name>``: an elimination server of the same name has others, and another lock.

    >>> TableNamespace("docs").root_name
    '/shmelim-table.docs'
    """

    @property
    def root_name(self) -> str:
        """The name of the root segment, as ``shm_open`` takes it."""
        return f"/shmelim-table.{self.name}"

    def _not_serving(self, why: str = "") -> NotServingError:
        return NotServingError(f"there is no table {self.name!r} (any more){why}", hint="start its writer")


def kind(keys: type, values: str) -> bytes:
    """Return the word, which stands where other tables have the id of their store.

    >>> kind(str, MSGPACK)
    b'table:text:msgpk'
    """
    return f"table:{'text' if keys is str else 'byte'}:{values}".encode()


def check_key_type(keys: type) -> None:
    """Raise TypeError unless ``keys`` is the type of keys that a table can have."""
    if keys is not str and keys is not bytes:
        raise TypeError(f"keys must be str or bytes, the type itself, not {keys!r}")


def is_a_table(name: str) -> bool:
    """Tell whether there is a table of this name, whether or not its writer lives."""
    return _is_there(TableNamespace(name))


def is_an_elimination_servers(name: str) -> bool:
    """Tell whether an elimination server has, or had, this name."""
    return _is_there(SharedNamespace(name))


def _is_there(namespace: SharedNamespace) -> bool:
    return os.path.lexists(f"/dev/shm{namespace.root_name}")  # noqa: S108  # where Linux keeps shared memory
