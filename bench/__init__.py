"""Benchmarks: the pytest-benchmark suite, and scripts for figures that it cannot give."""

import compileall
import multiprocessing
import sys
from pathlib import Path

import shmelim

if sys.dont_write_bytecode and multiprocessing.parent_process() is None:
    # As an installation has it: else every process that is started and timed compiles the package first.
    compileall.compile_dir(Path(shmelim.__file__).parent, quiet=2)
