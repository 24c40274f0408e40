"""Many eliminations at once and their order, by the same test bodies in every way of reaching a server."""

import pytest
from apis import nothing_applied, refused
from serving import row


class TestOrder:
    def test_is_that_of_the_first_elimination(self, api):
        for hotkey in ("z", "a", "m"):
            api.add_elimination(hotkey, row(hotkey))
        api.add_elimination("a", row("a", 9))
        assert list(api) == ["z", "a", "m"]
        api.remove_elimination("z")
        api.add_elimination("z", row("z"))
        assert list(api) == ["a", "m", "z"]
        assert [record["hotkey"] for record in api.get_eliminations_from_memory()] == ["a", "m", "z"]
        assert list(api.get_eliminations_dict()) == list(api.snapshot().eliminations) == ["a", "m", "z"]

    def test_a_sync_keeps_the_places_of_those_that_stay(self, api):
        api.sync_eliminations([row(hotkey) for hotkey in "abcd"])
        assert api.sync_eliminations([row(hotkey, 5) for hotkey in "xdbay"]) == ["c"]
        assert list(api) == ["a", "b", "d", "x", "y"]
        assert all(record == row(hotkey, 5) for hotkey, record in api.items())

    def test_departures_do_not_disturb_it(self, api):
        api.update_metagraph(["b", "m", "a"])
        api.add_elimination("a", row("a"))
        api.update_metagraph(["m"])
        api.add_elimination("b", row("b"))
        api.add_elimination("c", row("c"))
        assert list(api) == ["a", "b", "c"]
        api.remove_elimination("a")
        api.add_elimination("a", row("a"))
        assert list(api) == ["b", "c", "a"]
        assert set(api.get_departed_hotkeys()) == {"a", "b"}

    def test_of_departures_is_that_in_which_they_were_seen(self, api):
        api.update_metagraph(["z", "a", "m", "k"])
        assert api.update_metagraph(["a", "m", "k"]) == ["z"]
        api.add_elimination("a", row("a"))
        assert api.update_metagraph(["k"]) == ["a", "m"]
        # Eliminated later than others departed.
        api.add_elimination("z", row("z"))
        assert list(api.get_departed_hotkeys()) == ["z", "a", "m"]
        assert list(api.departed_hotkeys) == ["z", "a", "m"]


class TestRemoving:
    def test_one(self, api):
        api.add_elimination("a", row("a"))
        assert api.remove_elimination("a") is True
        assert api.remove_elimination("a") is False
        assert api.is_hotkey_eliminated("a") is False
        assert api.get_elimination("a") is None
        assert len(api) == 0

    def test_many_in_one_transaction(self, api):
        for kind in (list, tuple, dict.fromkeys):
            api.clear_eliminations()
            api.sync_eliminations([row(hotkey) for hotkey in "abcde"])
            version = api.version
            assert api.delete_eliminations(kind(["d", "x", "b", "d"])) == ["d", "b"]
            assert api.version == version + 1
            assert list(api) == ["a", "c", "e"]

    def test_a_set(self, api):
        api.sync_eliminations([row(hotkey) for hotkey in "abcde"])
        assert set(api.delete_eliminations({"d", "b"})) == {"b", "d"}
        assert api.rpc("delete_eliminations", {"a"}) == ["a"]
        assert list(api) == ["c", "e"]

    def test_all(self, api):
        api.sync_eliminations([row(hotkey) for hotkey in "abc"])
        version = api.version
        assert api.clear_eliminations() is None
        assert api.version == version + 1
        assert (len(api), api.get_eliminations_from_memory()) == (0, [])
        api.clear_eliminations()
        assert api.version == version + 1

    def test_leaves_departures(self, api):
        api.update_metagraph(["a", "b"])
        api.update_metagraph(["b"])
        api.sync_eliminations([row("a"), row("b")])
        api.clear_eliminations()
        assert list(api.get_departed_hotkeys()) == ["a"]
        assert api.snapshot().registered == {"b"}


