"""The compiled read path in the place of the reference: what ``_native`` looks up, the pure classes attach."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partialmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

from shmelim.shm import _native
from shmelim.shm.lookups import Lookups
from shmelim.shm.reader import LOADING_NUMPY, TableReader, closed
from shmelim.shm.segment import Segment
from shmelim.shm.view import View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TESTS: Final = 4
_CHOICE: Final = _TESTS
_DECODED: Final = _TESTS + 1


class NativeView(_native.View, View):
    """A :class:`View` in which the extension looks up, too."""

    def __init__(self, segment: Segment, version: int, root: Segment) -> None:
        View.__init__(self, segment, version, root)
        self._map(root.memory, segment.window, segment.label, *self.header[:5])


class NativeTableReader(_native.Table, TableReader):
    """A :class:`TableReader` whose lookups are compiled; attaching and all that is rare is inherited."""

    _view_type = NativeView

    def close(self) -> None:
        """Let go of the table: every later read raises ReaderClosedError. Idempotent."""
        del self._view
        self._stop_counting()

    def _no_view(self) -> NoReturn:
        """Say why there is none; called in the place of a look at it."""
        raise closed(self._namespace.name)

    def flags_of(self, keys: Sequence[bytes]) -> NDArray[np.uint8]:
        """Return the flags of many keys as of one version, as a ``uint8`` array of the same length."""
        with LOADING_NUMPY:
            import numpy as np  # noqa: PLC0415

        listed = keys if isinstance(keys, (list, tuple)) else list(keys)
        flags = np.empty(len(listed), np.uint8)
        return flags if self._fill(listed, flags, 0) else self._flags_of_snapshot(listed)


class NativeLookups(_native.Lookups, Lookups):
    """:class:`Lookups` that reach the extension without a Python frame.

    Methods marked by :func:`flag_test`, :func:`flag_choice` and :func:`decoded` are replaced by C functions that
    do the same, in every subclass anew, since the interpreter is quickest with a method of the very type of its
    object.
    """

    __slots__ = ()

    _methods: ClassVar[dict[str, Any]]
    _settings: ClassVar[tuple[Any, ...]]
    _decoding: ClassVar[Any]  # the decoded method as it was, without its mark: asked where decode raises

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._methods = _marked_methods(cls)
        masks = [cls._member]
        choices, decode, argument = None, None, "key"
        for method in cls._methods.values():
            mark, argument = method.__mark__, method.__code__.co_varnames[1]
            if mark.decode is not None:
                decode, cls._decoding = mark.decode, partialmethod(method)
            elif mark.choices is not None:
                choices = mark.choices
            elif mark.mask not in masks:
                masks.append(mark.mask)
        padded = (*masks, *[0] * (_TESTS - len(masks)))
        cls._settings = (padded, choices, argument, cls._head, decode)
        for name, method in cls._methods.items():
            mark = method.__mark__
            which = masks.index(mark.mask) if mark.mask else _DECODED if mark.decode is not None else _CHOICE
            _native.bind(cls, name, f"{name}($self, {argument})\n--\n\n{method.__doc__ or ''}", which)

    def _collect(self, mask: int, form: int) -> tuple[int, bytes] | None:
        table: NativeTableReader = self._table
        return table._collect(mask, form, self._head)  # noqa: SLF001


def _marked_methods(cls: type[NativeLookups]) -> dict[str, Any]:
    """Return the marked methods that a class has, as they were before the extension's took their places."""
    methods: dict[str, Any] = {}
    for kind in reversed(cls.__mro__):
        methods |= vars(kind) | vars(kind).get("_methods", {})
    return {name: method for name, method in methods.items() if hasattr(method, "__mark__")}
