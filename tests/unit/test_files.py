"""The JSON files: their shapes, their bad rows, and that they are replaced whole."""

import json
import math
import stat
from pathlib import Path

import pytest

import shmelim
from shmelim.eliminations.files import format as files
from shmelim.eliminations.record import encode, generate_row, normalise
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
    @pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 2500])
    def test_content_is_what_json_reads(self, path, count):
        rows = [record(f"h{n}", n=n) for n in range(count)]
        digest = files.write_eliminations(path, map(encode, rows))
        assert json.loads(path.read_text()) == {"eliminations": rows}
        assert digest == files.digest_of(path)
        assert names(path) == [path.name]

    def test_one_row_a_line(self, path):
        files.write_eliminations(path, [encode(record(f"h{n}\n")) for n in range(2500)])
        lines = path.read_text().splitlines()
        assert len(lines) == 2502
        assert all(json.loads(line.rstrip(","))["hotkey"] for line in lines[1:-1])

    def test_nan_and_infinities_as_python_writes_them(self, path):
        rows = [record("a", dd=math.inf, x=[-math.inf, None, "é"]), record("b", dd=math.nan), record("c", dd=None)]
        files.write_eliminations(path, map(encode, rows))
        text = path.read_text(encoding="utf-8")
        assert '"dd":Infinity' in text
        assert "[-Infinity,null" in text
        read = list(files.read_eliminations(path).taken.values())
        assert read == list(map(encode, rows))

    def test_a_new_one_is_its_owners_alone(self, path):
        files.write_eliminations(path, [])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_digest_is_told_before_the_rename(self, path):
        files.write_eliminations(path, [encode(record("old"))])
        old = files.digest_of(path)
        told = []

        def before_rename(digest):
            told.append(digest)
            assert files.digest_of(path) == old

        assert [files.write_eliminations(path, [encode(record("new"))], before_rename=before_rename)] == told
        assert files.digest_of(path) == told[0] != old

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
        assert files.digest_of(path) is None

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
            ({"hotkey": "x", "reason": "r"}, "'elimination_initiated_time_ms'"),
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
        assert list(read.taken) == ["a", "b"]
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
]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("read", [files.read_eliminations, files.read_departed])
def test_damaged_files_say_so(path, read, content):
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"eliminations\.json is damaged"):
        read(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("read", [files.read_eliminations, files.read_departed, files.digest_of])
def test_a_directory_is_no_file(tmp_path, read):
    with pytest.raises(StoreError, match="cannot be read"):
        read(tmp_path)


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

    @pytest.mark.parametrize(
        "info", [None, 5, [], {}, {"detected_ms": None}, {"detected_ms": "5"}, {"detected_ms": 1.5}]
        + [{"detected_ms": ms} for ms in (True, -1, 2**63, math.nan, math.inf)],
    )  # fmt: skip
    def test_bad_times_are_set_aside(self, path, info):
        path.write_text(json.dumps({"departed_hotkeys": {"a": {"detected_ms": 5.0, "x": 1}, "b": info}}))
        read = files.read_departed(path)
        assert read.taken == {"a": 5}
        (bad,) = read.bad
        assert bad.index == 1
        assert "'b'" in bad.problem

    @pytest.mark.parametrize("hotkey", ["", "x" * 256, "\ud800", None, 5, ["a"], {}])
    def test_bad_hotkeys_are_set_aside(self, path, hotkey):
        path.write_text(json.dumps([hotkey, "a"]))
        read = files.read_departed(path)
        assert read.taken == {"a": 0}
        assert [(bad.index, bad.row) for bad in read.bad] == [(0, hotkey)]


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
        assert content["rows"][0]["row"]["hotkey"] == "\ud800"
        assert [row["index"] for row in json.loads(second.read_text())["rows"]] == [5]

    def test_missing_directory(self, tmp_path):
        with pytest.raises(StoreError, match="could not be set aside"):
            files.quarantine(tmp_path / "gone" / "x.json", [files.BadRow(0, None, "none")])
