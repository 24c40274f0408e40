"""Everything that is compared, behind one face: the operations of the field, each done the way its users do it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from pathlib import Path

from bench.peers.base_manager import RpcManager
from bench.peers.shmelim_ import serve
from shmelim import EliminationClient
from shmelim.eliminations.serve import ServeOptions
from shmelim.shm import SharedNamespace


class InProcessDict:
    """A dict of this process: no sharing, no durability. The floor."""

    label = "dict"

    def __init__(self) -> None:
        self.data: dict[str, dict] = {}
        self.check = self.data.__contains__

    def get(self, hotkey):
        return self.data.get(hotkey)

    def check_many(self, hotkeys):
        data = self.data
        return [hotkey in data for hotkey in hotkeys]

    def everything(self):
        return list(self.data.values())

    def add(self, hotkey, record):
        self.data[hotkey] = record

    def sync(self, records):
        self.data.clear()
        self.data.update({record["hotkey"]: record for record in records})

    def close(self):
        pass


class ManagerDict(InProcessDict):
    """`multiprocessing.Manager().dict()`: every operation is a call to the manager process. Nothing is durable."""

    label = "Manager dict"

    def __init__(self) -> None:
        self.manager = multiprocessing.get_context("spawn").Manager()
        self.data = self.manager.dict()
        self.check = self.data.__contains__

    def close(self):
        self.manager.shutdown()


class BaseManagerRpc:
    """One BaseManager server over loopback TCP, as validators run it today. Nothing is durable."""

    label = "BaseManager RPC"

    def __init__(self) -> None:
        self.manager = RpcManager(
            address=("127.0.0.1", 0), authkey=os.urandom(32), ctx=multiprocessing.get_context("spawn")
        )
        self.manager.start()
        self.proxy = self.manager.target()
        self.check = self.proxy.check_rpc
        self.get = self.proxy.get_rpc
        self.everything = self.proxy.everything_rpc
        self.add = self.proxy.add_rpc
        self.sync = self.proxy.sync_rpc

    def check_many(self, hotkeys):
        """One call for the set of all, which is what today's callers do for many checks."""
        eliminated = self.proxy.hotkeys_rpc()
        return [hotkey in eliminated for hotkey in hotkeys]

    def close(self):
        self.manager.shutdown()


class Shmelim:
    """This package: reads from shared memory, changes over a Unix socket, each durable before it returns."""

    label = "shmelim"

    def __init__(self) -> None:
        self._closing = contextlib.ExitStack()
        base = Path(self._closing.enter_context(tempfile.TemporaryDirectory()))
        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        options = ServeOptions(
            f"bench-{os.getpid()}",
            state_dir=base / "state",
            runtime_base=base,
            registry=None,
            replace_published=True,
        )
        self.process = context.Process(target=serve, args=(options, ready))
        self.process.start()
        if not ready.wait(30):
            raise TimeoutError("the server did not become ready")
        self.client = EliminationClient(options.name, runtime_base=base, timeout=60)
        self._closing.callback(SharedNamespace(options.name).remove)
        self.check = self.client.is_hotkey_eliminated
        self.get = self.client.get_elimination
        self.check_many = self.client.are_eliminated
        self.everything = self.client.get_eliminations_from_memory
        self.add = self.client.add_elimination
        self.sync = self.client.sync_eliminations

    def close(self):
        self.client.close()
        self.process.terminate()
        self.process.join()
        self._closing.close()


CONTENDERS = (Shmelim, InProcessDict, ManagerDict, BaseManagerRpc)
