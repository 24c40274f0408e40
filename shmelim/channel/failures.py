"""How an exception travels from the server to the caller, without ever naming code that the caller would run.

An exception goes as ``[kind, type name, data, text]``:

========  =======================  ==================================================================
kind      data                     comes back as
========  =======================  ==================================================================
shmelim   ``[message, hint]``      the class of that name in :mod:`shmelim.errors`
builtin   the arguments            the class of that name in :mod:`builtins`, if it is an Exception
other     nothing                  :class:`~shmelim.errors.RemoteError` with ``"type name: text"``
========  =======================  ==================================================================
"""

from __future__ import annotations

import builtins
import contextlib
from typing import Any

from shmelim import errors
from shmelim.channel.codec import Codec
from shmelim.errors import ProtocolError, RemoteError, ShmelimError

_TEXT_LIMIT = 2000  # characters of one text; keeps every failure within FAILURE_LIMIT
FAILURE_LIMIT = 16 * 1024  # bytes; a channel's message limit must be at least this
_OWN: dict[str, type[ShmelimError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ShmelimError)
}


def pack_failure(error: BaseException, codec: Codec) -> list[Any]:
    """Return `error` in the form of the module's table: items that any codec carries, less than 16 KiB together.

    Arguments that `codec`, which will encode it, does not carry, or that are large, go as their text.
    """
    kind = type(error)
    name = kind.__name__
    text = _text(error)
    if isinstance(error, ShmelimError):
        if _OWN.get(name) is kind:
            return ["shmelim", name, [_clean(error.message), error.hint and _clean(error.hint)], text]
    elif isinstance(error, Exception) and _builtin_exception(name) is kind:
        arguments = [_carried(argument, codec) for argument in _arguments(error)]
        if len(codec.dumps(arguments)) > FAILURE_LIMIT // 2:
            arguments = [text]
        return ["builtin", name, arguments, text]
    return ["other", _clean(name), [], text]


def unpack_failure(parts: Any) -> Exception:
    """Return the exception in the form of the module's table; ``ProtocolError`` if `parts` are not one."""
    match parts:
        case ["shmelim", str(name), [str(message), None | str() as hint], str()] if name in _OWN:
            return _OWN[name](message, hint=hint)
        case [str(origin), str(name), list(arguments), str(text)]:
            kind = _builtin_exception(name) if origin == "builtin" else None
            with contextlib.suppress(Exception):  # its constructor may want what could not be carried
                if kind is not None and isinstance(error := kind(*arguments), kind):
                    return error
            return RemoteError(f"{name}: {text}")
    raise ProtocolError("the server's error reply has an unknown form")


def _builtin_exception(name: str) -> type[Exception] | None:
    kind = vars(builtins).get(name)
    return kind if isinstance(kind, type) and issubclass(kind, Exception) else None


def _arguments(error: Exception) -> tuple[Any, ...]:
    """Return what the type's constructor takes to build `error` again."""
    if isinstance(error, OSError) and error.filename is not None:
        # OSError takes the file names out of its arguments; None stands for Windows' error number.
        names = (error.filename,) if error.filename2 is None else (error.filename, None, error.filename2)
        return (*error.args, *names)
    return error.args


def _carried(argument: Any, codec: Codec) -> Any:
    try:
        codec.dumps([[[argument]]])  # as deep as it will be in the reply
    except Exception:
        return _text(argument)
    return argument


def _text(value: object) -> str:
    try:
        text = str(value)
    except Exception:
        text = f"<{type(value).__name__} without a text>"
    return _clean(text)


def _clean(text: str) -> str:
    """Return `text` such that every codec carries it, and short."""
    if len(text) > _TEXT_LIMIT:
        text = text[:_TEXT_LIMIT] + " …"
    return text.encode("utf-8", "backslashreplace").decode()
