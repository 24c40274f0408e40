"""From results.json to results.md: every figure, every gap with its reason, what each contender does not do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.operations import READS, TITLES
from bench.stats import percentile
from bench.units import duration, per_second, times

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "Footnotes",
    "Results",
    "around_a_check",
    "document",
    "steadiness",
    "table",
    "verdict_lines",
    "verdict_table",
]

_BUSY = 10.0
_WANDERING = 1.2


class Footnotes:
    """Numbered reasons; the same reason has the same number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        number = self._numbers.setdefault(" ".join(text.split()), len(self._numbers) + 1)
        return f"<sup>{number}</sup>"

    def lines(self) -> list[str]:
        return [f"{number}. {text}" for text, number in self._numbers.items()]


class Results:
    """Looks up what was measured, and why not.

    Parameters
    ----------
    results
        As `bench.run.Run.run` returns them.

    """

    def __init__(self, results: dict) -> None:
        self.raw = results
        self._cells = {_key(cell): cell for cell in results["cells"]}
        self.sizes = sorted({cell["size"] for cell in results["cells"] if cell["operation"] != "sync"})

    @property
    def names(self) -> list[str]:
        return list(self.raw["peers"])

    def label(self, name: str) -> str:
        return self.raw["peers"][name]["label"]

    def cell(self, name: str, size: int, operation: str, readers: int = 1, *, writer: bool = False) -> dict | None:
        if operation == "sync":
            size, readers = 0, 0
        return self._cells.get((name, size, operation, readers, writer))

    def reason(self, name: str, size: int, operation: str, readers: int = 1, *, writer: bool = False) -> str:
        """Say why there is no such cell."""
        missing = self.raw["peers"][name].get("missing")
        if missing is not None:
            return missing
        for skip in self.raw["skipped"]:
            wanted = (("size", size), ("operation", operation), ("readers", readers), ("writer", writer))
            if skip["peer"] == name and all(key not in skip or skip[key] == value for key, value in wanted):
                return _last_line(skip["why"])
        if operation == "sync":
            return "a sync changes the host, which it shares with another row of this table"
        return "not part of this run"

    def shown(
        self,
        notes: Footnotes,
        name: str,
        size: int,
        operation: str,
        readers: int = 1,
        *,
        writer: bool = False,
        figure: str = "p50",
    ) -> str:
        """Return a figure as text, or a mark with a reason."""
        cell = self.cell(name, size, operation, readers, writer=writer)
        if cell is None:
            reason = self.reason(name, size, operation, readers, writer=writer)
            return ("missing" if "missing" in self.raw["peers"][name] else "skipped") + notes.mark(reason)
        if cell[figure] is None:
            return "–" + notes.mark("too few calls in the time given to tell this percentile")
        shown = per_second if figure == "rate" else duration
        return shown(cell[figure], cell["spread"][figure])


def _key(cell: dict) -> tuple:
    # A sync ends with its own number of records, whatever was there.
    size = 0 if cell["operation"] == "sync" else cell["size"]
    return cell["peer"], size, cell["operation"], cell["readers"], cell["writer"]


def _last_line(text: str) -> str:
    """Return what a traceback ends with."""
    return text.strip().splitlines()[-1]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table: the first column is text, the others are figures."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def verdict_table(results: dict) -> list[str]:
    """Return the verdicts as a Markdown table."""
    words = {True: "met", False: "**not met**", None: "–"}
    rows = [
        (verdict["claim"], verdict["target"], verdict["shown"], words[verdict["met"]])
        for verdict in results["verdicts"]
    ]
    return table(("figure", "target", "measured", "verdict"), rows)


def verdict_lines(results: dict) -> list[str]:
    """Return the verdicts as plain text."""
    words = {True: "met    ", False: "NOT MET", None: "   –   "}
    return [
        f"{words[verdict['met']]}  {verdict['claim']}: {verdict['shown']}, target {verdict['target']}"
        for verdict in results["verdicts"]
    ]


