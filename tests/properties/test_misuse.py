"""No arguments and no surroundings bring a traceback: all end in a documented exit code, errors in one line."""

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invoking import CliRunner

from shmelim.cli.main import cli

DOCUMENTED = {0, 1, 2, 3, 4}
# These go on until they are stopped: a word too many, which none of them takes, keeps them from beginning.
ENDLESS = {"serve", "web", "demo", "watch", "publish", "follow", "top"}
# Nothing here may name a file that matters, for most commands write to what they are given, and tests run as root.
ODD = [
    "", " ", "-", "--", "-1", "0", "1e400", "nan", "99999999999999999999", "١٢", "x" * 5000, "a/b", "..", "\0",
    "\n", "\x1b[2J", "\udcff", "ünïcode", "{}", "[1", "2026-13-01", "2026-01-31T12:00:00Z",
    "0001-01-01", "9999-12-31T23:59:59Z",
    "5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs", "1", "file",
    "directory", "file/below", "no/such", "dangling", "loop", "/proc/shmelim",
]  # fmt: skip
PLACES = ["", "file", "directory", "file/below", "no/such", "loop", "/proc/shmelim", "x" * 5000, "run", None]


def paths(group, context, *above):
    """Yield the names of every command that is none of a group."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from paths(command, context, *above, name)
        else:
            yield (*above, name), command


COMMANDS = dict(paths(cli, click.Context(cli)))


@st.composite
def misuses(draw, command):
    """Draw words for a command: its own options with odd values, and odd words where its arguments stand."""
    words = []
    for parameter in draw(st.lists(st.sampled_from(command.params), max_size=4)):
        if isinstance(parameter, click.Option):
            words.append(draw(st.sampled_from(parameter.opts)))
            if not parameter.is_flag:
                words.append(draw(fitting(parameter.type)))
    taken = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    words += [draw(fitting(parameter.type)) for parameter in taken if draw(st.integers(0, 5))]
    return words if draw(st.integers(0, 5)) else [*words, draw(odd)]


def fitting(kind):
    """Return odd values, and those of which one is taken."""
    return st.one_of(odd, st.sampled_from(kind.choices)) if isinstance(kind, click.Choice) else odd


odd = st.one_of(st.sampled_from(ODD), st.text(max_size=6).filter(lambda text: "/" not in text))


@pytest.fixture
def place(tmp_path, monkeypatch, table_name):
    """Where all of it runs: a directory with something of each kind, and a name that nobody serves."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("{")
    (tmp_path / "directory").mkdir()
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    return table_name


def ends_well(path, words, env):
    """Run a command and check how it ends."""
    beyond = ["word"] * 3 if path[0] in ENDLESS else []
    result = CliRunner().invoke(cli, [*path, *words, *beyond], prog_name="shmelim", env=env, input="")
    shown = f"{[*path, *words]} with {env}: {result.exception!r}\n{result.stderr}"
    assert result.exception is None or isinstance(result.exception, SystemExit), shown
    assert result.exit_code in DOCUMENTED, shown
    if "--debug" not in words:
        assert "Traceback" not in result.stderr, shown
        assert "error: unexpected " not in result.stderr, shown
    if "--json" not in words:
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) <= 1, shown
        assert all(len(line) > len("error: ") for line in errors), shown
        if result.exit_code == 2 and path[0] not in {"health", "status"}:
            assert errors, shown
            assert "\nhint: " in result.stderr, shown
    return result


odd_use = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
@odd_use
@given(data=st.data())
def test_odd_arguments_and_surroundings_end_in_a_documented_way(path, place, data):
    words = data.draw(misuses(COMMANDS[path]))
    env = {"SHMELIM_NAME": place, "SHMELIM_DEBUG": None}
    for variable in (
        "HOME",
        "XDG_RUNTIME_DIR",
        "XDG_STATE_HOME",
        "SHMELIM_RUNTIME_DIR",
        "SHMELIM_REGISTRY",
        "TMPDIR",
    ):
        env[variable] = data.draw(st.sampled_from(PLACES))
    ends_well(path, words, env)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_an_empty_text_is_wrong_use_wherever_it_stands(path, place):
    """As of a variable that is not set: it is neither this directory nor every address."""
    for parameter in COMMANDS[path].params:
        if isinstance(parameter, click.Option) and (parameter.is_flag or parameter.name == "rule"):
            continue
        words = [parameter.opts[0], ""] if isinstance(parameter, click.Option) else [""]
        result = ends_well(path, words, {"SHMELIM_NAME": place})
        assert result.exit_code == 2, words
        assert "is empty" in result.stderr, words


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_odd_arguments_to_a_server_end_in_a_documented_way(path, place, serve, tmp_path_factory):
    runtime = tmp_path_factory.mktemp("r")
    served = serve(runtime_base=runtime / "shmelim", durability="process")
    env = {"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(runtime / "state"), "SHMELIM_NAME": served.name}

    @odd_use
    @given(words=misuses(COMMANDS[path]))
    def each(words):
        ends_well(path, words, env)

    each()
