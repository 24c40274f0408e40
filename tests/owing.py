"""What tests of debts share: a server without processes, and short words for what eliminations owe on it."""

from serving import row

from shmelim import EliminationManagerServer
from shmelim.eliminations.debts.states import (
    KINDS,
    SLASH,
)

ELIMINATED_MS = row("a")["elimination_initiated_time_ms"]


def a_server(kind, tmp_path):
    directory = None if kind == "memory" else tmp_path / "state"
    return EliminationManagerServer(None, directory, durability="process", slash_lease_s=0)


def eliminate(server, hotkey="a", kinds=KINDS, replacements=None, *, stamp=0, rule=None, **more):
    return server.eliminate_rpc(hotkey, row(hotkey, stamp), list(kinds), replacements, rule, **more)


def slashes(server, hotkey=None):
    """The slashes that were made, without when that was."""
    return [(s["hotkey"], s["eliminated_ms"] - ELIMINATED_MS, s["by"]) for s in server.get_slashes_rpc(hotkey)]


def owed(server, hotkey=None):
    return [(debt["hotkey"], debt["kind"], debt["state"]) for debt in server.get_debts_rpc(hotkey)]


def told(server, *actions):
    """The events of these actions, oldest first."""
    events = server.get_history_rpc(limit=None)[::-1]
    return [(event["action"], event["note"]) for event in events if not actions or event["action"] in actions]


def due(server, hotkey):
    return [debt["due"] for debt in server.get_debts_rpc(hotkey)]


def slash(server, hotkey="a"):
    (debt,) = [debt for debt in server.get_debts_rpc(hotkey) if debt["kind"] == SLASH]
    return debt


def make_slash(server, hotkey="a", how="contract"):
    assert server.begin_slash_rpc(hotkey, "one")
    if how == "contract":
        assert server.settle_debt_rpc(hotkey, SLASH, "one")
    else:
        assert server.doubt_slash_rpc(hotkey, "one", "timeout")
        assert server.resolve_slash_rpc(hotkey, made=True)


def leave_and_return(server, *hotkeys):
    server.update_metagraph_rpc(["other", *hotkeys])
    server.update_metagraph_rpc(["other"])
    server.update_metagraph_rpc(["other", *hotkeys])
