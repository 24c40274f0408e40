"""Somebody cleans up under a living server: it puts back what clients find it by, and drops nobody for it."""

import os
import resource
import shutil
import stat
import threading

import pytest
from crashing import call
from waiting import PATIENCE, until

from shmelim.channel import ChannelClient, ChannelServer, load_key, load_or_create_key
from shmelim.errors import CallerFaultError, ChannelError, KeyFileError, NotServingError
from shmelim.system.problems import Problems

KEY = b"0123456789abcdef0123456789abcdef"


class Target:
    def __init__(self):
        self.entered = threading.Event()
        self.release = threading.Event()

    def echo_rpc(self, value=None):
        return value

    def hang_rpc(self):
        self.entered.set()
        assert self.release.wait(PATIENCE)
        return "done"


@pytest.fixture
def place(tmp_path):
    place = tmp_path / "run" / "name"
    place.parent.mkdir(mode=0o700)
    place.mkdir(mode=0o700)
    return place


@pytest.fixture
def target():
    target = Target()
    yield target
    target.release.set()


@pytest.fixture
def problems():
    return Problems()


@pytest.fixture
def server(place, target, problems):
    key = load_or_create_key(place / "key")
    with ChannelServer(target, place / "socket", key, key_path=place / "key", problems=problems) as server:
        yield server
        target.release.set()


def new_client(place):
    return ChannelClient(
        place / "socket", lambda: load_key(place / "key"), connect_wait=PATIENCE, timeout=PATIENCE
    )


def answers(place):
    with new_client(place) as client:
        return client.call("echo_rpc", (1,)) == 1


@pytest.mark.parametrize("lost", ["all", "directory", "socket", "key"])
def test_what_vanished_is_put_back_and_living_connections_go_on(place, server, target, lost):
    key = load_key(place / "key")
    with new_client(place) as client:
        results = []
        thread = threading.Thread(target=lambda: results.append(client.call("hang_rpc")))
        thread.start()
        assert target.entered.wait(PATIENCE)
        if lost == "all":
            shutil.rmtree(place.parent)
        elif lost == "directory":
            shutil.rmtree(place)
        else:
            (place / lost).unlink()
        assert answers(place)
        target.release.set()
        thread.join()
        assert results == ["done"]
    until(lambda: (place / "key").exists() and (place / "socket").exists())
    assert load_key(place / "key") == key
    for directory in (place, place.parent):  # an XDG_RUNTIME_DIR that others may enter is not used
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for name in ("key", "socket"):
        assert stat.S_IMODE((place / name).stat().st_mode) == 0o600
    assert server.address == str(place / "socket")


def test_who_is_in_the_queue_of_the_lost_socket_is_served(place, server, monkeypatch):
    """Connected, and not yet accepted, when the server notices."""
    import shmelim.channel.server as module

    with new_client(place) as client:
        real = module.ChannelServer._accept_one
        held = threading.Event()

        def accept_one(self, listener):
            return real(self, listener) if held.is_set() or len(self._listeners) > 1 else False

        monkeypatch.setattr(module.ChannelServer, "_accept_one", accept_one)
        results = []
        thread = threading.Thread(target=lambda: results.append(client.call("echo_rpc", (5,))))
        thread.start()
        until(lambda: any(client._connections._wires), "the connection")
        (place / "socket").unlink()
        thread.join(PATIENCE)
        held.set()
        assert results == [5]


@pytest.mark.parametrize("content", [b"", b"x" * 32, b"x" * 40])
def test_a_key_that_was_replaced_is_put_back(place, server, content):
    key = load_key(place / "key")
    (place / "key").write_bytes(content)
    until(lambda: (place / "key").read_bytes() == key)
    assert answers(place)


def test_a_key_that_was_opened_to_others_is_closed_again(place, server):
    (place / "key").chmod(0o644)
    until(lambda: stat.S_IMODE((place / "key").stat().st_mode) == 0o600)


