"""The JSON files: their shapes, their bad rows, and that they are replaced whole."""

import json
import math
import os
import socket
import stat
from pathlib import Path

import pytest

import shmelim
from shmelim.eliminations.files import format as files
from shmelim.eliminations.record import decode, encode, generate_row, normalise
from shmelim.errors import DamagedFileError, StoreError

DEPARTED_DEFAULT = Path(shmelim.__file__).parent / "data" / "default_departed_hotkeys.json"


def record(hotkey, **changes):
    return normalise(generate_row(hotkey, 0.5, "ZOMBIE", 5) | changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "eliminations.json"


def names(path):
    return sorted(entry.name for entry in path.parent.iterdir())


class TestWriteEliminations:
    def test_others_have_the_interpreter_between_a_few_rows(self, path, monkeypatch):
        events = []

        def rows():
            for n in range(1000):
                events.append("row")
                yield encode(record(f"h{n}"))

        monkeypatch.setattr("time.sleep", lambda seconds: events.append("pause" if seconds > 0 else "none"))
        files.write_eliminations(path, rows())
        longest = max(len(run) // len("row") for run in "".join(events).split("pause"))
        assert longest <= 50

    @pytest.mark.parametrize("count", [0, 1, 2, 49, 50, 51, 2500])
    def test_content_is_what_json_reads(self, path, count):
        rows = [record(f"h{n}", n=n) for n in range(count)]
        summary = files.write_eliminations(path, map(encode, rows))
        assert json.loads(path.read_text()) == {"eliminations": rows}
        assert summary.digest == files.read_file(path).digest
        assert list(files.hashes_in(summary.rows)) == [files.hash_of(f"h{n}") for n in range(count)]
        assert names(path) == [path.name]

    def test_one_row_a_line(self, path):
        files.write_eliminations(path, [encode(record(f"h{n}\n")) for n in range(2500)])
        lines = path.read_text().splitlines()
        assert len(lines) == 2502
        assert all(json.loads(line.rstrip(","))["hotkey"] for line in lines[1:-1])

    def test_nan_and_infinities_are_null_as_strict_json_has_it(self, path):
        rows = [record("a", dd=math.inf, x=[-math.inf, None, "é"]), record("b", dd=math.nan), record("c", dd=None)]
        files.write_eliminations(path, map(encode, rows))
        json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
        read = [decode(row) for row in files.read_eliminations(path).taken.values()]
        assert read == [record("a", dd=None, x=[None, None, "é"]), record("b", dd=None), record("c", dd=None)]

    def test_a_new_one_is_its_owners_alone(self, path):
        files.write_eliminations(path, [])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_digest_is_told_before_the_rename(self, path):
        files.write_eliminations(path, [encode(record("old"))])
        old = files.read_file(path).digest
        told = []

        def before_rename(summary):
            told.append(summary)
            assert files.read_file(path).digest == old

        assert [files.write_eliminations(path, [encode(record("new"))], before_rename=before_rename)] == told
        assert files.read_file(path).digest == told[0].digest != old

    def test_what_before_rename_raises_cancels(self, path):
        files.write_eliminations(path, [encode(record("old"))])
        old = path.read_bytes()
        with pytest.raises(ZeroDivisionError):
            files.write_eliminations(path, [], before_rename=lambda _: 1 // 0)
        assert path.read_bytes() == old
        assert names(path) == [path.name]

    def test_rows_that_end_in_an_error_cancel(self, path):
        files.write_eliminations(path, [encode(record("old"))])
        old = path.read_bytes()
        with pytest.raises(ValueError, match="not an elimination record"):
            files.write_eliminations(path, [encode(record("new")), b"\xc1"])
        assert path.read_bytes() == old
        assert names(path) == [path.name]

    def test_missing_directory(self, tmp_path):
        with pytest.raises(StoreError, match=r"gone/x\.json could not be written"):
            files.write_eliminations(tmp_path / "gone" / "x.json", [])


class TestReadEliminations:
    def test_no_file(self, path):
        assert files.read_eliminations(path) is None

    @pytest.mark.parametrize(
        "shape",
        [
            lambda rows: {"eliminations": rows},
            lambda rows: rows,
            lambda rows: {"eliminations": {row["hotkey"]: row for row in rows}, "other": 1},
        ],
    )
    def test_three_shapes(self, path, shape):
        rows = [record("b"), record("a")]
        path.write_text(json.dumps(shape(rows)))
        read = files.read_eliminations(path)
        assert list(read.taken.items()) == [(row["hotkey"], encode(row)) for row in rows]
        assert read.bad == []

    def test_byte_order_mark(self, path):
        path.write_text(json.dumps([record("a")]), encoding="utf-8-sig")
        assert len(files.read_eliminations(path).taken) == 1

    def test_last_row_of_a_hotkey_at_the_place_of_the_first(self, path):
        path.write_text(json.dumps([record("a", n=1), record("b"), record("a", n=2)]))
        assert list(files.read_eliminations(path).taken.items()) == [
            ("a", encode(record("a", n=2))),
            ("b", encode(record("b"))),
        ]

    @pytest.mark.parametrize(
        ("bad", "problem"),
        [
            ({"hotkey": "x", "reason": 5}, r"record\['reason'\]"),
            ({"reason": "r", "elimination_initiated_time_ms": 1}, "'hotkey'"),
            (dict(generate_row("", 1, "r", 1)), "empty"),
            (dict(generate_row("\ud800", 1, "r", 1)), "Unicode"),
            (generate_row("x", 1, "r", 1) | {"y": "\ud800"}, r"record\['y'\]"),
            (generate_row("x", 1, "r", 1) | {"y": 2**64}, "64 bits"),
            (generate_row("x", 1, "r", 1) | {"dd": True}, r"record\['dd'\]"),
            (generate_row("x", 1, "r", 1) | {"y": "x" * 2**20}, "1048576"),
            (None, "NoneType"),
            ("x", "str"),
            ([], "list"),
        ],
    )
    def test_bad_rows_are_set_aside(self, path, bad, problem):
        path.write_text(json.dumps({"eliminations": [record("a"), bad, record("b")]}))
        read = files.read_eliminations(path)
        # Of one that names a hotkey what can be stored is taken all the same.
        salvaged = ["x"] if isinstance(bad, dict) and bad.get("hotkey") == "x" else []
        assert list(read.taken) == ["a", *salvaged, "b"]
        assert read.salvaged == set(salvaged)
        (found,) = read.bad
        assert (found.index, found.row) == (1, bad)
        with pytest.raises(ValueError, match=problem):
            raise ValueError(found.problem)

    def test_row_under_another_hotkey_is_bad(self, path):
        path.write_text(json.dumps({"eliminations": {"a": record("a"), "b": record("c")}}))
        read = files.read_eliminations(path)
        assert list(read.taken) == ["a"]
        assert "'c'" in read.bad[0].problem

    def test_whole_float_times_of_old_files(self, path):
        path.write_text(json.dumps([generate_row("a", 1, "r", 5.0)]))
        assert files.read_eliminations(path).taken == {"a": encode(generate_row("a", 1, "r", 5))}


DAMAGED = [
    b"",
    b" ",
    b"{",
    b'{"eliminations": [',
    b"\xff\xfe[]",
    b'["\xff"]',
    b"null",
    b"5",
    b'"text"',
    b"{}",
    b'{"eliminations": null, "departed_hotkeys": 5}',
    b'{"eliminations": "x", "departed_hotkeys": "x"}',
    b"[" * 200_000,
    b"[" + b"9" * 5000 + b"]",
    bytes(4096),
    # One of two would be taken in silence.
    b'{"eliminations": [], "departed_hotkeys": [], "eliminations": [], "departed_hotkeys": []}',
    b'{"eliminations": [{"hotkey": "a", "reason": "X", "hotkey": "b"}], "departed_hotkeys": {"a": {}, "a": {}}}',
    b'{"eliminations": [{"hotkey": "a", "p": {"x": 1, "x": 2}}], "departed_hotkeys": {"a": {"x": 1, "x": 1}}}',
    b'{"a": {"x": 1, "x": ' + b"9" * 5000 + b"}}",
]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("read", [files.read_eliminations, files.read_departed])
def test_damaged_files_say_so(path, read, content):
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"eliminations\.json is damaged"):
        read(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("read", [files.read_eliminations, files.read_departed])
def test_what_is_not_a_file_is_damage_and_is_not_waited_for(path, read, monkeypatch):
    for make, what in ((path.mkdir, "a directory"), (lambda: os.mkfifo(path), "a pipe")):
        make()
        with pytest.raises(DamagedFileError, match=f"is {what}, not a file"):
            read(path)
        path.rmdir() if path.is_dir() else path.unlink()
    monkeypatch.chdir(path.parent)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path.name)
        with pytest.raises(DamagedFileError, match="is a socket, not a file"):
            read(path)


class TestDeparted:
    def test_the_real_list(self, path):
        read = files.read_departed(DEPARTED_DEFAULT)
        assert len(read.taken) == 367
        assert read.bad == []
        files.write_departed(path, read.taken.items())
        assert json.loads(path.read_text()) == json.loads(DEPARTED_DEFAULT.read_text())
        again = files.read_departed(path)
        assert list(again.taken.items()) == list(read.taken.items())

    @pytest.mark.parametrize("wrap", [lambda hotkeys: hotkeys, lambda hotkeys: {"departed_hotkeys": hotkeys}])
    def test_older_list_reads_as_zero(self, path, wrap):
        path.write_text(json.dumps(wrap(["b", "a", "b"])))
        assert list(files.read_departed(path).taken.items()) == [("b", 0), ("a", 0)]

    def test_empty_ones(self, path):
        for content in ("[]", '{"departed_hotkeys": {}}', '{"departed_hotkeys": []}'):
            path.write_text(content)
            assert files.read_departed(path).taken == {}
        files.write_departed(path, [])
        assert json.loads(path.read_text()) == {"departed_hotkeys": {}}

    @pytest.mark.parametrize("info", [None, {}, {"detected_ms": None}, {"x": 1}])
    def test_a_time_that_is_missing_reads_as_zero(self, path, info, caplog):
        path.write_text(json.dumps({"departed_hotkeys": {"a": {"detected_ms": 5.0, "x": 1}, "b": info}}))
        assert files.read_departed(path) == ({"a": 5, "b": 0}, [], set())
        assert caplog.text == ""

    @pytest.mark.parametrize(
        "info", [5, [], {"detected_ms": "5"}, {"detected_ms": 1.5}]
        + [{"detected_ms": ms} for ms in (True, -1, 2**63, math.nan, math.inf)],
    )  # fmt: skip
    def test_so_does_one_that_is_no_time_with_a_warning(self, path, info, caplog):
        path.write_text(json.dumps({"departed_hotkeys": {"a": {"detected_ms": 5.0, "x": 1}, "b": info}}))
        assert files.read_departed(path) == ({"a": 5, "b": 0}, [], set())
        assert "no valid 'detected_ms', which reads as 0: b" in caplog.text

    @pytest.mark.parametrize("hotkey", ["", "x" * 256, "\ud800", None, 5, ["a"], {}])
    def test_bad_hotkeys_are_set_aside(self, path, hotkey):
        path.write_text(json.dumps([hotkey, "a"]))
        read = files.read_departed(path)
        assert read.taken == {"a": 0}
        assert [(bad.index, bad.row) for bad in read.bad] == [(0, hotkey)]


NOT_ONE_ROW = [
    (files.read_eliminations, '{"eliminations": ["a", "b"]}'),
    (files.read_eliminations, "[null]"),
    (files.read_eliminations, '{"eliminations": {"a": 5, "b": "name"}}'),
    (files.read_departed, '{"departed_hotkeys": [null, 5]}'),
    (files.read_departed, '{"departed_hotkeys": {"": {"detected_ms": 5}}}'),
]


@pytest.mark.parametrize(("read", "content"), NOT_ONE_ROW)
def test_a_file_of_which_not_one_row_can_be_taken_is_damaged(path, read, content):
    path.write_text(content)
    with pytest.raises(DamagedFileError, match=r"none of its \d rows can be taken; row 0:"):
        read(path)


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (files.read_eliminations, '{"eliminations": []}'),
        (files.read_eliminations, '{"eliminations": {}}'),
        (files.read_departed, "[]"),
    ],
)
def test_a_list_that_somebody_emptied_is_empty(path, read, content):
    path.write_text(content)
    assert read(path) == ({}, [], set())


