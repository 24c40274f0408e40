"""The example services: each program runs, and all four live side by side while one after the other is killed."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import crashing
import pytest
from ledger import Alerts
from waiting import PATIENCE, until

from shmelim import EliminationReader
from shmelim.errors import NoTableError, OutcomeUnknownError
from shmelim.service import HealthCheckDaemon
from shmelim.table.naming import TableNamespace, is_a_table

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["price_fetcher", "positions", "limit_orders", "eliminations"]
PORTS = {"price_fetcher": 50001, "positions": 50002, "limit_orders": 50003, "eliminations": 50004}


def load(name):
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Also in processes that are spawned."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


class Four:
    """All four services on free ports, or all in direct mode."""

    def __init__(self, directory, new_name, stack, **options):
        options |= {
            "enable_health_check": True,
            "health_check_interval_s": 0,
            "max_consecutive_failures": 1,
            "call_timeout": PATIENCE,
            "ready_timeout": PATIENCE,
            "connect_wait": PATIENCE,
            "port": 0,
        }
        self.alerts = {which: Alerts() for which in NAMES}
        self.prices = load("price_fetcher").PriceFetcher(
            slack_notifier=self.alerts["price_fetcher"], published_table=new_name(), **options
        )
        stack.callback(self.prices.shutdown)
        self.positions = load("positions").PositionManager(
            str(directory / "positions.json"),
            slack_notifier=self.alerts["positions"],
            published_table=new_name(),
            limit=2,
            **options,
        )
        stack.callback(self.positions.shutdown)
        self.orders = load("limit_orders").LimitOrderManager(
            slack_notifier=self.alerts["limit_orders"], published_table=new_name(), **options
        )
        stack.callback(self.orders.shutdown)
        self.name = new_name()
        self.eliminations = load("eliminations").Eliminations(
            self.name, str(directory / "state"), slack_notifier=self.alerts["eliminations"], **options
        )
        stack.callback(self.eliminations.shutdown)
        self.services = dict(
            zip(NAMES, (self.prices, self.positions, self.orders, self.eliminations), strict=True)
        )


@pytest.fixture(params=["direct", "fork"])
def four(request, tmp_path, new_name):
    mode = {"running_unit_tests": True} if request.param == "direct" else {"start_method": "fork"}
    with contextlib.ExitStack() as stack:
        yield Four(tmp_path, new_name, stack, **mode)


def test_each_one_does_its_work(four):
    four.prices.put_price("BTC/USD", 97_000)
    assert four.prices.get_price("BTC/USD") == 97_000
    assert four.prices.get_price("ETH/USD") is None
    for pair, price in (("BTC", 1.0), ("BTC/USD", 0), ("BTC/USD", float("nan")), ("BTC/USD", "1")):
        with pytest.raises(ValueError, match=r"looks like|more than 0"):
            four.prices.put_price(pair, price)

    number = four.positions.open_position("5A", "BTC/USD", 1.0)
    four.positions.open_position("5A", "ETH/USD", -1.0)
    with pytest.raises(ValueError, match="limit"):
        four.positions.open_position("5A", "ETH/USD", 1.0)
    with pytest.raises(ValueError, match="size of a position must not be 0"):
        four.positions.open_position("5B", "ETH/USD", 0)
    assert four.positions.close_position(number)["pair"] == "BTC/USD"
    with pytest.raises(KeyError):
        four.positions.close_position(number)
    assert [position["size"] for position in four.positions.get_positions_for_one_hotkey("5A")] == [-1.0]

    buy = four.orders.add_limit_order("5A", "BTC/USD", "buy", 95_000)
    sell = four.orders.add_limit_order("5A", "BTC/USD", "sell", 99_000)
    for side, limit in (("hold", 1), ("buy", 0), ("buy", "1")):
        with pytest.raises(ValueError, match=r"a side is|a limit is"):
            four.orders.add_limit_order("5A", "BTC/USD", side, limit)
    assert four.orders.price_moved("BTC/USD", 96_000) == []
    assert four.orders.get_limit_order(sell)["side"] == "sell"
    assert four.orders.get_limit_order(0) is None
    assert four.orders.price_moved("BTC/USD", 95_000) == [buy]
    assert four.orders.price_moved("ETH/USD", 100_000) == []
    assert four.orders.price_moved("BTC/USD", 100_000) == [sell]
    four.orders.add_limit_order("5A", "BTC/USD", "buy", 1)
    assert four.orders.delete_all_limit_orders_for_hotkey("5A") == 1
    assert four.orders.delete_all_limit_orders_for_hotkey("5A") == 0

    assert four.eliminations.append_elimination_row("5A", 0.1, "ZOMBIE")
    assert not four.eliminations.append_elimination_row("5A", 0.1, "ZOMBIE")
    assert four.eliminations.is_hotkey_eliminated("5A")
    assert not four.eliminations.is_hotkey_eliminated("5B")
    assert all(service.health_check() for service in four.services.values())


def test_what_is_published_is_what_the_server_would_answer(four):
    """Also to a copy of the service in another process, and of a pair that nobody has a price of."""
    four.prices.put_price("BTC/USD", 97_000)
    four.positions.open_position("5A", "BTC/USD", 1.0)
    closed = four.positions.open_position("5B", "BTC/USD", 1.0)
    four.positions.close_position(closed)
    kept = four.orders.add_limit_order("5A", "BTC/USD", "buy", 1)
    filled = four.orders.add_limit_order("5A", "BTC/USD", "buy", 99_000)
    four.orders.price_moved("BTC/USD", 97_000)

    def compare():
        asked = [
            (four.prices.get_price, four.prices._server_proxy.get_price_rpc, ["BTC/USD", "ETH/USD"]),
            (
                four.positions.get_positions_for_one_hotkey,
                four.positions._server_proxy.get_positions_for_one_hotkey_rpc,
                ["5A", "5B", "5C"],
            ),
            (four.orders.get_limit_order, four.orders._server_proxy.get_limit_order_rpc, [kept, filled, 99]),
        ]
        return [(read(key), call(key)) for read, call, keys in asked for key in keys]

    answers = compare()
    assert [read for read, _ in answers] == [call for _, call in answers]
    assert [bool(read) for read, _ in answers] == [True, False, True, False, False, True, False, False]
    if four.prices.server_pid:
        assert crashing.call(compare) == answers


def read_and_call(prices, answers):
    answers.put((prices.get_price("BTC/USD"), prices._server_proxy.get_price_rpc("BTC/USD")))


def test_a_spawned_process_reads_what_is_published(new_name):
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    with load("price_fetcher").PriceFetcher(port=0, published_table=new_name(), start_method="fork") as prices:
        prices.put_price("BTC/USD", 97_000)
        assert prices.get_price("BTC/USD") == 97_000
        copy = spawn.Process(target=read_and_call, args=(prices, answers))
        copy.start()
        copy.join(PATIENCE)
        assert copy.exitcode == 0
        assert answers.get(timeout=PATIENCE) == (97_000, 97_000)


def test_what_was_published_is_read_while_the_server_is_dead_and_kept_by_its_successor(tmp_path, new_name):
    with contextlib.ExitStack() as stack:
        four = Four(tmp_path, new_name, stack, start_method="fork", restart_on_exit=False)
        four.prices.put_price("BTC/USD", 97_000)
        four.positions.open_position("5A", "BTC/USD", 1.0)
        number = four.orders.add_limit_order("5A", "BTC/USD", "buy", 1)
        for service in (four.prices, four.positions, four.orders):
            os.kill(service.server_pid, signal.SIGKILL)
            service._server_process.join(PATIENCE)
        assert four.prices.get_price("BTC/USD") == 97_000
        assert len(four.positions.get_positions_for_one_hotkey("5A")) == 1
        assert four.orders.get_limit_order(number) is not None
        for service in (four.prices, four.positions, four.orders):
            service.restart_server()
        assert four.prices.get_price("BTC/USD") == four.prices._server_proxy.get_price_rpc("BTC/USD") == 97_000
        assert len(four.positions.get_positions_for_one_hotkey("5A")) == 1
        assert four.orders.get_limit_order(number) is four.orders._server_proxy.get_limit_order_rpc(number) is None


def test_a_service_without_a_table_says_so():
    prices = load("price_fetcher").PriceFetcher(port=0, published_table=None)
    with prices, pytest.raises(NoTableError, match="LivePriceFetcher names no table"):
        prices.get_price("BTC/USD")


def test_stale_prices_are_not_given_out():
    server = load("price_fetcher").PriceServer(stale_after_s=-1)
    server.put_price_rpc("BTC/USD", 1.0)
    assert server.get_price_rpc("BTC/USD") is None


def test_positions_without_a_directory_are_not_well(tmp_path):
    server = load("positions").PositionServer(str(tmp_path / "gone" / "positions.json"), 1)
    assert server.health_check_rpc()["status"] != "ok"


class Caller(threading.Thread):
    """Calls one service without pause; what it was told was done must be there in the end."""

    def __init__(self, call):
        super().__init__(daemon=True)
        self.call = call
        self.done = 0
        self.unknown = 0
        self.errors = []
        self.ending = threading.Event()

    def run(self):
        while not self.ending.is_set():
            try:
                self.call()
                self.done += 1
            except OutcomeUnknownError:
                self.unknown += 1  # its request was in the server's hands when that died
            except Exception as error:
                self.errors.append(error)
                return


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_all_four_at_once_and_each_killed_in_turn(tmp_path, new_name, method):
    numbers = iter(range(10**9))
    with contextlib.ExitStack() as stack:
        four = Four(tmp_path, new_name, stack, start_method=method)
        reader = EliminationReader(four.name)
        four.eliminations.append_elimination_row("5Eliminated", 0.1, "ZOMBIE")
        reader_errors = []
        callers = {
            "price_fetcher": Caller(lambda: four.prices.put_price("BTC/USD", 1 + next(numbers))),
            "positions": Caller(lambda: four.positions.get_positions_for_one_hotkey("5A")),
            "limit_orders": Caller(lambda: four.orders.add_limit_order("5A", "BTC/USD", "buy", 1)),
            "eliminations": Caller(
                lambda: four.eliminations.append_elimination_row(f"5{next(numbers)}", 0.1, "ZOMBIE")
            ),
        }
        ending = threading.Event()

        def read():
            while not ending.is_set():
                if not reader.is_hotkey_eliminated("5Eliminated"):
                    reader_errors.append("the elimination was lost")

        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        for caller in callers.values():
            caller.start()
        daemons = [
            stack.enter_context(HealthCheckDaemon(service, 0.02).start()) for service in four.services.values()
        ]
        position = four.positions.open_position("5Kept", "BTC/USD", 1.0)
        for name, service in four.services.items():
            before = {which: other.server_pid for which, other in four.services.items()}
            calls_of_others = {which: callers[which].done for which in NAMES if which != name}
            unknown_of_others = {which: callers[which].unknown for which in NAMES if which != name}
            os.kill(service.server_pid, signal.SIGKILL)
            until(lambda: four.alerts[name].of("success"), f"the recovery of {name}")  # noqa: B023
            done = callers[name].done
            until(lambda: callers[name].done > done or callers[name].errors)  # noqa: B023
            until(lambda: all(callers[which].done > calls for which, calls in calls_of_others.items()))  # noqa: B023
            after = {which: other.server_pid for which, other in four.services.items()}
            assert [which for which in NAMES if before[which] != after[which]] == [name]
            assert {which: callers[which].unknown for which in unknown_of_others} == unknown_of_others
        for daemon in daemons:
            daemon.stop()
        for caller in (*callers.values(),):
            caller.ending.set()
            caller.join(PATIENCE)
            assert caller.errors == []
            assert caller.unknown <= 1
        ending.set()
        reading.join(PATIENCE)
        assert reader_errors == []
        for alerts in four.alerts.values():
            assert [level for level, _ in alerts.messages] == ["error", "success"]
        assert four.positions.close_position(position)["hotkey"] == "5Kept"
        acknowledged = callers["eliminations"].done
        present = len(reader) - 1
        assert acknowledged <= present <= acknowledged + callers["eliminations"].unknown


@pytest.fixture(name="free_ports")
def _free_ports():
    """The examples have the ports of the field; where one is in use, its program cannot run."""
    for port in PORTS.values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"port {port} is in use")


@pytest.fixture
def _published_tables():
    """The programs' tables are left behind, as their values outlive them; one that is somebody's is left alone."""
    tables = [TableNamespace(name) for name in ("prices", "positions", "limit-orders")]
    for table in tables:
        if is_a_table(table.name):
            pytest.skip(f"there is a table {table.name!r} already")
    yield
    for table in tables:
        table.remove()


@pytest.mark.usefixtures("free_ports", "_published_tables")
@pytest.mark.parametrize("name", [*NAMES, "processing", "in_one_process"])
def test_the_program_runs(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = {
        "processing": "5Miner eliminated: False\nafter a tick: True LIQUIDATED\n",
        "in_one_process": "another process says: True\nafter its end: True\n",
        "price_fetcher": "BTC/USD 97250.5 | ETH/USD None\nhealthy: True\n",
        "positions": "its server was killed, and is back",
        "limit_orders": "filled at 94,900: [1]\ndeleted with 5Other: 1\nhealthy: True\n",
        "eliminations": "5Miner eliminated: True\n5Other eliminated: False\nhealthy: True\nwithout the server: ",
    }
    assert expected[name] in done.stdout


def test_a_service_is_about_twenty_lines():
    """From the class statement to the first method of its clients."""
    for name in NAMES:
        lines = (EXAMPLES / f"{name}.py").read_text().split("(RPCServiceBase):")[1].splitlines()
        end = next(
            number for number, line in enumerate(lines) if line.startswith("    def ") and " def _" not in line
        )
        assert len([line for line in lines[:end] if line.strip()]) <= 20
