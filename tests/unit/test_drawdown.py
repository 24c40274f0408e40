"""The default drawdown rule over ledgers that are looked at again and again: what is read, and what is noticed."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest

from shmelim.eliminations.validator.drawdown import LOOKS, Drawdowns
from shmelim.eliminations.validator.environment import ValidatorEnvironment

COUNT = 180


class Checkpoint:
    reads = 0

    def __init__(self, mdd: float) -> None:
        self._mdd = mdd

    @property
    def mdd(self) -> float:
        Checkpoint.reads += 1
        return self._mdd


class Ledger:
    def __init__(self, count: int = COUNT) -> None:
        self.cps = [Checkpoint(0.99) for _ in range(count)]


@pytest.fixture
def drawdowns() -> Drawdowns:
    return Drawdowns()


def reads(drawdowns: Drawdowns, ledger: Any) -> int:
    Checkpoint.reads = 0
    drawdowns.percentage(ledger)
    return Checkpoint.reads


def test_ledger_that_has_not_changed_is_read_at_its_end_only(drawdowns: Drawdowns) -> None:
    ledger = Ledger()
    assert [reads(drawdowns, ledger) for _ in range(4)] == [COUNT, 2, 2, 2]


def test_of_so_many_looks_one_reads_everything(drawdowns: Drawdowns) -> None:
    ledgers = [Ledger() for _ in range(100)]
    ever = [[reads(drawdowns, ledger) for ledger in ledgers] for _ in range(3 * LOOKS)]
    for number in range(100):
        for first in range(2 * LOOKS):
            assert COUNT in [look[number] for look in ever[first : first + LOOKS]]
    # Not all of them at the same look, but for the first.
    assert max(look.count(COUNT) for look in ever[1:]) <= 50


@pytest.mark.parametrize("place", [-1, -2])
def test_end_that_falls_in_place_is_noticed_at_once(drawdowns: Drawdowns, place: int) -> None:
    ledger = Ledger()
    assert drawdowns.percentage(ledger) == 1.0
    ledger.cps[place]._mdd = 0.5
    assert drawdowns.percentage(ledger) == 50.0
    ledger.cps[place]._mdd = 0.99
    assert drawdowns.percentage(ledger) == 1.0


def _grow(ledger: Ledger) -> None:
    ledger.cps[-1]._mdd = 0.5
    ledger.cps += [Checkpoint(0.99) for _ in range(3)]


def _build_anew(ledger: Ledger) -> None:
    ledger.cps = [Checkpoint(0.99) for _ in range(COUNT)]
    ledger.cps[90]._mdd = 0.5


def _cut_and_go_on(ledger: Ledger) -> None:
    ledger.cps[-9:] = [Checkpoint(0.5), *(Checkpoint(0.99) for _ in range(8))]


def _drop_the_oldest(ledger: Ledger) -> None:
    del ledger.cps[0]
    ledger.cps.insert(90, Checkpoint(0.5))


@pytest.mark.parametrize("change", [_grow, _build_anew, _cut_and_go_on, _drop_the_oldest])
def test_change_of_a_ledger_is_noticed_at_once(drawdowns: Drawdowns, change: Any) -> None:
    ledger = Ledger()
    assert drawdowns.percentage(ledger) == 1.0
    change(ledger)
    assert drawdowns.percentage(ledger) == 50.0


def test_checkpoint_in_the_middle_that_falls_in_place_is_noticed_in_time(drawdowns: Drawdowns) -> None:
    ledger = Ledger()
    drawdowns.percentage(ledger)
    ledger.cps[90]._mdd = 0.5
    assert 50.0 in [drawdowns.percentage(ledger) for _ in range(LOOKS)]


def test_nobody_is_eliminated_by_a_checkpoint_that_was_put_right_in_place() -> None:
    environment, ledger = ValidatorEnvironment(), Ledger()
    ledger.cps[90]._mdd = 0.5
    assert environment.drawdown(ledger) == (True, 50.0)
    ledger.cps[90]._mdd = 0.99
    assert [environment.drawdown(ledger) for _ in range(LOOKS)] == [(False, 1.0)] * LOOKS


def test_another_ledger_is_another(drawdowns: Drawdowns) -> None:
    """Also one that stands where the first one stood, and has its checkpoints."""
    one = Ledger()
    drawdowns.percentage(one)
    other = Ledger(0)
    other.cps = one.cps
    assert reads(drawdowns, other) == COUNT
    del one, other
    gc.collect()
    assert drawdowns._known == {}


def test_ledger_that_cannot_say_when_it_is_gone_is_read_whole(drawdowns: Drawdowns) -> None:
    class Slotted:
        __slots__ = ("cps",)

    ledger: Any = Slotted()
    ledger.cps = Ledger().cps
    assert [reads(drawdowns, ledger) for _ in range(2)] == [COUNT, COUNT]
    ledger.cps = tuple(ledger.cps)
    assert reads(drawdowns, ledger) == COUNT


def test_nan_at_the_end_of_a_known_ledger_is_left_out(drawdowns: Drawdowns) -> None:
    ledger = Ledger()
    assert drawdowns.percentage(ledger) == 1.0
    ledger.cps[-1]._mdd = float("nan")
    assert drawdowns.percentage(ledger) == 1.0
    ledger.cps[-2]._mdd = 0.6
    assert drawdowns.percentage(ledger) == 40.0


def test_environment_can_be_pickled_with_ledgers_that_it_knows() -> None:
    environment = ValidatorEnvironment()
    ledger = Ledger()
    environment.drawdown(ledger)
    assert environment._drawdowns._known
    copied = pickle.loads(pickle.dumps(environment))
    assert copied.drawdown(ledger) == (False, 1.0)
