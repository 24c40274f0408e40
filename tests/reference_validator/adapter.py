"""How the reference validator takes part in the processing of eliminations: the worked example of the docs."""

from types import SimpleNamespace as Namespace

from reference_validator.scoring import NothingMovedError
from shmelim import Collaborators, ValidatorEnvironment
from shmelim.eliminations.record import generate_row


class Position:
    def __init__(self, holding):
        self.holding, self.position_uuid = holding, holding.id
        self.trade_pair = Namespace(trade_pair_id=holding.pair)

    is_closed_position = property(lambda self: self.holding.closed)
    orders = property(lambda self: [Namespace(processed_ms=trade.at_ms) for trade in self.holding.trades])

    def to_websocket_dict(self):
        return {"hotkey": self.holding.hotkey, "position": self.holding.id, "closed": self.holding.closed}

    @staticmethod
    def generate_fake_flat_order(position, at_ms, prices, price):
        return -position.holding.size, prices.at(position.holding.pair, at_ms) if price is None else price, at_ms

    def add_order(self, order, _prices):
        self.holding.trade(*order)


def plug_in(v, **figures):
    """Return a validator's collaborators and environment. Where only a name differs, a namespace does."""

    def held_by(hotkey, only_open_positions=False):
        return [Position(holding) for holding in v.book.holdings(hotkey, open_only=only_open_positions)]

    ledgers = Namespace(
        perf_ledger_hks_to_invalidate=v.ledgers.stale, get_perf_ledger_eliminations=lambda: [
            generate_row(who, dd, "LIQUIDATED", at, prices) for who, dd, at, prices in v.ledgers.liquidated()],
        filtered_ledger_for_scoring=lambda portfolio_only=True, hotkeys=(): v.ledgers.of(hotkeys))  # fmt: skip
    positions = Namespace(
        perf_ledger_manager=ledgers, get_positions_for_one_hotkey=held_by,
        get_miner_position_by_uuid=lambda who, uuid: (holding := v.book.holding(who, uuid)) and Position(holding),
        save_miner_position=lambda position, delete_open_position_if_exists=True: v.book.store(position.holding),
        delete_position=lambda position: v.book.drop(position.holding))  # fmt: skip
    challenge = Namespace(
        has_elimination_reasons=v.probation.has_failed, get_all_elimination_reasons=v.probation.all_failed,
        clear_elimination_reasons=v.probation.clear_failed, get_hotkeys_by_bucket=v.probation.in_stage,
        has_miner=v.probation.has, remove_miner=v.probation.remove,
        _write_challengeperiod_from_memory_to_disk=v.probation.save)  # fmt: skip
    contract = Namespace(slash_miner_collateral_proportion=lambda who, slash_proportion=None: (
        v.collateral.slash(who, slash_proportion)))  # fmt: skip
    collaborators = Collaborators(
        v.registry, positions, challenge, contract, v.locks,
        Namespace(delete_all_limit_orders_for_hotkey=v.limit_orders.cancel_all),
        shared_queue_websockets=v.websockets, slack_notifier=v.slack, shutdown_dict=v.ending,
        sync_in_progress=v.syncing, sync_epoch=v.epoch)  # fmt: skip
    own = {
        "scored_bucket": "scored", "miner_directory": v.miners_directory, "clock": lambda: v.now_ms,
        "drawdown": lambda ledger: (ledger.drawdown() >= 0.1, 100 * ledger.drawdown()),
        "live_price_fetcher": v.prices, "not_made_errors": NothingMovedError}  # fmt: skip
    return collaborators, ValidatorEnvironment(**own | figures)
