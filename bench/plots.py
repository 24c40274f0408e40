"""Plots of a run, as SVG and PNG: readable on light and dark pages, for eyes that do not tell red from green."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from bench.report import Results
from bench.units import duration, per_second, times

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

# Okabe and Ito's colours, and a shape each, so that neither is needed alone.
_OURS = "#0072B2"
_OTHERS = "#666666"
_MARKS = (("o", "#56B4E9"), ("s", "#0072B2"), ("D", "#D55E00"))
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "shmelim",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": "#999999",
    "axes.axisbelow": True,
    "ytick.left": False,
    "figure.facecolor": "white",
}


def draw(raw: dict, output: Path) -> list[Path]:
    """Draw all plots into a directory and return the files."""
    results = Results(raw)
    written = []
    with mpl.rc_context(_STYLE):
        for name, make in (("check", _check), ("tail", _tail), ("readers", _readers), ("duels", _duels)):
            figure = make(results)
            if figure is None:
                continue
            for kind in ("svg", "png"):
                path = output / f"{name}.{kind}"
                # No date in the file: the same results give the same file.
                figure.savefig(
                    path, dpi=160, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None
                )
                written.append(path)
            plt.close(figure)
    return written


def _present(results: Results) -> list[str]:
    """Return those with any figure, quickest last, so that it stands at the top of a horizontal plot."""

    def middle(name: str) -> float:
        cells = (results.cell(name, size, "hit") for size in results.sizes)
        return min((cell["p50"] for cell in cells if cell), default=0.0)

    return sorted((name for name in results.names if middle(name)), key=middle, reverse=True)


def _rows(axes: Axes, results: Results, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [results.label(name) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    # None where the axes share the labels of their neighbour.
    for label, name in zip(axes.get_yticklabels(), names, strict=False):
        if name.startswith("shmelim"):
            label.set(color=_OURS, fontweight="bold")
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)


def _logarithmic_time(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _foot(figure: Figure, results: Results) -> None:
    machine = results.raw["machine"]
    figure.text(
        0.01,
        -0.02,
        ", ".join(
            (
                machine["cpu"],
                f"{machine['cores']} cores",
                machine["python"],
                machine["date"][:10],
                f"commit {machine['commit']}",
            )
        ),
        fontsize=7,
        color="#777777",
    )


def _check(results: Results) -> Figure | None:
    """The headline: what one check takes."""
    names = _present(results)
    if not names:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(names) + 1.4))
    for (marker, color), size in zip(_MARKS, results.sizes, strict=False):
        points = [
            (cell["p50"], row) for row, name in enumerate(names) if (cell := results.cell(name, size, "hit"))
        ]
        axes.scatter(
            *zip(*points, strict=True), marker=marker, s=46, color=color, label=f"{size:,} records", zorder=3
        )
    for row, name in enumerate(names):
        cells = [cell for size in results.sizes if (cell := results.cell(name, size, "hit"))]
        largest = max(cell["p50"] for cell in cells)
        text = f"  {duration(cells[0]['p50'])}"
        axes.annotate(text, (largest, row), xytext=(6, 0), textcoords="offset points", va="center", color=_OTHERS)
    _logarithmic_time(axes)
    _rows(axes, results, names)
    axes.set_xlim(right=axes.get_xlim()[1] * 4)
    axes.set_xlabel("median time of one check that hits (logarithmic); the figure is that of the smallest state")
    axes.set_title("Is this hotkey eliminated?", loc="left", fontweight="bold")
    axes.legend(loc="upper right", frameon=False)
    _foot(figure, results)
    return figure


def _tail(results: Results) -> Figure | None:
    """From the median to p99.9, without and with a writer, at the size in the middle."""
    size = results.sizes[min(1, len(results.sizes) - 1)]
    names = [name for name in _present(results) if results.cell(name, size, "hit")]
    if not names:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(11, 0.42 * len(names) + 1.4), sharex=True, sharey=True)
    for axes, writer in zip(panels, (False, True), strict=True):
        for row, name in enumerate(names):
            cell = results.cell(name, size, "hit", writer=writer)
            if cell is None:
                continue
            color = _OURS if name.startswith("shmelim") else _OTHERS
            known = [(cell[key], mark) for key, mark in (("p50", "o"), ("p99", "|"), ("p999", ">")) if cell[key]]
            axes.plot([known[0][0], known[-1][0]], [row, row], color=color, linewidth=1.5, zorder=2)
            for value, mark in known:
                axes.scatter(value, row, marker=mark, s=60 if mark == "|" else 30, color=color, zorder=3)
        _logarithmic_time(axes)
        _rows(axes, results, names)
        axes.set_title("a writer: 1,000 changes a second" if writer else "no writer", loc="left")
        axes.set_xlabel("time of one check: ● median, | p99, ▶ p99.9")
    figure.suptitle(f"Tails, {size:,} records", x=0.01, ha="left", fontweight="bold")
    figure.tight_layout()
    _foot(figure, results)
    return figure


def _readers(results: Results) -> Figure | None:
    """Checks a second of several readers."""
    size = results.sizes[min(1, len(results.sizes) - 1)]
    counts = sorted({cell["readers"] for cell in results.raw["cells"] if cell["readers"]})
    names = [name for name in _present(results)[::-1] if results.cell(name, size, "hit", counts[-1])]
    if not names or len(counts) < 2:
        return None
    figure, axes = plt.subplots(figsize=(8, 5))
    ends = []
    for name in names:
        rates = [results.cell(name, size, "hit", count)["rate"] for count in counts]
        ours = name.startswith("shmelim")
        axes.plot(counts, rates, marker="o", color=_OURS if ours else "#aaaaaa", linewidth=2.2 if ours else 1.2)
        ends.append((rates[-1], name))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: per_second(rate)))
    low = 0.0
    for rate, name in sorted(ends):
        # Labels keep a distance of a third of a factor, so that none covers another.
        low = max(rate, low * 1.38)
        color = _OURS if name.startswith("shmelim") else _OTHERS
        text = f"{results.label(name)}, {per_second(rate)}"
        axes.annotate(text, (counts[-1], low), xytext=(8, 0), textcoords="offset points", va="center", color=color)
    axes.set_xticks(counts)
    axes.set_xlabel(f"reader processes, on {results.raw['machine']['cores']} cores")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_title(f"Checks a second of all readers together, {size:,} records", loc="left", fontweight="bold")
    _foot(figure, results)
    return figure


def _duels(results: Results) -> Figure | None:
    """Ratios to dict, in whatever way it is asked."""
    found = [
        duel
        for duel in results.raw["duels"]
        if duel["what"] in {"check, hit", "check, miss"} and duel["against"] == "dict"
    ][::-1]
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.26 * len(found) + 1.4))
    for row, duel in enumerate(found):
        color = "#D55E00" if duel["ratio"] > 1 else _OURS
        axes.plot([duel["low"], duel["high"]], [row, row], color=color, linewidth=1.5)
        axes.scatter(duel["ratio"], row, color=color, s=26, zorder=3)
        axes.annotate(
            times(duel["ratio"]),
            (max(duel["high"], duel["ratio"]), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_OTHERS,
        )
    axes.axvline(1.0, color="#333333", linewidth=1)
    labels = [
        f"{duel['what'].partition(', ')[2]}, {duel['size']:,}, {duel['form']}, {duel['strings']}, {duel['spread']}"
        f"{', writer' if duel['writer'] else ''}"
        for duel in found
    ]
    axes.set_yticks(range(len(found)), labels, fontsize=8)
    axes.set_ylim(-0.7, len(found) - 0.3)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_xlabel(
        "time of a check, as a multiple of dict.__contains__ called the same way (quartiles of rounds)"
    )
    axes.set_title("shmelim against a dict", loc="left", fontweight="bold")
    _foot(figure, results)
    return figure
