"""Metrics for Prometheus: of a server that is well, has problems, is dead, or is not there."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from invoking import CliRunner
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from serving import row
from waiting import until

from shmelim import __version__
from shmelim.cli.main import cli
from shmelim.errors import CorruptSegmentError
from shmelim.shm import READ_PATH
from shmelim.watch import seeing
from shmelim.watch.metrics import ShmelimCollector, text_of

HOSTILE = 'a"b\\c\nshmelim_up{name="x"} 7'


def samples(text):
    """Each sample by its name and its labels but for the name that is served."""
    return {
        (sample.name, *(value for label, value in sorted(sample.labels.items()) if label != "name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def served(serve):
    return serve()


def test_of_a_server_that_is_well(served):
    with served.client() as client:
        client.sync_eliminations([row("a"), row("b")])
        client.update_metagraph(["a", "b", "c"])
        client.update_metagraph(["a", "b"])
        found = samples(text_of(served.name).decode())
        assert found["shmelim_up",] == 1
        assert {status: found["shmelim_status", status] for status in ("ok", "degraded", "failing")} == {
            "ok": 1,
            "degraded": 0,
            "failing": 0,
        }
        assert [found[f"shmelim_{what}_hotkeys",] for what in ("eliminated", "departed", "registered")] == [
            2,
            1,
            2,
        ]
        assert found["shmelim_version",] == client.version
        assert found["shmelim_changes_total",] == client.health_check()["changes"]
        assert 0 < found["shmelim_table_entries",] <= found["shmelim_table_usable_entries",]
        assert 0 <= found["shmelim_uptime_seconds",] < 3600


def test_names_units_and_types_are_as_prometheus_wants_them(served):
    text = text_of(served.name).decode()
    families = list(text_string_to_metric_families(text))
    assert len(families) > 15
    for family in families:
        assert family.documentation.endswith(".")
        assert family.name.startswith("shmelim_")
        assert (family.type == "counter") == any(sample.name.endswith("_total") for sample in family.samples)
        assert not any(unit in family.name for unit in ("_ms", "_kb", "_mib", "percent"))


def test_of_a_server_that_is_dead_and_of_one_that_is_not_there(served, new_name):
    served.kill()
    until(lambda: samples(text_of(served.name).decode())["shmelim_up",] == 0)
    found = samples(text_of(served.name).decode())
    assert found["shmelim_problems", "not_served", "failing"] == 1
    assert found["shmelim_eliminated_hotkeys",] == 0, "the last state can be read"
    found = samples(text_of(new_name()).decode())
    assert found["shmelim_up",] == 0
    assert found["shmelim_status", "not served"] == 1


def test_of_debts_by_state_and_of_the_last_publish(served):
    with served.client() as client:
        client._call("eliminate_rpc", ("a", row("a"), ["limit_orders", "slash"]))
        client._call("eliminate_rpc", ("b", row("b"), ["positions"]))
        client._call("begin_slash_rpc", ("a", "t"))
        found = samples(text_of(served.name).decode())
        assert [found["shmelim_debts", state] for state in ("owed", "attempting", "in_doubt")] == [2, 1, 0]
        before = found["shmelim_last_publish_timestamp_seconds",]
        assert before == client.health_check()["published_ms"] / 1000
        assert found["shmelim_files_behind",] == 0
        numbers = iter(range(10**9))

        def publish():
            client.add_elimination("c", row("c", next(numbers)))
            return samples(text_of(served.name).decode())["shmelim_last_publish_timestamp_seconds",] > before

        until(publish)


def test_a_server_of_an_older_release_says_less_and_what_it_says_is_shown(served, monkeypatch):
    seen = seeing.see(served.name)
    older = {key: value for key, value in seen.server.items() if key not in {"published_ms", "debts_by_state"}}
    monkeypatch.setattr("shmelim.watch.metrics.see", lambda *_: seen._replace(server=older))
    found = samples(text_of(served.name).decode())
    assert found["shmelim_commits_total",] == older["commits"]
    assert ("shmelim_last_publish_timestamp_seconds",) not in found
    assert ("shmelim_debts", "owed") not in found


def test_the_package_that_looked_is_named(served):
    found = samples(text_of(served.name).decode())
    assert found["shmelim_info", READ_PATH, __version__] == 1


def test_a_table_that_cannot_be_read_is_failing_and_never_not_served(served, monkeypatch):
    def contradict(*_, **__):
        raise CorruptSegmentError("bytes contradict each other")

    monkeypatch.setattr(seeing, "EliminationReader", contradict)
    found = samples(text_of(served.name).decode())
    assert found["shmelim_status", "failing"] == found["shmelim_problems", "table_unreadable", "failing"] == 1


def test_what_strangers_chose_makes_no_line_of_its_own(monkeypatch, new_name):
    problem = {"name": HOSTILE, "severity": "degraded"}
    monkeypatch.setattr(
        "shmelim.watch.metrics.see", lambda *_: seeing.Seen("degraded", [problem, problem], None, None, None)
    )
    found = samples(text_of(new_name()).decode())
    assert found["shmelim_problems", HOSTILE, "degraded"] == 2
    assert found["shmelim_up",] == 0


def test_a_registry_of_ones_own(served):
    registry = CollectorRegistry()
    registry.register(ShmelimCollector(served.name))
    assert registry.get_sample_value("shmelim_up", {"name": served.name}) == 1


def test_the_command_prints_or_writes_a_file_in_one_step(served, tmp_path):
    result = CliRunner().invoke(cli, ["metrics", "--name", served.name])
    assert result.exit_code == 0
    assert samples(result.stdout)["shmelim_up",] == 1
    file = tmp_path / "shmelim.prom"
    assert CliRunner().invoke(cli, ["metrics", "--name", served.name, "--to", str(file)]).exit_code == 0
    assert samples(file.read_text())["shmelim_up",] == 1
    assert file.stat().st_mode & 0o777 == 0o644
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for place, said in (
        (tmp_path / "no" / "file", "there is no directory"),
        (tmp_path / "directory", "is a directory"),
        (tmp_path / "pipe", "is not a regular file"),
        ("/dev/null", "is not a regular file"),
        (file / "below", "there is no directory"),
    ):
        odd = CliRunner().invoke(cli, ["metrics", "--name", served.name, "--to", str(place)])
        assert (odd.exit_code, said in odd.stderr, "hint: " in odd.stderr) == (4, True, True), odd.stderr
        assert "move it away" not in odd.stderr
    assert (
        samples(CliRunner().invoke(cli, ["metrics", "--name", served.name, "--to", "-"]).stdout)["shmelim_up",]
        == 1
    )
    assert {"directory", "pipe"} < {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "no").exists()


def test_without_the_extra_it_says_what_to_install(new_name):
    blocked = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        f"sys.argv = ['shmelim', 'metrics', '--name', {new_name()!r}]\n"
        "from shmelim.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "pip install 'shmelim[metrics]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_metrics_that_the_documents_alert_on_exist(served):
    document = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
    section = document.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rules = yaml.safe_load(textwrap.dedent(section[section.index("    groups:") :]))
    expressions = " ".join(rule["expr"] for group in rules["groups"] for rule in group["rules"])
    named = set(re.findall(r"shmelim_\w+", expressions))
    assert len(named) == 5
    with served.client() as client:
        client._call("report_processing_rpc", (1_700_000_000_000, 300_000, []))
    assert named - {name for name, *_ in samples(text_of(served.name).decode())} == {"shmelim_problems"}