def test_a_file_in_the_place_of_the_socket_is_left_alone_and_named(place, server, problems):
    (place / "socket").unlink()
    (place / "socket").write_text("precious")
    until(lambda: problems.stands("channel_unreachable", "shmelim"))
    assert "not a socket" in problems.standing()[0].text
    assert (place / "socket").read_text() == "precious"
    (place / "socket").unlink()
    assert answers(place)
    until(lambda: problems.standing() == [])


def test_a_socket_that_only_got_another_mode_stays(place, server, caplog):
    inode = (place / "socket").stat().st_ino
    (place / "socket").chmod(0o660)
    until(lambda: server._socket_file._identity[2] == (place / "socket").stat().st_ctime_ns)
    assert (place / "socket").stat().st_ino == inode
    assert "put back" not in caplog.text


def test_a_stale_socket_in_the_place_of_ours_is_replaced(place, server):
    import socket

    (place / "socket").unlink()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(place / "socket"))
    assert answers(place)


def test_what_was_put_back_is_removed_at_the_end(place, target):
    with ChannelServer(target, place / "socket", KEY):
        shutil.rmtree(place)
        until((place / "socket").exists)
    assert not (place / "socket").exists()


def test_an_end_without_the_directory_is_quiet(place, target, caplog):
    server = ChannelServer(target, place / "socket", KEY).start()
    shutil.rmtree(place.parent)
    place.parent.touch()  # nothing can be put back below a file
    server.close()
    assert "cannot remove" not in caplog.text


class TestTheAskerIsToBlame:
    def test_who_has_no_key_of_a_server_that_listens(self, place, server, tmp_path):
        with (
            ChannelClient(place / "socket", lambda: load_key(tmp_path / "elsewhere")) as client,
            pytest.raises(
                KeyFileError, match=r"a server listens at .*socket, but there is no key file .*elsewhere"
            ),
        ):
            client.call("echo_rpc")

    def test_but_not_where_nobody_listens(self, tmp_path):
        with (
            ChannelClient(tmp_path / "socket", lambda: load_key(tmp_path / "key")) as client,
            pytest.raises(NotServingError) as caught,
        ):
            client.call("echo_rpc")
        assert not isinstance(caught.value, CallerFaultError)

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
    def test_who_may_not_read_the_key(self, place, server):
        def as_nobody():
            os.setgid(65534)
            os.setuid(65534)
            with pytest.raises(KeyFileError) as caught:
                load_key(place / "key")
            return str(caught.value)

        for directory in (place, *place.parents):
            if directory.owner() == "root" and str(directory).startswith("/tmp/pytest"):
                directory.chmod(0o755)
        text = call(as_nobody)
        assert "Permission denied; this process runs as user 65534" in text
        assert f"{place / 'key'} belongs to user 0 and has mode 0600" in text
        place.chmod(0o700)
        assert f"{place} belongs to user 0 and has mode 0700" in call(as_nobody)

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
    def test_who_may_not_use_the_socket(self, place, server):
        key = load_key(place / "key")
        place.chmod(0o755)
        for directory in place.parents:
            if str(directory).startswith("/tmp/pytest"):
                directory.chmod(0o755)

        def as_nobody():
            os.setgid(65534)
            os.setuid(65534)
            with (
                ChannelClient(place / "socket", key) as client,
                pytest.raises(CallerFaultError, match=r"as user 65534, .*socket belongs to user 0"),
            ):
                client.call("echo_rpc")
            return True

        assert call(as_nobody)

    def test_who_has_no_descriptor_left(self, place, server):
        key = load_key(place / "key")

        def short_of_descriptors():
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            with (
                ChannelClient(place / "socket", key) as client,
                pytest.raises(CallerFaultError, match=r"Too many open files .*limit of its own"),
            ):
                client.call("echo_rpc")
            return True

        assert call(short_of_descriptors)

    def test_a_server_that_refuses_is_to_blame_itself(self, place, target):
        with (
            ChannelServer(target, place / "socket", KEY),
            ChannelClient(place / "socket", b"another key, long enough") as client,
            pytest.raises(ChannelError) as caught,
        ):
            client.call("echo_rpc")
        assert not isinstance(caught.value, CallerFaultError)
