"""Turns the JSON of a pytest-benchmark run into the Markdown table of the README.

python -m pytest bench --benchmark-json=/tmp/bench.json
python -m bench.table /tmp/bench.json
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

COLUMNS = ("shmelim", "dict", "Manager dict", "BaseManager RPC")


def figure(seconds: float) -> str:
    """Three significant digits with the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{float(f'{seconds / size:.3g}'):g} {unit}"
    return f"{float(f'{seconds / 1e-9:.3g}'):g} ns"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    rows: dict[str, dict[str, float]] = {}
    for benchmark in results["benchmarks"]:
        contender = re.search(r"\[(.*)-\d+\]$", benchmark["name"])[1]
        rows.setdefault(benchmark["group"], {})[contender] = benchmark["stats"]["median"]
    print("| median of one run | " + " | ".join(COLUMNS) + " |")
    print("|---|" + "---:|" * len(COLUMNS))
    for group, medians in rows.items():
        cells = [figure(medians[column]) if column in medians else "not run" for column in COLUMNS]
        print(f"| {group} | " + " | ".join(cells) + " |")
    machine = results["machine_info"]
    print(
        f"\nPython {machine['python_version']}, {machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores, ",
        end="",
    )
    print(f"{machine['system']} {machine['release']}.")


if __name__ == "__main__":
    main()
