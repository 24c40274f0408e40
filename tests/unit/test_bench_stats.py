"""The percentiles, units and samples of the benchmark."""

from __future__ import annotations

import itertools
import time

import pytest

from bench.measure import duel, duel_with_slow, rate, sample, timer_cost
from bench.stats import enough_for, percentile
from bench.units import duration, per_second, times


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 50), (0.01, 1), (0.07, 7), (0.99, 99), (0.991, 100), (0.999, 100), (1, 100)]
)
def test_percentile_is_the_nearest_rank(share, expected):
    assert percentile(list(range(1, 101)), share) == expected


def test_percentile_of_one_value_is_that_value():
    assert percentile([3.0], 0.5) == percentile([3.0], 0.999) == 3.0


def test_percentile_takes_the_lower_of_two_middles():
    assert percentile([1, 2], 0.5) == 1


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_percentile_refuses_what_is_not_a_share(share):
    with pytest.raises(ValueError, match="share"):
        percentile([1], share)


def test_percentile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


@pytest.mark.parametrize(
    ("share", "count", "enough"), [(0.99, 99, False), (0.99, 100, True), (0.999, 999, False), (0.999, 1000, True)]
)
def test_a_percentile_needs_a_value_beyond_it(share, count, enough):
    assert enough_for(share, count) is enough


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ns"),
        (61.24e-9, "61.2 ns"),
        (999.4e-9, "999 ns"),
        (999.9e-9, "1 µs"),
        (1.5e-6, "1.5 µs"),
        (0.99996e-3, "1 ms"),
        (44.123e-3, "44.1 ms"),
        (84, "84 s"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (61.2e-9, 61.3e-9, "61.2 ns"),
        (60.7e-9, 61.8e-9, "61.2 ns"),
        (60.0e-9, 62.0e-9, "61 ns"),
        (55.2e-9, 67.2e-9, "61 ns"),
        (40.0e-9, 90.0e-9, "~60 ns"),
    ],
)
def test_digits_end_where_the_noise_begins(low, high, text):
    assert duration(61.24e-9, (low, high)) == text


def test_rounding_may_need_the_next_unit():
    assert duration(996e-9, (900e-9, 1090e-9)) == "1 µs"
    assert per_second(9.6e5, (6e5, 12e5)) == "~1 M/s"


@pytest.mark.parametrize(
    ("value", "text"), [(12_345_678, "12.3 M/s"), (999_960, "1 M/s"), (4_560, "4.56 k/s"), (78.4, "78.4 /s")]
)
def test_rates(value, text):
    assert per_second(value) == text


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.834, "0.83 ×"), (9.994, "9.99 ×"), (12.34, "12.3 ×"), (1234.5, "1,230 ×")]
)
def test_ratios(ratio, text):
    assert times(ratio) == text


def test_quick_calls_are_measured_in_batches():
    found = sample({"a": 1}.__contains__, ["a", "b"] * 50, 0.02)
    assert found.batched
    assert 0 < found.p50 < 20e-6
    assert found.p99 is not None
    assert found.p99 <= found.p999
    assert found.rate == pytest.approx(1 / found.p50, rel=0.9)


def test_slow_calls_are_measured_one_by_one():
    found = sample(lambda _: time.sleep(0.002), [None], 0.03)
    assert not found.batched
    assert 0.002 <= found.p50 < 0.1
    assert found.p99 is None
    assert found.p999 is None
    assert 1 <= found.calls <= 15


def test_a_call_that_takes_longer_than_the_time_given_is_made_once_for_the_figures():
    calls = []
    found = sample(lambda _: (calls.append(1), time.sleep(0.003)), [None] * 8, 0.001)
    assert found.calls == 1
    assert found.rate == pytest.approx(1 / found.p50, rel=0.01)


def test_measuring_begins_when_it_is_told_to():
    begin_at = time.perf_counter() + 0.03
    rate(lambda _: None, [None], 0.001, begin_at)
    assert time.perf_counter() >= begin_at


def test_a_duel_divides_by_each_sides_calls():
    found = duel(lambda: time.sleep(0.002), lambda: time.sleep(0.002), (20_000, 2), 0.02)
    assert found.rounds >= 3
    assert found.ratio == pytest.approx(found.ours / found.theirs)
    assert found.theirs >= 0.001
    assert found.ours < found.theirs  # of ten thousand times as many calls, however long each pass took
    assert found.low <= found.high


def test_a_duel_prepares_each_pass_outside_of_the_time():
    prepared = []
    found = duel(lambda: None, lambda: None, 1, 0.001, before=lambda: (prepared.append(1), time.sleep(0.001)))
    assert len(prepared) == 2 * found.rounds + 4
    assert found.ours < 0.001


def test_the_timer_costs_something():
    assert 0 < timer_cost() < 1e-3


def test_a_call_is_not_taken_for_quick_because_it_has_one_argument():
    assert not sample(lambda _: time.sleep(5e-6), [None], 0.005).batched


def test_a_rare_stall_does_not_move_the_median_of_quick_calls():
    stalls = iter([*[0] * 700, 0.02] * 1000)

    def call(_):
        if next(stalls):
            time.sleep(0.02)

    assert sample(call, [None] * 512, 0.1).p50 < 2e-6


def test_a_slow_operation_is_judged_by_its_calls_once_it_is_awake():
    calls = itertools.count()

    def slow(_):
        # The first calls of a round take long, as where a server has to wake up; one later call is stalled.
        time.sleep(0.01 if next(calls) % 20 < 8 or next(stalls) else 0.001)

    stalls = itertools.cycle([0] * 11 + [1])
    found = duel_with_slow(lambda: time.sleep(0.001), 10, slow, range(20), 0.01)
    assert found.rounds >= 3
    assert 0.001 <= found.theirs < 0.005
    assert found.ratio < 0.5
