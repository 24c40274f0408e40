"""The tables, verdicts and README part that the benchmark makes of its results."""

from __future__ import annotations

import json

import pytest

from bench.operations import READS
from bench.peers import LABELS, NAMES
from bench.readme import BEGIN, END, figures, rewrite
from bench.report import Footnotes, Results, document, steadiness, table, verdict_lines
from bench.verdicts import verdicts


def a_cell(peer, size, operation, readers=1, writer=False, **figures):
    found = {"p50": 60e-9, "p99": 90e-9, "p999": None, "calls": 500, "rate": 1.5e7, "batched": True}
    spread = {key: value and (value, value) for key, value in found.items() if key[0] in "pr"}
    return {
        "peer": peer,
        "size": size,
        "operation": operation,
        "readers": readers,
        "writer": writer,
        **found,
        "spread": spread,
        **figures,
    }


def a_change(what, ratio, seconds=1e-3):
    return {"what": what, "p50": seconds, "spread": (seconds, seconds), "against": "lmdb put", "ratio": ratio}


def a_duel(what, against, ratio, **about):
    found = {"size": 256, "writer": False, "ours": ratio * 1e-7, "theirs": 1e-7, "low": ratio, "high": ratio}
    return {"what": what, "against": against, "ratio": ratio, "rounds": 9, **found, **about}


def a_check(ratio, answer="hit", form="bound", **about):
    about = {"strings": "equal", "spread": "warm", "form": form, **about}
    return a_duel(f"check, {answer}", "dict", ratio, **about)


@pytest.fixture
def results():
    load = {"averages": [0.1, 0.2, 0.3], "busy_percent": 3.0}
    raw = {
        "machine": {
            "date": "2026-01-02T03:04:05+00:00",
            "commit": "abc",
            "python": "CPython 3.11",
            "compiler": "GCC",
            "kernel": "Linux 6",
            "architecture": "x86_64",
            "cpu": "A | processor",
            "cores": 2,
            "memory_gb": 24.0,
            "virtual": True,
            "packages": {"shmelim": "1", "matplotlib": None},
            "timer_cost": 50e-9,
            "pinned": True,
            "load_before": load,
            "load_after": load,
        },
        "plan": {},
        "peers": {
            "shmelim": {"label": "shmelim", "version": "1", "how": "so", "limits": "none"},
            "redis": {"label": "Redis", "missing": "not installed: redis"},
            "cache": {"label": "5 s cache", "version": "1", "how": "so", "limits": "stale"},
        },
        "cells": [a_cell("shmelim", size, operation) for size in (256, 1_000_000) for operation in READS]
        + [a_cell("shmelim", 256, "hit", 2), a_cell("cache", 256, "hit")]
        + [a_cell("shmelim", 256, "hit", writer=True, written_per_second=998.6)],
        "duels": [a_check(0.8)],
        "scaling": [],
        "around": {
            "import": {"modules": 60, "more_modules": 70, "mb": 6.3, "seconds": 0.05},
            "waking": {"p50": 30e-6, "p99": 90e-6, "publishes": 1000, "cpu_while_waiting": 0.0003, "put": 4e-6},
        },
        "changes": {"100": [a_change("sync, all changed", 3.0), a_change("sync, 14 changed", 1.9)]},
        "skipped": [
            {"peer": "cache", "size": 1_000_000, "why": "takes too long"},
            {"peer": "cache", "size": 256, "operation": "get", "why": "host: Traceback:\n  File\nOSError: no"},
        ],
        "seconds": {"all": 61.0},
    }
    raw["verdicts"] = verdicts(raw)
    return raw


def by_claim(results, beginning):
    (found,) = [verdict for verdict in verdicts(results) if verdict["claim"].startswith(beginning)]
    return found


# ---------------------------------------------------------------- verdicts


def test_the_worse_of_both_forms_decides(results):
    results["duels"] = [a_check(0.7), a_check(1.01, form="method")]
    verdict = by_claim(results, "check, hit, 256 records, no writer")
    assert verdict["met"] is False
    assert verdict["value"] == 1.01
    assert "bound 0.70 ×" in verdict["shown"]
    assert "method 1.01 ×" in verdict["shown"]


