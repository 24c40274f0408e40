"""SPEC 1: who calls it, how many they are, and what a hotkey is."""

import json
import multiprocessing
import subprocess
import sys

import pytest
from contract_validator import row
from waiting import PATIENCE

from shmelim import EliminationReader


def ask_until_all_are_eliminated(name, hotkeys, pipe):
    reader = EliminationReader(name)
    pipe.send([reader.is_hotkey_eliminated(hotkey) for hotkey in hotkeys])
    while not reader.are_eliminated(hotkeys).all():
        assert reader.wait_for_change(PATIENCE)
    pipe.send([reader.is_hotkey_eliminated(hotkey) for hotkey in hotkeys])
    assert pipe.poll(PATIENCE)  # until the writer has taken them back
    pipe.recv()
    pipe.send([reader.is_hotkey_eliminated(hotkey) for hotkey in hotkeys])


def test_many_processes_of_every_kind_ask_and_see_each_change_at_once(make):
    manager, hotkeys, children = make("rpc"), ["a", "b"], []
    for method in ("fork", "fork", "spawn"):
        context = multiprocessing.get_context(method)
        here, there = context.Pipe()
        child = context.Process(
            target=ask_until_all_are_eliminated, args=(manager.name, hotkeys, there), daemon=True
        )
        child.start()
        children.append((child, here))

    def answers():
        assert all(pipe.poll(PATIENCE) for _, pipe in children)
        return [pipe.recv() for _, pipe in children]

    assert answers() == [[False, False]] * 3
    manager.sync_eliminations([row("a"), row("b")])
    assert answers() == [[True, True]] * 3
    manager.clear_eliminations()
    for _, pipe in children:
        pipe.send("it is done")  # an answer that comes after the change was acknowledged shows it
    assert answers() == [[False, False]] * 3
    for child, _ in children:
        child.join(PATIENCE)
        assert child.exitcode == 0


def test_managers_produce_eliminations_and_a_sync_replaces_them_all(manager):
    manager.append_elimination_row("a", 0.1, "LIQUIDATED")
    manager.append_elimination_row("b", 0.1, "LIQUIDATED")
    assert manager.sync_eliminations([row("b", 1), row("c")]) == ["a"]
    assert manager.eliminations == {"b": row("b", 1), "c": row("c")}


def test_operators_look_and_repair_by_the_command_line(make):
    manager = make("rpc")
    manager.add_elimination("a", row("a"))

    def shmelim(*arguments):
        command = [sys.executable, "-m", "shmelim", *arguments, "--name", manager.name]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)

    looked = shmelim("list")
    assert looked.returncode == 0, looked.stderr
    assert "LIQUIDATED" in looked.stdout
    removed = shmelim("remove", "a")
    assert removed.returncode == 0, removed.stderr
    assert not manager.is_hotkey_eliminated("a")
    audited = shmelim("history")
    assert audited.returncode == 0, audited.stderr
    assert "remove" in audited.stdout


# ---------------------------------------------------------------------- sizes


def test_sizes_of_the_field(make, mode, tmp_path):
    departed = {f"departed{n:04}".ljust(48, "x"): {"detected_ms": n} for n in range(367)}
    (tmp_path / "departed.json").write_text(json.dumps({"departed_hotkeys": departed}))
    manager = make(mode, default_departed=tmp_path / "departed.json")
    registered = [f"registered{n:04}".ljust(48, "x") for n in range(256)]
    manager.update_metagraph(registered)
    rows = [row(f"eliminated{n:04}".ljust(48, "x"), n, return_info={"pad": "x" * 350}) for n in range(3000)]
    assert manager.sync_eliminations(rows) == []
    assert manager.get_departed_hotkeys() == departed
    assert manager.get_eliminations_from_memory() == rows
    assert all(manager.is_hotkey_eliminated(one["hotkey"]) for one in rows)
    assert not any(map(manager.is_hotkey_eliminated, registered))
    assert not any(map(manager.is_hotkey_re_registered, registered))


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_many_more_are_served_as_well(make, count):
    manager = make("direct")
    manager.sync_eliminations(row(f"h{n}") for n in range(count))
    assert len(manager.get_eliminated_hotkeys()) == count
    assert manager.get_elimination(f"h{count - 1}") == row(f"h{count - 1}")


# ---------------------------------------------------------------------- hotkeys

LEGAL = ("x", "5" + "F" * 47, "x" * 255, "schlüssel", "键" * 85, "a b\n\0c", "👑")
ILLEGAL = ("", "x" * 256, "键" * 86, "\ud800")


@pytest.mark.parametrize("hotkey", LEGAL, ids=ascii)
def test_a_hotkey_is_any_text_of_1_to_255_bytes(manager, hotkey):
    assert manager.add_elimination(hotkey, row(hotkey)) is True
    assert manager.is_hotkey_eliminated(hotkey)
    assert not manager.is_hotkey_eliminated(hotkey[:-1] + "?")
    assert manager.get_elimination(hotkey) == row(hotkey)
    assert manager.get_eliminated_hotkeys() == {hotkey}
    assert manager.remove_elimination(hotkey) is True
    assert not manager.is_hotkey_eliminated(hotkey)


@pytest.mark.parametrize("hotkey", ILLEGAL, ids=ascii)
def test_what_is_not_a_hotkey_is_refused_where_it_would_be_stored_and_absent_where_it_is_read(manager, hotkey):
    manager.add_elimination("a", row("a"))
    for change in (
        lambda: manager.add_elimination(hotkey, row("a") | {"hotkey": hotkey}),
        lambda: manager.append_elimination_row(hotkey, 1.0, "ZOMBIE"),
        lambda: manager.sync_eliminations([row("a") | {"hotkey": hotkey}]),
        lambda: manager.delete_eliminations(["a", hotkey]),
        lambda: manager.update_metagraph(["a", hotkey]),
    ):
        with pytest.raises((ValueError, TypeError)):
            change()
    assert manager.eliminations == {"a": row("a")}
    assert manager.is_hotkey_eliminated(hotkey) is False
    assert manager.get_elimination(hotkey) is None
