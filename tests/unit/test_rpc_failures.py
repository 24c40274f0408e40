"""Exceptions travel, and never bring code or more than a few kilobytes along."""

import json

import pytest

from shmelim import errors
from shmelim.channel.codec import MSGPACK
from shmelim.channel.failures import FAILURE_LIMIT, pack_failure, unpack_failure
from shmelim.errors import OutcomeUnknownError, ProtocolError, RemoteError, UnknownMethodError


def there_and_back(error):
    data = MSGPACK.dumps(pack_failure(error, MSGPACK))
    assert len(data) <= FAILURE_LIMIT
    return unpack_failure(MSGPACK.loads(data))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        ValueError(),
        KeyError("k"),
        KeyError(3),
        IndexError("i", 2, [3]),
        TypeError("t"),
        ZeroDivisionError("division by zero"),
        AttributeError("a"),
        StopIteration(4),
        AssertionError(),
        TimeoutError("late"),
        OSError(5, "Input/output error"),
        FileNotFoundError(2, "No such file", "/x"),
        OSError(18, "cross-device", "a", None, "b"),
        BlockingIOError(11, "again", 5),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),
        NotImplementedError("later"),
        UserWarning("hm"),
    ],
)
def test_a_builtin_exception_comes_back_as_itself(error):
    result = there_and_back(error)
    assert type(result) is type(error)
    assert str(result) == str(error)
    assert getattr(result, "filename", None) == getattr(error, "filename", None)
    assert getattr(result, "errno", None) == getattr(error, "errno", None)


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_the_packages_own_exceptions_keep_message_and_hint(kind):
    result = there_and_back(kind("what", hint="do this"))
    assert type(result) is kind
    assert (result.message, result.hint) == ("what", "do this")
    assert there_and_back(kind("what")).hint is None


class OwnError(ValueError):
    pass


class OwnShmelimError(errors.StoreError):
    pass


class Pretender(Exception):  # noqa: N818
    pass


Pretender.__name__ = "ValueError"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OwnError("x"), "OwnError: x"),
        (OwnShmelimError("x"), "OwnShmelimError: x"),
        (json.JSONDecodeError("bad", "doc", 1), "JSONDecodeError: bad: line 1 column 2 (char 1)"),
        (Pretender("x"), "ValueError: x"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (ExceptionGroup("g", [ValueError(1)]), "ExceptionGroup: g (1 sub-exception)"),
    ],
)
def test_anything_else_is_a_remote_error(error, text):
    result = there_and_back(error)
    assert type(result) is RemoteError
    assert result.message == text


class Unprintable(Exception):  # noqa: N818
    def __str__(self):
        raise RuntimeError


def test_odd_arguments_become_text():
    assert there_and_back(ValueError("bad", Unprintable)).args[0] == "bad"
    assert "test_rpc_failures" in there_and_back(ValueError("bad", Unprintable)).args[1]
    assert there_and_back(ValueError(2**70)).args == (str(2**70),)
    assert there_and_back(KeyError("\ud800")).args == ("\\ud800",)
    assert there_and_back(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no")).reason == "no"
    assert "without a text" in there_and_back(Unprintable()).message
    assert len(there_and_back(ValueError("x" * 10**6)).args[0]) < 3000
    assert len(str(there_and_back(errors.StoreError("x" * 10**6, hint="y" * 10**6)))) < 6000
    nested = current = []
    for _ in range(98):
        current.append([])
        current = current[0]
    assert type(there_and_back(ValueError(nested))) is ValueError


@pytest.mark.parametrize(
    "parts",
    [
        None,
        [],
        ["builtin"],
        ["builtin", 1, [], ""],
        ["shmelim", "NoSuchError", ["m", None], "t", 5],
        ["shmelim", "StoreError", "m", 3],
        [1, 2, 3, 4],
    ],
)
def test_a_malformed_failure_is_a_protocol_error(parts):
    with pytest.raises(ProtocolError):
        unpack_failure(parts)


@pytest.mark.parametrize("name", ["eval", "exec", "SystemExit", "BaseException", "print", "nothing", "__import__"])
def test_no_other_builtin_is_ever_called(name):
    result = unpack_failure(["builtin", name, ["print('called')"], "text"])
    assert type(result) is RemoteError
    assert result.message == f"{name}: text"


def test_no_other_name_of_the_errors_module_is_used():
    assert type(unpack_failure(["shmelim", "_rebuild", ["m", None], "t"])) is RemoteError
    assert type(unpack_failure(["shmelim", "annotations", ["m", None], "t"])) is RemoteError


def test_the_endings_of_a_call_are_distinct_types():
    assert not issubclass(OutcomeUnknownError, errors.CallTimeoutError)
    assert issubclass(UnknownMethodError, AttributeError)
