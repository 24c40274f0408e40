"""Collaborators that hand in what nobody expects, answer with coroutines, or call back into the manager."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from crashing import call
from reference_validator import Managed

from shmelim.eliminations.record import generate_row
from shmelim.eliminations.rules import deadlines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MINERS = ("a", "b", "c")


@pytest.fixture(params=["direct", "rpc"])
def managed(request: pytest.FixtureRequest, new_name: Callable[[], str], tmp_path: Path) -> Iterator[Managed]:
    with Managed(request.param, new_name(), tmp_path, call_deadline_s=2) as made:
        made.validator.register(*MINERS)
        yield made


@pytest.fixture
def directly(new_name: Callable[[], str], tmp_path: Path) -> Iterator[Managed]:
    with Managed("direct", new_name(), tmp_path) as made:
        made.validator.register(*MINERS)
        yield made


class Unreadable(Sequence[Any]):
    """It raises wherever it is looked at."""

    def __len__(self) -> int:
        raise ConnectionRefusedError("its process is gone")

    def __getitem__(self, _: Any) -> Any:
        raise ConnectionRefusedError("its process is gone")

    def __str__(self) -> str:
        raise ConnectionRefusedError("its process is gone")

    __repr__ = __str__


class Gone:
    """What stands for an object of a process that is gone: even what it is cannot be asked."""

    def __getattribute__(self, _: str) -> Any:
        raise ConnectionRefusedError("its process is gone")


class UnreadableRow:
    @property
    def get(self) -> Any:
        raise ConnectionRefusedError("its process is gone")


class Unhashable(str):
    """Text that is no key."""

    __slots__ = ()

    def __hash__(self) -> int:
        raise TypeError("unhashable")


# ---------------------------------------------------------------------- one miner's odd value


@pytest.mark.parametrize(
    "why",
    [
        Unreadable(),
        np.array(["PLAGIARISM", 0.2]),
        {"reason": "PLAGIARISM"},
        object(),
        (float("nan"),),
        (),
        None,
        (Gone(), 0.1),
        ("PLAGIARISM", Gone()),
    ],
    ids=type,
)
def test_a_challenge_reason_that_nobody_understands_eliminates_all_the_same(directly: Managed, why: Any) -> None:
    directly.validator.probation.failed = {"a": ("PLAGIARISM", 0.1), "b": why, "c": ("PLAGIARISM", 0.1)}
    directly.tick()
    assert directly.reasons.keys() == set(MINERS)
    directly.validator.probation.failed = {"b": why}
    directly.manager.process_eliminations()
    assert directly.validator.probation.failed == {}, "and is forgotten"


class Unnameable:
    """It can be a key, and cannot be shown."""

    def __str__(self) -> str:
        raise ConnectionRefusedError("its process is gone")

    __repr__ = __str__


@pytest.mark.parametrize("key", [5, b"b", None, "", "x" * 300, "\ud800", Unnameable], ids=ascii)
def test_a_challenge_reason_of_nobody_keeps_nobody_from_being_eliminated(directly: Managed, key: Any) -> None:
    why = ("PLAGIARISM", 0.1)
    reasons = {"a": why, Unnameable() if key is Unnameable else key: why, "c": why}
    directly.manager.challengeperiod_manager.get_all_elimination_reasons = lambda: reasons
    directly.manager.challengeperiod_manager.has_elimination_reasons = lambda: True
    directly.tick()
    assert directly.reasons.keys() == {"a", "c"}
    assert any("challenge-period elimination" in text for text in directly.alerts)


@pytest.mark.parametrize("row", [UnreadableRow(), {"hotkey": 5}, {"hotkey": Gone()}, 7, None], ids=type)
def test_a_row_that_cannot_be_read_is_passed_over_and_told(directly: Managed, row: Any) -> None:
    ledgers: Any = directly.manager.position_manager.perf_ledger_manager
    ledgers.get_perf_ledger_eliminations = lambda: [{"hotkey": "a"}, row, {"hotkey": "c"}]
    directly.tick()
    assert directly.reasons.keys() == {"a", "c"}
    assert any("number 1 of the list" in text for text in directly.alerts)


def test_a_hotkey_may_be_text_of_another_class(directly: Managed) -> None:
    ledgers: Any = directly.manager.position_manager.perf_ledger_manager
    ledgers.get_perf_ledger_eliminations = lambda: [{"hotkey": Unhashable("a")}, {"hotkey": np.str_("b")}]
    directly.tick()
    assert directly.reasons.keys() == {"a", "b"}


@pytest.mark.parametrize("entry", [5, b"b", None, "", object(), Unreadable(), Gone], ids=type)
def test_an_entry_of_the_bucket_that_is_not_a_hotkey_is_told_and_the_others_are_judged(
    directly: Managed, entry: Any
) -> None:
    for hotkey in MINERS:
        directly.validator.lose(hotkey, 0.2)
    listed = [Unhashable("a"), entry() if entry is Gone else entry, "c"]
    directly.manager.challengeperiod_manager.get_hotkeys_by_bucket = lambda _: listed
    directly.tick()
    assert directly.reasons.keys() == {"a", "c"}
    assert any("the scored bucket holds what is not a hotkey" in text for text in directly.alerts)


@pytest.mark.parametrize(
    ("judged", "eliminated"),
    [
        ((True, float("nan")), True),
        ((np.True_, Decimal(20)), True),
        ((True, 10**400), True),
        ((True, "20"), True),
        (True, False),
        ((True,), False),
        (None, False),
        ((np.array([True, False]), 1.0), False),
        ((4.2, False), False),
        (("no", 4.2), False),
        ((str.isdigit, 4.2), False),
    ],
    ids=repr,
)
def test_an_odd_judgement_is_that_miners_alone(directly: Managed, judged: Any, eliminated: bool) -> None:
    for hotkey in MINERS:
        directly.validator.lose(hotkey, 0.2 if hotkey != "b" else 0.3)
    rule = directly.environment._drawdown
    directly.environment._drawdown = lambda ledger: judged if ledger.drawdown() == 0.3 else rule(ledger)
    directly.tick()
    assert directly.reasons.keys() == {"a", "c"} | ({"b"} if eliminated else set())
    assert bool(directly.alerts) is not eliminated


def test_a_name_that_the_environment_cannot_judge_is_no_zombie_and_keeps_no_other_from_being_one(
    directly: Managed,
) -> None:
    """Nor does one that was made a zombie before keep others from being deleted."""

    def is_hotkey(name: str) -> bool:
        if name.startswith("odd"):
            raise ValueError(name)
        return True

    directly.environment.is_hotkey = is_hotkey
    directories = directly.validator.miners_directory
    for name in ("odd", "a zombie"):
        (directories / name).mkdir(parents=True)
    directly.tick()
    assert directly.reasons == {"a zombie": "ZOMBIE"}
    assert [text for text in directly.alerts if "miner odd: ValueError: odd" in text]
    now_ms = directly.validator.now_ms
    directly.manager.add_elimination("odder", generate_row("odder", None, "ZOMBIE", now_ms))
    directly.tick(172_800_000)
    assert directly.reasons == {"odder": "ZOMBIE"}
    assert [text for text in directly.alerts if "'odder' is eliminated as a ZOMBIE" in text]
    assert not (directories / "a zombie").exists()


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64, Fraction])
def test_figures_may_be_numpys(managed: Managed, kind: Callable[[int], Any]) -> None:
    managed.environment.check_interval_ms = kind(300_000)
    managed.environment.max_slashes_per_hour = kind(10)
    managed.environment.slash_proportions = {"MAX_TOTAL_DRAWDOWN": kind(1)}
    managed.validator.lose("a", 0.2)
    managed.tick()
    assert managed.validator.collateral.slashes() == ["a"]
    assert managed.manager._server_proxy.health_check_rpc()["status"] == "ok"


# ---------------------------------------------------------------------- what is said to be done, and is not


def test_a_position_that_is_listed_as_open_and_not_found_is_not_settled(managed: Managed) -> None:
    validator, positions = managed.validator, managed.collaborators.position_manager
    validator.open_position("a")
    validator.lose("a", 0.2)
    by_uuid = positions.get_miner_position_by_uuid
    positions.get_miner_position_by_uuid = lambda *_: None
    managed.tick()
    assert [debt["kind"] for debt in managed.debts] == ["positions"]
    assert any("listed as open" in text for text in managed.alerts)
    positions.get_miner_position_by_uuid = by_uuid
    managed.tick()
    assert validator.is_flat("a")
    assert managed.debts == []


def test_a_position_that_went_meanwhile_is_settled(managed: Managed) -> None:
    validator, positions = managed.validator, managed.collaborators.position_manager
    holding = validator.open_position("a")
    validator.lose("a", 0.2)
    by_uuid = positions.get_miner_position_by_uuid

    def gone(hotkey: str, uuid: str) -> Any:
        validator.book.drop(holding)
        return by_uuid(hotkey, uuid)

    positions.get_miner_position_by_uuid = gone
    managed.tick()
    assert (managed.debts, managed.alerts) == ([], [])


def test_a_queue_of_asyncio_is_told_nothing_and_people_are(directly: Managed) -> None:
    directly.validator.open_position("a")
    directly.validator.lose("a", 0.2)
    directly.manager.shared_queue_websockets = asyncio.Queue()
    directly.tick()
    assert any("put answered with a coroutine" in text for text in directly.alerts)
    assert directly.debts == []


@pytest.mark.parametrize("method", ["clear_elimination_reasons", "pop_elimination_reasons"])
def test_reasons_that_nobody_forgets_are_told(directly: Managed, method: str) -> None:
    async def forget(*_: Any) -> None:
        raise AssertionError("nobody runs it")

    directly.validator.probation.fail("a", "PLAGIARISM", 0.1)
    setattr(directly.manager.challengeperiod_manager, method, forget)
    directly.tick()
    assert any(f"{method} answered with a coroutine" in text for text in directly.alerts)
    assert directly.reasons == {"a": "PLAGIARISM"}


async def asked_later(*_: Any) -> bool:
    return True


@pytest.mark.parametrize("listed", ["abc", b"abc"])
def test_a_text_is_no_list_of_hotkeys(directly: Managed, listed: Any) -> None:
    """Its letters would be miners, and all others gone."""
    for hotkey in MINERS:
        directly.validator.lose(hotkey, 0.2)
    directly.manager.challengeperiod_manager.get_hotkeys_by_bucket = lambda _: listed
    directly.tick()
    assert any("hotkeys must be a list" in text for text in directly.alerts)
    assert directly.reasons == {}
    directly.manager.metagraph = SimpleNamespace(hotkeys=listed, has_hotkey=lambda _: True)
    directly.tick()
    assert directly.manager.get_departed_hotkeys() == {}
    assert any("hotkeys must be a list" in text for text in directly.alerts)


def test_a_question_that_answers_with_a_coroutine_has_not_said_yes(
    directly: Managed, recwarn: pytest.WarningsRecorder
) -> None:
    challenge, stranger = directly.manager.challengeperiod_manager, "backup-2026"
    challenge.has_elimination_reasons = asked_later
    directly.environment.is_hotkey = asked_later
    (directly.validator.miners_directory / stranger).mkdir()
    for _ in range(3):
        directly.tick()
    assert stranger not in directly.reasons
    assert (directly.validator.miners_directory / stranger).exists()
    for name in "has_elimination_reasons", "is_hotkey":
        assert any(f"{name} answered with a coroutine" in text for text in directly.alerts), name
    directly.manager.update_metagraph(["a", "b", "c"])
    directly.manager.update_metagraph(["a", "b"])
    directly.manager.metagraph = SimpleNamespace(hotkeys=["a", "b"], has_hotkey=asked_later)
    assert not directly.manager.is_hotkey_re_registered("c")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("kind", ["method", "coroutine"])
def test_a_position_that_says_neither_is_not_taken_for_closed(directly: Managed, kind: str) -> None:
    """As where a property of the field's has become a method: all positions would count as closed."""
    directly.validator.open_position("a")
    directly.validator.lose("a", 0.2)
    positions = directly.manager.position_manager
    found = positions.get_miner_position_by_uuid

    class Odd:
        def __init__(self, position: Any) -> None:
            self._position = position
            self.is_closed_position = self._never if kind == "method" else asked_later()

        def _never(self) -> bool:
            return False

        def __getattr__(self, name: str) -> Any:
            return getattr(self._position, name)

    positions.get_miner_position_by_uuid = lambda *given: Odd(found(*given))
    directly.tick()
    assert [debt["kind"] for debt in directly.debts] == ["positions"]
    assert any("is_closed_position" in text for text in directly.alerts)
    assert not directly.validator.is_flat("a")
    positions.get_miner_position_by_uuid = found
    directly.tick()
    assert directly.validator.is_flat("a")