def document(raw: dict) -> str:
    """Return results.md."""
    results, notes = Results(raw), Footnotes()
    lines = ["# Results", "", *_intro(raw), "", "## Against the targets", "", *verdict_table(raw), ""]
    for size in results.sizes:
        lines += [f"## {size:,} records: medians, one reader, no writer", "", *_medians(results, notes, size), ""]
    for size in results.sizes:
        lines += [
            f"## {size:,} records: percentiles of a check that hits",
            "",
            *_percentiles(results, notes, size),
            "",
        ]
    for size in results.sizes:
        lines += [f"## {size:,} records: several readers", "", *_crowd(results, notes, size), ""]
    lines += ["## Duels", "", *_duels(raw, results), "", "## Around a check", "", *around_a_check(raw), ""]
    lines += ["## What changes cost", "", *_changes(raw), "", "## Contenders", "", *_contenders(raw), ""]
    return "\n".join([*lines, "## Notes", "", *notes.lines(), ""])


def _intro(raw: dict) -> list[str]:
    machine = raw["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    where = "a virtual machine" if machine["virtual"] else "no virtual machine"
    before, after = (machine[key] for key in ("load_before", "load_after"))
    return [
        f"Made by `python -m bench` on {machine['date']}, at commit `{machine['commit']}`.",
        *(f"**A part failed**, {failed['part']}: {failed['why']}" for failed in raw.get("failed", ())),
        "",
        *(
            "- " + " ".join(item)
            for item in (
                (
                    f"{machine['cpu']}, {machine['cores']} cores ({where}), {machine['memory_gb']} GB;",
                    f"{machine['kernel']} {machine['architecture']}; {machine['python']}, {machine['compiler']}.",
                ),
                (f"{packages}.",),
                (
                    f"Load averages {_averages(before)} before and {_averages(after)} after; processors in use",
                    f"{before['busy_percent']:.0f} % before, {after['busy_percent']:.0f} % after. The run took",
                    f"{raw['seconds']['all'] / 60:.1f} minutes.",
                ),
                (
                    f"A look at the clock costs {duration(machine['timer_cost'])}. That is part of every",
                    "percentile, and of medians from 2 µs on; smaller medians are those of batches, without it.",
                ),
                (
                    "Records have 0.5 kB as msgpack; with 1,000,000 of them 0.15 kB, since they must fit into",
                    "memory several times.",
                ),
                (
                    "Hosts run on one processor, with the servers that they start, readers on the others in turn."
                    if machine["pinned"]
                    else "Nothing is pinned: there is one processor.",
                ),
                (
                    "A figure has as many digits as the rounds it was measured in leave: three where they differ",
                    "by 1 % to each side, two up to 10 %, one and a tilde beyond.",
                ),
                (steadiness(raw),),
                (
                    "Trust the ratios between rows more than the figures. Rows saw the same machine, minutes",
                    "apart; the duels saw it within the same millisecond.",
                ),
            )
        ),
    ]


def steadiness(raw: dict) -> str:
    """Say how far the machine's own speed wandered, and whether others used it."""
    empty = sorted(cell["p50"] for cell in raw["cells"] if cell["operation"] == "empty" and cell["readers"] == 1)
    if not empty:
        return "How steady the machine was is not known."
    low, middle, high = (percentile(empty, share) for share in (0.1, 0.5, 0.9))
    said = (
        f"An empty C call, measured with every row, took {duration(middle)}, and of ten rows the quickest had "
        f"{duration(low)} and the slowest {duration(high)}."
    )
    busy = max(raw["machine"][key]["busy_percent"] for key in ("load_before", "load_after"))
    if busy > _BUSY:
        said += f" **The machine was in use** ({busy:.0f} %): rows do not compare."
    elif high > low * _WANDERING:
        said += " **The machine's speed wandered**: compare a row's figures with its own empty call."
    return said


def _averages(load: dict) -> str:
    return " ".join(map(str, load["averages"]))


def _medians(results: Results, notes: Footnotes, size: int) -> Iterator[str]:
    operations = (*READS, "sync") if size == results.sizes[0] else READS
    rows = [
        (results.label(name), *(results.shown(notes, name, size, operation) for operation in operations))
        for name in results.names
    ]
    yield from table(("", *(TITLES[operation] for operation in operations)), rows)


def _percentiles(results: Results, notes: Footnotes, size: int) -> Iterator[str]:
    rows = []
    for name in results.names:
        row = [results.label(name)]
        for writer in (False, True):
            row += [
                results.shown(notes, name, size, "hit", writer=writer, figure=figure)
                for figure in ("p50", "p99", "p999")
            ]
        cell = results.cell(name, size, "hit", writer=True)
        written = cell and cell.get("written_per_second")
        rows.append((*row, f"{written:,.0f} /s" if written else "–"))
    head = ("", "p50", "p99", "p99.9", "p50, writer", "p99, writer", "p99.9, writer", "changes made")
    yield from table(head, rows)


def _crowd(results: Results, notes: Footnotes, size: int) -> Iterator[str]:
    counts = sorted({cell["readers"] for cell in results.raw["cells"] if cell["readers"]})
    head = [""]
    for writer in ("", ", writer"):
        head += [f"{count} reader{'s' if count > 1 else ''}{writer}" for count in counts]
    yield "Checks a second that hit, of all readers together:"
    yield ""
    yield from table(head, _crowd_rows(results, notes, size, counts, "rate"))
    yield ""
    yield "p99 of a check that hits, of the reader with the worst:"
    yield ""
    yield from table(head, _crowd_rows(results, notes, size, counts, "p99"))


def _crowd_rows(
    results: Results, notes: Footnotes, size: int, counts: Sequence[int], figure: str
) -> Iterator[Sequence[str]]:
    for name in results.names:
        yield (
            results.label(name),
            *(
                results.shown(notes, name, size, "hit", count, writer=writer, figure=figure)
                for writer in (False, True)
                for count in counts
            ),
        )


def _duels(raw: dict, results: Results) -> Iterator[str]:
    yield (
        "shmelim and another in one process, in passes that alternate. *Quartiles* are those of the ratios of "
        "single rounds. What form, strings and spread mean is said in `bench/duels.py`."
    )
    yield ""
    head = (
        "what",
        "against",
        "records",
        "writer",
        "form, strings, spread",
        "shmelim",
        "other",
        "ratio",
        "quartiles",
    )
    rows = []
    for duel in raw["duels"]:
        against = duel["against"]
        variant = ", ".join(duel[key] for key in ("form", "strings", "spread") if key in duel)
        written = duel.get("written_per_second")
        rows.append(
            (
                duel["what"],
                results.label(against) if against in raw["peers"] else against,
                f"{duel['size']:,}",
                f"{written:,.0f} /s" if written else "no",
                variant or "–",
                duration(duel["ours"]),
                duration(duel["theirs"]),
                times(duel["ratio"]),
                f"{times(duel['low'])} to {times(duel['high'])}",
            )
        )
    yield from table(head, rows)


def around_a_check(raw: dict) -> list[str]:
    """Return a table of what importing the reader, being woken and waiting cost."""
    if not raw["around"]:
        return ["not measured"]
    importing, waking = raw["around"]["import"], raw["around"]["waking"]
    rows = [
        ("`from shmelim import EliminationReader`, more than bare Python: time", duration(importing["seconds"])),
        ("the same: memory", f"{importing['mb']:.1f} MB"),
        ("the same: modules", f"{importing['more_modules']:.0f}"),
        ("publish of one value to the waiter's next line, another process: median", duration(waking["p50"])),
        ("the same: p99", duration(waking["p99"])),
        ("a processor's share while waiting", f"{waking['cpu_while_waiting']:.2%}"),
        ("publish of one value for which nobody waits (`shmelim.table`)", duration(waking["put"])),
    ]
    return table(("what", ""), rows)


def _changes(raw: dict) -> Iterator[str]:
    yield (
        "In turns, each durable where it can be: shmelim with history, guard and debts, by a client over a Unix "
        "socket; BaseManager RPC over a socket, in memory; py-lmdb and SQLite in the process that asks. A sync is "
        "held against py-lmdb's put of all the records."
    )
    rows = [
        (
            row["what"],
            f"{int(size):,}",
            duration(row["p50"], row["spread"]),
            f"{duration(row['spread'][0])} to {duration(row['spread'][1])}",
            f"{times(row['ratio'])} {row['against']}",
        )
        for size, found in raw.get("changes", {}).items()
        for row in found
    ]
    yield ""
    yield from table(("what", "records", "median", "quartiles", "against"), rows)


def _contenders(raw: dict) -> Iterator[str]:
    for about in raw["peers"].values():
        if "missing" in about:
            yield f"- **{about['label']}**: missing, {about['missing']}"
        else:
            yield f"- **{about['label']}** ({about['version']}): {about['how']}. Limits: {about['limits']}."
