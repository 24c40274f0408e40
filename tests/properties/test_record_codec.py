"""Whatever JSON-like record goes in comes out the same, through msgpack and through the JSON file."""

import contextlib
import json
import math
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shmelim.eliminations import record as rec
from shmelim.eliminations.files import format as files
from shmelim.system.containers import finite

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
hotkeys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
integers = st.integers(-(2**63), 2**64 - 1)
scalars = st.none() | st.booleans() | integers | st.floats() | text
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=12
)


@st.composite
def records(draw):
    fields = {
        "hotkey": draw(hotkeys),
        "dd": draw(st.none() | st.floats() | integers),
        "reason": draw(st.sampled_from(rec.EliminationReason) | text),
        "elimination_initiated_time_ms": draw(integers),
        "price_info": draw(st.none() | st.dictionaries(text, values, max_size=4)),
        "return_info": draw(st.dictionaries(text, values, max_size=4)),
        **draw(st.dictionaries(text.filter(lambda key: key not in REQUIRED + INFOS), values, max_size=3)),
    }
    return dict(draw(st.permutations(list(fields.items()))))


REQUIRED = ("hotkey", "reason", "elimination_initiated_time_ms")
INFOS = ("dd", "price_info", "return_info")


def same(left, right):
    """Equal in value, type, order and sign; NaN equals NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (
            left == right and math.copysign(1, left) == math.copysign(1, right)
        )
    return left == right


@given(records())
def test_msgpack_round_trip(record):
    plain = rec.normalise(record)
    assert same(plain, finite({**record, "reason": str.__str__(record["reason"])}))
    assert same(rec.decode(rec.encode(plain)), plain)
    assert same(rec.normalise(plain), plain)


def disguise(value):
    """The same value in the clothes that numpy and tuples lend it."""
    if isinstance(value, dict):
        return {np.str_(key) if "\0" not in key else key: disguise(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(map(disguise, value))
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float64(value)
    if isinstance(value, int):
        return np.int64(value) if value < 2**63 else np.uint64(value)
    return value


@given(records())
def test_numpy_and_tuples_become_what_they_stand_for(record):
    assert same(rec.normalise(disguise(record)), rec.normalise(record))


@given(st.lists(records(), max_size=5, unique_by=lambda record: record["hotkey"]))
@settings(max_examples=40)
def test_json_file_round_trip(given_records):
    plain = [rec.normalise(record) for record in given_records]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "eliminations.json")
        summary = files.write_eliminations(path, map(rec.encode, plain))
        plain = [rec.normalise(finite(record)) for record in plain]  # the files are strict JSON
        assert same(json.loads(path.read_text(encoding="utf-8")), {"eliminations": plain})
        assert files.read_file(path).digest == summary.digest
        read = files.read_eliminations(path)
    assert read is not None
    assert read.bad == []
    assert same([rec.decode(record) for record in read.taken.values()], plain)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_decode_or_are_a_value_error(data):
    with contextlib.suppress(ValueError):
        assert isinstance(rec.decode(data), dict)
