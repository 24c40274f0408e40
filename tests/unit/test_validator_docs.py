"""The worked example of the documentation is the file that the tests use, and short."""

from __future__ import annotations

from pathlib import Path

from shmelim.eliminations.validator import collaborators
from shmelim.eliminations.validator.environment import ValidatorEnvironment

ROOT = Path(__file__).parents[2]
ADAPTER = (ROOT / "tests/reference_validator/adapter.py").read_text()
DOCUMENT = (ROOT / "docs/validator-integration.md").read_text()


def test_documentation_quotes_the_adapter_as_it_is() -> None:
    assert f"```python\n{ADAPTER}```" in DOCUMENT


def test_adapter_has_at_most_60_lines() -> None:
    assert len(ADAPTER.splitlines()) <= 60


def test_documentation_names_every_figure_and_every_method() -> None:
    names = [name for name in ValidatorEnvironment.__init__.__annotations__ if name != "return"]
    for protocol in (
        "PositionManager",
        "ChallengePeriodManager",
        "ContractManager",
        "LimitOrderManager",
        "Position",
    ):
        methods = vars(getattr(collaborators, protocol))
        names += [name for name in methods if not name.startswith("_") or name.startswith("_write")]
    assert [name for name in names if name not in DOCUMENT] == []


def test_adapter_fits_the_protocols() -> None:
    from reference_validator import ReferenceValidator, plug_in

    made, _ = plug_in(ReferenceValidator())
    assert isinstance(made.metagraph, collaborators.Metagraph)
    assert isinstance(made.position_manager, collaborators.PositionManager)
    assert isinstance(made.position_manager.perf_ledger_manager, collaborators.PerfLedgerManager)
    assert isinstance(made.challengeperiod_manager, collaborators.ChallengePeriodManager)
    assert isinstance(made.contract_manager, collaborators.ContractManager)
    assert isinstance(made.position_locks, collaborators.PositionLocks)
    assert isinstance(made.limit_order_manager, collaborators.LimitOrderManager)
    assert isinstance(made.slack_notifier, collaborators.Notifier)
    assert isinstance(made.shared_queue_websockets, collaborators.WebSocketQueue)
    assert isinstance(made.sync_epoch, collaborators.SharedValue)
    assert not isinstance(object(), collaborators.ContractManager)