@pytest.mark.parametrize("unit", [1e-3, 1e3, 1e6, float("nan"), float("inf"), None], ids=repr)
def test_a_clock_that_begins_to_count_in_something_else_costs_a_tick_and_nothing_else(
    directly: Managed, unit: float | None
) -> None:
    clock: dict[str, Any] = {"unit": 1}
    directly.environment._clock = lambda: (
        None if clock["unit"] is None else directly.validator.now_ms * clock["unit"]
    )
    directly.validator.probation.fail("a", "PLAGIARISM", 0.1)
    directly.tick()
    directory = directly.validator.miners_directory / "a"
    directory.mkdir(exist_ok=True)
    clock["unit"] = unit
    directly.validator.lose("b", 0.2)
    for _ in range(3):
        with pytest.raises((ValueError, TypeError)):
            directly.tick()
    assert directory.exists()
    assert directly.reasons == {"a": "PLAGIARISM"}
    clock["unit"] = 1
    directly.tick()
    assert directly.reasons == {"a": "PLAGIARISM", "b": "MAX_TOTAL_DRAWDOWN"}
    assert directory.exists()


@pytest.mark.parametrize("can_pop", [True, False])
def test_a_reason_that_another_tick_saw_and_did_not_record_is_not_forgotten(
    directly: Managed, monkeypatch: pytest.MonkeyPatch, can_pop: bool
) -> None:
    """A sync ends the one that saw it, while the other one records what it saw before."""
    manager, failed = directly.manager, directly.validator.probation.failed
    if can_pop:
        manager.challengeperiod_manager.pop_elimination_reasons = lambda recorded: [
            failed.pop(hotkey, None) for hotkey in recorded
        ]
    state = manager._processor.context.state
    eliminate = state.eliminate

    def overtaken(hotkey: str, *more: Any) -> str:
        if hotkey == "a" and "b" not in failed:
            failed["b"] = ("PLAGIARISM", 0.1)
            other = threading.Thread(target=manager.handle_challenge_period_eliminations)
            other.start()
            other.join()
        return "superseded" if hotkey == "b" else eliminate(hotkey, *more)

    monkeypatch.setattr(state, "eliminate", overtaken)
    failed["a"] = ("PLAGIARISM", 0.1)
    manager.handle_challenge_period_eliminations()
    assert directly.reasons == {"a": "PLAGIARISM"}
    monkeypatch.undo()
    directly.tick()
    assert directly.reasons == {"a": "PLAGIARISM", "b": "PLAGIARISM"}
    assert failed == {}


