"""Benchmarks: the pytest-benchmark suite, and scripts for figures that it cannot give."""
