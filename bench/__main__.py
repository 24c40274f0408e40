"""Compare shmelim with everything that could be used instead, in one run and on the same data.

Writes results.json, results.md and plots. Starts its own servers, on Unix sockets and loopback, and leaves none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import signal
import sys
import time
from pathlib import Path

from bench import plan
from bench.peers import NAMES
from bench.report import document, verdict_lines
from bench.run import Run

_EPILOG = """
contenders: {names}

examples:
  python -m bench                                    # everything, about 15 minutes on two cores
  python -m bench --quick --output /tmp/results      # to try it, under a minute: its figures mean little
  python -m bench --only shmelim,dict,lmdb --sizes 256,10000
  python -m bench --render                           # table and plots again, from results.json
  python -m bench.readme bench/results/results.json  # take the table over into README.md
"""


def main() -> None:
    options = _options()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    if not options.render:
        # What ends the run ends its processes too, by way of the context managers that started them.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        logging.getLogger("shmelim").setLevel(logging.ERROR)
        began = time.monotonic()

        def say(what: str) -> None:
            print(f"[{time.monotonic() - began:5.0f} s] {what}", flush=True)

        try:
            results = Run(_plan(options), options.only, say).run()
        except KeyboardInterrupt:
            sys.exit("interrupted: nothing was written")
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(path.read_text(encoding="utf-8"))
    (output / "results.md").write_text(document(results), encoding="utf-8")
    written = [path, output / "results.md"]
    try:
        from bench.plots import draw
    except ImportError as error:
        print(f"no plots: {error.name} is not installed (pip install 'shmelim[bench]')")
    else:
        written += draw(results, output)
    print("\n" + "\n".join(verdict_lines(results)))
    print("\nwritten: " + ", ".join(str(each) for each in written))
    if results.get("failed"):
        sys.exit("failed: " + ", ".join(failed["part"] for failed in results["failed"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=_EPILOG.format(names=", ".join(NAMES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="short samples of 256 records, up to two readers")
    parser.add_argument(
        "--only",
        type=_names,
        default=NAMES,
        metavar="NAME,…",
        help="these contenders; shmelim is always among them",
    )
    parser.add_argument(
        "--sizes", type=_sizes, metavar="N,…", help="numbers of records (default: 256,10000,1000000)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench/results"),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )
    parser.add_argument("--render", action="store_true", help="measure nothing: write table and plots again")
    return parser.parse_args()


def _names(text: str) -> tuple[str, ...]:
    wanted = {name.strip() for name in text.split(",")}
    if unknown := wanted - set(NAMES):
        raise argparse.ArgumentTypeError(f"no such contender: {', '.join(sorted(unknown))}")
    return tuple(name for name in NAMES if name in wanted | {"shmelim"})


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({int(size.replace("_", "")) for size in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a list of numbers: {text}") from None
    if not sizes or sizes[0] < 128:
        raise argparse.ArgumentTypeError("at least 128 records are needed")
    return sizes


def _plan(options: argparse.Namespace) -> plan.Plan:
    chosen = plan.quick if options.quick else plan.full
    return dataclasses.replace(chosen, sizes=options.sizes) if options.sizes else chosen


if __name__ == "__main__":
    main()
