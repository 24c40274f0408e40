"""Everything that is compared, one module each, in the order in which tables show them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.peers.base import Peer

__all__ = ["LABELS", "NAMES", "load"]

_MODULES = {
    "shmelim": ("shmelim_", "Native", "shmelim"),
    "shmelim-pure": ("shmelim_", "Pure", "shmelim, pure Python"),
    "dict": ("local", "LocalDict", "dict"),
    "cache": ("cache", "Cache", "5 s cache"),
    "ultradict": ("ultradict", "UltraDictPeer", "UltraDict"),
    "iceoryx2": ("iceoryx", "Blackboard", "iceoryx2 blackboard"),
    "lmdb": ("lmdb_", "Lmdb", "py-lmdb"),
    "sqlite3": ("sqlite", "Sqlite", "sqlite3"),
    "memcached": ("memcached", "Memcached", "memcached"),
    "redis": ("redis_", "Redis", "Redis"),
    "manager-dict": ("manager_dict", "ManagerDict", "Manager dict"),
    "base-manager": ("base_manager", "BaseManagerRpc", "BaseManager RPC"),
}

NAMES = tuple(_MODULES)
LABELS = {name: label for name, (_, _, label) in _MODULES.items()}


def load(name: str) -> type[Peer]:
    """Return a peer's class; what it needs is imported only here.

    Raises
    ------
    ImportError
        It is not installed.

    """
    module, cls, _ = _MODULES[name]
    return getattr(importlib.import_module(f"bench.peers.{module}"), cls)
