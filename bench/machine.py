"""What a run must say of where it ran."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil

from bench.measure import timer_cost

__all__ = ["describe", "load"]

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("shmelim", "numpy", "msgspec", "xxhash", "matplotlib")


def describe() -> dict:
    """Return machine, kernel, interpreter, versions, commit and date."""
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": _git("describe", "--always", "--dirty", "--abbrev=12"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiler": platform.python_compiler(),
        "kernel": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "virtual": _hypervisor(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "timer_cost": timer_cost(),
    }


def load() -> dict:
    """Return how busy the machine is: load averages, and the share of processors in use during half a second."""
    return {
        "averages": [round(average, 2) for average in os.getloadavg()],
        "busy_percent": psutil.cpu_percent(interval=0.5),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _hypervisor() -> bool:
    return any(line.startswith("flags") and "hypervisor" in line.split() for line in _lines("/proc/cpuinfo"))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
