"""When a loss of hotkeys is believed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmelim.eliminations.state.changes import lost_hotkeys


@pytest.mark.parametrize(
    ("before", "lost", "anomalous"),
    [
        (0, 0, False),
        (10, 10, False),
        (11, 11, True),
        (40, 10, False),
        (44, 11, True),
        (45, 11, False),
        (48, 12, True),
    ],
)
def test_more_than_10_and_at_least_a_quarter_is_an_anomaly(before, lost, anomalous):
    hotkeys = [f"h{n:03}" for n in range(before)]
    assert lost_hotkeys(set(hotkeys), set(hotkeys[lost:])) == (hotkeys[:lost], anomalous)


def test_quarter_is_one_of_those_who_were_there_before_the_loss():
    before = {f"h{n:03}" for n in range(60)}
    now = {f"h{n:03}" for n in range(11, 60)}
    assert not lost_hotkeys(before, now)[1]
    assert lost_hotkeys(before, now, 44)[1]


@given(st.sets(st.text(max_size=3)), st.sets(st.text(max_size=3)))
def test_the_lost_are_sorted_and_newcomers_do_not_count(before, now):
    lost, _ = lost_hotkeys(before, now)
    assert lost == sorted(hotkey for hotkey in before if hotkey not in now)
    assert lost_hotkeys(before, now | {"newcomer"} | before) == ([], False)
