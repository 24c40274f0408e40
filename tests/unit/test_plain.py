"""Plain values are told from others alike by the reference and by the extension, whatever the bytes are."""

import math
import random
import threading
from math import inf, nan

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmelim.shm import DEEPEST, Kind, native, plain

REQUIRED = ((b"name", int(Kind.TEXT)), (b"time", int(Kind.INTEGER)), (b"both", int(Kind.TEXT | Kind.INTEGER)))
OPTIONAL = ((b"share", int(Kind.NOTHING | Kind.INTEGER | Kind.NUMBER)), (b"more", int(Kind.NOTHING | Kind.MAP)))
USUAL = {"name": "x", "time": 5, "both": "y", "share": 0.5, "more": {"a": [1, None, True, {"b": -0.0}]}, "": ""}


class Text(str):
    __slots__ = ()


class Dict(dict):
    pass


encode = msgspec.msgpack.encode
PATHS = [plain] if native.extension is None else [plain, native.extension]
IDS = ["reference", "extension"][: len(PATHS)]

atoms = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.sampled_from([0, 31, 32, 127, 128, 255, 256, 65535, 65536, 1 << 31, 1 << 32, (1 << 64) - 1])
    | st.sampled_from([-1, -32, -33, -128, -129, -32768, -32769, -(1 << 31), -(1 << 31) - 1, -(1 << 63)])
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from(["é" * 15, "é" * 16, "a" * 31, "a" * 32, "a" * 255, "a" * 256, "a" * 65536, "😀", "\0"])
)
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=20)
        | st.dictionaries(st.text(max_size=4), inner, max_size=20)
        | st.tuples(inner, inner)
    ),
    max_leaves=30,
)

# The first draw of such values takes its time, where all else is slow, too.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def nested(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def scanned(path, packed):
    return path.scan(packed, REQUIRED, OPTIONAL)


def written_by_hand(head, *items):
    """A map of which msgspec wrote keys and values, and not the head."""
    return head + b"".join(map(encode, items))


WHOLE = ("name", "x", "time", 5, "both", 6)
ODD = {
    "nothing": b"",
    "no map": encode([1]),
    "more bytes than it takes": encode(USUAL) + b"\0",
    "fewer": encode(USUAL)[:-1],
    "bytes": encode({**USUAL, "x": b"abc"}),
    "a time": encode({**USUAL, "x": msgspec.msgpack.Ext(5, b"abc")}),
    "a key that is no text": encode({**USUAL, 5: 1}),
    "a key that is none, deeper": encode({**USUAL, "x": [{None: 1}]}),
    "NaN": encode({**USUAL, "x": nan}),
    "infinite, deeper": encode({**USUAL, "x": [{"y": (1, -inf)}]}),
    "a short float": b"\x84" + b"".join(map(encode, WHOLE)) + b"\xa1x\xca\0\0\0\0",
    "never used": b"\x84" + b"".join(map(encode, WHOLE)) + b"\xa1x\xc1",
    "text that is not UTF-8": b"\x84" + b"".join(map(encode, WHOLE)) + b"\xa1x\xa2\xc3\x28",
    "half of a surrogate": b"\x84" + b"".join(map(encode, WHOLE)) + b"\xa1x\xa3\xed\xa0\x80",
    "a number in more bytes": b"\x84" + b"".join(map(encode, WHOLE)) + b"\xa1x\xcd\0\xff",
    "a negative number in more": b"\x84" + b"".join(map(encode, WHOLE)) + b"\xa1x\xd1\xff\xff",
    "a positive one as a signed one": b"\x84" + b"".join(map(encode, WHOLE)) + b"\xa1x\xd1\x7f\xff",
    "a text in more bytes": b"\x84" + b"".join(map(encode, WHOLE)) + b"\xa1x\xd9\x01x",
    "a list in more bytes": b"\x84" + b"".join(map(encode, WHOLE)) + b"\xa1x\xdc\0\x01\x05",
    "a map in more bytes": written_by_hand(b"\xde\0\x03", *WHOLE),
    "a text longer than all": b"\x84" + b"".join(map(encode, WHOLE)) + b"\xa1x\xdb\xff\xff\xff\xff",
    "a list longer than all": b"\x84" + b"".join(map(encode, WHOLE)) + b"\xa1x\xdd\xff\xff\xff\xff",
    "a map longer than all": b"\xdf\xff\xff\xff\xff",
    "a field twice": written_by_hand(b"\x84", *WHOLE, "name", "z"),
    "an optional field twice": written_by_hand(b"\x85", *WHOLE, "share", 1, "share", 2),
    "a field that lacks": encode({"name": "x", "time": 5}),
    "of another kind": encode({**USUAL, "time": "5"}),
    "a boolean for an integer": encode({**USUAL, "time": True}),
    "a float for an integer": encode({**USUAL, "time": 5.0}),
    "an optional one of another kind": encode({**USUAL, "more": [1]}),
    "too deep": encode({**USUAL, "x": nested(DEEPEST)}),
    "too many": encode({**USUAL, "x": [[]] * 1000}),
}

