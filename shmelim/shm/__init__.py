"""Generic shared-memory table: bytes keys to (flags, record bytes), one writer, lock-free readers."""

from importlib import import_module
from typing import TYPE_CHECKING

from shmelim.shm.counting import Counts, ReadingProcess, Readings, readings_of
from shmelim.shm.facts import TableIdentity, TableInfo, WriterInfo, WriterState
from shmelim.shm.lookups import HEADS, ITEMS, KEYS, VALUES, Attached, decoded, flag_choice, flag_test
from shmelim.shm.native import READ_PATH
from shmelim.shm.plain import DEEPEST, Kind
from shmelim.shm.reader import LOADING_NUMPY, Record, TableSnapshot
from shmelim.shm.segment import Namespace, check_name
from shmelim.shm.shared import SharedNamespace

if TYPE_CHECKING:
    from shmelim.shm.following import Position
    from shmelim.shm.private import PrivateNamespace
    from shmelim.shm.replay import Entry
    from shmelim.shm.writer import TableWriter, Transaction

if TYPE_CHECKING or READ_PATH == "pure":
    from shmelim.shm.lookups import PlainLookups as Lookups
    from shmelim.shm.plain import is_plain, may_mean_the_same, scan
    from shmelim.shm.reader import TableReader
else:
    from shmelim.shm._native import is_plain, may_mean_the_same, scan
    from shmelim.shm.fast import NativeLookups as Lookups
    from shmelim.shm.fast import NativeTableReader as TableReader

__all__ = [
    "DEEPEST",
    "HEADS",
    "ITEMS",
    "KEYS",
    "LOADING_NUMPY",
    "READ_PATH",
    "VALUES",
    "Attached",
    "Counts",
    "Entry",
    "Kind",
    "Lookups",
    "Namespace",
    "Position",
    "PrivateNamespace",
    "ReadingProcess",
    "Readings",
    "Record",
    "SharedNamespace",
    "TableIdentity",
    "TableInfo",
    "TableReader",
    "TableSnapshot",
    "TableWriter",
    "Transaction",
    "WriterInfo",
    "WriterState",
    "check_name",
    "decoded",
    "flag_choice",
    "flag_test",
    "is_plain",
    "may_mean_the_same",
    "readings_of",
    "scan",
]

# What no reader needs; the writer brings numpy.
_LAZY = {
    "Entry": "replay",
    "Position": "following",
    "PrivateNamespace": "private",
    "TableWriter": "writer",
    "Transaction": "writer",
}

if not TYPE_CHECKING:

    def __getattr__(name):  # noqa: ANN001, ANN202
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(import_module(f"{__name__}.{_LAZY[name]}"), name))
