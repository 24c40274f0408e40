"""Many readers while the state is replaced again and again, and while its writer is killed again and again."""

import functools
import itertools
import random
import threading
import time
from contextlib import ExitStack

import crashing
import pytest
from crashing import Child, Counter
from serving import row, stamp_of
from waiting import PATIENCE

from shmelim import EliminationReader
from shmelim.errors import NotServingError, OutcomeUnknownError

READERS = 4


@pytest.fixture
def longer(monkeypatch):
    """For the full sizes: children may run for longer."""
    monkeypatch.setattr(crashing, "WATCHDOG", 900)


# ---------------------------------------------------------------------- a sync of everything


def _read_everything(name, hotkeys, stop, overlapped):
    """Look in every way, as fast as possible; return counts, and say when a publish has overlapped a read."""
    reader = EliminationReader(name)
    rng = random.Random()
    stamp, reads, overlaps = 0, 0, 0
    either = [[f"{parity}-{n}" for n in range(100)] for parity in ("even", "odd")]
    while not stop.value:
        before = reader.version
        found = reader.snapshot()
        overlaps += reader.version != before
        stamps = {stamp_of(hotkey, record) for hotkey, record in found.eliminations.items()}
        assert len(stamps) == 1, f"mixed snapshot: {sorted(stamps)}"
        (seen,) = stamps
        assert seen >= stamp, f"sync {seen} after sync {stamp}"
        stamp = seen
        assert found.eliminations.keys() == {*hotkeys, *either[stamp % 2]}
        assert len(reader) == len(hotkeys) + 100
        for hotkey in rng.sample(hotkeys, 200):
            assert reader.is_hotkey_eliminated(hotkey)
            seen = stamp_of(hotkey, reader.get_elimination(hotkey))
            assert seen >= stamp, f"sync {seen} after sync {stamp}"
            stamp = seen
        before = reader.version
        batch = reader.are_eliminated(hotkeys[:2000] + either[0] + either[1])
        overlaps += reader.version != before
        assert batch[:2000].all()
        # All of one and none of the other: one version for the whole batch.
        assert (int(batch[2000:2100].sum()), int(batch[2100:].sum())) in ((100, 0), (0, 100))
        reads += 1
        overlapped.value = overlaps + reader.retries
    return reads, overlaps + reader.retries, stamp


@pytest.mark.parametrize(("count", "seconds"), [(3_000, 3.0), pytest.param(10_000, 20.0, marks=pytest.mark.long)])
def test_a_sync_is_never_seen_in_part(serve, longer, count, seconds):
    """Every record carries the number of its sync; some hotkeys come and go with every other sync."""
    server = serve(durability="process", files="off")
    client = server.client(timeout=60)
    hotkeys = [f"hotkey-{n}" for n in range(count - 100)]

    def sync(stamp):
        parity = ("even", "odd")[stamp % 2]
        client.sync_eliminations(
            row(hotkey, stamp) for hotkey in [*hotkeys, *(f"{parity}-{n}" for n in range(100))]
        )

    sync(0)
    stop, overlapped = Counter(), [Counter() for _ in range(READERS)]
    with ExitStack() as stack:
        readers = [
            stack.enter_context(Child(functools.partial(_read_everything, server.name, hotkeys, stop, counter)))
            for counter in overlapped
        ]
        began = time.monotonic()
        for stamp in itertools.count(1):
            sync(stamp)
            lasted = time.monotonic() - began
            if lasted > seconds and any(counter.value for counter in overlapped):
                break
            assert lasted < seconds + PATIENCE, "no publish ever overlapped a read"
        stop.value = 1
        results = [reader.result() for reader in readers]
    reads, overlaps = (sum(result[n] for result in results) for n in (0, 1))
    print(f"{stamp} syncs of {count}, {reads} rounds of reads, {overlaps} reads overlapped a publish")
    assert all(result[0] for result in results)
    assert max(result[2] for result in results) > 0
    assert overlaps > 0


# ---------------------------------------------------------------------- a writer that is killed


