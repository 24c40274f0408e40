"""The journal of slashes: what a store that was lost, restored or damaged still knows of the money that moved."""

import json
import os
import shutil
from pathlib import Path

import pytest
from crashing import Child, kill_self
from serving import row

from shmelim import EliminationManagerServer
from shmelim.eliminations.debts.journal import FILE_NAME
from shmelim.eliminations.debts.states import SLASH
from shmelim.errors import StoreError


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "state"


def opened(directory):
    return EliminationManagerServer(None, directory, durability="process", files="off", slash_lease_s=0)


def lines(directory):
    return [json.loads(line) for line in (directory / FILE_NAME).read_text().splitlines()]


def owe(server, *hotkeys, rule="drawdown"):
    for hotkey in hotkeys:
        assert server.eliminate_rpc(hotkey, row(hotkey), [SLASH], None, rule, 0.5) == "added"


def lose_store(directory):
    for path in directory.glob("shmelim.sqlite*"):
        path.unlink()


def kept(directory):
    """Copy the store as it is now, as a backup would."""
    copy = directory.with_name("kept")
    shutil.copytree(directory, copy, ignore=lambda _, names: [name for name in names if name == FILE_NAME])
    return copy


def put_back(directory, copy):
    lose_store(directory)
    for path in copy.glob("shmelim.sqlite*"):
        shutil.copy(path, directory / path.name)


def slash_states(server):
    return {debt["hotkey"]: debt["state"] for debt in server.get_debts_rpc() if debt["kind"] == SLASH}


