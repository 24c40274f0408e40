"""shmelim: is this hotkey eliminated? Answered from shared memory, in any process.

Readers attach by name and look up without IPC and without locks; one server process owns the state::

    from shmelim import EliminationReader

    eliminations = EliminationReader("shmelim")
    eliminations.is_hotkey_eliminated(hotkey)

Each name is loaded when it is first asked for: a process that only reads never loads what a server is made of.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from shmelim.errors import (
    AlreadyServingError,
    ChangesUnknownError,
    EpochError,
    NotServingError,
    OutcomeUnknownError,
    ShmelimError,
    SlashNotMadeError,
    StateConflictError,
)

if TYPE_CHECKING:
    from shmelim.eliminations.client import EliminationClient
    from shmelim.eliminations.manager import EliminationManager
    from shmelim.eliminations.reader import EliminationReader
    from shmelim.eliminations.reading import Snapshot
    from shmelim.eliminations.record import DEPARTED_HOTKEYS_KEY, EliminationReason
    from shmelim.eliminations.rows import Status
    from shmelim.eliminations.server import EliminationManagerServer
    from shmelim.eliminations.validator.collaborators import Collaborators
    from shmelim.eliminations.validator.environment import ValidatorEnvironment
    from shmelim.notify import SlackNotifier
    from shmelim.service import HealthCheckDaemon, RPCServiceBase

    __version__: str

__all__ = [
    "DEPARTED_HOTKEYS_KEY",
    "AlreadyServingError",
    "ChangesUnknownError",
    "Collaborators",
    "EliminationClient",
    "EliminationManager",
    "EliminationManagerServer",
    "EliminationReader",
    "EliminationReason",
    "EpochError",
    "HealthCheckDaemon",
    "NotServingError",
    "OutcomeUnknownError",
    "RPCServiceBase",
    "ShmelimError",
    "SlackNotifier",
    "SlashNotMadeError",
    "Snapshot",
    "StateConflictError",
    "Status",
    "ValidatorEnvironment",
    "__version__",
]

_MODULES = {
    "DEPARTED_HOTKEYS_KEY": "eliminations.record",
    "Collaborators": "eliminations.validator.collaborators",
    "EliminationClient": "eliminations.client",
    "EliminationManager": "eliminations.manager",
    "EliminationManagerServer": "eliminations.server",
    "EliminationReader": "eliminations.reader",
    "EliminationReason": "eliminations.record",
    "HealthCheckDaemon": "service",
    "RPCServiceBase": "service",
    "SlackNotifier": "notify",
    "Snapshot": "eliminations.reading",
    "Status": "eliminations.rows",
    "ValidatorEnvironment": "eliminations.validator.environment",
}

if not TYPE_CHECKING:  # a type checker that sees these would take any misspelt name for one of ours

    def __getattr__(name):  # noqa: ANN001, ANN202
        if name in _MODULES:
            value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        elif name == "__version__":
            from importlib.metadata import version  # noqa: PLC0415  # takes tens of milliseconds

            value = version(__name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, value)

    def __dir__():  # noqa: ANN202
        return sorted({*globals(), *__all__})