def test_reasons_that_stay_though_they_were_seen_make_no_tick_due(directly: Managed) -> None:
    challenge, processor = directly.manager.challengeperiod_manager, directly.manager._processor
    challenge.clear_elimination_reasons = lambda: None
    directly.validator.probation.fail("a", "PLAGIARISM", 0.1)
    directly.tick()
    assert directly.reasons == {"a": "PLAGIARISM"}
    assert not processor._challenge.is_waiting()
    directly.validator.probation.fail("b", "PLAGIARISM", 0.1)
    assert processor._challenge.is_waiting()
    directly.tick()
    assert not processor._challenge.is_waiting()
    directly.validator.probation.failed.clear()
    assert not processor._challenge.is_waiting()
    directly.validator.probation.fail("b", "PLAGIARISM", 0.1)
    assert processor._challenge.is_waiting(), "it was cleared, and comes again"


def test_the_environment_is_the_one_that_the_rules_have(directly: Managed) -> None:
    with pytest.raises(AttributeError, match="environment"):
        directly.manager.environment = directly.environment
    assert directly.manager.environment is directly.environment


# ---------------------------------------------------------------------- a fork in mid-tick


def reasons_after_a_tick(managed: Managed) -> tuple[dict[str, str], bool]:
    managed.tick()
    return managed.reasons, managed.validator.is_flat("b")


