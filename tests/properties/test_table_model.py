"""Any sequence of changes, transactions, failed blocks and successors leaves what it would leave of a dict."""

from __future__ import annotations

from itertools import count

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from shmelim.shm import lookups, reader
from shmelim.table import Reader, Writer
from shmelim.table import reader as table_reader
from shmelim.table.naming import TableNamespace

TEXTS = st.sampled_from(["a", "b", "c", "ü" * 30, "long" * 60])
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
VALUES = st.none() | st.booleans() | NUMBERS | st.text() | st.lists(st.binary(max_size=300), max_size=20)
RAW = st.binary(max_size=300)
CHANGES = st.lists(st.tuples(TEXTS, st.booleans(), st.integers(0, 2**32)), max_size=12)


class Model(RuleBasedStateMachine):
    """A table beside a dict, with one reader that was attached first and is never opened again."""

    name = ""
    raw = False

    @initialize()
    def start(self):
        self.values = {}
        self.options = {"keys": bytes, "encode": bytes} if self.raw else {}
        self.table = Writer(self.name, capacity=4, **self.options)
        decode = {"keys": bytes, "decode": bytes} if self.raw else {}
        self.reader = Reader(self.name, **decode)
        self.before = self.reader.snapshot()
        self.earlier = {}
        self.version = self.reader.version

    def key(self, text):
        return text.encode() if self.raw else text

    def value(self, data):
        return data.draw(RAW if self.raw else VALUES)

    @rule(text=TEXTS, data=st.data())
    def put(self, text, data):
        value = self.value(data)
        self.table.put(self.key(text), value)
        self.values[self.key(text)] = value

    @rule(text=TEXTS)
    def remove(self, text):
        self.table.remove(self.key(text))
        self.values.pop(self.key(text), None)

    @rule(changes=CHANGES, fails=st.booleans())
    def transaction(self, changes, fails):
        after = dict(self.values)
        try:
            with self.table.transaction() as transaction:
                for text, is_put, number in changes:
                    key, value = self.key(text), b"%d" % number
                    if is_put:
                        transaction.put(key, value)
                        after[key] = value
                    else:
                        transaction.remove(key)
                        after.pop(key, None)
                if fails:
                    raise InterruptedError  # noqa: TRY301
        except InterruptedError:
            after = self.values
        self.values = after

    @rule(texts=st.lists(TEXTS), data=st.data())
    def replace_all(self, texts, data):
        self.values = {self.key(text): self.value(data) for text in texts}
        self.table.replace_all(self.values)

    @rule(keep=st.booleans(), closes=st.booleans())
    def successor(self, keep, closes):
        if closes:
            self.table.close()
        del self.table
        self.table = Writer(self.name, capacity=4, keep=keep, **self.options)
        self.values = self.values if keep else {}

    @rule()
    def note(self):
        self.before, self.earlier = self.reader.snapshot(), dict(self.values)

    @invariant()
    def every_way_of_reading_gives_the_same(self):
        table, values = self.reader, self.values
        everything = [self.key(text) for text in ("a", "b", "c", "ü" * 30, "long" * 60, "never")]
        assert list(table.items()) == list(values.items())
        assert (len(table), table.usage.entries) == (len(values), len(values))
        assert table.many(everything, ...) == [values.get(key, ...) for key in everything]
        assert [table.get(key, ...) for key in everything] == [values.get(key, ...) for key in everything]
        assert [key in table for key in everything] == table.contains_many(everything).tolist()
        assert [table.read(key, len) is not None for key in everything] == [key in values for key in everything]
        after, put, removed = table.changes(self.before)
        assert dict(self.before) == self.earlier
        assert dict(after) == values
        assert removed == [key for key in self.earlier if key not in values]
        same = {key: value for key, value in values.items() if key in self.earlier and key not in put}
        assert same == {key: self.earlier[key] for key in same}
        assert put == {key: value for key, value in values.items() if key not in same}
        assert table.version == self.table.version >= self.version
        self.version = table.version

    def teardown(self):
        if hasattr(self, "table"):
            self.table.close(unlink=True)


@pytest.fixture(params=["as built", "pure"])
def _path(request, monkeypatch):
    """Have readers look up in each way."""
    if request.param == "pure":
        monkeypatch.setattr(table_reader, "TableReader", reader.TableReader)

        class PureTextKeys(lookups.Lookups):
            __init__ = table_reader._TextKeys.__init__
            record = lookups.Lookups._record
            read = lookups.Lookups._read
            to_bytes = lookups.Lookups._key
            to_key = staticmethod(bytes.decode)
            collect = table_reader._TextKeys.collect

        monkeypatch.setattr(table_reader, "_TextKeys", PureTextKeys)


@pytest.mark.usefixtures("_path", "image")
@pytest.mark.parametrize("raw", [False, True], ids=["text and msgpack", "bytes"])
def test_a_table_is_a_dict_that_others_read(new_name, raw):
    numbers = count()
    name = new_name()

    class Table(Model):
        def __init__(self):
            super().__init__()
            self.name, self.raw = name, raw
            next(numbers)

    run_state_machine_as_test(Table, settings=settings(max_examples=25, stateful_step_count=15, deadline=None))
    assert next(numbers) > 10
    assert TableNamespace(name).generations() == []
