"""Server programs of others, each on a private Unix socket and ended by whoever started it."""

from __future__ import annotations

import socket
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["start", "stop"]

READY_WITHIN = 15


def start(command: list[str], path: Path) -> subprocess.Popen:
    """Start a server and return once its socket takes connections."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + READY_WITHIN
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                return process
        if process.poll() is not None:
            raise RuntimeError(f"{command[0]} ended at once, with exit code {process.returncode}")
        if time.monotonic() > deadline:
            stop(process)
            raise TimeoutError(f"{command[0]} did not become ready")
        time.sleep(0.02)


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
