"""A validator small enough to read and real enough to fail: what the processing of eliminations is tested against.

Its classes have names and methods of their own, as any validator's do; ``adapter.py`` makes them fit. With a
directory it keeps everything on disk, so that it comes back after a SIGKILL with what it had.
"""

from reference_validator.adapter import plug_in
from reference_validator.faults import Faults, InjectedError
from reference_validator.managed import Managed, manager_of
from reference_validator.validator import DAY, HOUR, MINUTE, ReferenceValidator

__all__ = [
    "DAY",
    "HOUR",
    "MINUTE",
    "Faults",
    "InjectedError",
    "Managed",
    "ReferenceValidator",
    "manager_of",
    "plug_in",
]
