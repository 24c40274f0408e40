"""The key file: whole or absent, and never in other hands."""

import errno
import os
import threading

import pytest

from shmelim.channel import KEY_SIZE, load_key, load_or_create_key, restore_key
from shmelim.errors import KeyFileError, NotServingError


def test_made_once_with_mode_0600(tmp_path):
    path = tmp_path / "key"
    before = os.umask(0)
    try:
        key = load_or_create_key(path)
    finally:
        os.umask(before)
    assert len(key) == KEY_SIZE
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_key(path) == key == load_key(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_usable_under_any_umask(tmp_path):
    before = os.umask(0o777)
    try:
        key = load_or_create_key(tmp_path / "key")
    finally:
        os.umask(before)
    assert load_key(tmp_path / "key") == key


def test_all_who_make_it_at_once_get_the_same(tmp_path):
    keys, barrier = [], threading.Barrier(8)

    def make():
        barrier.wait()
        keys.append(load_or_create_key(tmp_path / "key"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_missing(tmp_path):
    with pytest.raises(NotServingError, match="start the server"):
        load_key(tmp_path / "key")


@pytest.mark.parametrize("load", [load_key, load_or_create_key])
@pytest.mark.parametrize("size", [0, 31, 33, 100_000])
def test_wrong_size(tmp_path, load, size):
    path = tmp_path / "key"
    path.write_bytes(b"K" * size)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="32 bytes") as caught:
        load(path)
    assert "KKK" not in str(caught.value)
    assert path.read_bytes() == b"K" * size


@pytest.mark.parametrize("load", [load_key, load_or_create_key])
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o604, 0o666])
def test_in_other_hands(tmp_path, load, mode):
    path = tmp_path / "key"
    path.write_bytes(b"K" * 32)
    path.chmod(mode)
    with pytest.raises(PermissionError, match="others may"):
        load(path)


@pytest.mark.parametrize("load", [load_key, load_or_create_key])
def test_a_group_may_read_it(tmp_path, load):
    path = tmp_path / "key"
    path.write_bytes(b"K" * 32)
    path.chmod(0o640)
    assert load(path) == b"K" * 32


@pytest.mark.parametrize("load", [load_key, load_or_create_key])
@pytest.mark.parametrize("kind", ["symlink", "dangling", "fifo", "directory"])
def test_no_regular_file(tmp_path, load, kind):
    path = tmp_path / "key"
    real = tmp_path / "real"
    if kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir(mode=0o700)
    else:
        if kind == "symlink":
            real.write_bytes(b"K" * 32)
            real.chmod(0o600)
        path.symlink_to(real)
    with pytest.raises(KeyFileError):
        load(path)
    assert kind == "symlink" or not real.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_file(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"K" * 32)
    path.chmod(0o600)
    os.chown(path, 12345, 12345)
    for load in (load_key, load_or_create_key):
        with pytest.raises(KeyFileError, match="belongs to user 12345"):
            load(path)


def test_a_directory_that_cannot_be_written(tmp_path):
    with pytest.raises(KeyFileError, match="cannot make"):
        load_or_create_key(tmp_path / "absent" / "key")


@pytest.mark.parametrize("there", [None, b"x" * 32, b"short", "mode", "link"])
def test_a_key_is_put_back_as_it_was(tmp_path, there):
    path = tmp_path / "key"
    key = load_or_create_key(path)
    assert restore_key(path, key) is False
    if there == "mode":
        path.chmod(0o644)
    else:
        path.unlink()
        if there == "link":
            path.symlink_to(tmp_path / "elsewhere")
        elif there is not None:
            path.write_bytes(there)
            path.chmod(0o600)
    assert restore_key(path, key) is True
    assert load_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_a_key_that_cannot_be_put_back(tmp_path):
    (tmp_path / "key").mkdir()
    with pytest.raises(KeyFileError, match="cannot make"):
        restore_key(tmp_path / "key", b"k" * 32)
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_without_descriptors_left_nobody_is_told_to_be_somebody_else(tmp_path, monkeypatch):
    load_or_create_key(tmp_path / "key")

    def none_left(*_args):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", none_left)
    with pytest.raises(KeyFileError) as caught:
        load_key(tmp_path / "key")
    assert "ulimit -n" in str(caught.value.hint)