def test_a_number_of_more_digits_than_python_reads_is_its_rows_fault_alone(path):
    digits = "9" * 5000
    rows = [json.dumps(record("a")), json.dumps(record("b")).replace("0.5", digits)]
    path.write_text('{"eliminations": [' + ", ".join(rows) + "]}")
    read = files.read_eliminations(path)
    assert list(read.taken) == ["a", "b"]
    assert decode(read.taken["b"]) == record("b") | {"dd": None}
    (bad,) = read.bad
    assert bad.index == 1
    assert "has no JSON form" in bad.problem
    assert digits in files.quarantine(path, read.bad).read_text()


def nested(levels):
    value = 1
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize("levels", [100, 400, 900])
def test_a_side_field_that_is_nested_too_deep_costs_itself_alone(path, levels):
    deep = {"hotkey": "a", "reason": "X", "elimination_initiated_time_ms": 5, "price_info": nested(levels)}
    path.write_text('{"eliminations": [' + json.dumps(deep) + ', {"hotkey": "b", "reason": "Y"}]}')
    found = files.read_eliminations(path)
    assert list(found.taken) == ["a", "b"]
    assert [bad.index for bad in found.bad] == [0]
    (kept,) = json.loads(files.quarantine(path, found.bad).read_text())["rows"]
    row = kept["row"]
    assert (json.loads(row) if isinstance(row, str) else row) == deep


