"""Generic shared-memory table: bytes keys to (flags, record bytes), one writer, lock-free readers."""

from shmelim.shm.private import PrivateNamespace
from shmelim.shm.reader import Record, TableInfo, TableReader, TableSnapshot, WriterInfo, WriterState
from shmelim.shm.replay import Entry
from shmelim.shm.segment import Namespace, check_name
from shmelim.shm.shared import SharedNamespace
from shmelim.shm.writer import TableWriter, Transaction

__all__ = [
    "Entry",
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
]
