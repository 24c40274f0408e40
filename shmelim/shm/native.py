"""Which of the two read paths is in use: decided once, when the package is imported.

``native`` is the extension ``_native``, compiled when the package is installed; ``pure`` is Python, and the
reference. ``SHMELIM_PURE=1`` in the environment forces the latter.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from types import ModuleType
from typing import Any, Final

from shmelim.shm.segment import Segment

_INTERFACE: Final = 7
"""That of ``_native.c``: to be raised there and here by whatever only a matching pair of them can do."""

HOW_TO_COMPILE: Final = (
    "install a C compiler, then `SHMELIM_BUILD=native pip install --force-reinstall --no-deps --no-cache-dir"
    " --no-binary shmelim shmelim`"
)
"""Without the cache: pip keeps a wheel that was built without a compiler, and installs it again."""


def _load() -> tuple[ModuleType | None, str]:
    """Return the extension, or None and why it is not used; that is logged where nobody asked for it."""
    if os.environ.get("SHMELIM_PURE", "0") not in {"", "0"}:
        return None, "SHMELIM_PURE says so"
    try:
        native = import_module("shmelim.shm._native")
    except ModuleNotFoundError:
        why = "the extension was not compiled" + _for_others()
    except ImportError as error:
        why = f"the extension cannot be loaded ({error})"
    else:
        if getattr(native, "INTERFACE", None) == _INTERFACE:
            return native, ""
        why = f"{native.__file__} was built from another release of shmelim"
    from shmelim.system.text import get_logger  # noqa: PLC0415  # loads logging, which who only reads does not

    text = "reads take the pure-Python path, which is slower: %s; %s. SHMELIM_PURE=1 says that it is meant"
    get_logger("shmelim.shm").warning(text, why, HOW_TO_COMPILE)
    return None, why


def _for_others() -> str:
    """Name the Pythons that it was compiled for, where there are some, and none is this one."""
    from pathlib import Path  # noqa: PLC0415  # as above

    found = sorted(path.name for path in Path(__file__).parent.glob("_native.*.so"))
    return f" for this Python, as {', '.join(found)} was for another" if found else ""


_loaded: Final = _load()
extension: Final = _loaded[0]

READ_PATH: Final = "pure" if extension is None else "native"
"""``"native"`` or ``"pure"``."""


def why_pure() -> str:
    """Return why the pure path is in use, for people; empty where it is not."""
    return _loaded[1]


def fence() -> None:
    """Keep this thread's loads and stores on their sides of this call.

    Without the extension nothing is to be done: such machines are refused unless they keep that order themselves.
    """
    if extension is not None:
        extension.fence()


def release_word(segment: Segment, index: int) -> Any:
    """Return a word of a writable segment; assigning to its item 0 publishes.

    Everything stored before is seen before it, everything stored behind is seen after it. The assignment is a
    statement in which no signal handler runs, as a call could be.
    """
    if extension is None:
        return segment.words[index : index + 1]
    return extension.ReleaseWord(segment.memory, index)


WAKES: Final = 0 if extension is None else extension.WAKES
"""1 where such an assignment wakes who waits for the word by :func:`wait_word`, else 0."""


def wait_word(segment: Segment, index: int, value: int, seconds: float) -> bool:
    """Wait in the kernel until a word is stored to, at once if it is not this value; ends after so many seconds.

    False, at once, where this cannot be done, and the caller has to look again and again: without the extension,
    or where sleeping is not the kernel's business either, but a library's that has other tasks run meanwhile.
    """
    if not WAKES or time.sleep.__module__ != "time":
        return False
    waited: bool = extension.wait_word(segment.memory, index, value, seconds)  # type: ignore[union-attr]
    return waited
