"""Takes the figures of a run over into README.md, between two comments.

python -m bench.readme bench/results/results.json
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from bench.operations import READS, TITLES
from bench.report import Footnotes, Results, table, verdict_lines

__all__ = ["BEGIN", "END", "figures", "rewrite"]

BEGIN = "<!-- figures: written by python -m bench.readme, do not edit -->"
END = "<!-- end of figures -->"
_SIZE = 256
_LARGE = 1_000_000


def rewrite(text: str, part: str) -> str:
    """Return a text with the part between the two comments replaced.

    Raises
    ------
    ValueError
        The comments are not there once each, in that order.

    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text must have {BEGIN!r} and {END!r} once each")
    before, _, rest = text.partition(BEGIN)
    if END not in rest:
        raise ValueError(f"{END!r} stands before {BEGIN!r}")
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{part.strip()}\n\n{END}{after}"


def figures(raw: dict, folder: str) -> str:
    """Return the README's part: the plot, one table, and where it was made."""
    results, notes = Results(raw), Footnotes()
    machine = raw["machine"]
    operations = (*READS, "sync")
    rows = []
    for name in results.names:
        row = [results.label(name)]
        row += [results.shown(notes, name, _SIZE, operation) for operation in operations]
        rows.append((*row, results.shown(notes, name, _LARGE, "hit")))
    judged = [verdict["met"] for verdict in raw["verdicts"] if verdict["met"] is not None]
    failed = [line.partition("  ")[2].strip() for line in verdict_lines(raw) if line.startswith("NOT MET")]
    alternative = "Median time of a check, by contender and number of records, on a logarithmic scale"
    full = f"{folder}/results.md"
    prose = (
        "Syncs of shmelim, py-lmdb and sqlite3 are atomic, and on disk when they return; the others' are not",
        "durable. The *dict*, the *5 s cache* and UltraDict return references to records, all others copies. A",
        "dict is not shared at all, and the cache is up to 5 seconds stale:",
        f"[what each does not do]({full}#contenders).",
    )
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, {machine['python']}; commit",
        f"`{machine['commit']}`, {machine['date'][:10]}. Percentiles up to p99.9, several readers, a writer with",
        f"1,000 changes a second, and all versions: [{full}]({full}). Made by `python -m bench`",
        "([how](bench/README.md)).",
    )
    count = f"Of {len(judged)} figures that were held against a target, {sum(judged)} met it."
    lines = [
        f"![{alternative}]({folder}/check.svg)",
        "",
        f"Medians of one run, one reader, {_SIZE} records of half a kilobyte (the last column: {_LARGE:,}):",
        "",
        *table(("", *(TITLES[operation] for operation in operations), f"check, hit, {_LARGE:,}"), rows),
        "",
        *notes.lines(),
        "",
        " ".join(prose),
        "",
        " ".join(where),
        "",
        count + (" These did not:" if failed else ""),
    ]
    lines += [""] * bool(failed) + [f"- {line}" for line in failed]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of a run")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="which file (default: %(default)s)")
    options = parser.parse_args()
    raw = json.loads(options.results.read_text(encoding="utf-8"))
    folder = os.path.relpath(options.results.parent, options.readme.resolve().parent)
    text = options.readme.read_text(encoding="utf-8")
    options.readme.write_text(rewrite(text, figures(raw, folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