@pytest.mark.parametrize("hangs", ["the ledger", "a lock of our own"])
def test_what_hangs_in_a_parent_does_not_in_its_forked_child(
    new_name: Callable[[], str], tmp_path: Path, gate: threading.Event, hangs: str
) -> None:
    parent = os.getpid()
    with Managed("rpc", new_name(), tmp_path, call_deadline_s=0.3) as managed:
        validator, judge = managed.validator, managed.environment._drawdown
        managed.manager.position_locks = None
        validator.register(*MINERS)
        validator.open_position("b")
        validator.lose("b", 0.2)

        def wait() -> None:
            if os.getpid() == parent:
                gate.wait()

        def judge_slowly(ledger: Any) -> Any:
            if ledger.drawdown() == 0.2:
                wait()
            return judge(ledger)

        if hangs == "the ledger":
            managed.environment._drawdown = judge_slowly
        else:
            validator.faults.at("holding", wait, times=None)
        managed.tick()
        assert (managed.reasons == {}) == (hangs == "the ledger")
        assert deadlines.left_behind()
        assert call(lambda: reasons_after_a_tick(managed)) == ({"b": "MAX_TOTAL_DRAWDOWN"}, True)


# ---------------------------------------------------------------------- calling back

POINTS = ["registry", "all failed", "ledgers", "cancel", "holdings", "holding", "price", "store", "store!", "slash", "slash!", "websockets", "slack"]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("point", POINTS)
def test_a_tick_within_a_tick_is_left_to_that_one(managed: Managed, point: str) -> None:
    validator, manager = managed.validator, managed.manager
    manager.position_locks = None
    for hotkey in ("a", "b"):
        validator.open_position(hotkey)
        validator.lose(hotkey, 0.2)

    def call_back() -> None:
        manager.process_eliminations()
        manager.handle_mdd_eliminations()

    if point == "slack":
        validator.faults.fail("cancel")
    validator.faults.at(point, call_back)
    for _ in range(2):
        managed.tick()
    assert sorted(validator.collateral.slashes()) == ["a", "b"]
    for hotkey in ("a", "b"):
        assert [len(holding.trades) for holding in validator.book.on_disk(hotkey)] == [2]
    assert managed.debts == []


