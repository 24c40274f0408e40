"""The figures that shmelim must show, each held against its target."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from bench.operations import BATCH
from bench.units import duration, times

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Verdict", "verdicts"]

SIZES = (256, 10_000, 1_000_000)
OTHERS = {
    "lmdb": ("a py-lmdb read transaction", 10.0),
    "base-manager": ("BaseManager RPC", 500.0),
    "redis": ("Redis", 300.0),
}
CHANGES = (
    ("100", "add", 1.4),
    ("100", "append", 1.15),
    ("100", "sync, all changed", 3.2),
    ("100", "sync, 14 changed", 1.8),
    ("10000", "sync, all changed", 4.5),
    ("10000", "sync, 14 changed", 0.9),
    ("10000", "sync, none changed", 0.4),
)
"""Records, what changes, and at most how many times what the peer takes."""
WORST_ADD = "worst add during a sync, 14 changed"
SECONDS = (
    ("200000", WORST_ADD, 0.08),
    ("200000", "start after SIGKILL", 1.2),
)


@dataclass(frozen=True)
class Verdict:
    """One figure and its target.

    Attributes
    ----------
    claim
        What must be so.
    target
        The bound, as text.
    value
        What was measured: a ratio, or nanoseconds; None if it was not.
    met
        None if it was not measured.
    shown
        The value as text, with what it was made of.

    """

    claim: str
    target: str
    value: float | None
    met: bool | None
    shown: str


def verdicts(results: dict) -> list[dict]:
    """Judge a run."""
    duels = results["duels"]
    kinds = (_checks(duels), _others(duels), _batches(duels), _gets(duels), _lists(duels))
    judged = [verdict for kind in kinds for verdict in kind]
    judged += [*_scaling(results["scaling"]), *_manager(duels)]
    return [asdict(verdict) for verdict in [*judged, *_around(results["around"]), *_changes(results["changes"])]]


def _select(duels: Iterable[dict], **wanted: object) -> list[dict]:
    return [duel for duel in duels if all(duel.get(key) == value for key, value in wanted.items())]


def _at_most(claim: str, bound: float, duels: list[dict], shown: str = "") -> Verdict:
    if not duels:
        return Verdict(claim, f"≤ {times(bound)}", None, None, "not measured")
    value = max(duel["ratio"] for duel in duels)
    return Verdict(claim, f"≤ {times(bound)}", value, value <= bound, shown or _both(duels[0]))


def _both(duel: dict) -> str:
    return f"{times(duel['ratio'])} ({duration(duel['ours'])} to {duration(duel['theirs'])})"


def _checks(duels: list[dict]) -> Iterator[Verdict]:
    for writer, bound in ((False, 1.0), (True, 1.2)):
        for size in SIZES:
            for answer in ("hit", "miss"):
                found = _select(
                    duels,
                    what=f"check, {answer}",
                    against="dict",
                    size=size,
                    writer=writer,
                    strings="equal",
                    spread="warm",
                )
                shown = "; ".join(f"{duel['form']} {_both(duel)}" for duel in found)
                written = next((duel.get("written_per_second") for duel in found), None)
                rate = "no writer" if not writer else "a writer" + (f" at {written:,.0f}/s" if written else "")
                yield _at_most(f"check, {answer}, {size:,} records, {rate}: against dict", bound, found, shown)


def _others(duels: list[dict]) -> Iterator[Verdict]:
    for name, (label, bound) in OTHERS.items():
        found = [duel for duel in _select(duels, against=name) if duel["what"].startswith("check")]
        claim = f"check, faster than {label} (the least of all sizes, hit and miss)"
        target = f"≥ {times(bound)}"
        if not found:
            yield Verdict(claim, target, None, None, "not measured")
            continue
        least = max(found, key=lambda duel: duel["ratio"])
        value = 1 / least["ratio"]
        made = f"{duration(least['theirs'])} to {duration(least['ours'])}; {least['what']}, {least['size']:,}"
        yield Verdict(claim, target, value, value >= bound, f"{times(value)} ({made})")


def _batches(duels: list[dict]) -> Iterator[Verdict]:
    for size in SIZES:
        found = _select(duels, what=f"{BATCH} checks at once", size=size, writer=False)
        yield _at_most(f"are_eliminated({BATCH}), {size:,} records: against [h in d for h in hotkeys]", 0.5, found)


def _gets(duels: list[dict]) -> Iterator[Verdict]:
    for size in SIZES:
        for against, bound in (("msgspec.msgpack.decode of the same bytes", 1.3), ("copy.deepcopy(d[hk])", 1.0)):
            found = _select(duels, what="get one record", against=against, size=size, writer=False)
            of = f" of {found[0]['record_bytes']} bytes" if found else ""
            yield _at_most(f"get_elimination, {size:,} records{of}: against {against}", bound, found)


def _lists(duels: list[dict]) -> Iterator[Verdict]:
    claim, bound = "get_eliminations_from_memory of 256, faster than BaseManager RPC over TCP", 100.0
    found = _select(duels, what="all records", against="base-manager", size=256)
    if not found:
        yield Verdict(claim, f"≥ {times(bound)}", None, None, "not measured")
    for duel in found:
        value = 1 / duel["ratio"]
        shown = f"{times(value)} ({duration(duel['theirs'])} to {duration(duel['ours'])})"
        of = f"{claim}, records of {duel['record_bytes']} bytes"
        yield Verdict(of, f"≥ {times(bound)}", value, value >= bound, shown)


def _scaling(rounds: list[dict]) -> Iterator[Verdict]:
    bound = 1.8
    for size in SIZES:
        ratios = [entry["together"] / entry["alone"] for entry in rounds if entry["size"] == size]
        claim = f"two readers together against one, {size:,} records"
        if not ratios:
            yield Verdict(claim, f"≥ {times(bound)}", None, None, "not measured")
            continue
        value = statistics.median(ratios)
        shown = f"{times(value)} (median of {len(ratios)} rounds, {times(min(ratios))} to {times(max(ratios))})"
        yield Verdict(claim, f"≥ {times(bound)}", value, value >= bound, shown)


def _manager(duels: list[dict]) -> Iterator[Verdict]:
    bound = 30.0
    for answer in ("hit", "miss"):
        claim = f"check, {answer}, by EliminationManager in RPC mode: more than the reader"
        found = _select(duels, what=f"check, {answer}, by EliminationManager in RPC mode")
        if not found:
            yield Verdict(claim, f"≤ {bound:.0f} ns", None, None, "not measured")
            continue
        value = (found[0]["ours"] - found[0]["theirs"]) * 1e9
        yield Verdict(claim, f"≤ {bound:.0f} ns", value, value <= bound, f"{value:.1f} ns")


def _around(around: dict) -> Iterator[Verdict]:
    if not around:
        return
    importing, waking = around["import"], around["waking"]
    mb, late, put = importing["mb"], waking["p50"], waking["put"]
    yield Verdict("import of the reader, more than bare Python", "≤ 9 MB", mb, mb <= 9, f"{mb:.1f} MB")
    claim = "publish to the next line of who waits, median"
    yield Verdict(claim, "≤ 150 µs", late * 1e9, late <= 150e-6, duration(late))
    yield Verdict("publish of one value, the table alone", "≤ 5 µs", put * 1e9, put <= 5e-6, duration(put))


def _changes(changes: dict) -> Iterator[Verdict]:
    for size, what, bound in CHANGES:
        row = _row(changes, size, what)
        claim = f"{what}, {int(size):,} records" + (f": against {row['against']}" if row else "")
        if row is None:
            yield Verdict(claim, f"≤ {times(bound)}", None, None, "not measured")
        else:
            shown = f"{times(row['ratio'])} ({duration(row['p50'], row['spread'])})"
            yield Verdict(claim, f"≤ {times(bound)}", row["ratio"], row["ratio"] <= bound, shown)
    for size, what, bound in SECONDS:
        row, claim = _row(changes, size, what), f"{what}, {int(size):,} records"
        if row is None:
            yield Verdict(claim, f"≤ {duration(bound)}", None, None, "not measured")
        else:
            met = row["p50"] <= bound
            yield Verdict(claim, f"≤ {duration(bound)}", row["p50"] * 1e9, met, duration(row["p50"]))


def _row(changes: dict, size: str, what: str) -> dict | None:
    return next((row for row in changes.get(size, ()) if row["what"] == what), None)
