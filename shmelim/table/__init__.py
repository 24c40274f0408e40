"""A table in shared memory for any state: one process writes it, every other one reads it without asking anybody.

::

    from shmelim.table import Writer                 from shmelim.table import Reader

    prices = Writer("prices")                        prices = Reader("prices")
    prices.put("BTC/USD", 97_250.5)                  prices["BTC/USD"]

Each name is loaded when it is first asked for: a process that only reads never loads what a writer is made of.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmelim.table.reader import Reader
    from shmelim.table.snapshot import Changes, Snapshot
    from shmelim.table.writer import Transaction, Writer

__all__ = ["Changes", "Reader", "Snapshot", "Transaction", "Writer"]

_MODULES = {
    "Changes": "snapshot",
    "Reader": "reader",
    "Snapshot": "snapshot",
    "Transaction": "writer",
    "Writer": "writer",
}

if not TYPE_CHECKING:  # a type checker that sees these would take any misspelt name for one of ours

    def __getattr__(name):  # noqa: ANN001, ANN202
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(import_module(f"{__name__}.{_MODULES[name]}"), name))

    def __dir__():  # noqa: ANN202
        return sorted({*globals(), *__all__})
