"""What a public thing is given and cannot use is refused at once, by the name of the argument and its value."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any

import numpy as np
import pytest

from shmelim import (
    EliminationClient,
    EliminationManager,
    EliminationManagerServer,
    EliminationReader,
    HealthCheckDaemon,
    SlackNotifier,
    ValidatorEnvironment,
)
from shmelim.shm import PrivateNamespace, SharedNamespace, TableReader, TableWriter
from shmelim.system.arguments import number, whole
from shmelim.table import Reader, Writer

HOOK = "http://127.0.0.1:9/"
NAN = float("nan")
NOT_SECONDS = [("2", TypeError), (True, TypeError), (NAN, ValueError), (-1, ValueError), ([], TypeError)]


def manager(**given: Any) -> EliminationManager:
    return EliminationManager(None, None, None, running_unit_tests=True, **given)


def server(**given: Any) -> EliminationManagerServer:
    return EliminationManagerServer(**given)


def notifier(**given: Any) -> SlackNotifier:
    return SlackNotifier(**{"webhook_url": HOOK, **given})


def nothing_served(kind: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **given: kind("test-nobody", **given)


class Service:
    service_name = "Some"

    def health_check(self, current_time_ms: float | None = None) -> bool:
        return current_time_ms is None


SECONDS = [
    (nothing_served(EliminationReader), "wait"),
    (nothing_served(EliminationClient), "wait"),
    (nothing_served(Reader), "wait"),
    (server, "slash_lease_s"),
    (notifier, "repeat_after"),
    (notifier, "interval"),
    (notifier, "retry_delay"),
    (notifier, "timeout"),
    (notifier, "exit_timeout"),
    (lambda **given: HealthCheckDaemon(Service(), **given), "interval_s"),
]


@pytest.mark.parametrize(("value", "error"), NOT_SECONDS)
@pytest.mark.parametrize(("make", "name"), SECONDS)
def test_seconds(make: Callable[..., Any], name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must be .*, not {re.escape(repr(value))}$"):
        make(**{name: value})


OTHERS: list[tuple[Callable[..., Any], str, Any, type[Exception]]] = [
    (server, "namespace", "shmelim", TypeError),
    (server, "namespace", Path("shmelim"), TypeError),
    (server, "slash_lease_s", 3601, ValueError),
    (server, "epoch", 7, TypeError),
    (server, "adopt_published", "no", TypeError),
    (server, "must_exist", 1, TypeError),
    (manager, "replace_published", "0", TypeError),
    (manager, "group_readable", "false", TypeError),
    (manager, "environment", {}, TypeError),
    (manager, "state_dir", "\ud800", ValueError),
    (ValidatorEnvironment, "believe_empty_metagraph", "false", TypeError),
    (ValidatorEnvironment, "is_hotkey", "5C4", TypeError),
    (ValidatorEnvironment, "drawdown", 10, TypeError),
    (ValidatorEnvironment, "price_source", "last", TypeError),
    (ValidatorEnvironment, "slash_outcome", "made", TypeError),
    (ValidatorEnvironment, "slash_proportions", ["PLAGIARISM"], TypeError),
    (ValidatorEnvironment, "miner_directory", "", ValueError),
    (ValidatorEnvironment, "miner_directory", b"miners", TypeError),
    (nothing_served(EliminationReader), "owner", "root", TypeError),
    (nothing_served(EliminationReader), "owner", -1, ValueError),
    (nothing_served(Reader), "owner", 1.5, TypeError),
    (nothing_served(Reader), "decode", "msgpack", TypeError),
    (nothing_served(Reader), "keys", [], TypeError),
    (lambda **given: SharedNamespace("test-nobody", **given), "mode", "0600", ValueError),
    (lambda **given: Writer(None, **given), "encode", 5, TypeError),
    (lambda **given: Writer(None, **given), "keep", "no", TypeError),
    (lambda **given: Writer(None, **given), "capacity", 1.5, TypeError),
    (lambda **given: Writer(None, **given), "capacity", -1, ValueError),
    (lambda **given: Writer(None, **given), "capacity", 10**30, ValueError),
    (notifier, "burst", 1.5, TypeError),
    (notifier, "max_queued", 0, ValueError),
    (notifier, "max_tries", True, TypeError),
    (notifier, "source", 5, TypeError),
    (notifier, "webhook_url", b"http://127.0.0.1:9/", TypeError),
    (notifier, "outbox", "", ValueError),
    (HealthCheckDaemon, "service", None, TypeError),
]


@pytest.mark.parametrize(("make", "name", "value", "error"), OTHERS)
def test_others(make: Callable[..., Any], name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name} must"):
        make(**{name: value})


@pytest.mark.parametrize("attribute", ["is_hotkey", "drawdown", "believe_empty_metagraph"])
def test_an_environment_is_checked_as_long_as_it_lives(attribute: str) -> None:
    environment = ValidatorEnvironment()
    with pytest.raises(TypeError, match=f"^{attribute} must"):
        setattr(environment, attribute, "no")


def test_directories_stay_where_they_are_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hotkey = "5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs"
    for place in "before", "after":
        (tmp_path / place / "miners" / hotkey).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "before")
    environment = ValidatorEnvironment(miner_directory="miners")
    os.chdir(tmp_path / "after")
    environment.remove_miner_directory(hotkey)
    assert not (tmp_path / "before" / "miners" / hotkey).exists()
    assert (tmp_path / "after" / "miners" / hotkey).exists()


@pytest.mark.parametrize(
    ("given", "error"),
    [({"timeout": "1"}, TypeError), ({"timeout": NAN}, ValueError), ({"timeout": 1, "since": "7"}, TypeError)],
)
def test_a_wait_for_nothing_that_can_be(given: dict[str, Any], error: type[Exception]) -> None:
    namespace = PrivateNamespace()
    with TableWriter(namespace) as writer:
        writer.load([])
        with pytest.raises(error, match=f"^{list(given)[-1]} must"):
            TableReader(namespace).wait_for_change(**given)


def test_a_page_of_the_history_from_nowhere() -> None:
    with server() as made, pytest.raises(ValueError, match=r"^before_id must"):
        made.get_history_rpc(before_id=10**30)


@pytest.mark.parametrize(
    ("given", "limits", "said"),
    [
        (1e10, {"most": TIMEOUT_MAX}, "n must be 0 to 9,223,372,036, not 10000000000.0"),
        (float("inf"), {"most": TIMEOUT_MAX}, "n must be 0 or more and finite, not inf"),
        (1 << 40, {"most": 1 << 32}, "n must be 0 to 4,294,967,296, not 1099511627776"),
        (NAN, {"least": float("-inf")}, "n must be a number, not nan"),
        (-1, {}, "n must be 0 or more, not -1"),
        (2, {"most": 1}, "n must be 0 to 1, not 2"),
    ],
)
def test_a_number_out_of_its_limits_is_told_them(given: float, limits: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        number("n", given, **limits)


def test_whatever_is_a_number_is_one() -> None:
    assert [number("n", each) for each in (0, 1.5, np.int64(3), np.float32(2), Fraction(1, 2))] == [
        0,
        1.5,
        3,
        2,
        0.5,
    ]
    assert whole("n", np.int64(3)) == 3
    with pytest.raises(TypeError, match=r"^n must be a number, not "):
        number("n", np.True_)
