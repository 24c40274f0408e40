"""A validator in memory: exactly the methods that SPEC 7 says its managers have, and a book of what they did."""

import contextlib
import copy
from types import SimpleNamespace

from shmelim import ValidatorEnvironment

MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
START = 1_750_000_000_000
PRICE = 100.0
"""What the price fetcher says."""


def row(hotkey, n=0, **fields):
    """A whole record, which differs with `n`."""
    whole = {
        "hotkey": hotkey,
        "dd": n / 2,
        "reason": "LIQUIDATED",
        "elimination_initiated_time_ms": START + n,
        "price_info": {"BTC/USD": 1.5},
        "return_info": {"n": n},
    }
    return whole | fields


def miners(count):
    return [f"miner{number:02}" for number in range(count)]


def eliminated(validator, *hotkeys):
    """Let miners be eliminated by a rule that slashes."""
    for hotkey in hotkeys:
        validator.challenged(hotkey)
    validator.tick()


class Notifier:
    """Keeps what it is told."""

    def __init__(self):
        self.messages = []

    def send_message(self, text, level="info"):
        self.messages.append((level, text))

    def of(self, *levels):
        return [text for level, text in self.messages if level in levels]

    def about(self, *words):
        return [text for _, text in self.messages if all(word.lower() in text.lower() for word in words)]


class Metagraph:
    def __init__(self, *hotkeys):
        self.hotkeys = list(hotkeys)

    def has_hotkey(self, hotkey):
        return hotkey in self.hotkeys


class Position:
    def __init__(self, hotkey, uuid, pair, at_ms):
        self.hotkey, self.position_uuid = hotkey, uuid
        self.trade_pair = SimpleNamespace(trade_pair_id=pair.replace("/", ""), trade_pair=pair)
        self.orders = [SimpleNamespace(processed_ms=at_ms, price=PRICE)]
        self.is_closed_position = False

    def to_websocket_dict(self):
        return {"hotkey": self.hotkey, "position": self.position_uuid, "closed": self.is_closed_position}

    @staticmethod
    def generate_fake_flat_order(position, time_ms, live_price_fetcher, price_source):
        price = live_price_fetcher.price(position.trade_pair) if price_source is None else price_source
        return SimpleNamespace(processed_ms=time_ms, price=price)

    def add_order(self, order, live_price_fetcher):
        self.orders.append(order)
        self.is_closed_position = True


class PerfLedgers:
    def __init__(self):
        self.liquidated, self.ledgers, self.perf_ledger_hks_to_invalidate = [], {}, {}

    def get_perf_ledger_eliminations(self):
        return list(self.liquidated)

    def filtered_ledger_for_scoring(self, portfolio_only=True, hotkeys=None):
        assert portfolio_only
        return {hotkey: self.ledgers[hotkey] for hotkey in hotkeys if hotkey in self.ledgers}


class Positions:
    """Gives out copies, as a store does."""

    def __init__(self, did, locks):
        self.did, self.locks = did, locks
        self.book = {}
        self.perf_ledger_manager = PerfLedgers()
        self.fail_to_save = set()

    def get_miner_position_by_uuid(self, hotkey, uuid):
        return copy.deepcopy(self.book.get(hotkey, {}).get(uuid))

    def get_positions_for_one_hotkey(self, hotkey, only_open_positions=False):
        found = self.book.get(hotkey, {}).values()
        return [copy.deepcopy(one) for one in found if not (only_open_positions and one.is_closed_position)]

    def get_positions_for_hotkeys(self, hotkeys, only_open_positions=True):
        return {hotkey: self.get_positions_for_one_hotkey(hotkey, only_open_positions) for hotkey in hotkeys}

    def save_miner_position(self, position, delete_open_position_if_exists=True):
        if position.hotkey in self.fail_to_save:
            raise OSError(f"{position.hotkey} cannot be saved")
        self.did("save", position.hotkey, held=list(self.locks.held))
        self.book.setdefault(position.hotkey, {})[position.position_uuid] = copy.deepcopy(position)

    def delete_position(self, position):
        self.did("delete", position.hotkey)
        self.book[position.hotkey].pop(position.position_uuid, None)


class Challenge:
    def __init__(self, did):
        self.did = did
        self.reasons, self.buckets, self.written = {}, {}, 0

    def has_elimination_reasons(self):
        return bool(self.reasons)

    def get_all_elimination_reasons(self):
        return dict(self.reasons)

    def clear_elimination_reasons(self):
        self.reasons.clear()

    def get_hotkeys_by_bucket(self, bucket):
        return [hotkey for hotkey, found in self.buckets.items() if found == bucket]

    def has_miner(self, hotkey):
        return hotkey in self.buckets

    def remove_miner(self, hotkey):
        self.did("remove miner", hotkey)
        self.buckets.pop(hotkey, None)

    def _write_challengeperiod_from_memory_to_disk(self):
        self.written += 1