class TestSync:
    def test_returns_those_that_are_no_longer_eliminated(self, api):
        assert api.sync_eliminations([row("a"), row("b")]) == []
        assert api.sync_eliminations([row("b"), row("c")]) == ["a"]
        assert api.sync_eliminations([]) == ["b", "c"]
        assert list(api) == []

    def test_of_a_hotkey_listed_twice_the_last_counts(self, api):
        api.sync_eliminations([row("a", 1), row("b"), row("a", 2)])
        assert api.get_eliminations_from_memory() == [row("a", 2), row("b")]

    def test_takes_any_iterable(self, api):
        api.sync_eliminations(row(hotkey) for hotkey in "ab")
        api.sync_eliminations(tuple(row(hotkey) for hotkey in "ab"))
        assert list(api) == ["a", "b"]

    def test_one_bad_record_refuses_the_list_and_is_named(self, api):
        api.sync_eliminations([row("x")])
        before = api.snapshot()
        bad = row("c")
        del bad["hotkey"]
        for place in (0, 1, 2):
            rows = [row("a"), row("b")]
            rows.insert(place, bad)
            with pytest.raises(ValueError, match=f"elimination {place} .*'hotkey'"):
                api.sync_eliminations(rows)
            with pytest.raises(ValueError, match="'hotkey'"):
                api.write_eliminations_to_disk(rows)
            nothing_applied(api, before)

    def test_refuses_what_is_not_a_list_of_records(self, api):
        api.sync_eliminations([row("x")])
        before = api.snapshot()
        for rows in (5, None, {"a": row("a")}, "text", ["a"]):
            with refused(TypeError, rows):
                api.rpc("sync_eliminations", rows)
            nothing_applied(api, before)

    def test_write_to_disk_is_a_sync_without_an_answer(self, api):
        api.sync_eliminations([row("x")])
        assert api.write_eliminations_to_disk([row("a")]) is None
        assert list(api) == ["a"]
        assert api.get_eliminations_from_disk() == [row("a")]

    def test_of_equal_records_publishes_nothing(self, api):
        api.sync_eliminations([row("a"), row("b")])
        version = api.version
        assert api.sync_eliminations([row("b"), row("a")]) == []
        assert api.version == version

    def test_is_one_publish(self, api):
        api.sync_eliminations([row(f"h{n}") for n in range(500)])
        version = api.version
        api.sync_eliminations([row(f"h{n}", 1) for n in range(250, 750)])
        # A growth moves the generation, which stands above.
        assert (api.version - version) % (1 << 48) == 1

    def test_of_very_many(self, api):
        all_rows = [row(f"h{n}", n) for n in range(4500)]
        for count in (1999, 2000, 2001, 4500):
            rows = all_rows[:count]
            api.clear_eliminations()
            assert api.sync_eliminations([row("x")]) == []
            assert api.sync_eliminations(rows) == ["x"]
            assert api.get_eliminations_from_memory() == rows
            assert api.are_eliminated([f"h{n}" for n in range(count)]).all()


class TestUploads:
    def test_are_applied_as_a_whole(self, api):
        api.sync_eliminations([row("x")])
        token = api.rpc("begin_upload")
        assert api.rpc("upload", token, [row("a"), row("b")]) == 2
        assert api.rpc("upload", token, [row("b", 5), row("c")]) == 3
        assert list(api) == ["x"]
        assert api.rpc("sync_uploaded", token) == ["x"]
        assert api.get_eliminations_from_memory() == [row("a"), row("b", 5), row("c")]

    def test_a_bad_record_in_the_last_part_leaves_nothing_of_it(self, api):
        api.sync_eliminations([row("x")])
        before = api.snapshot()
        token = api.rpc("begin_upload")
        api.rpc("upload", token, [row("a")])
        with pytest.raises(TypeError, match=r"elimination 2 .*'b'"):
            api.rpc("upload", token, [row("c"), {"hotkey": "b", "reason": 5}])
        for method, args in (("upload", [[row("d")]]), ("sync_uploaded", [])):
            with pytest.raises(ValueError, match="no upload"):
                api.rpc(method, token, *args)
        nothing_applied(api, before)

    def test_a_bad_record_in_a_long_list_leaves_nothing_of_it(self, api):
        api.sync_eliminations([row("x")])
        before = api.snapshot()
        with pytest.raises(TypeError, match=r"elimination 4100 of the list: .*'bad'"):
            api.sync_eliminations([*(row(f"h{n % 4000}") for n in range(4100)), {"hotkey": "bad", "reason": 5}])
        nothing_applied(api, before)

    def test_can_be_finished_once(self, api):
        token = api.rpc("begin_upload")
        api.rpc("upload", token, [row("a")])
        api.rpc("sync_uploaded", token)
        with pytest.raises(ValueError, match="no upload"):
            api.rpc("sync_uploaded", token)
        assert list(api) == ["a"]

    def test_an_empty_one_clears(self, api):
        api.sync_eliminations([row("x")])
        assert api.rpc("sync_uploaded", api.rpc("begin_upload")) == ["x"]

    def test_at_most_four_at_a_time(self, api):
        tokens = [api.rpc("begin_upload") for _ in range(4)]
        with pytest.raises(ValueError, match="4 uploads"):
            api.rpc("begin_upload")
        api.rpc("sync_uploaded", tokens[0])
        api.rpc("begin_upload")
