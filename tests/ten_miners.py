"""Ten miners who are to be eliminated, and what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reference_validator import Managed

TEN = [f"miner{number}" for number in range(10)]
THIRD = TEN[2]


def ten_to_eliminate(managed: Managed) -> None:
    validator = managed.validator
    validator.register(*TEN)
    for hotkey in TEN:
        validator.open_position(hotkey)
        validator.limit_orders.place(hotkey)
        validator.lose(hotkey, 0.2)


def complete(managed: Managed) -> list[str]:
    """The miners to whom everything was done that an elimination owes."""
    slashes = managed.validator.collateral.slashes()
    owing = {debt["hotkey"] for debt in managed.debts}
    return [
        hotkey
        for hotkey in TEN
        if hotkey in managed.reasons
        and managed.validator.is_flat(hotkey)
        and slashes.count(hotkey) == 1
        and hotkey not in owing
    ]


def state_of_slash(managed: Managed) -> list[str]:
    return [debt["state"] for debt in managed.debts if debt["kind"] == "slash"]