def test_a_row_that_is_nested_too_deep_to_be_written_is_said_to_be(path):
    place = files.quarantine(path, [files.BadRow(0, nested(50_000), "deep")])
    assert json.loads(place.read_text())["rows"][0]["row"] == "a row that is nested too deep to be written"


def test_a_pipe_that_somebody_named_is_read_to_its_end_by_one_open(path):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        pipe.write(json.dumps([record("a")]))
    try:
        file = files.read_file(Path(f"/dev/fd/{reading}"), stream=True)
    finally:
        os.close(reading)
    assert list(files.eliminations_in(file).taken) == ["a"]
    assert len(file.digest) == 64


class TestQuarantine:
    def test_nothing_bad_leaves_no_file(self, path):
        assert files.quarantine(path, []) is None
        assert names(path) == []

    def test_quarantine_keeps_rows_and_problems(self, path):
        bad = [files.BadRow(3, {"hotkey": "\ud800", "dd": math.nan}, "unfit"), files.BadRow(5, None, "none")]
        first = files.quarantine(path, bad)
        second = files.quarantine(path, bad[1:])
        assert first != second
        assert first.parent == path.parent
        assert first.name.startswith("eliminations.json.quarantine-2")
        assert first.suffix == second.suffix == ".json"
        assert stat.S_IMODE(first.stat().st_mode) == 0o600
        content = json.loads(first.read_text())
        assert [row["problem"] for row in content["rows"]] == ["unfit", "none"]
        assert content["rows"][0]["row"]["dd"] is None
        assert content["rows"][0]["row"]["hotkey"] == "\ud800"
        assert [row["index"] for row in json.loads(second.read_text())["rows"]] == [5]

    def test_missing_directory(self, tmp_path):
        with pytest.raises(StoreError, match="could not be set aside"):
            files.quarantine(tmp_path / "gone" / "x.json", [files.BadRow(0, None, "none")])
