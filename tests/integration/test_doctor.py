"""``shmelim doctor``: each finding is provoked once, and a machine where all is well has none."""

import errno
import json
import os
import resource
from pathlib import Path

import pytest
from invoking import CliRunner
from waiting import until

from shmelim.cli.main import cli
from shmelim.watch import doctor
from shmelim.watch.doctor import Machine, examine


@pytest.fixture
def machine(tmp_path):
    """Places of a machine where all is well; its shared memory is the real one."""
    (tmp_path / "etc").mkdir()
    return Machine(Path("/dev/shm"), tmp_path / "etc", tmp_path / "no-logind")


@pytest.fixture
def served(serve, monkeypatch):
    found = serve()
    monkeypatch.setattr(doctor, "_of_clock", list)  # a container cannot help it
    monkeypatch.setattr(doctor, "_SLOW_FSYNC", 60)
    monkeypatch.setattr(doctor, "READ_PATH", "native")
    monkeypatch.setattr(doctor, "_LEAST_FILES", 0)
    return found


@pytest.fixture
def finds(served, machine):
    """What is found, as pairs of the check and the text; in another place of the machine where one is given."""

    def finds(name=served.name, state_dir=served.state_dir, **places):
        found = examine(name, state_dir, machine._replace(**places))
        assert all(finding.remedy for finding in found)
        return [(finding.what, finding.text) for finding in found]

    return finds


def statvfs(size, free, flags=0):
    return lambda _path: os.statvfs_result((1, 1, size, free, free, 0, 0, 0, flags, 255))


def test_where_all_is_well_nothing_is_found(finds, served):
    assert finds() == []
    result = CliRunner().invoke(cli, ["doctor", "--name", served.name, "--state-dir", str(served.state_dir)])
    assert result.exit_code in (0, 1), result.output


def test_the_read_path_and_why(finds, monkeypatch):
    monkeypatch.setattr(doctor, "READ_PATH", "pure")
    monkeypatch.setattr(doctor, "why_pure", lambda: "the extension cannot be loaded (no compiler)")
    assert finds() == [
        ("read path", "reads take the pure-Python path: the extension cannot be loaded (no compiler)")
    ]


def test_versions_that_differ(finds, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda _name: "0.0.1")
    ((what, text),) = finds()
    assert what == "versions"
    assert "this command 0.0.1" in text


@pytest.mark.parametrize(
    ("size", "free", "text"),
    [(64 << 20, 64 << 20, "has 64 MiB in all"), (1 << 40, 1000, "MiB left, and growing takes")],
)
def test_little_shared_memory(finds, monkeypatch, size, free, text):
    monkeypatch.setattr(os, "statvfs", statvfs(size, free))
    found = [said for what, said in finds() if what == "shared memory"]
    assert len(found) == 1
    assert text in found[0]


def test_shared_memory_in_which_nothing_can_be_made(finds, monkeypatch):
    monkeypatch.setattr(os, "statvfs", statvfs(1 << 40, 1 << 40, os.ST_RDONLY))
    (found,) = [said for what, said in finds() if what == "shared memory"]
    assert "read-only" in found


def test_no_shared_memory_at_all(finds, tmp_path):
    (found,) = [said for what, said in finds(shared_memory=tmp_path / "none") if what == "shared memory"]
    assert "cannot be used" in found


@pytest.mark.parametrize(
    ("files", "is_found"),
    [
        ({}, True),
        ({"logind.conf": "[Login]\nRemoveIPC=no\n"}, False),
        ({"logind.conf": "[Login]\nRemoveIPC=no\n", "logind.conf.d/z.conf": "[Login]\nRemoveIPC=yes\n"}, True),
        ({"logind.conf": "[Login]\n#RemoveIPC=no\n"}, True),
        ({"logind.conf": "not a section"}, True),
    ],
)
def test_logind_that_removes_what_users_share(finds, machine, tmp_path, monkeypatch, files, is_found):
    for name, text in files.items():
        path = machine.configuration / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for uid, expected in ((1000, is_found), (100, False)):
        with monkeypatch.context() as patch:
            patch.setattr(doctor.os, "geteuid", lambda uid=uid: uid)
            found = list(doctor._of_logind(machine._replace(logind=tmp_path)))
        assert [finding.what for finding in found] == ["RemoveIPC"] * expected
    assert list(doctor._of_logind(machine)) == [], "without logind"


