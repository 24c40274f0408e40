"""The defaults of what is the validator's own, and the directories of its miners."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from shmelim.eliminations.validator.directories import MinerDirectories
from shmelim.eliminations.validator.drawdown import ledger_drawdown_percentage
from shmelim.eliminations.validator.environment import ValidatorEnvironment

if TYPE_CHECKING:
    from pathlib import Path


def ledger(*factors: Any) -> SimpleNamespace:
    return SimpleNamespace(cps=[SimpleNamespace(mdd=factor) for factor in factors])


def test_figures_are_those_of_the_field() -> None:
    environment = ValidatorEnvironment()
    assert environment.check_interval_ms == 300_000
    assert environment.deletion_delay_ms == 172_800_000
    assert environment.development_hotkey == "DEVELOPMENT"
    assert environment.slash_proportion("PLAGIARISM") is None
    assert environment.miner_hotkeys() == []
    environment.remove_miner_directory("a")


@pytest.mark.parametrize(
    ("factors", "eliminated", "percentage"),
    [
        ((1.0, 0.9), True, 10.0),
        ((0.9, 1.0), True, 10.0),
        ((0.90001,), False, 9.999),
        ((0.89999,), True, 10.001),
        ((1.0,), False, 0.0),
        ((1.5,), False, 0.0),
        ((-0.5,), True, 100.0),
        ((), False, 0.0),
    ],
)
def test_drawdown_from_10_percent_on_eliminates(factors: Any, eliminated: bool, percentage: float) -> None:
    assert ValidatorEnvironment().drawdown(ledger(*factors)) == (eliminated, pytest.approx(percentage))


def test_drawdown_of_no_ledger_is_none() -> None:
    assert ledger_drawdown_percentage(None) == 0.0


NAN = float("nan")


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        ((NAN,), ValueError, "not a number"),
        ((0.99, NAN, 0.98), ValueError, "not a number"),
        ((None,), TypeError, "NoneType"),
        ((1.0, None), TypeError, "NoneType"),
        (("0.5",), TypeError, "str"),
        ((90.0, 95.0), ValueError, "factor"),
        ((float("inf"),), ValueError, "factor"),
        ((0.99, -7.5), ValueError, "factor"),
    ],
)
def test_ledger_whose_checkpoints_make_no_sense_is_an_error(factors: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ledger_drawdown_percentage(ledger(*factors))


@pytest.mark.parametrize("broken", [{"portfolio": ledger(0.5)}, SimpleNamespace(), SimpleNamespace(cps=None), 5])
def test_ledger_without_checkpoints_to_read_is_an_error(broken: Any) -> None:
    with pytest.raises((TypeError, AttributeError), match=r"cps|NoneType"):
        ledger_drawdown_percentage(broken)


def test_checkpoints_and_factors_may_be_numpys() -> None:
    checkpoints = np.array([SimpleNamespace(mdd=np.float64(0.99)), SimpleNamespace(mdd=np.float32(0.5))], object)
    assert ledger_drawdown_percentage(SimpleNamespace(cps=checkpoints)) == 50.0
    assert ledger_drawdown_percentage(SimpleNamespace(cps=checkpoints[:0])) == 0.0
    assert ledger_drawdown_percentage(SimpleNamespace(cps=(SimpleNamespace(mdd=1),))) == 0.0


@pytest.mark.parametrize("key", ["BTC/USD", "BTCUSD", "the pair"])
def test_price_is_found_under_every_name_of_the_pair(key: str) -> None:
    class Pair:
        trade_pair = "BTC/USD"
        trade_pair_id = "BTCUSD"

        def __str__(self) -> str:
            return "the pair"

    environment = ValidatorEnvironment()
    assert environment.price_source(Pair(), {key: 5.0}, 0) == 5.0
    assert environment.price_source(Pair(), {"ETH/USD": 5.0}, 0) is None


def test_what_is_passed_replaces_the_default() -> None:
    environment = ValidatorEnvironment(
        price_source=lambda *given: given, drawdown=lambda _: (True, 1.0), clock=lambda: 7
    )
    assert environment.price_source("pair", {}, 3) == ("pair", {}, 3)
    assert environment.drawdown(ledger()) == (True, 1.0)
    assert environment.now_ms() == 7


@pytest.mark.parametrize("time_ms", [7, 6.6, np.float64(7.2), np.int64(7)])
def test_clock_may_be_one_of_fractions(time_ms: Any) -> None:
    now = ValidatorEnvironment(clock=lambda: time_ms).now_ms()
    assert (now, type(now)) == (7, int)


@pytest.fixture
def directories(tmp_path: Path) -> MinerDirectories:
    for name in ("miners/a/positions", "miners/.hidden", "victim/kept"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "miners/file").write_text("")
    (tmp_path / "miners/link").symlink_to(tmp_path / "victim")
    (tmp_path / "miners/a/positions/link").symlink_to(tmp_path / "victim")
    (tmp_path / "miners" / os.fsdecode(b"\xff")).mkdir()  # no UTF-8
    return MinerDirectories(tmp_path / "miners")


def test_miners_are_the_real_directories_that_can_be_hotkeys(directories: MinerDirectories) -> None:
    assert directories.hotkeys() == ["a"]


def test_removal_follows_no_link(directories: MinerDirectories) -> None:
    assert directories.remove("a")
    assert not directories.remove("a")
    assert directories.hotkeys() == []
    assert (directories.root.parent / "victim/kept").is_dir()


@pytest.mark.parametrize(
    "hotkey", ["link", "file", "..", ".", ".hidden", "../victim", "a/positions", "/etc", "", "a\0", "x" * 256]
)
def test_what_is_not_a_miners_directory_is_not_removed(directories: MinerDirectories, hotkey: str) -> None:
    before = sorted(path.name for path in directories.root.iterdir())
    assert not directories.remove(hotkey)
    assert sorted(path.name for path in directories.root.iterdir()) == before
    assert (directories.root.parent / "victim/kept").is_dir()


def test_root_that_is_not_there_has_no_miners(tmp_path: Path) -> None:
    absent = MinerDirectories(tmp_path / "nowhere")
    assert absent.hotkeys() == []
    assert not absent.remove("a")