@pytest.mark.parametrize("point", ["cancel", "store", "slash", "slash!"])
@pytest.mark.parametrize("what", ["remove", "delete", "clear", "sync", "end", "no contract", "close"])
def test_what_calls_back_doubles_and_loses_nothing(managed: Managed, what: str, point: str) -> None:
    validator, manager = managed.validator, managed.manager
    manager.position_locks = None
    contract = manager.contract_manager
    for hotkey in ("a", "b"):
        validator.open_position(hotkey)
        validator.limit_orders.place(hotkey)
        validator.lose(hotkey, 0.2)
    acts = {
        "remove": lambda: manager.remove_elimination("a"),
        "delete": lambda: manager.delete_eliminations(["a", "b"]),
        "clear": manager.clear_eliminations,
        "sync": lambda: manager.sync_eliminations([]),
        "end": lambda: validator.ending.update(now=True),
        "no contract": lambda: setattr(manager, "contract_manager", None),
        "close": lambda: manager.handle_eliminated_miner("a"),
    }
    validator.faults.at(point, acts[what])
    managed.tick()
    validator.ending.clear()
    manager.contract_manager = contract
    for _ in range(2):
        managed.tick()
    assert managed.reasons.keys() == {"a", "b"}
    assert sorted(validator.collateral.slashes()) == ["a", "b"]
    assert validator.is_flat("a")
    assert validator.is_flat("b")
    assert managed.debts == []


def test_a_contract_that_is_exchanged_in_a_tick_takes_what_comes_after(managed: Managed) -> None:
    validator, manager = managed.validator, managed.manager
    taken: list[tuple[str, str]] = []

    def contract(name: str) -> Any:
        def slash(hotkey: str, slash_proportion: float | None = None) -> bool:
            taken.append((name, hotkey))
            manager.contract_manager = contract("the other")
            return True

        return SimpleNamespace(slash_miner_collateral_proportion=slash)

    manager.contract_manager = contract("one")
    for hotkey in ("a", "b"):
        validator.lose(hotkey, 0.2)
    managed.tick()
    assert taken == [("one", "a"), ("the other", "b")]
    assert managed.debts == []
