"""Generic shared-memory table: bytes keys to (flags, record bytes), one writer, lock-free readers."""

from typing import TYPE_CHECKING

from shmelim.shm.lookups import HEADS, ITEMS, KEYS, VALUES, flag_choice, flag_test
from shmelim.shm.native import READ_PATH
from shmelim.shm.private import PrivateNamespace
from shmelim.shm.reader import Record, TableInfo, TableSnapshot, WriterInfo, WriterState
from shmelim.shm.replay import Entry
from shmelim.shm.segment import Namespace, check_name
from shmelim.shm.shared import SharedNamespace
from shmelim.shm.writer import TableWriter, Transaction

if TYPE_CHECKING or READ_PATH == "pure":
    from shmelim.shm.lookups import Lookups
    from shmelim.shm.reader import TableReader
else:
    from shmelim.shm.fast import NativeLookups as Lookups
    from shmelim.shm.fast import NativeTableReader as TableReader

__all__ = [
    "HEADS",
    "ITEMS",
    "KEYS",
    "READ_PATH",
    "VALUES",
    "Entry",
    "Lookups",
    "Namespace",
    "PrivateNamespace",
    "Record",
    "SharedNamespace",
    "TableInfo",
    "TableReader",
    "TableSnapshot",
    "TableWriter",
    "Transaction",
    "WriterInfo",
    "WriterState",
    "check_name",
    "flag_choice",
    "flag_test",
]
