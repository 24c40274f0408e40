"""When a loss of hotkeys is believed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmelim import EliminationManagerServer
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


HOUR = 3_600_000
START = 1_700_000_000_000
FORTY = [f"h{n:02}" for n in range(40)]


@pytest.fixture
def server():
    with EliminationManagerServer() as made:
        made.update_metagraph_rpc(FORTY, START)
        yield made


def test_what_is_lost_in_small_steps_within_a_day_is_lost_as_well(server):
    for step in range(1, 8):
        server.update_metagraph_rpc(FORTY[5 * step :], START + step * HOUR)
    assert list(server.get_departed_hotkeys_rpc()) == FORTY[:10]
    assert server.get_missing_hotkeys_rpc() == FORTY[10:35]
    assert server.accept_loss_rpc(FORTY[10:35]) == FORTY[10:35]
    assert len(server.get_departed_hotkeys_rpc()) == 35


def test_a_few_each_day_are_believed(server):
    for day in range(1, 6):
        server.update_metagraph_rpc(FORTY[6 * day :], START + day * 24 * HOUR)
    assert list(server.get_departed_hotkeys_rpc()) == FORTY[:30]


def test_that_nobody_is_left_is_believed_if_the_caller_says_so(server):
    server.update_metagraph_rpc(FORTY[:2], START, believe_empty=True)
    server.accept_loss_rpc(FORTY)
    assert server.update_metagraph_rpc([], START + HOUR) == []
    assert server.get_missing_hotkeys_rpc() == FORTY[:2]
    assert server.update_metagraph_rpc([], START + 2 * HOUR, believe_empty=True) == FORTY[:2]
    assert server.get_departed_hotkeys_rpc()["h00"] == {"detected_ms": START + 2 * HOUR}


def test_who_comes_and_goes_is_lost_once(server):
    for step in range(30):
        server.update_metagraph_rpc(FORTY[1:], START + step)
        server.update_metagraph_rpc(FORTY, START + step)
    assert server.get_missing_hotkeys_rpc() == []


def test_a_look_that_was_wrong_is_corrected_by_the_next():
    with EliminationManagerServer() as server:
        look_wrongly(server)


def look_wrongly(server):
    own, foreign = [f"own{n}" for n in range(256)], [f"foreign{n}" for n in range(256)]
    server.update_metagraph_rpc(own)
    server.update_metagraph_rpc([*foreign, "own0"])
    assert len(server.get_missing_hotkeys_rpc()) == 255
    server.update_metagraph_rpc([*foreign[:5], *own])
    assert server.get_missing_hotkeys_rpc() == []
    assert set(server.reader.snapshot().registered) == {*foreign[:5], *own}
    assert server.update_metagraph_rpc([*foreign[:5], *own[1:]]) == ["own0"]
    assert server.update_metagraph_rpc(own[1:]) == foreign[:5], "they were there when a look was believed"
    server.update_metagraph_rpc([*own[1:], "foreign9"])
    assert not server.is_hotkey_re_registered_rpc("foreign9")
