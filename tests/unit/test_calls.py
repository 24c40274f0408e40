"""Each remote method is declared once: the server has it so, and callers, type checkers, mocks and help see it."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
import types
from unittest.mock import Mock, create_autospec

import pytest
from serving import row

from shmelim import EliminationClient, EliminationManager, EliminationManagerServer, EliminationReader
from shmelim.eliminations.calls import Calls, ProcessingCalls, accepts

DECLARED = {
    name: declared
    for name, declared in inspect.getmembers(ProcessingCalls, inspect.isfunction)
    if not name.startswith("_") and name != "generate_elimination_row"
}
PUBLIC = {name: declared for name, declared in DECLARED.items() if hasattr(Calls, name)}
# What a client does before it sends: the server has no part in it.
OF_THE_CALLER_ALONE = {"sync_eliminations": {"on_progress"}}


def parameters_of(method, without=()):
    """Names, kinds and defaults."""
    found = list(inspect.signature(method).parameters.values())[1:]
    return [(each.name, each.kind, each.default) for each in found if each.name not in without]


def test_there_are_as_many_as_ever():
    assert len(PUBLIC) > 20
    assert len(DECLARED) > len(PUBLIC)


@pytest.mark.parametrize("name", DECLARED)
def test_the_server_has_it_as_it_is_declared(name):
    body = getattr(
        EliminationManagerServer, "load_eliminations_from_disk_rpc" if "reload" in name else f"{name}_rpc"
    )
    declared = parameters_of(DECLARED[name], OF_THE_CALLER_ALONE.get(name, ()))
    assert parameters_of(body) == declared
    assert inspect.getdoc(body) == inspect.getdoc(DECLARED[name])


@pytest.mark.parametrize("kind", [EliminationManager, EliminationClient])
@pytest.mark.parametrize("name", PUBLIC)
def test_callers_have_a_plain_function_with_documentation(kind, name):
    method = inspect.getattr_static(kind, name)
    assert type(method) is types.FunctionType
    assert method is PUBLIC[name]
    assert inspect.getdoc(method)
    assert parameters_of(method) == parameters_of(PUBLIC[name])
    assert "self, *args" not in pydoc.render_doc(method)


@pytest.mark.parametrize(
    "kind", [EliminationManager, EliminationClient, EliminationReader, EliminationManagerServer]
)
def test_everything_public_is_documented(kind):
    for name, value in inspect.getmembers(kind):
        if not name.startswith("_") and (callable(value) or isinstance(value, property)):
            assert inspect.getdoc(value), name


def test_mocks_see_the_methods_and_their_parameters():
    mock = create_autospec(EliminationManager, instance=True)
    mock.add_elimination("a", {})
    mock.sync_eliminations([], on_progress=print)
    for wrong in (mock.add_elimination, lambda: mock.remove_elimination("a", "b")):
        with pytest.raises(TypeError):
            wrong()
    assert callable(Mock(spec=EliminationManager).process_eliminations)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rearm_slash", ("5C4",)),
        ("release_money", ()),
        ("resolve_slash", ("5C4", "made")),
        ("remove_elimination", ("5C4",)),
    ],
)
def test_what_frees_money_or_takes_back_is_not_sent_again_when_a_connection_breaks(name, arguments):
    """Carried out again, it would be for a slash, or a hold, of which its caller does not know."""
    sent = []

    class Caller(Calls):
        def _call(self, method, args, kwargs, **options):
            sent.append((method, options["idempotent"]))

    getattr(Caller(), name)(*arguments)
    assert sent == [(f"{name}_rpc", False)]


def test_a_keyword_of_a_caller_and_ours_at_once_is_refused():
    with EliminationManagerServer() as server:
        with pytest.raises(TypeError, match=r"eliminations was given twice: 'dat' and 'eliminations'"):
            server.sync_eliminations_rpc(dat=[], eliminations=[])
        with pytest.raises(TypeError, match="unexpected keyword"):
            server.sync_eliminations_rpc(rows=[])
        assert server.sync_eliminations_rpc(eliminations_list=[row("a")]) == []
        assert server.is_hotkey_eliminated_rpc("a")


def test_what_takes_other_keywords_says_its_own_name_and_takes_ours():
    @accepts(theirs="ours")
    def method(ours, more=2):
        """Documented."""
        return ours, more

    assert method(1) == method(ours=1) == method(theirs=1) == (1, 2)
    assert method(theirs=1, more=3) == (1, 3)
    assert (method.__name__, method.__doc__) == ("method", "Documented.")


SCRIPT = """
from shmelim import EliminationClient, EliminationManager

manager = EliminationManager(None, None, None, running_unit_tests=True)
client = EliminationClient("shmelim")
record = {"hotkey": "a", "reason": "ZOMBIE", "elimination_initiated_time_ms": 5}
new: bool = manager.add_elimination("a", record)
removed: list[str] = client.sync_eliminations([record], on_progress=print)
gone: list[str] = manager.delete_eliminations({"a"})
told: list[str] = manager.update_metagraph(["a"])
events = client.get_history("a", limit=None)
manager.process_eliminations()
manager.process_eliminations(position_locks=None, iteration_epoch=None)
manager.handle_eliminated_miner("a", {}, None)
ran: bool = manager.get_first_refresh_ran()
well: bool = manager.health_check()
health: dict[str, object] = client.health_check()
generated = manager.generate_elimination_row("a", 0.1, "ZOMBIE", t_ms=5)
"""
MISUSE = {
    'manager.add_elimination("a")': "call-arg",
    "manager.add_elimination(5, record)": "arg-type",
    'manager.add_elimination("a", "record")': "arg-type",
    'text: str = manager.add_elimination("a", record)': "assignment",
    "client.delete_eliminations(None)": "arg-type",
    "client.sync_eliminations(record, on_progress=5)": "arg-type",
    "client.remove_elimination()": "call-arg",
    'client.get_history(limit="all")': "arg-type",
    "manager.update_metagraph(hotkey=[])": "call-arg",
    'manager.set_first_refresh_ran("yes")': "arg-type",
    "manager.process_eliminations(1, 2, 3)": "call-arg",
    "manager.handle_eliminated_miner()": "call-arg",
    "client.process_eliminations()": "attr-defined",
    "manager.no_such_method()": "attr-defined",
    'manager.generate_elimination_row("a", 0.1)': "call-arg",
    "client.clear_eliminations(1)": "call-arg",
}


def test_a_type_checker_takes_the_right_use_and_finds_each_misuse(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "\n".join(MISUSE) + "\n")
    arguments = ["--strict", "--no-error-summary", "--hide-error-context", f"--cache-dir={tmp_path}", str(script)]
    # In a process of its own: what it leaves behind would be looked through for garbage by all later tests.
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments], capture_output=True, text=True, check=False
    )
    assert not checked.stderr, checked.stderr
    said = checked.stdout
    first = SCRIPT.count("\n") + 1
    found = {}
    for line, code in re.findall(r"^[^:]*script\.py:(\d+): error: .*\[([a-z-]+)\]$", said, re.MULTILINE):
        found.setdefault(int(line), set()).add(code)
    right = {line: codes for line, codes in found.items() if line < first}
    assert not right, said
    for number, (misuse, code) in enumerate(MISUSE.items(), first):
        assert code in found.get(number, ()), f"{misuse}: {said}"
