"""SPEC 13: the table for other state, read by a process that shares nothing with its writer but the name."""

import os
import subprocess
import sys

import numpy as np
import pytest
from waiting import PATIENCE, until

from shmelim.errors import AlreadyServingError
from shmelim.table import Reader, Writer

WRITER = """
import sys
from shmelim.table import Writer

with Writer(sys.argv[1]) as prices:
    prices.replace_all({"BTC/USD": 97_250.5, "ETH/USD": 3_400.0})
    print("published", flush=True)
    for line in sys.stdin:
        with prices.transaction() as transaction:
            transaction.put("BTC/USD", float(line))
            transaction.remove("ETH/USD")
        print("published", flush=True)
"""


class Elsewhere:
    """A writer in a process of its own."""

    def __init__(self, name):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "published\n"

    def put(self, price):
        self.process.stdin.write(f"{price}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "published\n"

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def name(unused_name):
    return unused_name()


@pytest.fixture
def writer(name):
    running = Elsewhere(name)
    yield running
    running.kill()


def test_what_is_put_is_read_in_another_process_at_once_and_whole(name, writer):
    prices = Reader(name)
    assert dict(prices) == {"BTC/USD": 97_250.5, "ETH/USD": 3_400.0}
    before = prices.version
    writer.put(1.5)
    assert dict(prices) == {"BTC/USD": 1.5}
    assert prices.version > before
    assert prices.wait_for_change(PATIENCE, since=before)


def test_many_are_asked_for_as_arrays(name, writer):
    keys = ["ETH/USD", "XRP/USD", "BTC/USD"]
    np.testing.assert_array_equal(Reader(name).numbers(keys), [3_400.0, np.nan, 97_250.5])
    assert Reader(name).contains_many(keys).tolist() == [True, False, True]


def test_the_values_outlive_their_writer_and_readers_can_ask_whether_it_lives(name, writer):
    prices = Reader(name)
    assert prices.writer.pid == writer.process.pid
    assert prices.writer.alive
    with pytest.raises(AlreadyServingError, match=str(writer.process.pid)):
        Writer(name)
    writer.kill()
    assert prices["BTC/USD"] == Reader(name)["BTC/USD"] == 97_250.5
    until(lambda: prices.writer.alive is False, "that the writer's death is seen")
    assert prices.writer.heartbeat_age > 1
    with Writer(name, keep=True) as successor:
        successor.put("XRP/USD", 0.5)
        assert list(prices) == ["BTC/USD", "ETH/USD", "XRP/USD"]
        assert prices.writer.pid == os.getpid()


def test_bytes_are_kept_as_they_are(name):
    with Writer(name, encode=bytes) as blobs:
        blobs.put("a", b"\x00\xff")
        assert Reader(name, decode=bytes)["a"] == b"\x00\xff"
