"""The public face: names that can be imported, methods that mocks and IDEs see, parameters as SPEC gives them."""

import inspect
import subprocess
import sys
from unittest.mock import Mock

import pytest
from contract_marks import words

import shmelim
import shmelim.errors
from shmelim import (
    EliminationClient,
    EliminationManager,
    EliminationManagerServer,
    EliminationReader,
    HealthCheckDaemon,
    RPCServiceBase,
)

EMPTY = inspect.Parameter.empty
MANAGER = {
    "metagraph": EMPTY,
    "position_manager": EMPTY,
    "challengeperiod_manager": EMPTY,
    "running_unit_tests": False,
    "shutdown_dict": None,
    "use_ipc": False,
    "is_backtesting": False,
    "shared_queue_websockets": None,
    "contract_manager": None,
    "position_locks": None,
    "sync_in_progress": None,
    "slack_notifier": None,
    "sync_epoch": None,
    "limit_order_manager": None,
}
SERVICE = {
    "service_name": EMPTY,
    "port": EMPTY,
    "running_unit_tests": False,
    "enable_health_check": False,
    "health_check_interval_s": 60,
    "max_consecutive_failures": 3,
    "enable_auto_restart": True,
    "slack_notifier": None,
}
READS = words("""
    is_hotkey_eliminated hotkey_in_eliminations get_elimination get_eliminated_hotkeys
    get_eliminations_from_memory eliminations get_eliminations_dict is_hotkey_re_registered
    get_departed_hotkeys departed_hotkeys get_departed_hotkey_info
""")
MUTATIONS = words("""
    add_elimination remove_elimination append_elimination_row delete_eliminations sync_eliminations
    clear_eliminations save_eliminations write_eliminations_to_disk update_metagraph
""")
REST = words("""
    get_eliminations_from_disk generate_elimination_row process_eliminations handle_perf_ledger_eliminations
    handle_mdd_eliminations handle_first_refresh first_refresh_ran is_zombie_hotkey refresh_allowed
    set_last_update_time get_last_update_time_ms run_update_loop health_check shutdown get_eliminations_lock
    __enter__ __exit__
""")
NEWER = [
    "reload_from_disk",
    "load_eliminations_from_disk",
    "clear_departed_hotkeys",
    "handle_eliminated_miner",
    "get_first_refresh_ran",
    "set_first_refresh_ran",
    "get_eliminations_local_cache",
]
COLLABORATORS = [
    "position_manager",
    "challengeperiod_manager",
    "contract_manager",
    "position_locks",
    "limit_order_manager",
    "metagraph",
    "live_price_fetcher",
]


def positional(callable_):
    parameters = inspect.signature(callable_).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", shmelim.__all__)
def test_every_name_of_the_face_can_be_imported(name):
    assert getattr(shmelim, name) is not None
    assert name in dir(shmelim) or name == "__version__"


def test_star_import_and_an_unknown_name():
    code = "from shmelim import *; import shmelim; assert EliminationReader; shmelim.no_such_name"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has no attribute 'no_such_name'" in done.stderr


@pytest.mark.parametrize("name", words("""
    EliminationManagerServer EliminationManager EliminationReader EliminationClient EliminationReason
    DEPARTED_HOTKEYS_KEY RPCServiceBase HealthCheckDaemon ValidatorEnvironment NotServingError SlashNotMadeError
"""))  # fmt: skip
def test_what_the_spec_names_is_on_the_face(name):
    assert name in shmelim.__all__


def test_errors_are_one_hierarchy():
    for name, kind in vars(shmelim.errors).items():
        if inspect.isclass(kind) and issubclass(kind, BaseException):
            assert issubclass(kind, shmelim.ShmelimError), name


def test_errors_that_built_in_types_already_say_are_those_too():
    assert issubclass(shmelim.NotServingError, ConnectionError)
    assert issubclass(shmelim.OutcomeUnknownError, TimeoutError)
    assert str(shmelim.ShmelimError("what", hint="what to do")) == "what (what to do)"


def test_the_error_of_the_guard():
    assert issubclass(shmelim.errors.GuardedChangeError, shmelim.ShmelimError)


def test_signature_of_the_manager():
    assert list(positional(EliminationManager).items()) == list(MANAGER.items())
    ours = [p for p in inspect.signature(EliminationManager).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert ours
    assert all(p.default is not EMPTY for p in ours)
    assert inspect.signature(EliminationManager).parameters["port"].default == 50004


def test_signature_of_the_service_base():
    assert list(positional(RPCServiceBase).items()) == list(SERVICE.items())


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (EliminationManagerServer.add_elimination_rpc, ["self", "hotkey"]),
        (EliminationManagerServer.append_elimination_row_rpc,
         ["self", "hotkey", "current_dd", "reason", "t_ms", "price_info", "return_info"]),
        (EliminationManagerServer.delete_eliminations_rpc, ["self", "hotkeys"]),
        (EliminationManagerServer.update_metagraph_rpc, ["self", "hotkeys"]),
        (EliminationManagerServer.get_history_rpc, ["self", "hotkey", "limit"]),
        (EliminationManager.append_elimination_row,
         ["self", "hotkey", "current_dd", "reason", "t_ms", "price_info", "return_info"]),
        (EliminationManager.process_eliminations, ["self", "position_locks", "iteration_epoch"]),
        (EliminationManager.is_hotkey_eliminated, ["self", "hotkey"]),
        (EliminationReader.wait_for_change, ["self", "timeout"]),
        (RPCServiceBase.health_check, ["self", "current_time_ms"]),
        (RPCServiceBase._start_server_process, ["self", "address", "authkey", "server_ready"]),
        (HealthCheckDaemon, ["service", "interval_s", "slack_notifier"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)  # fmt: skip
def test_parameters_come_in_the_order_that_the_spec_gives(method, parameters):
    assert list(inspect.signature(method).parameters)[: len(parameters)] == parameters


@pytest.mark.parametrize("name", [*READS, *MUTATIONS, *REST, *COLLABORATORS, "_server_proxy", "server_pid"])
def test_every_method_stands_on_the_manager_class_for_mocks(name):
    assert hasattr(EliminationManager, name)
    if not name.startswith("__"):
        getattr(Mock(spec=EliminationManager), name)


@pytest.mark.parametrize("name", NEWER)
def test_what_newer_callers_use_stands_on_the_manager_class(name):
    getattr(Mock(spec=EliminationManager), name)


def test_a_mock_has_nothing_else():
    with pytest.raises(AttributeError):
        Mock(spec=EliminationManager).no_such_method  # noqa: B018


def test_classes_are_what_the_spec_says_they_are():
    assert issubclass(EliminationManager, RPCServiceBase)
    assert issubclass(EliminationClient, EliminationReader)


@pytest.mark.parametrize("name", [*READS, "status", "are_eliminated", "read", "snapshot", "version", "writer",
                                  "wait_for_change", "__len__", "__contains__", "__iter__"])  # fmt: skip
def test_a_reader_has_the_reads(name):
    assert hasattr(EliminationReader, name)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_client_has_the_mutations_and_a_reader_has_none(name):
    assert hasattr(EliminationClient, name)
    assert not hasattr(EliminationReader, name)