BOUNDS = [bound - less for bound in (1, 32, 128, 256, 32768, 65536, 1 << 31, 1 << 32) for less in (0, 1)]
UNSIGNED = [(b"\xcc", 1), (b"\xcd", 2), (b"\xce", 4), (b"\xcf", 8)]
SIGNED = [(b"\xd0", 1), (b"\xd1", 2), (b"\xd2", 4), (b"\xd3", 8)]


@pytest.mark.parametrize("path", PATHS, ids=IDS)
class TestScan:
    def test_the_usual(self, path):
        assert scanned(path, encode(USUAL)) == ("x", 5, "y")
        assert scanned(path, encode({"both": -7, "time": (1 << 64) - 1, "name": "é😀"})) == (
            "é😀",
            (1 << 64) - 1,
            -7,
        )

    @pytest.mark.parametrize("packed", ODD.values(), ids=ODD)
    def test_the_odd(self, path, packed):
        assert scanned(path, packed) is None

    @pytest.mark.parametrize("value", [*BOUNDS, *(-bound for bound in BOUNDS), *(-bound - 1 for bound in BOUNDS)])
    def test_an_integer_in_any_form_but_the_shortest_is_odd(self, path, value):
        forms = [head + value.to_bytes(size, "big") for head, size in UNSIGNED if 0 <= value < 1 << 8 * size]
        forms += [
            head + value.to_bytes(size, "big", signed=True)
            for head, size in SIGNED
            if -(1 << 8 * size - 1) <= value < 1 << 8 * size - 1
        ]
        whole = b"\x84" + b"".join(map(encode, WHOLE)) + encode("x")
        assert scanned(path, whole + encode(value)) is not None
        assert [form for form in forms if scanned(path, whole + form) is not None] in ([], [encode(value)])

    @pytest.mark.parametrize("levels", [DEEPEST - 1, DEEPEST])
    def test_the_limits(self, path, levels):
        value = {**USUAL, "x": nested(levels)}
        assert path.is_plain(value) == (levels < DEEPEST)
        assert (scanned(path, encode(value)) is not None) == (levels < DEEPEST)
        # With those that are in it anyway, 4.
        many = {**USUAL, "x": [()] * (995 if levels < DEEPEST else 996)}
        assert path.is_plain(many) == (levels < DEEPEST)
        assert (scanned(path, encode(many)) is not None) == (levels < DEEPEST)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize(
    "value",
    [
        *(None, [], (), "x", 5, {1: 2}, {"x": b""}, {"x": {1}}, {"x": [{None: 1}]}, {"x": 1j}, {b"x": 1}),
        *(
            {"x": [object()]},
            {"x": type("Text", (str,), {})()},
            {"x": Kind.TEXT},
            {"x": type("Dict", (dict,), {})()},
        ),
        {type("Text", (str,), {})("x"): 1},
    ],
)
def test_what_is_not_plain(path, value):
    assert path.is_plain(value) is False


def test_a_list_in_itself_is_not_plain():
    endless = []
    endless.append(endless)
    assert [path.is_plain({"x": endless}) for path in PATHS] == [False] * len(PATHS)