def test_limits(finds, monkeypatch):
    monkeypatch.setattr(doctor, "_LEAST_FILES", 1 << 40)
    ((what, text),) = finds()
    assert (what, "files open" in text) == ("limits", True)
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (1 << 20, 1 << 20))
    assert ["a file may have 1 MiB" in text for _, text in finds()] == [False, True]


def test_a_slow_disk(finds, monkeypatch):
    monkeypatch.setattr(doctor, "_SLOW_FSYNC", 0.02)
    monkeypatch.setattr(doctor, "_time_of_sync", lambda _directory: 0.25)
    ((what, text),) = finds()
    assert (what, "takes 250 ms" in text) == ("disk", True)


def test_a_state_directory_that_is_not_there_or_not_ours(finds, tmp_path, monkeypatch):
    ((what, text),) = finds(state_dir=tmp_path / "none")
    assert (what, "there is no state directory" in text) == ("state", True)
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 12345, -1)
        ((what, text),) = finds(state_dir=tmp_path / "theirs")
        assert (what, "belongs to uid 12345" in text) == ("state", True)

    def refuse(_directory):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "_time_of_sync", refuse)
    ((what, text),) = finds(state_dir=tmp_path)
    assert (what, "cannot be written: Permission denied" in text) == ("state", True)


def test_a_full_disk_is_not_to_be_made_writable(served, machine, monkeypatch):
    def refuse(_directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(doctor, "_time_of_sync", refuse)
    (found,) = examine(served.name, served.state_dir, machine)
    assert "cannot be written: No space left on device" in found.text
    assert "make room" in found.remedy


def test_a_key_that_others_may_read(finds, served):
    (key,) = served.runtime.rglob("key")
    served.kill()  # it would put the key back
    key.chmod(0o644)
    (text,) = [text for what, text in finds() if what == "runtime"]
    assert "has mode 0o644" in text


def test_segments_that_nobody_can_find(finds, tmp_path):
    for name in ("shmelim.gone.7", "shmelim.there", "shmelim.there.3", "shmelim.there.lock", "other.1"):
        (tmp_path / name).touch()
    found = [said for what, said in finds(shared_memory=tmp_path) if what == "leftovers"]
    assert found == ["shmelim.gone.7 is of a name that is not there"]


def test_a_clock_that_nobody_keeps(monkeypatch):
    class Libc:
        adjtimex = staticmethod(lambda _buffer: 5)

    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda _name: Libc)
    assert ["synchronised" in finding.text for finding in doctor._of_clock()] == [True]
    Libc.adjtimex = staticmethod(lambda _buffer: 0)
    assert list(doctor._of_clock()) == []
    monkeypatch.setattr(doctor.clock, "now_ms", lambda: 1000)
    assert [finding.text for finding in doctor._of_clock()] == ["the time is before 2020"]


def test_what_is_wrong_with_the_name(finds, served, new_name):
    served.kill()
    until(lambda: "not_served" in {what for what, _ in finds()})
    assert "not_served" in {what for what, _ in finds(new_name())}


def test_the_command(served, new_name):
    result = CliRunner().invoke(cli, ["doctor", "--name", new_name(), "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)["findings"]
    assert {"what": "not_served", "severity": "warning"}.items() <= found[-1].items()
    result = CliRunner().invoke(cli, ["doctor", "--name", new_name()])
    assert "warning: not_served: " in result.stdout