ENDS = {
    "made": lambda server: server.settle_debt_rpc("a", SLASH, "one"),
    "declined": lambda server: server.settle_debt_rpc("a", SLASH, "one", declined=True, answer="bool False"),
    "not made": lambda server: server.fail_debt_rpc("a", SLASH, "refused", "one"),
    "by hand": lambda server: server.resolve_slash_rpc("a", made=True),
    "not, by hand": lambda server: server.resolve_slash_rpc("a", made=False),
    "never": lambda _: True,
    "doubt": lambda server: server.doubt_slash_rpc("a", "one", "timeout"),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("loss", ["emptied", "restored"])
def test_what_was_begun_or_made_is_not_slashed_again(directory, end, loss):
    with opened(directory) as server:
        owe(server, "a")
    copy = kept(directory)
    with opened(directory) as server:
        assert server.begin_slash_rpc("a", "one")
        assert ENDS[end](server)
    if loss == "emptied":
        lose_store(directory)
    else:
        put_back(directory, copy)
    with opened(directory) as server:
        if end in ("never", "doubt"):
            assert slash_states(server) == {"a": "in_doubt"}
            (debt,) = server.get_debts_rpc("a")
            assert (debt["rule"], debt["share"], debt["attempt"]) == ("drawdown", 0.5, "one")
        server.eliminate_rpc("a", row("a"), [SLASH], None, "drawdown")
        again = server.begin_slash_rpc("a", "two")
        assert again is (end in ("not made", "not, by hand"))
        outcomes = [(made["outcome"], made["by"], made["share"]) for made in server.get_slashes_rpc()]
        expected = {
            "made": ("made", "contract", 0.5),
            "declined": ("declined", "contract", 0.5),
            "by hand": ("made", "hand", 0.5),
        }
        assert outcomes == ([expected[end]] if end in expected else [])


def test_another_registration_is_known_too(directory):
    with opened(directory) as server:
        for hotkeys in (["a", "b"], ["b"], ["a", "b"]):
            server.update_metagraph_rpc(hotkeys)
        owe(server, "a")
        assert server.begin_slash_rpc("a", "one")
        assert server.settle_debt_rpc("a", SLASH, "one")
    lose_store(directory)
    with opened(directory) as server:
        server.update_metagraph_rpc(["a", "b"])
        owe(server, "a")
        assert slash_states(server) == {}


def test_a_return_that_the_store_forgot_is_counted_once(directory):
    """He was away when the backup was made, and was slashed since, for the registration that is seen again."""
    with opened(directory) as server:
        server.update_metagraph_rpc(["a", "b"])
        server.update_metagraph_rpc(["b"])
        copy = kept(directory)
        server.update_metagraph_rpc(["a", "b"])
        owe(server, "a")
        server.begin_slash_rpc("a", "one")
        server.settle_debt_rpc("a", SLASH, "one")
    put_back(directory, copy)
    with opened(directory) as server:
        server.update_metagraph_rpc(["a", "b"])
        owe(server, "a")
        assert server.get_debts_rpc() == []
        assert [slash["registration"] for slash in server.get_slashes_rpc("a")] == [1]


@pytest.mark.parametrize("how", ["not made", "re-armed"])
def test_a_return_that_was_undone_is_not_counted_again_for_what_was_not_made_since(directory, how):
    with opened(directory) as server:
        server.update_metagraph_rpc(["a", "b"])
        owe(server, "a")
        server.begin_slash_rpc("a", "one")
        server.settle_debt_rpc("a", SLASH, "one")
        server.update_metagraph_rpc(["b"])
        server.update_metagraph_rpc(["a", "b"])
        server.remove_elimination_rpc("a")
        owe(server, "a", rule="challenge_period")
        server.begin_slash_rpc("a", "two")
        if how == "not made":
            server.fail_debt_rpc("a", SLASH, "refused", "two")
        else:
            server.settle_debt_rpc("a", SLASH, "two")
            server.rearm_slash_rpc("a", "challenge_period")
        server.undo_departures_rpc(["a"])
    with opened(directory) as server:
        server.remove_elimination_rpc("a")
        owe(server, "a")
        assert "drawdown" not in [debt["rule"] for debt in server.get_debts_rpc()], "slashed for it before"


@pytest.mark.parametrize("is_known", [True, False])
def test_a_doubt_of_an_earlier_state_is_none_once_the_slash_was_made(directory, is_known):
    """A person who says once more that it was not made, which is so, had the miner slashed twice."""
    with opened(directory) as server:
        owe(server, "a")
        assert server.begin_slash_rpc("a", "one")
        assert server.fail_debt_rpc("a", SLASH, "timeout", "one", in_doubt=True)
        copy = kept(directory)
        assert server.resolve_slash_rpc("a", made=False)
        assert server.begin_slash_rpc("a", "two")
        assert server.settle_debt_rpc("a", SLASH, "two")
    if not is_known:  # how the first one ended
        left = [line for line in lines(directory) if line["what"] != "not made"]
        (directory / FILE_NAME).write_text("".join(f"{json.dumps(line)}\n" for line in left))
    put_back(directory, copy)
    with opened(directory) as server:
        assert slash_states(server) == ({} if is_known else {"a": "in_doubt"})
        assert server.resolve_slash_rpc("a", made=False) is not is_known
        assert server.get_debts_rpc() == []
        assert [slash["outcome"] for slash in server.get_slashes_rpc()] == ["made"]


def test_a_rearmed_one_may_be_slashed_again(directory):
    with opened(directory) as server:
        owe(server, "a")
        assert server.begin_slash_rpc("a", "one")
        assert server.settle_debt_rpc("a", SLASH, "one")
        assert server.rearm_slash_rpc("a")
    lose_store(directory)
    with opened(directory) as server:
        owe(server, "a")
        assert slash_states(server) == {"a": "owed"}


def test_a_start_with_the_stores_own_journal_changes_nothing(directory):
    with opened(directory) as server:
        owe(server, "made", "failed", "begun", "doubted", "owing")
        for hotkey in ("made", "failed", "begun", "doubted"):
            assert server.begin_slash_rpc(hotkey, f"of {hotkey}")
        assert server.settle_debt_rpc("made", SLASH, "of made")
        assert server.fail_debt_rpc("failed", SLASH, "refused", "of failed")
        assert server.doubt_slash_rpc("doubted", "of doubted", "timeout")
        before = server.get_debts_rpc(), server.get_slashes_rpc(), server.get_history_rpc(limit=None)
    content = (directory / FILE_NAME).read_bytes()
    with opened(directory) as server:
        assert (server.get_debts_rpc(), server.get_slashes_rpc(), server.get_history_rpc(limit=None)) == before
    assert (directory / FILE_NAME).read_bytes() == content


def test_a_journal_that_was_lost_is_filled_from_the_store(directory):
    with opened(directory) as server:
        owe(server, "made", "begun")
        for hotkey in ("made", "begun"):
            assert server.begin_slash_rpc(hotkey, f"of {hotkey}")
        assert server.settle_debt_rpc("made", SLASH, "of made")
    (directory / FILE_NAME).unlink()
    opened(directory).close()
    assert {(line["what"], line["hotkey"]) for line in lines(directory)} == {("made", "made"), ("begun", "begun")}


@pytest.mark.parametrize("step", ["begin", "fail"])
def test_a_server_that_dies_between_commit_and_journal(directory, step):
    with opened(directory) as server:
        owe(server, "a")
        if step == "fail":
            assert server.begin_slash_rpc("a", "one")

    def run():
        server = opened(directory)
        server._journal.append = lambda _: kill_self()
        if step == "begin":
            server.begin_slash_rpc("a", "one")
        else:
            server.fail_debt_rpc("a", SLASH, "refused", "one")

    with Child(run) as child:
        assert child.wait() == -9
    with opened(directory) as server:
        assert slash_states(server) == {"a": "attempting" if step == "begin" else "owed"}
    assert lines(directory)[-1]["what"] == ("begun" if step == "begin" else "not made")


def test_a_slash_whose_end_is_written_at_the_next_start_can_be_rearmed(directory):
    """Its beginning stands in the journal already, and must not be taken for one that never ended."""
    with opened(directory) as server:
        owe(server, "a")
        assert server.begin_slash_rpc("a", "one")

    def run():
        server = opened(directory)
        server._journal.append = lambda _: kill_self()
        server.settle_debt_rpc("a", SLASH, "one")

    with Child(run) as child:
        assert child.wait() == -9
    with opened(directory) as server:
        told = [(line["what"], line["attempt"]) for line in lines(directory)]
        assert told == [("begun", "one"), ("made", "one")]
        assert server.rearm_slash_rpc("a")
        server.remove_elimination_rpc("a")
    with opened(directory) as server:
        assert server.get_debts_rpc() == []
        owe(server, "a")
        assert slash_states(server) == {"a": "owed"}


def test_a_slash_that_cannot_be_written_there_is_not_begun(directory, monkeypatch):
    with opened(directory) as server:
        owe(server, "a", "b")
        assert server.begin_slash_rpc("b", "other")

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("shmelim.eliminations.debts.journal._write", full)
            with pytest.raises(StoreError, match=r"journal of slashes .*No space left"):
                server.begin_slash_rpc("a", "one")
            # An end is in the store, and is not refused.
            assert server.settle_debt_rpc("b", SLASH, "other")
            assert "slash_journal" in {p["name"] for p in server.health_check_rpc()["problems"]}
        assert server.begin_slash_rpc("a", "one"), "it can be repeated"
        assert server.settle_debt_rpc("a", SLASH, "one")
        assert "slash_journal" not in {p["name"] for p in server.health_check_rpc()["problems"]}
    assert {line["hotkey"] for line in lines(directory) if line["what"] == "made"} == {"a", "b"}


def test_a_line_is_on_disk_before_the_contract_may_be_called_and_after_its_answer(directory, monkeypatch):
    synced = []
    sync = os.fsync

    def watch(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    with opened(directory) as server:
        owe(server, "a")
        monkeypatch.setattr(os, "fsync", watch)
        assert server.begin_slash_rpc("a", "one")
        assert FILE_NAME in synced
        synced.clear()
        assert server.settle_debt_rpc("a", SLASH, "one")
        assert FILE_NAME in synced
    assert (directory / FILE_NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
def test_something_else_in_its_place_is_refused_and_not_waited_for(directory, make):
    opened(directory).close()
    (directory / FILE_NAME).unlink(missing_ok=True)
    make(directory / FILE_NAME)
    with pytest.raises(StoreError, match="not a file") as caught:
        opened(directory)
    assert caught.value.hint


def test_what_a_power_cut_left_of_the_last_line_is_ignored(directory):
    with opened(directory) as server:
        owe(server, "a", "b")
        assert server.begin_slash_rpc("a", "one")
        assert server.settle_debt_rpc("a", SLASH, "one")
    journal = directory / FILE_NAME
    whole = journal.read_bytes()
    for length in range(len(whole.splitlines(keepends=True)[0]), len(whole)):
        journal.write_bytes(whole[:length])
        with opened(directory) as server:
            assert server.get_money_held_rpc() is None
            assert [made["outcome"] for made in server.get_slashes_rpc()] == ["made"]
        assert [entry["what"] for entry in readable(directory)].count("made") >= 1


def readable(directory):
    found = []
    for line in (directory / FILE_NAME).read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@pytest.mark.parametrize("line", [b"\xff\xfe\x00", b"{}", b"[1]", b'{"what": "made"}'])
def test_lines_that_cannot_be_read_hold_money_once(directory, line):
    with opened(directory) as server:
        owe(server, "a")
    journal = directory / FILE_NAME
    journal.write_bytes(line + b"\n")
    with opened(directory) as server:
        assert "1 lines of" in server.get_money_held_rpc()["why"]
        assert not server.begin_slash_rpc("a", "one")
        assert server.release_money_rpc()
    with opened(directory) as server:
        assert server.get_money_held_rpc() is None
        assert server.begin_slash_rpc("a", "one")


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("is_slashed", [True, False])
def test_that_nothing_was_made_is_not_forgotten_with_a_line_where_a_return_was_undone(
    directory, monkeypatch, is_slashed, by_hand
):
    """It is committed, and the process dies before the journal has it; the return that waited for it is gone."""
    with opened(directory) as server:
        server.update_metagraph_rpc(["a", "b"])
        if is_slashed:
            owe(server, "a")
            assert server.begin_slash_rpc("a", "zero")
            assert server.settle_debt_rpc("a", SLASH, "zero")
            server.remove_elimination_rpc("a")
        server.update_metagraph_rpc(["b"])
        server.update_metagraph_rpc(["a", "b"])
        owe(server, "a")
        assert server.begin_slash_rpc("a", "one")
        assert server.fail_debt_rpc("a", SLASH, "timeout", "one", in_doubt=True)
        server.undo_departures_rpc(["a"])

        def die(*_):
            raise StoreError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(server._journal, "append", die)
            if by_hand:
                assert server.resolve_slash_rpc("a", made=False)
            else:
                assert server.fail_debt_rpc("a", SLASH, "refused", "one")
    for _ in range(2):
        with opened(directory) as server:
            owed = [(debt["state"], debt["registration"]) for debt in server.get_debts_rpc("a")]
            assert owed == ([] if is_slashed else [("owed", 0)])
            assert lines(directory)[-1]["what"] == "not made"
