"""The domain: elimination records, their store, the server that publishes them and the reader."""

from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.manager import EliminationManager
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.reading import Snapshot
from shmelim.eliminations.record import DEPARTED_HOTKEYS_KEY, EliminationReason
from shmelim.eliminations.rows import Status
from shmelim.eliminations.server import EliminationManagerServer
from shmelim.eliminations.validator.environment import ValidatorEnvironment

__all__ = [
    "DEPARTED_HOTKEYS_KEY",
    "EliminationClient",
    "EliminationManager",
    "EliminationManagerServer",
    "EliminationReader",
    "EliminationReason",
    "Snapshot",
    "Status",
    "ValidatorEnvironment",
]