def test_exactly_the_target_meets_it(results):
    results["duels"] = [a_check(1.0)]
    assert by_claim(results, "check, hit, 256 records, no writer")["met"] is True


def test_other_strings_sizes_and_writers_do_not_count(results):
    results["duels"] = [a_check(9, strings="same"), a_check(9, spread="cold"), a_check(9, size=10_000)]
    verdict = by_claim(results, "check, hit, 256 records, no writer")
    assert verdict["met"] is None
    assert verdict["shown"] == "not measured"


def test_a_writer_has_a_target_of_its_own_and_its_rate_is_said(results):
    results["duels"] = [a_check(1.15, writer=True, written_per_second=998.6)]
    verdict = by_claim(results, "check, hit, 256 records, a writer at 999/s")
    assert verdict["met"] is True


def test_against_others_the_least_factor_decides(results):
    results["duels"] = [a_duel("check, hit", "lmdb", 0.05), a_duel("check, miss", "lmdb", 0.125)]
    verdict = by_claim(results, "check, faster than a py-lmdb")
    assert verdict["value"] == 8.0
    assert verdict["met"] is False


def test_each_kind_of_record_is_judged_in_lists(results):
    results["duels"] = [
        a_duel("all records", "base-manager", ratio, record_bytes=n) for ratio, n in ((0.5, 500), (0.005, 100))
    ]
    found = [verdict for verdict in verdicts(results) if "from_memory" in verdict["claim"]]
    assert [verdict["met"] for verdict in found] == [False, True]


def test_scaling_is_the_median_of_its_rounds(results):
    results["scaling"] = [{"size": 256, "alone": 10, "together": together} for together in (19, 10, 20)]
    verdict = by_claim(results, "two readers together against one, 256")
    assert verdict["value"] == 1.9
    assert verdict["met"] is True


def test_the_manager_is_judged_in_nanoseconds_more(results):
    what = "check, miss, by EliminationManager in RPC mode"
    results["duels"] = [a_duel(what, "the reader", 1, ours=100e-9, theirs=69e-9)]
    verdict = by_claim(results, what)
    assert verdict["value"] == pytest.approx(31)
    assert verdict["met"] is False


def test_changes_are_judged_by_their_ratio_or_their_time(results):
    assert by_claim(results, "sync, all changed, 100")["met"] is True
    assert by_claim(results, "sync, 14 changed, 100")["met"] is False
    assert by_claim(results, "sync, 14 changed, 10,000")["met"] is None
    results["changes"]["200000"] = [a_change("start after SIGKILL", 9.0, seconds=1.3)]
    assert by_claim(results, "start after SIGKILL")["met"] is False
    assert by_claim(results, "worst add during a sync")["met"] is None


def test_what_is_around_a_check_is_judged(results):
    results["around"]["waking"] |= {"p50": 151e-6, "put": 5e-6}
    assert by_claim(results, "import of the reader")["met"] is True
    assert by_claim(results, "publish to the next line")["met"] is False
    assert by_claim(results, "publish of one value")["met"] is True


def test_nothing_measured_is_nothing_met(results):
    results["duels"], results["changes"] = [], {}
    around = {"import of the reader", "publish to the next line", "publish of one value"}
    left = [each for each in verdicts(results) if not each["claim"].startswith(tuple(around))]
    assert {verdict["met"] for verdict in left} == {None}


# ---------------------------------------------------------------- tables


def test_a_table_escapes_what_would_end_a_cell():
    assert table(("a", "b"), [("x|y", "1")]) == ["| a | b |", "|---|---:|", "| x\\|y | 1 |"]


def test_the_same_reason_has_the_same_number():
    notes = Footnotes()
    assert [notes.mark(text) for text in ("a b", "c", "a\n  b")] == [
        "<sup>1</sup>",
        "<sup>2</sup>",
        "<sup>1</sup>",
    ]
    assert notes.lines() == ["1. a b", "2. c"]