@patient
@given(st.dictionaries(st.sampled_from(["name", "time", "both", "share", "more", "x", "é"]), values, max_size=8))
def test_both_paths_scan_alike_what_was_encoded(value):
    packed = encode(value)
    assert [scanned(path, packed) for path in PATHS] == [scanned(plain, packed)] * len(PATHS)
    assert {path.is_plain(value) for path in PATHS} == {True}


@patient
@given(st.integers(0, 10**9), values)
def test_both_paths_scan_alike_what_was_damaged(seed, value):
    chance = random.Random(seed)
    packed = bytearray(encode({**USUAL, "x": value}))
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(packed))
        match chance.randrange(4):
            case 0:
                packed[place] = chance.randrange(256)
            case 1:
                packed[place] ^= 1 << chance.randrange(8)
            case 2:
                del packed[place : place + chance.randint(1, 4)]
            case 3:
                packed[place:place] = chance.randbytes(chance.randint(1, 4))
        if not packed:
            break
    assert [scanned(path, bytes(packed)) for path in PATHS] == [scanned(plain, bytes(packed))] * len(PATHS)


@given(st.binary(max_size=60))
def test_both_paths_scan_alike_whatever_it_is(packed):
    assert [scanned(path, packed) for path in PATHS] == [scanned(plain, packed)] * len(PATHS)


def reordered(value):
    """Return what means the same as a value, written as differently as can be."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    if isinstance(value, (list, tuple)):
        return [reordered(each) for each in value]
    if isinstance(value, float):
        return None if math.isnan(value) else -0.0 if value == 0 else value
    return value


@patient
@given(values)
def test_what_means_the_same_is_never_told_apart(value):
    one, other = encode(value), encode(reordered(value))
    assert {path.may_mean_the_same(a, b) for path in PATHS for a, b in [(one, other), (other, one)]} == {True}


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_both_paths_tell_apart_alike(one, other):
    for a, b in [(one, other), (one, one[::-1]), (b"\xcb" + one, other), (one, other + b"\xcb\x80" + bytes(7))]:
        assert {path.may_mean_the_same(a, b) for path in PATHS} == {plain.may_mean_the_same(a, b)}


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("other", [{"a": 1, "b": 3}, {"a": 1}, {"a": 1, "b": 2.5}, {"a": 1, "b": "2"}])
def test_what_differs_is_told_apart_without_decoding_it(path, other):
    assert path.may_mean_the_same(encode({"a": 1, "b": 2}), encode(other)) is False


@pytest.mark.skipif(native.extension is None, reason="of the extension")
class TestExtension:
    @pytest.mark.parametrize("arguments", [(b"",), (b"", bytearray()), ("", b""), (b"", b"", b"")], ids=repr)
    def test_only_bytes_may_mean_the_same(self, arguments):
        with pytest.raises(TypeError):
            native.extension.may_mean_the_same(*arguments)

    @pytest.mark.parametrize(
        "arguments",
        [
            (bytearray(b"\x80"), (), ()),
            (b"\x80", [], ()),
            (b"\x80", ((b"x",),), ()),
            (b"\x80", (("x", 4),), ()),
            (b"\x80", ((b"x", int(Kind.NUMBER)),), ()),
            (b"\x80", ((b"x", 1 << 70),), ()),
            (b"\x80", (), ((b"x", 1 << 7),)),
            (b"\x80", (), ((b"x", 1),) * 33),
            (b"\x80",),
        ],
        ids=repr,
    )
    def test_arguments_that_make_no_sense_are_refused(self, arguments):
        with pytest.raises((TypeError, OverflowError)):
            native.extension.scan(*arguments)

    def test_a_dict_that_another_thread_changes_meanwhile(self):
        value, stop = {f"key {n}": [n] for n in range(200)}, threading.Event()

        def change():
            number = 0
            while not stop.is_set():
                number += 1
                value[f"key {number % 400}"] = [number] * (number % 5)
                value.pop(f"key {(number * 7) % 400}", None)

        threads = [threading.Thread(target=change) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            assert all(native.extension.is_plain(value) for _ in range(3000))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
