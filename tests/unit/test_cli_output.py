"""What is printed: nothing that a terminal obeys, nothing shortened, figures as people say them."""

import json

import pytest

from shmelim.cli import output
from shmelim.cli.options import Settings
from shmelim.system.clock import utc_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("5C511WZ", "5C511WZ"),
        ("größer", "größer"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\tb\nc\r", "a\\tb\\nc\\r"),
        ("\u202egnp", "\\u202egnp"),
        ("\x9b31m", "\\x9b31m"),
        ("\udc80", "\\udc80"),
        ("", ""),
    ],
)
def test_nothing_that_a_terminal_obeys_is_printed(text, shown):
    assert output.printable(text) == shown


@pytest.mark.parametrize(
    ("thing", "shown"),
    [(None, "-"), (True, "yes"), (False, "no"), (0.1, "0.1"), (7, "7"), ({"a": [1]}, '{"a": [1]}'), ("-", "-")],
)
def test_values(thing, shown):
    assert output.value(thing) == shown


@pytest.mark.parametrize(
    ("ms", "shown"),
    [
        (0, None),
        (None, None),
        (1, "1970-01-01 00:00:00"),
        (1746396435687, "2025-05-04 22:07:15"),
        (-5, "-5 ms"),
        (1 << 62, f"{1 << 62} ms"),
    ],
)
def test_moments(ms, shown):
    assert utc_text(ms) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3,072.0 GiB")],
)
def test_sizes(count, shown):
    assert output.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (119, "119.0 s"), (180, "3.0 min"), (9000, "2.5 h"), (200_000, "2.3 d")],
)
def test_spans(seconds, shown):
    assert output.span(seconds) == shown


def test_off_a_terminal_rows_are_whole_lines(capsys):
    long = "x" * 300
    output.records(("hotkey", "reason"), [(long, None), ("b", "c\td")])
    assert capsys.readouterr().out == f"{long}\t-\nb\tc\\td\n"


HOTKEY = "5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs"


@pytest.mark.parametrize("width", [*range(10, 130, 7), 59, 60, 72, 73, 80, 200])
@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (("hotkey", "reason", "dd", "eliminated"), (HOTKEY, "MAX_TOTAL_DRAWDOWN", 11.5, "2025-05-04 22:07:15")),
        (("hotkey", "reason", "x"), (HOTKEY, "[bold]" + "long" * 20, None)),
        (
            ("when", "action", "hotkey", "who", "change"),
            ("2025", "add", HOTKEY, "python[12] uid 0", "größer, " * 30),
        ),
        (("follower", "a heading that is long"), ("host", 1)),
    ],
)
def test_on_a_terminal_no_character_is_left_out(capsys, monkeypatch, width, columns, row):
    monkeypatch.setattr(output, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    output.records(columns, [row])
    printed = capsys.readouterr().out
    if "\t" in printed:  # the table does not fit
        assert printed == "\t".join(map(output.value, row)) + "\n"
        return
    assert all(len(line) <= width for line in printed.splitlines())
    assert all(column in printed for column in columns)
    assert all(output.value(cell) in printed for cell in row[:-1])
    # The last column may be folded: its parts stand below each other, at the end of the lines.
    at = printed.splitlines()[1].index(columns[-1])
    parts = (line[at:] for line in printed.splitlines()[3:])
    assert "".join(parts).replace(" ", "") == output.value(row[-1]).replace(" ", "")


@pytest.mark.parametrize("width", range(8, 100, 6))
def test_nor_of_facts(capsys, monkeypatch, width):
    monkeypatch.setattr(output, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    output.facts([("slashes in doubt", "none"), ("problems", "x" * 90)])
    printed = capsys.readouterr().out
    assert "slashes in doubt" in printed
    assert printed.count("x") == 90


def test_a_document_is_one_line_of_ascii(capsys):
    Settings("mainnet", as_json=True).answer({"hotkey": "größer", "dd": None}, "unused")
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.count("\n") == 1
    assert json.loads(printed) == {"name": "mainnet", "hotkey": "größer", "dd": None}
