"""The demo's report: what was measured, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shmelim.cli import output
from shmelim.cli.demo.scenario import AFTER, BEFORE, DEAD, KILLING, Findings, add_rate, median_ms
from shmelim.cli.demo.watcher import BATCH

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOT_MEASURED: Final = "not measured"
_MEMORY_ONLY: Final = frozenset({"tmpfs", "ramfs"})
HOW: Final = {
    "check_median_ns": f"over batches of {BATCH} checks, half of them hits: perf_counter_ns around a batch, "
    f"divided by {BATCH}; the loop is in it, the two clock readings add a few ns to each check",
    "reads": "calls answered; a batch of checks or a snapshot is one",
    "adds_per_second": "one client, one add after the other, each committed to the store and published before it "
    "returned; by the time the calls took",
    "first_change": "until the first reader process saw it",
}


def quantile(counts: Counter[int], share: float) -> int | None:
    """Return the value below or at which this share of the counted values lies; None of nothing."""
    wanted, passed = share * counts.total(), 0
    for value in sorted(counts):
        passed += counts[value]
        if passed >= wanted:
            return value
    return None


def document(findings: Findings) -> dict[str, Any]:
    """Return the report as one JSON document; what was not measured is null and listed."""
    tallies = findings.tallies
    check_ns: Counter[int] = sum((tally.check_ns for tally in tallies), Counter())
    losses = (
        findings.lost_while_dead,
        findings.lost_after_restart,
        findings.lost_at_the_end,
        findings.lost_in_history,
    )
    must_be_zero = {
        "torn_records": _total(findings, "torn"),
        "mixed_reads": _total(findings, "mixed"),
        "wrong_answers": _total(findings, "wrong"),
        "read_errors": _total(findings, "errors"),
        "read_errors_around_the_kill": sum(tally.errors_in[KILLING] + tally.errors_in[DEAD] for tally in tallies)
        if tallies
        else None,
        "acknowledged_changes_lost": None if None in losses else sum(loss or 0 for loss in losses),
        "changes_not_visible_on_return": findings.late,
    }
    content: dict[str, Any] = {
        "must_be_zero": must_be_zero,
        "reads": {
            "total": sum(tally.reads for tally in tallies) if tallies else None,
            "per_second": sum(tally.reads / tally.seconds for tally in tallies) if tallies else None,
            "check_median_ns": quantile(check_ns, 0.5),
            "check_p99_ns": quantile(check_ns, 0.99),
            "checks_per_timed_batch": BATCH,
            "retries": _total(findings, "retries"),
            "while_no_writer_lived": sum(tally.reads_in[DEAD] for tally in tallies) if tallies else None,
        },
        "readers": [
            {
                "pid": tally.pid,
                "seconds": tally.seconds,
                "reads": tally.reads,
                "per_second": tally.reads / tally.seconds,
                "checks": tally.checks,
                "gets": tally.gets,
                "batch_checks": tally.batch_checks,
                "snapshots": tally.snapshots,
                "snapshot_records": tally.snapshot_records,
                "retries": tally.retries,
                "reads_by_phase": {phase: tally.reads_in[phase] for phase in (BEFORE, KILLING, DEAD, AFTER)},
                "torn": tally.torn,
                "mixed": tally.mixed,
                "wrong": tally.wrong,
                "errors": tally.errors,
                "messages": tally.messages,
            }
            for tally in tallies
        ],
        "changes": {
            "acknowledged": findings.acknowledged,
            "adds": len(findings.add_seconds),
            "adds_per_second": add_rate(findings.add_seconds),
            "removes": findings.removes,
            "syncs": len(findings.sync_seconds),
            "sync_records": findings.sync_records,
            "sync_median_ms": median_ms(findings.sync_seconds),
            "outcome_unknown": findings.unknown_outcomes,
        },
        "takeover": {
            "kill_to_first_change_ms": findings.kill_to_first_ms,
            "start_to_first_change_ms": findings.start_to_first_ms,
        },
        "departed_hotkeys": findings.departed,
        "filesystem": findings.filesystem,
        "how": HOW,
    }
    missing = [
        f"{part}.{key}"
        for part in ("must_be_zero", "reads", "changes", "takeover")
        for key, value in content[part].items()
        if value is None
    ]
    ok = all(value == 0 for value in must_be_zero.values())
    return {"ok": ok, **content, "not_measured": missing}


def show(content: dict[str, Any]) -> None:
    """Print the report: a table on a terminal, else a line for each figure with a tab between."""
    if not output.on_terminal():
        for label, figure, _ in _rows(content):
            click.echo(f"{label}\t{figure}" if figure else f"# {label}")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", justify="right")
    for label, figure, style in _rows(content):
        if figure:
            table.add_row(Text(f"  {label}"), Text(figure, style))
        else:
            table.add_section()
            table.add_row(Text(label, "bold"), "")
    console = Console()
    console.print(table)
    console.print(Text(f"One check is timed {HOW['check_median_ns']}. Reads are {HOW['reads']}.", "dim"))
    if content["filesystem"] in _MEMORY_ONLY:
        console.print(
            Text("The state was on a file system in memory: durable changes are slower on a disk.", "dim")
        )


def _rows(content: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield label, figure and style; a label without a figure begins a section."""
    reads, changes, takeover = content["reads"], content["changes"], content["takeover"]
    yield f"Reads, by {len(content['readers'])} processes without pause", "", ""
    for reader in content["readers"]:
        yield f"reader {reader['pid']}", _figure(reader["per_second"], "{:,.0f} reads/s"), ""
    yield "all together", _figure(reads["per_second"], "{:,.0f} reads/s"), ""
    yield "reads", _figure(reads["total"], "{:,}"), ""
    yield "one check, median", _figure(reads["check_median_ns"], "{:,} ns"), ""
    yield "one check, p99", _figure(reads["check_p99_ns"], "{:,} ns"), ""
    yield "reads that a publish overtook, done again", _figure(reads["retries"], "{:,}"), ""
    yield "reads between the kill and the next writer", _figure(reads["while_no_writer_lived"], "{:,}"), ""
    yield "Changes, under the eyes of the readers", "", ""
    yield f"adds ({changes['adds']:,}), one by one, durable", _figure(changes["adds_per_second"], "{:,.0f}/s"), ""
    yield "removes", f"{changes['removes']:,}", ""
    records = _figure(changes["sync_records"], "{:,}")
    yield (
        f"syncs ({changes['syncs']:,}) of {records} records, median",
        _figure(changes["sync_median_ms"], "{:,.1f} ms"),
        "",
    )
    yield "Kill without warning, and the next writer", "", ""
    first = _figure(takeover["kill_to_first_change_ms"], "{:,.0f} ms")
    yield "from the kill to its first change, as a reader saw it", first, ""
    started = _figure(takeover["start_to_first_change_ms"], "{:,.0f} ms")
    yield "from its start to that", started, ""
    yield "Must be 0", "", ""
    for key, value in content["must_be_zero"].items():
        style = "green" if value == 0 else "bold red"
        yield key.replace("_", " "), _figure(value, "{:,}"), style
    for message in [message for reader in content["readers"] for message in reader["messages"]]:
        yield "error", output.printable(message), "red"


def _figure(value: float | None, pattern: str) -> str:
    return _NOT_MEASURED if value is None else pattern.format(value)


def _total(findings: Findings, what: str) -> int | None:
    return sum(getattr(tally, what) for tally in findings.tallies) if findings.tallies else None
