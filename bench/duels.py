"""shmelim and something else, in one process and in turn: the figures that are held against a target.

Both are called the same way, over the same hotkeys, in short passes that alternate, so that both saw the same
machine. A pass includes its loop, which is measured too.

What is varied, since each can turn a comparison around:

*form*: ``bound`` calls what was looked up once, ``method`` looks the method up on its object at every call.

*strings*: ``equal`` passes strings that are equal to the dict's keys but other objects, as a request brings them,
though with their hash known to Python already (from the pass before); ``same`` passes the dict's own keys, so that
it compares nothing; ``fresh`` passes each string object once only, so that Python has to hash it, as for a string
that was just received.

*spread*: ``warm`` goes round 512 hotkeys, ``cold`` round 50,000, more than fit into the caches near a core.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import msgspec

from bench.measure import duel, duel_with_slow
from bench.operations import BATCH
from bench.peers import load
from bench.records import hits, misses, mixed

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    from bench.peers.base import Place, Reader

__all__ = ["Arena"]

_WARM = 512
_COLD = 50_000
_BATCHES = 8


def by_bound(check: Callable, hotkeys: list[str]) -> Callable[[], None]:
    def run() -> None:
        for hotkey in hotkeys:
            check(hotkey)

    return run


def by_reader_method(reader: Any, hotkeys: list[str]) -> Callable[[], None]:
    def run() -> None:
        for hotkey in hotkeys:
            reader.is_hotkey_eliminated(hotkey)

    return run


def by_dict_method(data: dict, hotkeys: list[str]) -> Callable[[], None]:
    def run() -> None:
        for hotkey in hotkeys:
            data.__contains__(hotkey)

    return run


def by_in(data: dict, hotkeys: list[str]) -> Callable[[], None]:
    def run() -> None:
        for hotkey in hotkeys:
            hotkey in data  # noqa: B015

    return run


def loop_alone(hotkeys: list[str]) -> Callable[[], None]:
    def run() -> None:
        for _hotkey in hotkeys:
            pass

    return run


class Fresh:
    """Gives string objects that no pass has seen, over and over: decoding them is not in the pass."""

    def __init__(self, hotkeys: list[str]) -> None:
        self.raw = [hotkey.encode() for hotkey in hotkeys]
        self.hotkeys: list[str] = []

    def renew(self) -> None:
        self.hotkeys[:] = [raw.decode() for raw in self.raw]


class Arena:
    """A reader of shmelim, a dict of the same records, and readers of others, in one process."""

    def __init__(self, place: Place, others: dict[str, tuple[Place, Any]], closing: contextlib.ExitStack) -> None:
        self.place = place
        self.mine = self._join(closing, "shmelim", place, None)
        self.reader = self.mine.reader
        self.data = self._join(closing, "dict", place, None).data
        self.own_keys = list(self.data)
        self.others = {name: self._join(closing, name, where, facts) for name, (where, facts) in others.items()}

    @staticmethod
    def _join(closing: contextlib.ExitStack, name: str, place: Place, facts: Any) -> Any:
        reader: Reader = load(name).reader(place, facts)
        closing.callback(reader.close)
        return reader

    def fight(self, seconds: float) -> list[dict]:
        """Fight all duels that need only readers, so many seconds each."""
        kinds = (self._checks, self._variations, self._batches, self._gets, self._others)
        return [result for kind in kinds for result in kind(seconds)]

    def fight_briefly(self, seconds: float) -> list[dict]:
        """Fight those of checks and batches with a dict."""
        return [*self._checks(seconds), *self._batches(seconds)]

    def _duel(
        self,
        ours: Callable,
        theirs: Callable,
        calls: int | tuple[int, int],
        seconds: float,
        before: Any = None,
        **about: Any,
    ) -> dict:
        return {"size": self.place.size, **about, **duel(ours, theirs, calls, seconds, before).as_dict()}

    def _keys(self, answer: str, count: int) -> list[str]:
        return (hits if answer == "hit" else misses)(self.place.size, count)

    def _checks(self, seconds: float) -> Iterator[dict]:
        for answer in ("hit", "miss"):
            keys = self._keys(answer, _WARM)
            about = {"what": f"check, {answer}", "against": "dict", "strings": "equal", "spread": "warm"}
            yield self._duel(
                by_bound(self.reader.is_hotkey_eliminated, keys),
                by_bound(self.data.__contains__, keys),
                _WARM,
                seconds,
                form="bound",
                **about,
            )
            yield self._duel(
                by_reader_method(self.reader, keys),
                by_dict_method(self.data, keys),
                _WARM,
                seconds,
                form="method",
                **about,
            )

    def _variations(self, seconds: float) -> Iterator[dict]:
        check, contains = self.reader.is_hotkey_eliminated, self.data.__contains__
        for answer in ("hit", "miss"):
            about = {"what": f"check, {answer}", "against": "dict", "form": "bound"}
            fresh = Fresh(self._keys(answer, _WARM))
            yield self._duel(
                by_bound(check, fresh.hotkeys),
                by_bound(contains, fresh.hotkeys),
                _WARM,
                seconds,
                before=fresh.renew,
                strings="fresh",
                spread="warm",
                **about,
            )
            if self.place.size >= 10_000:
                keys = self._keys(answer, _COLD)
                yield self._duel(
                    by_bound(check, keys),
                    by_bound(contains, keys),
                    _COLD,
                    seconds,
                    strings="equal",
                    spread="cold",
                    **about,
                )
        keys = self.own_keys[: _WARM if self.place.size > _WARM else None]
        about = {"what": "check, hit", "strings": "same", "spread": "warm", "form": "bound"}
        count = len(keys)
        yield self._duel(by_bound(check, keys), by_bound(contains, keys), count, seconds, against="dict", **about)
        about["strings"] = "equal"
        keys = self._keys("hit", _WARM)
        yield self._duel(
            by_bound(check, keys), by_in(self.data, keys), _WARM, seconds, against="`in` of a dict", **about
        )
        yield self._duel(
            by_bound(check, keys), loop_alone(keys), _WARM, seconds, against="the loop alone", **about
        )

    def _batches(self, seconds: float) -> Iterator[dict]:
        lists = [mixed(self.place.size, BATCH, seed) for seed in range(_BATCHES)]
        data, many = self.data, self.reader.are_eliminated

        def ours() -> None:
            for hotkeys in lists:
                many(hotkeys)

        def theirs() -> None:
            for hotkeys in lists:
                [h in data for h in hotkeys]

        yield self._duel(
            ours,
            theirs,
            _BATCHES,
            seconds,
            what=f"{BATCH} checks at once",
            against="list comprehension over a dict",
        )

    def _gets(self, seconds: float) -> Iterator[dict]:
        keys = hits(self.place.size, 64)
        packed = [self.reader.read(key, bytes) for key in keys]
        data, deepcopy = self.data, copy.deepcopy
        ours = by_bound(self.reader.get_elimination, keys)
        about = {"what": "get one record", "record_bytes": len(packed[0])}

        def copied() -> None:
            for key in keys:
                deepcopy(data[key])

        yield self._duel(
            ours,
            by_bound(msgspec.msgpack.decode, packed),
            64,
            seconds,
            against="msgspec.msgpack.decode of the same bytes",
            **about,
        )
        yield self._duel(ours, copied, 64, seconds, against="copy.deepcopy(d[hk])", **about)

    def _others(self, seconds: float) -> Iterator[dict]:
        check = self.reader.is_hotkey_eliminated
        for name, other in self.others.items():
            for answer in ("hit", "miss"):
                keys = self._keys(answer, _WARM)
                about = {"what": f"check, {answer}", "against": name}
                ours = by_bound(check, keys)
                if name == "lmdb":
                    yield self._duel(ours, by_bound(other.check, keys[:64]), (_WARM, 64), seconds, **about)
                else:
                    found = duel_with_slow(ours, _WARM, other.check, keys[:40], seconds)
                    yield {"size": self.place.size, **about, **found.as_dict()}

    def fight_lists(self, seconds: float) -> list[dict]:
        """Compare lists of all records with BaseManager RPC's."""
        return [
            self._duel(
                self.mine.everything,
                self.others["base-manager"].everything,
                1,
                seconds,
                what="all records",
                against="base-manager",
                record_bytes=len(self.reader.read(self.own_keys[0], bytes)),
            )
        ]

    def fight_manager(self, seconds: float) -> list[dict]:
        """Compare an `EliminationManager` in RPC mode with a reader of the same state."""
        from shmelim import EliminationManager, EliminationReader
        from shmelim.shm import SharedNamespace

        name = f"{self.place.name}m"
        base = self.place.directory / "manager"
        base.mkdir()
        options = {"name": name, "port": 0, "state_dir": base / "state", "runtime_base": base, "registry": None}
        manager = EliminationManager(
            None, None, None, durability="process", enable_health_check=False, start_method="spawn", **options
        )
        try:
            manager.sync_eliminations(self.place.records())
            reader = EliminationReader(name)
            return [
                self._duel(
                    by_reader_method(manager, keys),
                    by_reader_method(reader, keys),
                    _WARM,
                    seconds,
                    what=f"check, {answer}, by EliminationManager in RPC mode",
                    against="the reader",
                    form="method",
                )
                for answer, keys in (("hit", self._keys("hit", _WARM)), ("miss", self._keys("miss", _WARM)))
            ]
        finally:
            manager.shutdown()
            SharedNamespace(name).remove()
