"""The unit and the compose file of ``examples/run``, as far as they can be run without systemd and containers."""

import configparser
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from waiting import PATIENCE

from shmelim import EliminationClient, EliminationReader
from shmelim.shm import SharedNamespace
from shmelim.system.supervisor import notify_supervisor

RUN = Path(__file__).parents[2] / "examples" / "run"
UNIT = (RUN / "shmelim.service").read_text()
PROGRAM = [sys.executable, "-m", "shmelim"]


class Supervisor:
    """What systemd does for a service of ``Type=notify``."""

    def __init__(self, place):
        self.place = place
        self.path = place / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(PATIENCE)

    def heard(self):
        return self._socket.recv(4096).decode().splitlines()

    def close(self):
        self._socket.close()


@pytest.fixture
def supervisor(tmp_path_factory):
    made = Supervisor(tmp_path_factory.mktemp("s"))
    yield made
    made.close()


@pytest.fixture
def start(supervisor, new_name):
    """Start the command of an example under another name, with its paths below a directory of this test."""
    processes, name = [], new_name()

    def start(words, environment):
        assert words[0].endswith("shmelim")
        given = ["shmelim" if word == "/opt" else word for word in words[1:]]
        arguments = [
            name if before == "--name" else word for before, word in zip(["", *given], given, strict=False)
        ]
        env = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(supervisor.path), **environment}
        process = subprocess.Popen([*PROGRAM, *arguments], env=env, stderr=subprocess.PIPE, cwd="/")
        processes.append(process)
        return name, process

    yield start
    for process in processes:
        process.kill()
        process.communicate()
    SharedNamespace(name).remove()


def below(place, text):
    """Replace systemd's and the containers' directories."""
    for said, meant in (
        ("%S", "state"),
        ("%t", "run"),
        ("/state", "state"),
        ("/run/", "run/"),
        ("/registry", "reg"),
    ):
        if text.startswith(said):
            return str(place / meant / text.removeprefix(said).lstrip("/")).rstrip("/")
    return text


def test_the_unit_is_one(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    program = tmp_path / "shmelim"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "shmelim.service"
    unit.write_text(
        UNIT.replace("/opt/validator/bin/shmelim", str(program)).replace("User=validator", "User=root")
    )
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "shmelim.service" in line]
    assert (done.returncode, said) == (0, [])


def test_the_unit_works_as_printed(supervisor, start):
    config = configparser.ConfigParser(strict=False, interpolation=None)
    config.optionxform = str
    config.read_string(UNIT)
    service = config["Service"]
    assert service["Type"] == "notify"
    words = [below(supervisor.place, word) for word in shlex.split(service["ExecStart"])]
    for directory in service["StateDirectory"].split():
        (supervisor.place / "state" / directory).mkdir(mode=0o700, parents=True)
    (supervisor.place / "run" / service["RuntimeDirectory"]).mkdir(mode=0o700, parents=True)
    variable, _, value = service["Environment"].partition("=")
    name, process = start(words, {variable: below(supervisor.place, value)})
    ready = supervisor.heard()
    assert "READY=1" in ready
    assert f"MAINPID={process.pid}" in ready
    assert len(EliminationReader(name)) == 0
    with EliminationClient(name) as client:
        assert client.append_elimination_row("a", None, "ZOMBIE"), "found without a variable"
    process.send_signal(signal.SIGTERM)
    assert supervisor.heard() == ["STOPPING=1"]
    assert process.wait(PATIENCE) == 0
    assert {path.name for path in supervisor.place.iterdir()} == {"notify", "run", "state"}, "nothing elsewhere"


def test_the_containers_commands_and_health_check_work(supervisor, start):
    services = yaml.safe_load((RUN / "compose.yaml").read_text())["services"]
    server, reader = services["server"], services["reader"]
    assert reader["ipc"] == "service:server"
    assert server["user"] == reader["user"]
    assert server["ipc"] == "shareable"
    environment = {key: below(supervisor.place, value) for key, value in server["environment"].items()}
    name, _ = start([below(supervisor.place, word) for word in server["command"]], environment)
    assert "READY=1" in supervisor.heard()
    kind, *check = server["healthcheck"]["test"]
    assert kind == "CMD"
    check = [name if word == "shmelim" else word for word in check[1:]]
    assert subprocess.run([*PROGRAM, *check], env={"PATH": os.environ["PATH"]}, check=False).returncode == 0
    watching = [name if word == "shmelim" else word for word in reader["command"][1:]]
    with subprocess.Popen(
        [*PROGRAM, *watching, "--json", "--since", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert b"is not known" in process.stderr.readline(), "it watches"
        process.kill()


def test_a_supervisor_that_is_not_there_is_not_waited_for(monkeypatch, tmp_path):
    for address in ("", "relative", str(tmp_path / "nobody"), "@nobody-at-all"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert notify_supervisor("READY=1") is False
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert notify_supervisor("READY=1") is False


def test_log_lines_as_json(start, supervisor):
    place = supervisor.place
    words = [
        "shmelim",
        "serve",
        "--name",
        "x",
        "--state-dir",
        str(place / "state"),
        "--runtime-dir",
        str(place / "run"),
    ]
    name, process = start([*words, "--log-format", "json", "--verbose"], {"SHMELIM_REGISTRY": "off"})
    supervisor.heard()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    lines = [json.loads(line) for line in said.splitlines()]
    assert any(line["message"].startswith(f"serving {name!r}: 0 eliminated") for line in lines)
    assert all(set(line) >= {"time", "level", "logger", "message"} for line in lines)
