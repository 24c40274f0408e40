"""This package: a server process, readers by name, changes over a Unix socket."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
from typing import TYPE_CHECKING, ClassVar

from bench.peers.base import Host, Peer, Place, Reader, distribution
from bench.records import COMPACT_FROM

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    from shmelim.eliminations.serve import ServeOptions

READY_WITHIN = 60


def serve(options: ServeOptions, ready: Event) -> None:
    from shmelim.eliminations.serve import run

    logging.getLogger("shmelim").setLevel(logging.ERROR)  # what the guard says of a sync is meant here
    run(options, lambda _service: ready.set())


class ShmelimHost(Host):
    def __init__(self, place: Place, *, fill: bool = True) -> None:
        super().__init__(place)
        from shmelim import EliminationClient
        from shmelim.eliminations.serve import ServeOptions

        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        options = ServeOptions(
            place.name,
            state_dir=place.directory / "state",
            runtime_base=place.directory,
            # A million records on disk take minutes to load, and reads do not touch the store.
            in_memory=place.large,
            durability="power" if place.durable else "process",
            registry=None,
            replace_published=True,
        )
        self.process = context.Process(target=serve, args=(options, ready))
        self.process.start()
        if not ready.wait(READY_WITHIN):
            raise TimeoutError("the server did not become ready")
        self.client = EliminationClient(place.name, runtime_base=place.directory, timeout=600)
        if fill:
            self.sync(place.records())

    def put(self, record: dict) -> None:
        self.client.add_elimination(record["hotkey"], record)

    def sync(self, records: list[dict]) -> None:
        self.client.sync_eliminations(records)

    def close(self) -> None:
        from shmelim.shm import SharedNamespace

        self.client.close()
        self.process.terminate()
        self.process.join()
        SharedNamespace(self.place.name).remove()


class ShmelimReader(Reader):
    def __init__(self, place: Place, _facts: None) -> None:
        from shmelim import EliminationReader, shm

        wanted = "pure" if os.environ.get("SHMELIM_PURE") == "1" else "native"
        if getattr(shm, "READ_PATH", "pure") != wanted:
            raise RuntimeError(f"this process should read by the {wanted} path, and does not")
        self.reader = EliminationReader(place.name)
        self.check = self.reader.is_hotkey_eliminated
        self.get = self.reader.get_elimination
        self.check_many = self.reader.are_eliminated
        self.everything = self.reader.get_eliminations_from_memory


class Native(Peer):
    how = "`EliminationReader`, compiled read path; changes by `EliminationClient` over a Unix socket"
    limits = (
        "one writer, one host; every record stands in shared memory twice; changes cost far more than reads, and "
        "a sync also writes the history of every changed record and a JSON file before it returns"
    )
    durable = True
    environment: ClassVar = {"SHMELIM_PURE": "0"}
    host = ShmelimHost
    reader = ShmelimReader

    @classmethod
    def missing(cls) -> str | None:
        built = importlib.util.find_spec("shmelim.shm._native") is not None
        return None if built else "the compiled read path is not built"

    @classmethod
    def version(cls) -> str:
        return distribution("shmelim")


class Pure(Native):
    how = "the same with `SHMELIM_PURE=1`"
    environment: ClassVar = {"SHMELIM_PURE": "1"}

    @classmethod
    def missing(cls) -> str | None:
        return None

    @classmethod
    def too_much(cls, size: int, operation: str | None = None) -> str | None:
        if operation == "everything" and size >= COMPACT_FROM:
            return "takes many seconds a call in pure Python; `python -m bench.million` measures a snapshot"
        return None
