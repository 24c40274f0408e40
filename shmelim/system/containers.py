"""What counts as a dict or a list although it is neither: mappings, sequences, proxies of ``multiprocessing``."""

from __future__ import annotations

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