class _Writer:
    """One of two threads that change things without pause; it knows what must be there.

    Its hotkeys are ``a<me>-0``, ``a<me>-1``, … which are added in sequence and never removed; ``b<me>``, whose
    stamp only grows; and ``c<me>-0`` to ``-9``, which come and go.
    """

    def __init__(self, me, client, syncing):
        self.me, self.client, self.syncing = me, client, syncing
        self.added, self.stamp = 0, 0
        self.toggled = dict.fromkeys(range(10), None)
        self.rng = random.Random(me)
        self.acknowledged, self.unknown = 0, 0

    def until_known(self, change, settle):
        """Make a change; where nobody can know whether it was made, look when the next server is there."""
        try:
            change()
        except NotServingError:
            self.unknown += 1
            self.wait_for_server()
            settle(known=False)
        except OutcomeUnknownError:
            self.unknown += 1
            self.wait_for_server()
            settle(known=None)
        else:
            self.acknowledged += 1
            settle(known=True)
        self.check()

    def wait_for_server(self):
        while True:
            try:
                self.client.health_check()
            except (NotServingError, OutcomeUnknownError):
                time.sleep(0.001)
            else:
                return

    def add(self):
        hotkey = f"a{self.me}-{self.added}"

        def settle(*, known):
            there = self.client.get_elimination(hotkey)
            assert there in (row(hotkey, self.added), None)
            assert known is None or (there is not None) == known, (hotkey, known, there)
            self.added += there is not None

        self.until_known(lambda: self.client.add_elimination(hotkey, row(hotkey, self.added)), settle)

    def update(self):
        hotkey, new = f"b{self.me}", self.stamp + 1

        def settle(*, known):
            record = self.client.get_elimination(hotkey)
            found = 0 if record is None else stamp_of(hotkey, record)
            assert found in {True: (new,), False: (self.stamp,), None: (self.stamp, new)}[known], (
                known,
                found,
                new,
            )
            self.stamp = found

        self.until_known(lambda: self.client.add_elimination(hotkey, row(hotkey, new)), settle)

    def toggle(self):
        n = self.rng.randrange(10)
        hotkey, old = f"c{self.me}-{n}", self.toggled[n]
        new = self.rng.randrange(1000) if old is None else None

        def settle(*, known):
            record = self.client.get_elimination(hotkey)
            found = None if record is None else stamp_of(hotkey, record)
            assert found in {True: (new,), False: (old,), None: (old, new)}[known], (hotkey, known, found)
            self.toggled[n] = found

        if new is None:
            self.until_known(lambda: self.client.remove_elimination(hotkey), settle)
        else:
            self.until_known(lambda: self.client.add_elimination(hotkey, row(hotkey, new)), settle)

    def expected(self):
        records = {f"a{self.me}-{n}": n for n in range(self.added)}
        records |= {f"b{self.me}": self.stamp} if self.stamp else {}
        return records | {f"c{self.me}-{n}": stamp for n, stamp in self.toggled.items() if stamp is not None}

    def check(self):
        """Everything that is mine is as I know it, in one snapshot."""
        if self.rng.random() < 0.05:
            found = self.client.snapshot().eliminations
            mine = {key: stamp_of(key, value) for key, value in found.items() if key[1] == str(self.me)}
            assert mine == self.expected()


def _sync(writers, number):
    """Replace everything, with a family of hotkeys of the sync's own, while nobody else changes anything."""
    me = writers[0]
    records = {key: stamp for writer in writers for key, stamp in writer.expected().items()}
    family = {f"s-{n}": number for n in range(50)}

    def settle(*, known):
        found = me.client.snapshot().eliminations
        stamps = {stamp_of(key, value) for key, value in found.items() if key.startswith("s-")}
        assert len(stamps) <= 1
        made = stamps == {number}
        assert known is None or made == known
        others = {key: stamp_of(key, value) for key, value in found.items() if not key.startswith("s-")}
        assert others == records

    rows = [row(key, stamp) for key, stamp in (records | family).items()]
    me.until_known(lambda: me.client.sync_eliminations(rows), settle)


