"""What docs/migration.md tells a validator to do in its first minute, done; and processing where the server is."""

import functools
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from reference_validator import ReferenceValidator, plug_in
from serving import row, state_in_table

from shmelim import EliminationManager, EliminationManagerServer, EliminationReader, ValidatorEnvironment
from shmelim.errors import NoCollaboratorsError
from shmelim.shm import SharedNamespace

DOCUMENT = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()


@pytest.fixture
def collaborators(tmp_path):
    made, _ = plug_in(ReferenceValidator(tmp_path / "validator"))
    return made


def test_in_one_minute_drops_no_rule_in_silence(collaborators, tmp_path, caplog):
    """The example of the document, with a validator in the place of the field's names."""
    _, example = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[:2]
    names = vars(collaborators) | {
        "live_price_fetcher": object(),
        "MinerBucket": SimpleNamespace(MAINCOMP="scored"),
        "ValiBkpUtils": SimpleNamespace(get_miner_dir=lambda: tmp_path),
        "ValidatorEnvironment": ValidatorEnvironment,
        "EliminationManager": functools.partial(EliminationManager, running_unit_tests=True),
    }
    caplog.set_level(logging.WARNING, "shmelim")
    exec(example, names)  # it is our own document
    names["manager"].shutdown()
    said = " ".join(record.getMessage() for record in caplog.records)
    for given in ("scored_bucket", "live_price_fetcher", "miner_directory"):
        assert given not in said, said


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ("live_price_fetcher", "closed without one"),
        ("miner_directory", "zombie"),
    ],
)
def test_what_is_left_out_is_said_at_construction_by_name(collaborators, tmp_path, caplog, left_out, said):
    figures = {"scored_bucket": "scored", "miner_directory": tmp_path, "live_price_fetcher": object()}
    del figures[left_out]
    caplog.set_level(logging.WARNING, "shmelim")
    with EliminationManager(
        **collaborators.as_arguments(), running_unit_tests=True, environment=ValidatorEnvironment(**figures)
    ):
        pass
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if left_out in line and said in line], lines


def test_a_directory_that_holds_the_files_is_taken_over(managers, tmp_path):
    (tmp_path / "eliminations.json").write_text(json.dumps({"eliminations": [row("a"), row("b")]}))
    departed = {"departed_hotkeys": {"c": {"detected_ms": 5}}}
    (tmp_path / "departed_hotkeys.json").write_text(json.dumps(departed))
    manager = managers(state_dir=tmp_path)
    assert list(manager.eliminations) == ["a", "b"]
    assert manager.get_departed_hotkeys() == departed["departed_hotkeys"]
    manager.remove_elimination("a")
    manager.save_eliminations()
    kept = json.loads((tmp_path / "eliminations.json").read_text())["eliminations"]
    assert [each["hotkey"] for each in kept] == ["b"]


def test_a_server_with_the_validators_objects_beside_it_processes_on_request(new_name, tmp_path):
    validator = ReferenceValidator(tmp_path / "validator")
    collaborators, environment = plug_in(validator)
    with EliminationManagerServer(SharedNamespace(new_name()), tmp_path / "state", durability="process") as server:
        with pytest.raises(NoCollaboratorsError):
            server.process_eliminations_rpc()
        server.process_with(collaborators, environment)
        validator.register("a", "b")
        validator.pass_time(300_001)
        server.process_eliminations_rpc()
        validator.open_position("a")
        validator.lose("a", 0.2)
        for _ in range(2):
            validator.pass_time(300_001)
            server.process_eliminations_rpc()
        assert set(EliminationReader(server.namespace.name)) == {"a"}
        assert validator.is_flat("a")
        assert validator.collateral.slashes() == ["a"]
        assert server.get_debts_rpc() == []
        assert server.health_check_rpc()["last_tick_ms"] is not None


def test_what_ones_own_process_publishes_is_gone_on_from(new_name, tmp_path):
    name = new_name()
    with EliminationManagerServer(SharedNamespace(name), tmp_path, durability="process") as server:
        server.add_elimination_rpc("a", row("a"))
        before = state_in_table(server.reader)
    assert set(EliminationReader(name)) == {"a"}, "its end leaves what was published"
    with EliminationManagerServer(SharedNamespace(name), tmp_path, durability="process") as server:
        assert state_in_table(server.reader) == before
