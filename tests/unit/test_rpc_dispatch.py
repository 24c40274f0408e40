"""Which methods exist for a client, how requests are answered, and how the log stays small."""

import functools
import logging

import pytest

from shmelim.channel import dispatch
from shmelim.channel.codec import MSGPACK
from shmelim.channel.failures import unpack_failure
from shmelim.channel.protocol import decode_hello, encode_hello, encode_welcome
from shmelim.errors import MessageTooLargeError, ProtocolError, RemoteError, UnknownMethodError
from shmelim.system.logs import LimitedLog


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Base:
    def inherited_rpc(self):
        return "inherited"


class Target(Base):
    constant_rpc = 3

    class Nested_rpc:  # noqa: N801
        pass

    def __init__(self):
        self.instance_rpc = lambda: "instance"
        self.plain_rpc_calls = 0

    def plain_rpc(self, a, b=2):
        self.plain_rpc_calls += 1
        return [a, b]

    @staticmethod
    def static_rpc():
        return "static"

    @classmethod
    def class_rpc(cls):
        return cls.__name__

    @decorated
    def wrapped_rpc(self):
        return "wrapped"

    @property
    def property_rpc(self):
        raise AssertionError("a property must not run")

    def _private_rpc(self):
        return "private"

    def ordinary(self):
        return "ordinary"

    def __getattr__(self, name):
        raise AssertionError(f"{name} must not be asked for")

    def odd_rpc(self):
        return {"deep": [object()]}

    def big_rpc(self):
        return "x" * 40_000

    def fails_rpc(self):
        raise OSError(5, "disk")

    def refuses_rpc(self):
        raise ValueError("no")

    def exits_rpc(self):
        raise SystemExit(1)


@pytest.fixture
def dispatcher():
    log = LimitedLog(logging.getLogger("shmelim.channel"))
    return dispatch.Dispatcher(Target(), (), MSGPACK, 32_768, "svc", log)


def ask(dispatcher, method, *args, **kwargs):
    reply = dispatcher.answer(MSGPACK.dumps([7, method, args, kwargs]))
    number, succeeded, value = MSGPACK.loads(reply)
    assert number == 7
    if succeeded:
        return value
    raise unpack_failure(value)


def test_methods_that_exist(dispatcher):
    assert ask(dispatcher, "plain_rpc", 1, b=3) == [1, 3]
    assert ask(dispatcher, "inherited_rpc") == "inherited"
    assert ask(dispatcher, "static_rpc") == "static"
    assert ask(dispatcher, "class_rpc") == "Target"
    assert ask(dispatcher, "wrapped_rpc") == "wrapped"


@pytest.mark.parametrize(
    "name",
    [
        "constant_rpc",
        "Nested_rpc",
        "instance_rpc",
        "property_rpc",
        "_private_rpc",
        "ordinary",
        "missing_rpc",
        "__init__",
        "__class__",
        "__reduce__",
        "plain_rpc.__globals__",
        "_rpc",
        "",
        "plain_rpc ",
        "x" * 100_000,
    ],
)
def test_methods_that_do_not(dispatcher, name):
    with pytest.raises(UnknownMethodError, match="no remote method") as caught:
        ask(dispatcher, name)
    assert len(str(caught.value)) < 400


def test_a_typing_error_is_pointed_out(dispatcher):
    with pytest.raises(UnknownMethodError, match="did you mean plain_rpc"):
        ask(dispatcher, "plane_rpc")


def test_wrong_arguments(dispatcher):
    with pytest.raises(TypeError, match="argument"):
        ask(dispatcher, "plain_rpc")
    with pytest.raises(TypeError, match="unexpected"):
        ask(dispatcher, "plain_rpc", 1, c=3)


def test_a_result_that_cannot_be_carried(dispatcher):
    with pytest.raises(TypeError, match=r"odd_rpc: result\['deep'\]\[0\].*object"):
        ask(dispatcher, "odd_rpc")


def test_a_result_that_is_too_large(dispatcher):
    with pytest.raises(MessageTooLargeError, match="carried out"):
        ask(dispatcher, "big_rpc")


def test_only_faults_of_the_server_are_logged(dispatcher, caplog):
    with pytest.raises(ValueError, match="no"):
        ask(dispatcher, "refuses_rpc")
    assert not caplog.records
    with pytest.raises(OSError, match="disk"):
        ask(dispatcher, "fails_rpc")
    assert "fails_rpc" in caplog.text
    assert "Traceback" in caplog.text


def test_an_exit_is_an_answer(dispatcher):
    with pytest.raises(RemoteError, match="SystemExit: 1"):
        ask(dispatcher, "exits_rpc")


@pytest.mark.parametrize(
    "request_",
    [
        None,
        [],
        [1, "plain_rpc", []],
        [1, "plain_rpc", [], {}, 5],
        ["1", "plain_rpc", [], {}],
        [True, "plain_rpc", [], {}],
        [1, b"plain_rpc", [], {}],
        [1, "plain_rpc", {}, {}],
        [1, "plain_rpc", [], []],
        {"id": 1},
    ],
)
def test_what_is_not_a_request(dispatcher, request_):
    with pytest.raises(ProtocolError):
        dispatcher.answer(MSGPACK.dumps(request_))


def test_keyword_names_that_are_no_text_are_a_type_error(dispatcher):
    reply = dispatcher.answer(MSGPACK.dumps([1, "plain_rpc", [], {1: 2}]))
    assert type(unpack_failure(MSGPACK.loads(reply)[2])) is TypeError


def test_hello_and_welcome(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/" + "é" * 300])
    data = encode_hello("ü" * 300)
    assert len(data) <= 512
    assert decode_hello(data)[2:] == ("é" * 60, "ü" * 60)
    assert decode_hello(MSGPACK.dumps([1, 2, "from an earlier version"])).epoch == ""
    monkeypatch.setattr("sys.argv", ["/x/\udcff"])
    assert decode_hello(encode_hello("")).program == "?"
    monkeypatch.setattr("sys.argv", [])
    assert decode_hello(encode_hello("")).program.startswith("python")
    assert len(encode_welcome("é" * 1000, "why not", 2**31)) <= 512
    assert decode_hello(MSGPACK.dumps([9, 1, "later", "more"])).protocol == 9
    for bad in (b"", MSGPACK.dumps([]), MSGPACK.dumps(["1", 2, "p"]), MSGPACK.dumps(5)):
        with pytest.raises(ProtocolError):
            decode_hello(bad)


def test_nobody_calls_outside_of_a_call():
    assert dispatch.current_caller() is None


def test_a_flood_of_one_kind_is_held_back_and_counted(caplog):
    log = LimitedLog(logging.getLogger("flood"), burst=3, interval=3600)
    for number in range(1000):
        log(logging.WARNING, "a", "line %d", number)
    log(logging.WARNING, "b", "another kind")
    assert [record.getMessage() for record in caplog.records] == ["line 0", "line 1", "line 2", "another kind"]


def test_the_next_line_says_how_many_were_held_back(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("shmelim.system.logs.monotonic", lambda: now[0])
    log = LimitedLog(logging.getLogger("flood"), burst=1, interval=10)
    for _ in range(5):
        log(logging.WARNING, "a", "line")
    now[0] = 10.0
    log(logging.WARNING, "a", "line")
    assert [record.getMessage() for record in caplog.records] == [
        "line",
        "line (4 more of this kind were not logged)",
    ]
