"""What is seen of a name as metrics for Prometheus; needs the extra ``metrics``.

Names, units and types follow Prometheus' conventions: base units, ``_total`` for what only grows, and a gauge of 1
for what is text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final, TypeAlias

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from shmelim import __version__
from shmelim.eliminations.debts.states import ATTEMPTING, IN_DOUBT, OWED
from shmelim.shm import READ_PATH, SharedNamespace, readings_of
from shmelim.system import clock
from shmelim.watch.seeing import Seen, see

_READ: Final = {
    "checks": "Checks of one hotkey by all processes, of those that ended, too; as is all that follows.",
    "hits": "Checks that found the hotkey eliminated.",
    "batches": "Checks of many hotkeys at once.",
    "records": "Single records that were asked for.",
    "snapshots": "Copies of all hotkeys or records.",
    "retries": "Reads that started over because a publish overtook them.",
}
_STATUSES: Final = ("ok", "degraded", "failing", "not served")

Counted: TypeAlias = CounterMetricFamily | GaugeMetricFamily
Metric: TypeAlias = Counted | InfoMetricFamily


class ShmelimCollector(Collector):
    """Looks at a name each time it is collected; for a registry of ``prometheus_client``.

    Parameters
    ----------
    name
        The name that is served; nothing is raised where nobody serves it.
    owner
        The uid whose segments are trusted; None: this user's and root's.

    Examples
    --------
    >>> from prometheus_client import CollectorRegistry
    >>> registry = CollectorRegistry()
    >>> registry.register(ShmelimCollector("doc-nobody"))
    >>> registry.get_sample_value("shmelim_up", {"name": "doc-nobody"})
    0.0

    """

    def __init__(self, name: str, owner: int | None = None) -> None:
        self._name = name
        self._owner = owner

    def collect(self) -> Iterator[Metric]:
        """Yield what is seen now; one call to the server, at most 2 s."""
        seen = see(self._name, self._owner)
        yield self._figure("up", "Whether a writer lives.", seen.is_served)
        status = GaugeMetricFamily("shmelim_status", "1 for the status of the health.", labels=["name", "status"])
        for each in _STATUSES:
            status.add_metric([self._name, each], float(each == seen.status))
        yield status
        # Whom they concern is no label: a series for each hotkey would never end.
        labels = ["name", "problem", "severity"]
        problems = GaugeMetricFamily("shmelim_problems", "How many problems of a kind stand.", labels=labels)
        for key, count in Counter((each["name"], each["severity"]) for each in seen.problems).items():
            problems.add_metric([self._name, *key], count)
        yield problems
        about = InfoMetricFamily("shmelim", "The package that looked, and how it reads.", labels=["name"])
        about.add_metric([self._name], {"version": __version__, "read_path": READ_PATH})
        yield about
        yield from self._of_table(seen)
        yield from self._of_readers(seen)
        yield from self._of_server(seen)

    def _of_table(self, seen: Seen) -> Iterator[Metric]:
        writer, table = seen.writer, seen.table
        if writer is None or table is None:
            return
        if writer.heartbeat_age is not None:
            yield self._figure("heartbeat_age_seconds", "Since the writer's last heartbeat.", writer.heartbeat_age)
        if seen.source is not None:
            about = "Since the source of a table that follows it was known to have nothing newer."
            age = float("inf") if seen.staleness is None else seen.staleness
            yield self._figure("follower_age_seconds", about, age)
        if seen.publishing is not None:
            about = "Changes that the publisher of the name has not sent."
            yield self._figure("publisher_behind_changes", about, seen.publishing.behind)
            yield self._figure("publisher_up", "Whether it says that it lives.", seen.publishing.is_up)
        eliminated, departed, registered, *_ = table.flag_counts
        yield self._figure("eliminated_hotkeys", "Hotkeys that are eliminated.", eliminated)
        yield self._figure("departed_hotkeys", "Hotkeys that once left the metagraph.", departed)
        yield self._figure("registered_hotkeys", "Hotkeys in the metagraph.", registered)
        yield self._figure("table_entries", "Entries in the table.", table.entries)
        yield self._figure("table_usable_entries", "Entries that fit before it grows.", table.capacity // 2)
        yield self._figure(
            "table_load_ratio", "Entries by slots; at 0.5 it grows.", table.entries / table.capacity
        )
        yield self._figure("table_records_bytes", "Bytes of the arena that are used.", table.arena_used)
        yield self._figure("table_arena_bytes", "Bytes of the arena, in each of two copies.", table.arena_size)
        yield self._figure("table_segment_bytes", "Bytes of the data segment.", table.segment_size)
        yield self._figure("version", "The version that is published; it only grows.", table.version)
        yield self._figure("generation", "The number of the data segment.", table.generation)

    def _of_readers(self, seen: Seen) -> Iterator[Metric]:
        """Yield what all processes read; a series for each process would never end."""
        if seen.table is None:
            return
        found = readings_of(SharedNamespace(self._name, owner=self._owner))
        yield self._figure("readers", "Processes that read the table now.", len(found.processes))
        for name, text in _READ.items():
            yield self._figure(f"read_{name}", text, getattr(found.total, name), CounterMetricFamily)

    def _of_server(self, seen: Seen) -> Iterator[Metric]:
        server = seen.server
        if server is None:
            return
        now_ms = clock.now_ms()
        yield self._figure("uptime_seconds", "Since the server's start.", (now_ms - server["started_ms"]) / 1000)
        yield self._figure("store_bytes", "Bytes of the store.", server["store_bytes"])
        for name in ("commits", "changes"):
            text = f"{name.capitalize()} since the server's start."
            yield self._figure(name, text, server[name], CounterMetricFamily)
        # A server of an older release, which still runs after an upgrade, says less.
        if (published := server.get("published_ms")) is not None:
            about = "When the table changed last, since 1970."
            yield self._figure("last_publish_timestamp_seconds", about, published / 1000)
        behind = any(problem["name"] == "files_behind" for problem in seen.problems)
        yield self._figure("files_behind", "Whether the JSON files cannot be written.", behind)
        if (by_state := server.get("debts_by_state")) is not None:
            debts = GaugeMetricFamily("shmelim_debts", "What eliminations still owe.", labels=["name", "state"])
            for state in (OWED, ATTEMPTING, IN_DOUBT):
                debts.add_metric([self._name, state], by_state.get(state, 0))
            yield debts
        if server.get("tick_age_s") is not None:
            yield self._figure("tick_age_seconds", "Since the last whole tick.", server["tick_age_s"])

    def _figure(self, name: str, text: str, value: float, kind: type[Counted] = GaugeMetricFamily) -> Counted:
        family = kind(f"shmelim_{name}", text, labels=["name"])
        family.add_metric([self._name], float(value))
        return family


def text_of(name: str, owner: int | None = None) -> bytes:
    """Return what is seen of a name, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ShmelimCollector(name, owner))
    return generate_latest(registry)
