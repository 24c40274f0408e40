"""What counts as a dict or a list although it is neither: mappings, sequences, proxies of ``multiprocessing``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_ATOMS = (str, bytes, bytearray, memoryview)


def plain_container(value: object) -> dict[Any, Any] | list[Any] | None:
    """Return a mapping as a dict and a sequence as a list, not what is in them; None for everything else."""
    # A proxy hands over what it stands for; by its abstract base it is nothing.
    fetch = getattr(type(value), "_getvalue", None)
    if callable(fetch):
        value = fetch(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, _ATOMS):
        return list(value)
    return None


def finite(value: Any) -> Any:
    """Return a copy of a JSON-like value in which NaN and infinities are None, as strict JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