class Contract:
    """Answers what `answers` says for a hotkey: a value, or an exception to raise."""

    def __init__(self, did):
        self.did = did
        self.answers, self.slashes = {}, []

    def slash_miner_collateral_proportion(self, hotkey, slash_proportion=None):
        self.did("slash", hotkey)
        self.slashes.append((hotkey, slash_proportion))
        answer = self.answers.get(hotkey)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def slashed(self, hotkey):
        return [whom for whom, _ in self.slashes].count(hotkey)


class Locks:
    def __init__(self):
        self.held, self.when_taken = [], lambda: None

    @contextlib.contextmanager
    def get_lock(self, hotkey, trade_pair_id):
        self.held.append((hotkey, trade_pair_id))
        self.when_taken()
        try:
            yield
        finally:
            self.held.remove((hotkey, trade_pair_id))


class LimitOrders:
    def __init__(self, did):
        self.did, self.error = did, None

    def delete_all_limit_orders_for_hotkey(self, hotkey):
        self.did("limit orders", hotkey)
        if self.error is not None:
            raise self.error


class Prices:
    def price(self, _pair):
        return PRICE


class Queue:
    def __init__(self):
        self.messages = []

    def put(self, message):
        self.messages.append(message)


class Validator:
    """The collaborators, the environment with a clock of its own, and `manager`, once somebody made it."""

    def __init__(self, miners, **figures):
        self.now_ms = START
        self.done, self.when_done = [], lambda *_: None
        self.miners = miners
        self.metagraph = Metagraph()
        self.locks = Locks()
        self.positions = Positions(self.did, self.locks)
        self.ledgers = self.positions.perf_ledger_manager
        self.challenge = Challenge(self.did)
        self.contract = Contract(self.did)
        self.limit_orders = LimitOrders(self.did)
        self.prices, self.slack, self.queue = Prices(), Notifier(), Queue()
        self.ending, self.syncing, self.epoch = {}, SimpleNamespace(value=False), SimpleNamespace(value=0)
        own = {"clock": lambda: self.now_ms, "scored_bucket": "MAINCOMP", "miner_directory": miners}
        self.environment = ValidatorEnvironment(**own | figures)
        self.manager = None

    def did(self, what, hotkey, **more):
        self.done.append(SimpleNamespace(what=what, hotkey=hotkey, **more))
        self.when_done(what, hotkey)

    def arguments(self):
        return {
            "metagraph": self.metagraph,
            "position_manager": self.positions,
            "challengeperiod_manager": self.challenge,
            "contract_manager": self.contract,
            "position_locks": self.locks,
            "limit_order_manager": self.limit_orders,
            "slack_notifier": self.slack,
            "shared_queue_websockets": self.queue,
            "shutdown_dict": self.ending,
            "sync_in_progress": self.syncing,
            "sync_epoch": self.epoch,
            "environment": self.environment,
        }

    def register(self, *hotkeys, bucket="MAINCOMP"):
        for hotkey in hotkeys:
            (self.miners / hotkey).mkdir(parents=True, exist_ok=True)
            self.challenge.buckets.setdefault(hotkey, bucket)
        self.metagraph.hotkeys = [*self.metagraph.hotkeys, *hotkeys]

    def leave(self, *hotkeys):
        self.metagraph.hotkeys = [hotkey for hotkey in self.metagraph.hotkeys if hotkey not in hotkeys]

    def open(self, hotkey, pair="BTC/USD", *, at_ms=None):
        position = Position(
            hotkey, f"{hotkey}-{len(self.positions.book.get(hotkey, {}))}", pair, at_ms or self.now_ms
        )
        self.positions.book.setdefault(hotkey, {})[position.position_uuid] = position
        return position

    def is_flat(self, hotkey):
        return not self.positions.get_positions_for_one_hotkey(hotkey, only_open_positions=True)

    def fall(self, hotkey, percentage):
        self.ledgers.ledgers[hotkey] = SimpleNamespace(cps=[SimpleNamespace(mdd=1 - percentage / 100)])

    def liquidate(self, hotkey, **fields):
        known = {"dd": 0.7, "reason": "LIQUIDATED", "elimination_initiated_time_ms": self.now_ms}
        self.ledgers.liquidated.append({"hotkey": hotkey, "price_info": {}, "return_info": {}} | known | fields)

    def challenged(self, hotkey, reason="FAILED_CHALLENGE_PERIOD_TIME", dd=None):
        self.challenge.reasons[hotkey] = (reason, dd)

    def tick(self, after_ms=300_001):
        self.now_ms += after_ms
        self.manager.process_eliminations()

    @property
    def reasons(self):
        return {hotkey: found["reason"] for hotkey, found in self.manager.get_eliminations_dict().items()}
