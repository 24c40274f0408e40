"""What the channel's codec carries, and what it refuses."""

import enum
from collections import OrderedDict, defaultdict, namedtuple

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmelim.channel.codec import MSGPACK, UncarriedValueError
from shmelim.errors import ProtocolError


def there_and_back(value):
    return MSGPACK.loads(MSGPACK.dumps(value))


class Reason(enum.StrEnum):
    ZOMBIE = "ZOMBIE"


class Plain(enum.Enum):
    ONE = 1
    DEEP = (1, 2)


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Text(str):
    __slots__ = ()

    def __str__(self):
        return "something else"


Point = namedtuple("Point", "x y")  # noqa: PYI024


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**63),
        2**64 - 1,
        1.5,
        float("inf"),
        "",
        "ключ",
        b"\x00\xff",
        [],
        {},
        set(),
        {"a": [1, {"b": None}], 1: 2, b"k": 3, None: 4, 1.5: 5, (1, "x"): 6},
        {"a", "b", 1, None, b"x"},
        [{"a"}, {"k": {1, 2}}],
    ],
)
def test_comes_back_as_it_was(value):
    result = there_and_back(value)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2, 3)), [1, [2, 3]]),
        (Point(1, 2), [1, 2]),
        (frozenset({1}), {1}),
        ({(1, (2,)), frozenset({3})}, {(1, (2,)), frozenset({3})}),
        (Reason.ZOMBIE, "ZOMBIE"),
        (Plain.ONE, 1),
        (Plain.DEEP, [1, 2]),
        (Flags.A | Flags.B, 3),
        ({Reason.ZOMBIE: Reason.ZOMBIE}, {"ZOMBIE": "ZOMBIE"}),
        ({Reason.ZOMBIE}, {"ZOMBIE"}),
        (Text("x"), "x"),
        ({Text("k"): Text("v")}, {"k": "v"}),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"ab"), b"ab"),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(list, a=[(1,)]), {"a": [[1]]}),
        ([np.float64(1.5), np.float32(0.5)], [1.5, 0.5]),
        ([np.int8(-3), np.uint64(2**64 - 1)], [-3, 2**64 - 1]),
        ({"flag": np.bool_(1), "text": np.str_("t")}, {"flag": True, "text": "t"}),
        ({np.int64(3): 1}, {3: 1}),
        ({np.int64(3), np.int64(4)}, {3, 4}),
    ],
)
def test_becomes_the_nearest_plain_value(value, expected):
    result = there_and_back(value)
    assert result == expected
    assert _types(result) == _types(expected)


def _types(value):
    if isinstance(value, dict):
        return {(type(key), str(_types(item))) for key, item in value.items()}
    if isinstance(value, list):
        return [_types(item) for item in value]
    return type(value)


class Alien:
    pass


@pytest.mark.parametrize(
    ("value", "path", "words"),
    [
        ({"a": [0, {"b": Alien()}]}, ("a", 1, "b"), "test_rpc_codec.Alien"),
        ([2**64], (0,), "64 bits"),
        ({"k": -(2**63) - 1}, ("k",), "64 bits"),
        ([{2**70}], (0, 0), "64 bits"),
        ([["\ud800"]], (0, 0), "surrogates"),
        ([np.zeros(3)], (0,), "numpy.ndarray"),
        ([np.datetime64("2020-01-01")], (0,), "datetime64"),
        ([1 + 2j], (0,), "complex"),
        ([object], (0,), "builtins.type"),
        ([iter(())], (0,), "tuple_iterator"),
    ],
)
def test_refuses_and_says_where(value, path, words):
    with pytest.raises(UncarriedValueError, match=words) as caught:
        MSGPACK.dumps(value)
    assert isinstance(caught.value, TypeError)
    if "{2" not in repr(value):
        assert caught.value.path == path


def test_a_cycle_and_deep_nesting_are_refused():
    cycle = []
    cycle.append(cycle)
    with pytest.raises(UncarriedValueError, match="100 levels"):
        MSGPACK.dumps(cycle)


def test_nothing_is_changed_by_encoding():
    inner = {1, 2}
    value = {"a": [inner, (Reason.ZOMBIE,)]}
    MSGPACK.dumps(value)
    assert value == {"a": [{1, 2}, (Reason.ZOMBIE,)]}
    assert value["a"][0] is inner


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x92\x01",
        b"\x01\x02",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\xa1\xff",
        msgspec.msgpack.encode(msgspec.msgpack.Ext(77, b"x")),
        msgspec.msgpack.encode(msgspec.msgpack.Ext(1, b"\x01")),
        msgspec.msgpack.encode(msgspec.msgpack.Ext(1, b"\xc1")),
        msgspec.msgpack.encode(msgspec.msgpack.Ext(1, b"\x91\x80")),
    ],
)
def test_garbage_is_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        MSGPACK.loads(data)


@given(st.binary(max_size=200))
def test_any_bytes_decode_to_what_can_be_sent_again_or_are_a_protocol_error(data):
    try:
        value = MSGPACK.loads(data)
    except ProtocolError:
        return
    # Compared as text, since a NaN is not equal to itself, and -0.0 equals 0.0.
    assert repr(MSGPACK.loads(MSGPACK.dumps(value))) == repr(value)


_keys = st.text(max_size=5) | st.integers(-(2**63), 2**64 - 1)
_atoms = st.none() | st.booleans() | st.floats(allow_nan=False) | st.binary(max_size=5) | _keys
_values = st.recursive(
    _atoms,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4) | st.sets(_keys, max_size=4)
    ),
)


@given(_values)
def test_json_like_values_and_sets_come_back_equal(value):
    assert there_and_back(value) == value


def test_what_is_msgpack_already_is_put_in_as_it_is():
    rows = [{"hotkey": "a"}, {"hotkey": "b", "more": [1, 2.5, None]}]
    packed = msgspec.Raw(MSGPACK.dumps(rows))
    assert MSGPACK.loads(MSGPACK.dumps([1, True, packed])) == [1, True, rows]