def _write(server, stop):
    """In a process of its own: two threads that change things until told to stop."""
    client = server.client(timeout=60)
    # Held by all for a sync, by each for its own changes.
    mine = [threading.Lock(), threading.Lock()]
    writers = [_Writer(me, client, mine) for me in range(2)]
    problems, syncs = [], itertools.count(1)

    def work(writer):
        try:
            while not stop.value and not problems:
                if writer.me == 0 and writer.rng.random() < 0.05:
                    with mine[0], mine[1]:
                        _sync(writers, next(syncs))
                    continue
                with mine[writer.me]:
                    writer.rng.choice([writer.add, writer.update, writer.toggle])()
        except BaseException as error:
            problems.append(error)
            raise

    threads = [threading.Thread(target=work, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    for writer in writers:
        writer.rng.random = lambda: 0.0
        writer.check()
    return (
        sum(writer.acknowledged for writer in writers),
        sum(writer.unknown for writer in writers),
        next(syncs) - 1,
    )


def _look(name, stop):
    """In a process of its own: whatever must only grow must never shrink, and nothing may ever be torn."""
    reader = EliminationReader(name)
    added, stamps, sync, reads, last = {"0": 0, "1": 0}, {"0": 0, "1": 0}, 0, 0, 0
    while not stop.value:
        for me, count in added.items():
            if count:
                n = random.randrange(count)
                assert reader.is_hotkey_eliminated(f"a{me}-{n}")
                assert reader.get_elimination(f"a{me}-{n}") == row(f"a{me}-{n}", n)
                assert reader.are_eliminated([f"a{me}-{m}" for m in range(count)]).all()
            record = reader.get_elimination(f"b{me}")
            found = 0 if record is None else stamp_of(f"b{me}", record)
            assert found >= stamps[me], f"b{me} went from {stamps[me]} back to {found}"
            stamps[me] = found
        version, eliminations, _, _ = reader.snapshot()
        assert version >= last
        last = version
        found = {key: stamp_of(key, value) for key, value in eliminations.items()}
        for me, count in added.items():
            numbers = sorted(int(key[3:]) for key in found if key.startswith(f"a{me}-"))
            assert numbers == list(range(len(numbers))), "a gap among hotkeys that are added in sequence"
            assert len(numbers) >= count
            added[me] = len(numbers)
            assert found.get(f"b{me}", 0) >= stamps[me]
            stamps[me] = found.get(f"b{me}", 0)
        family = [stamp for key, stamp in found.items() if key.startswith("s-")]
        assert len(family) in (0, 50)
        assert len(set(family)) <= 1
        assert sync <= max(family, default=0)
        sync = max(family, default=0)
        reads += 1
    return reads, reader.retries


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.long)])
def test_kill_9_at_any_time_loses_nothing_and_disturbs_no_reader(serve, longer, kills):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    server = serve(durability="process")
    stop_writing, stop_reading = Counter(), Counter()
    with ExitStack() as stack:
        readers = [stack.enter_context(Child(lambda: _look(server.name, stop_reading))) for _ in range(READERS)]
        writer = stack.enter_context(Child(lambda: _write(server, stop_writing)))
        for _ in range(kills):
            # The instant is arbitrary; nothing depends on how long this really takes.
            time.sleep(rng.uniform(0.0, 0.15))
            server.kill()
            server.start()
        stop_writing.value = 1
        acknowledged, unknown, syncs = writer.result()
        stop_reading.value = 1
        looks = [reader.result() for reader in readers]
    print(f"{kills} kills, {acknowledged} changes acknowledged, {unknown} not, {syncs} syncs")
    print(f"{sum(reads for reads, _ in looks)} rounds of reads, {sum(retries for _, retries in looks)} retries")
    assert acknowledged > kills
    assert unknown > 0
    assert all(reads for reads, _ in looks)
    server.reader().verify()