def test_nothing_is_skipped_silently(results):
    found, notes = Results(results), Footnotes()
    assert found.shown(notes, "shmelim", 256, "hit") == "60 ns"
    assert found.shown(notes, "shmelim", 256, "hit", figure="rate") == "15 M/s"
    assert found.shown(notes, "shmelim", 256, "hit", figure="p999") == "–<sup>1</sup>"
    assert found.shown(notes, "redis", 256, "hit") == "missing<sup>2</sup>"
    assert found.shown(notes, "cache", 1_000_000, "hit") == "skipped<sup>3</sup>"
    assert found.shown(notes, "cache", 256, "get") == "skipped<sup>4</sup>"
    assert found.shown(notes, "cache", 256, "miss") == "skipped<sup>5</sup>"
    reasons = [line.partition(" ")[2] for line in notes.lines()][1:]
    assert reasons == ["not installed: redis", "takes too long", "OSError: no", "not part of this run"]


def test_a_figure_has_no_digit_of_noise(results):
    for cell in results["cells"]:
        cell["spread"]["p50"] = (50e-9, 75e-9)
    assert Results(results).shown(Footnotes(), "shmelim", 256, "hit") == "~60 ns"
    assert "| shmelim | ~60 ns |" in document(results)


@pytest.mark.parametrize(
    ("busy", "slowest", "said"),
    [
        (5.0, 60e-9, "took 60 ns, and of ten"),
        (5.0, 90e-9, "speed wandered"),
        (11.0, 90e-9, "**The machine was in use** (11 %)"),
    ],
)
def test_how_steady_the_machine_was_is_said(results, busy, slowest, said):
    results["machine"]["load_after"] = {"averages": [1, 1, 1], "busy_percent": busy}
    next(cell for cell in results["cells"] if cell["operation"] == "empty")["p50"] = slowest
    assert said in document(results)
    assert ("**" in steadiness(results)) is (said != "took 60 ns, and of ten")


def test_the_document_has_a_row_for_everyone_and_says_what_they_do_not_do(results):
    text = document(results)
    rows = [line for line in text.splitlines() if line.startswith("| Redis |")]
    assert len(rows) == 2 * len(Results(results).sizes) + 2 * len(Results(results).sizes)
    assert all(cell.strip().startswith("missing") or "–" in cell for row in rows for cell in row.split("|")[2:-1])
    assert "**5 s cache** (1): so. Limits: stale." in text
    assert "999 /s" in text
    assert "a virtual machine" in text
    assert "None" not in text


def test_all_tables_have_as_many_cells_as_their_head(results):
    width = None
    for line in document(results).splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = line.replace("\\|", "").count("|")
        width = width or cells
        assert cells == width, line


def test_results_survive_json(results):
    assert document(json.loads(json.dumps(results))) == document(results)


def test_verdict_lines_name_what_is_not_met(results):
    results["verdicts"] = [{"claim": "c", "target": "≤ 1", "value": 2, "met": False, "shown": "2"}]
    assert verdict_lines(results) == ["NOT MET  c: 2, target ≤ 1"]


# ---------------------------------------------------------------- README


def test_rewriting_touches_nothing_but_the_part():
    text = f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    assert rewrite(text, "new\n") == f"before\n\n{BEGIN}\n\nnew\n\n{END}\n\nafter\n"


def test_rewriting_twice_is_rewriting_once():
    once = rewrite(f"{BEGIN}{END}", "new")
    assert rewrite(once, "new") == once


@pytest.mark.parametrize("text", ["", BEGIN, END, END + BEGIN, BEGIN + BEGIN + END, BEGIN + END + END])
def test_rewriting_refuses_a_text_without_its_place(text):
    with pytest.raises(ValueError, match="figures"):
        rewrite(text, "new")


def test_the_readme_has_a_place_for_the_figures(pytestconfig):
    text = (pytestconfig.rootpath / "README.md").read_text(encoding="utf-8")
    assert rewrite(text, "new")


def test_the_part_names_what_was_not_met(results):
    results["verdicts"] = [
        {"claim": "c", "target": "≤ 1", "value": 2, "met": False, "shown": "2"},
        {"claim": "d", "target": "≤ 1", "value": 1, "met": True, "shown": "1"},
        {"claim": "e", "target": "≤ 1", "value": None, "met": None, "shown": "not measured"},
    ]
    part = figures(results, "bench/results")
    assert "Of 2 figures that were held against a target, 1 met it. These did not:" in part
    assert "- c: 2, target ≤ 1" in part
    assert "bench/results/check.svg" in part
    assert "| Redis | missing<sup>" in part


def test_every_contender_has_a_label():
    assert set(LABELS) == set(NAMES)
