"""How the reference validator takes part in the processing of eliminations: the worked example of the docs."""

from types import SimpleNamespace as Namespace

from reference_validator.scoring import NothingMovedError
from shmelim.eliminations.record import generate_row
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.eliminations.validator.environment import ValidatorEnvironment


class Position:
    def __init__(self, holding):
        self.holding, self.position_uuid = holding, holding.id
        self.trade_pair = Namespace(trade_pair_id=holding.pair)

    is_closed_position = property(lambda self: self.holding.closed)
    orders = property(lambda self: [Namespace(processed_ms=trade.at_ms) for trade in self.holding.trades])

    def to_websocket_dict(self):
        return {"hotkey": self.holding.hotkey, "position": self.holding.id, "closed": self.holding.closed}

    @staticmethod
    def generate_fake_flat_order(position, time_ms, prices, price):
        pair = position.holding.pair
        return -position.holding.size, prices.at(pair, time_ms) if price is None else price, time_ms

    def add_order(self, order, _prices):
        self.holding.trade(*order)


class Positions:
    def __init__(self, book, ledgers):
        self.book, self.perf_ledger_manager = book, ledgers

    def get_miner_position_by_uuid(self, hotkey, uuid):
        holding = self.book.holding(hotkey, uuid)
        return None if holding is None else Position(holding)

    def get_positions_for_one_hotkey(self, hotkey, only_open_positions=False):
        return [Position(holding) for holding in self.book.holdings(hotkey, open_only=only_open_positions)]

    def get_positions_for_hotkeys(self, hotkeys, only_open_positions=True):
        return {hotkey: self.get_positions_for_one_hotkey(hotkey, only_open_positions) for hotkey in hotkeys}

    def save_miner_position(self, position, delete_open_position_if_exists=True):
        self.book.store(position.holding)

    def delete_position(self, position):
        self.book.drop(position.holding)


class Environment(ValidatorEnvironment):
    def slash_outcome(self, answer):
        return "not made" if isinstance(answer, NothingMovedError) else super().slash_outcome(answer)


def plug_in(v, **figures):
    """Return a validator's collaborators and environment. Where only a name differs, a namespace does."""

    def liquidated():
        return [generate_row(who, dd, "LIQUIDATED", at, prices) for who, dd, at, prices in v.ledgers.liquidated()]

    def slash(hotkey, slash_proportion=None):
        return v.collateral.slash(hotkey, slash_proportion)

    ledgers = Namespace(
        get_perf_ledger_eliminations=liquidated, perf_ledger_hks_to_invalidate=v.ledgers.stale,
        filtered_ledger_for_scoring=lambda portfolio_only=True, hotkeys=None: v.ledgers.of(hotkeys))  # fmt: skip
    challenge = Namespace(
        has_elimination_reasons=v.probation.has_failed, get_all_elimination_reasons=v.probation.all_failed,
        clear_elimination_reasons=v.probation.clear_failed, get_hotkeys_by_bucket=v.probation.in_stage,
        has_miner=v.probation.has, remove_miner=v.probation.remove,
        _write_challengeperiod_from_memory_to_disk=v.probation.save)  # fmt: skip
    collaborators = Collaborators(
        v.registry, Positions(v.book, ledgers), challenge, Namespace(slash_miner_collateral_proportion=slash),
        v.locks, Namespace(delete_all_limit_orders_for_hotkey=v.limit_orders.cancel_all), v.prices,
        v.websockets, v.slack, v.ending, v.syncing, v.epoch)  # fmt: skip
    own = {"scored_bucket": "scored", "miner_directory": v.miners_directory, "clock": lambda: v.now_ms}
    own["drawdown"] = lambda ledger: (ledger.drawdown() >= 0.1, 100 * ledger.drawdown())
    return collaborators, Environment(**own | figures)
