"""The defaults of what is the validator's own, and the directories of its miners."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import time
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.eliminations.validator.directories import MinerDirectories
from shmelim.eliminations.validator.drawdown import ledger_drawdown_percentage
from shmelim.eliminations.validator.environment import ValidatorEnvironment
from shmelim.errors import ShmelimError
from shmelim.system.logs import LimitedLog

if TYPE_CHECKING:
    from pathlib import Path


NOW = 1_700_000_000_000


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
    "factors",
    [
        (NAN,),
        (None, "0.5"),
        ("0.5",),
        (90.0, 95.0),
        (float("inf"),),
        (-7.5, True),
    ],
)
def test_ledger_none_of_whose_checkpoints_makes_sense_is_an_error(factors: Any) -> None:
    with pytest.raises(ValueError, match="not a factor"):
        ledger_drawdown_percentage(ledger(*factors))


@pytest.mark.parametrize("bad", [NAN, None, "0.5", 90.0, float("-inf"), -7.5, object, [0.1], 10**400], ids=repr)
@pytest.mark.parametrize("count", [1, 20])
def test_checkpoint_that_makes_no_sense_hides_no_drawdown_beside_it(bad: Any, count: int) -> None:
    environment = ValidatorEnvironment()
    for place in (0, count // 2, count):
        factors = [0.99] * count + [0.8]
        factors.insert(place, bad)
        for _ in range(3):
            assert environment.drawdown(ledger(*factors)) == (True, 20.0)


def test_what_is_left_out_is_said(caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("shmelim.eliminations.validator.drawdown._limited", LimitedLog(logging.getLogger("test")))
    ValidatorEnvironment().drawdown(ledger(0.99, "low", 0.8))
    assert "1 checkpoints of a ledger have an mdd that is not a factor, such as 'low'" in caplog.text


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
        price_source=lambda *given: given, drawdown=lambda _: (True, 1.0), clock=lambda: NOW
    )
    assert environment.price_source("pair", {}, 3) == ("pair", {}, 3)
    assert environment.drawdown(ledger()) == (True, 1.0)
    assert environment.now_ms() == NOW


@pytest.mark.parametrize("time_ms", [NOW, NOW - 0.4, np.float64(NOW + 0.2), np.int64(NOW)])
def test_clock_may_be_one_of_fractions(time_ms: Any) -> None:
    now = ValidatorEnvironment(clock=lambda: time_ms).now_ms()
    assert (now, type(now)) == (NOW, int)


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("max_drawdown_percentage", -1),
        ("max_drawdown_percentage", 101),
        ("deletion_delay_ms", NAN),
        ("error_pause_s", -0.5),
        ("plausible_since_ms", -1),
        ("slash_proportions", {"LIQUIDATED": 50}),
        ("slash_proportions", {"LIQUIDATED": NAN}),
        ("slash_proportions", {"LIQUIDATD": 0.5}),
    ],
)
def test_figure_that_cannot_be_is_refused_when_it_is_set_too(figure: str, value: Any) -> None:
    environment = ValidatorEnvironment()
    before = getattr(environment, figure)
    with pytest.raises(ValueError, match=figure):
        setattr(environment, figure, value)
    assert getattr(environment, figure) == before
    with pytest.raises(ValueError, match=figure):
        ValidatorEnvironment(**{figure: value})


@pytest.mark.parametrize("assigned", [False, True])
def test_shares_are_those_that_were_checked(assigned: bool) -> None:
    shares = {"LIQUIDATED": 0.5}
    environment = ValidatorEnvironment(slash_proportions=None if assigned else MappingProxyType(shares))
    if assigned:
        environment.slash_proportions = MappingProxyType(shares)
    shares["LIQUIDATED"] = 50
    assert environment.slash_proportion("LIQUIDATED") == 0.5
    assert pickle.loads(pickle.dumps(environment)).slash_proportion("LIQUIDATED") == 0.5


@pytest.mark.parametrize("value", ["5", None, True])
def test_figure_that_is_not_a_number_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="tick_pause_s must be a number"):
        ValidatorEnvironment(tick_pause_s=value)


@pytest.mark.parametrize("clock", [time.time, time.monotonic, lambda: 1000 * NOW, lambda: NAN])
def test_clock_that_counts_something_else_is_refused(clock: Any) -> None:
    with pytest.raises(ValueError, match="clock must return milliseconds since 1970"):
        ValidatorEnvironment(clock=clock)


class Challenge:
    def __init__(self, buckets: Any) -> None:
        self.buckets = buckets

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


@pytest.mark.parametrize("buckets", [{"a": "MAINCOMP", "b": "CHALLENGE"}, ["MAINCOMP"], {"MAINCOMP"}])
def test_a_scored_bucket_that_is_none_of_the_managers_is_said_without_asking_it(buckets: Any) -> None:
    collaborators = Collaborators(challengeperiod_manager=Challenge(buckets))  # type: ignore[arg-type]
    said = ValidatorEnvironment(scored_bucket="NEVER").gaps(collaborators)
    assert sum("scored_bucket 'NEVER' is unknown" in gap for gap in said) == 1
    assert not any("scored_bucket" in gap for gap in ValidatorEnvironment().gaps(collaborators))


def test_what_nobody_needs_is_no_gap() -> None:
    assert ValidatorEnvironment().gaps(Collaborators()) == []
    collaborators = Collaborators(position_manager=SimpleNamespace())  # type: ignore[arg-type]
    assert len(ValidatorEnvironment().gaps(collaborators)) == 2
    assert len(ValidatorEnvironment().gaps(collaborators, is_backtesting=True)) == 1
    whole = ValidatorEnvironment(live_price_fetcher=object(), miner_directory="miners")
    assert whole.gaps(collaborators) == []


def test_errors_that_say_nothing_moved_are_exception_classes() -> None:
    class RefusedError(ConnectionError):
        """Of a contract."""

    environment = ValidatorEnvironment(not_made_errors=(RefusedError, TimeoutError))
    said = [environment.slash_outcome(error) for error in (RefusedError(), TimeoutError(), ConnectionError())]
    assert said == ["not made", "not made", "in doubt"]
    for wrong in (RefusedError(), "RefusedError", [RefusedError], int, None, (RefusedError, 1)):
        with pytest.raises(TypeError, match=r"not_made_errors must be an exception class or a tuple"):
            ValidatorEnvironment(not_made_errors=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wide", [Exception, BaseException, ShmelimError, (KeyError, Exception)])
def test_errors_that_anything_may_raise_do_not_say_that_nothing_moved(wide: Any) -> None:
    with pytest.raises(ValueError, match="not_made_errors must be the contract's own"):
        ValidatorEnvironment().not_made_errors = wide


ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"


@pytest.mark.parametrize("prefix", [0, 2, 42, 63, 64, 255, 16383])
def test_addresses_of_every_network_are_hotkeys(prefix: int) -> None:
    address = ss58(prefix, bytes(range(32)))
    assert ValidatorEnvironment().is_hotkey(address)
    assert not ValidatorEnvironment().is_hotkey(address[:-1] + ("2" if address[-1] != "2" else "3"))


def ss58(prefix: int, account: bytes) -> str:
    """Encode an address by the format's description, without any of what is tested."""
    wide = [(prefix & 252) >> 2 | 64, prefix >> 8 | (prefix & 3) << 6]
    head = bytes([prefix] if prefix < 64 else wide)
    raw = head + account + hashlib.blake2b(b"SS58PRE" + head + account).digest()[:2]
    number, text = int.from_bytes(raw, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"[digit] + text
    return "1" * (len(raw) - len(raw.lstrip(b"\0"))) + text


@pytest.mark.parametrize(
    "name",
    ["", "backup-2026", "lost+found", "hotkey123", "5" + "F" * 47, ALICE.lower(), f" {ALICE}", "1" * 48, "é" * 48],
)
def test_other_names_are_nobodys(name: str) -> None:
    assert ValidatorEnvironment().is_hotkey(ALICE)
    assert not ValidatorEnvironment().is_hotkey(name)


@pytest.mark.parametrize("price", [5.0, (5.0, NOW), [5.0, NOW]], ids=repr)
def test_price_may_stand_with_its_time(price: Any) -> None:
    pair = SimpleNamespace(trade_pair="BTC/USD", trade_pair_id="BTCUSD")
    prices = {"BTCUSD": price, "BTCUSD_prev": (4.0, NOW - 1)}
    assert ValidatorEnvironment().price_source(pair, prices, NOW) == 5.0


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


@pytest.mark.parametrize(
    "price",
    [0, 0.0, -5.0, float("nan"), float("inf"), None, True, "5.0", [], [None, NOW], [0.0, NOW], {"x": 5.0}],
    ids=repr,
)
def test_what_is_no_price_is_fetched(price: Any) -> None:
    """None has it fetched; a position closed at nothing would be worth nothing."""
    pair = SimpleNamespace(trade_pair="BTC/USD", trade_pair_id="BTCUSD")
    environment = ValidatorEnvironment()
    assert environment.price_source(pair, {"BTC/USD": price}, NOW) is None
    assert environment.price_source(pair, {"BTC/USD": price, "BTCUSD": (5.0, NOW)}, NOW) == 5.0
