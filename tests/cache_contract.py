"""What a namespace does, in whichever tiers its records lie. test_contract.py runs it for every configuration.

The fixtures `cache` and `ns` are the test's: `ns` is a namespace of `cache`.
"""

from __future__ import annotations

import array
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvstrata import Cache, Namespace
from kvstrata.errors import InvalidKey, InvalidValue, KVStrataError, TierFull, VersionConflict

Namespaces = Callable[..., Namespace]

# Around a unit of memory, a cache line, a page, and the size from which records lie on pages of their own.
SIZES = [0, 1, 47, 48, 63, 64, 65, 4095, 4096, 4097, 8192, 65535, 65536, 65537, 300_000]
# Around what an entry of the index holds itself, and the longest.
NO_KEYS: list[Any] = [b"", "", b"x" * 1025, "ü" * 513, 1, None, ("a",), bytearray(b"a"), "\ud800"]
KEY_LENGTHS = [1, 2, 31, 32, 33, 64, 255, 1023, 1024]


def pattern(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng([size, seed]).bytes(size)


class NamespaceContract:
    # ---- Values and keys

    def test_get_returns_what_put_stored(self, ns: Namespace) -> None:
        for size in SIZES:
            ns.put("key", pattern(size))
            assert ns.get("key") == pattern(size)
            assert "key" in ns

    def test_a_key_is_compared_in_full(self, ns: Namespace) -> None:
        for length in KEY_LENGTHS:
            keys = [b"k" * (length - 1) + bytes([last]) for last in (0, 1, 255)]
            for key in keys:
                ns.put(key, key + b"!")
            assert ns.get_many(keys) == [key + b"!" for key in keys]
            assert ns.get(b"k" * length) is None

    def test_a_str_key_is_its_utf8(self, ns: Namespace) -> None:
        ns.put("größe", b"1")
        assert ns.get("größe".encode()) == b"1"

    def test_a_key_is_no_prefix_of_another(self, ns: Namespace) -> None:
        ns.put(b"a", b"1")
        ns.put(b"a\0", b"2")
        assert (ns.get(b"a"), ns.get(b"a\0"), ns.get(b"a\0\0")) == (b"1", b"2", None)

    def test_what_is_no_key_raises_invalid_key(self, ns: Namespace) -> None:
        for key in NO_KEYS:
            for use in (ns.get, ns.pin, ns.delete, lambda k: ns.put(k, b""), lambda k: k in ns):
                with pytest.raises(InvalidKey):
                    use(key)
            for use_many in (ns.get_many, ns.pin_many, ns.contains_prefix):
                with pytest.raises(InvalidKey):
                    use_many([b"a", key])
            if not isinstance(key, bytearray):  # which a dict can't hold
                with pytest.raises(InvalidKey):
                    ns.put_many({b"a": b"1", key: b"2"})
            with pytest.raises(InvalidKey), ns.reserve(key, 1):
                pass

    @pytest.mark.parametrize("one_key", ["abc", b"abc"])
    def test_one_key_is_no_sequence_of_keys(self, ns: Namespace, one_key: Any) -> None:
        for use_many in (ns.get_many, ns.pin_many, ns.contains_prefix, ns.delete_many):
            with pytest.raises(InvalidKey):
                use_many(one_key)

    @pytest.mark.parametrize("given", [dict.keys, iter, tuple], ids=["view", "iterator", "tuple"])
    def test_keys_may_come_from_anything_that_yields_them(
        self, cache: Cache, ns: Namespace, given: Callable[[dict[str, bytes]], Any]
    ) -> None:
        items = {f"key {i}": pattern(100 * i) for i in range(10)}
        asked = {"key 0": b"", "absent": b"", **items}
        expected = [items.get(key) for key in asked]
        ns.put_many(items)
        cache.flush()
        for leave in (lambda: None, cache.demote):
            leave()
            assert ns.get_many(given(asked)) == expected
            leave()
            assert [None if pin is None else bytes(pin) for pin in ns.pin_many(given(asked))] == expected
            leave()
            assert ns.contains_prefix(given(items)) == len(items)
        assert ns.delete_many(given(asked)) == len(items)

    @pytest.mark.parametrize(
        "value",
        [
            bytearray(b"some bytes"),
            memoryview(b"some bytes"),
            memoryview(b"s.o.m.e. .b.y.t.e.s.")[::2],
            array.array("d", [1.5, 2.5]),
            np.arange(24, dtype="<i4").reshape(2, 3, 4),
            np.arange(24, dtype="<i4").reshape(4, 6).T,
            np.arange(100, dtype=np.float16)[::-3],
            np.float64(0.5),
        ],
        ids=lambda value: f"{type(value).__name__}",
    )
    def test_any_buffer_is_a_value(self, ns: Namespace, value: Any) -> None:
        ns.put("key", value)
        expected = value.tobytes() if hasattr(value, "tobytes") else bytes(value)
        assert ns.get("key") == expected

    def test_a_mapped_file_is_a_value(self, ns: Namespace) -> None:
        with mmap.mmap(-1, 100_000) as mapped:
            mapped[:] = pattern(100_000)
            ns.put("key", mapped)
        assert ns.get("key") == pattern(100_000)

    @pytest.mark.parametrize("value", [None, 1, "text", [b"a"], object()])
    def test_what_is_no_buffer_raises_invalid_value(self, ns: Namespace, value: Any) -> None:
        ns.put("key", b"old")
        with pytest.raises(InvalidValue):
            ns.put("key", value)
        with pytest.raises(InvalidValue):
            ns.put_many({"key": value})
        assert ns.get("key") == b"old"

    def test_a_value_larger_than_memory_raises_tier_full_and_changes_nothing(self, cache: Cache, ns: Namespace) -> None:
        ns.put("key", b"old")
        too_large = np.zeros(cache.options.memory + 1, np.uint8)
        with pytest.raises(TierFull) as raised:
            ns.put("key", too_large)
        assert raised.value.need > cache.options.memory
        with pytest.raises(TierFull), ns.reserve("key", too_large.nbytes):
            pass
        assert ns.get("key") == b"old"

    # ---- Put

    def test_put_replaces(self, ns: Namespace) -> None:
        for size in (10, 70_000, 0, 5):
            ns.put("key", pattern(size))
            assert ns.get("key") == pattern(size)

    def test_put_many_stores_in_the_order_given(self, ns: Namespace) -> None:
        items = {f"key {i}": pattern(i * 1000, i) for i in range(50)}
        ns.put_many(items)
        assert ns.get_many(list(items)) == list(items.values())

    def test_put_many_of_nothing_does_nothing(self, ns: Namespace) -> None:
        ns.put_many({})

    def test_put_many_keeps_what_came_before_a_failure(self, cache: Cache, ns: Namespace) -> None:
        with pytest.raises(TierFull):
            ns.put_many({"a": b"1", "b": np.zeros(cache.options.memory + 1, np.uint8), "c": b"3"})
        assert ns.get_many(["a", "b", "c"]) == [b"1", None, None]

    # ---- Reserve

    def test_a_reservation_is_stored_at_the_end_of_its_block(self, ns: Namespace) -> None:
        for size in SIZES:
            ns.put("key", b"old")
            with ns.reserve("key", size) as view:
                assert view.nbytes == size
                assert not view.readonly
                view[:] = pattern(size)
                assert ns.get("key") == b"old"
            assert ns.get("key") == pattern(size)

    def test_an_exception_drops_a_reservation(self, ns: Namespace) -> None:
        ns.put("key", b"old")
        with pytest.raises(RuntimeError, match="mine"), ns.reserve("key", 100):
            raise RuntimeError("mine")
        assert ns.get("key") == b"old"

    def test_a_reservation_can_be_filled_through_an_array(self, ns: Namespace) -> None:
        with ns.reserve("key", 8000) as view:
            filled = np.frombuffer(view, np.float64)
            filled[:] = np.arange(1000)
        assert ns.get("key") == np.arange(1000.0).tobytes()
        assert filled[-1] == 999  # still readable, though nobody should write there

    def test_the_view_of_a_reservation_ends_with_its_block(self, ns: Namespace) -> None:
        with ns.reserve("key", 10) as view:
            view[:] = b"0123456789"
        with pytest.raises(ValueError, match="released"):
            view[0] = 1

    # ---- Get

    def test_get_of_an_absent_key_gives_the_default(self, ns: Namespace) -> None:
        marker = object()
        assert ns.get("absent") is None
        assert ns.get("absent", marker) is marker
        assert ns.get("absent", marker, out=bytearray(10)) is marker

    def test_get_fills_the_start_of_out(self, ns: Namespace) -> None:
        for size in SIZES:
            ns.put("key", pattern(size))
            out = bytearray(b"\xee" * (size + 10))
            filled = ns.get("key", out=out)
            assert filled is not None
            assert filled == pattern(size)
            assert filled.nbytes == size
            assert out == pattern(size) + b"\xee" * 10

    def test_out_may_be_an_array_of_any_type(self, ns: Namespace) -> None:
        values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
        ns.put("key", values)
        out = np.empty_like(values)
        assert ns.get("key", out=out) == values.tobytes()
        assert np.array_equal(out, values)

    @pytest.mark.parametrize(
        "out",
        [bytearray(9), b"readonly  ", memoryview(bytearray(40))[::2], "text", np.empty((10, 10)).T[::2]],
    )
    def test_an_unfit_out_raises_invalid_value_and_is_not_touched(self, ns: Namespace, out: Any) -> None:
        ns.put("key", b"0123456789")
        before = bytes(out) if not isinstance(out, str) else out
        with pytest.raises(InvalidValue):
            ns.get("key", out=out)
        with pytest.raises(InvalidValue):
            ns.get_many(["key"], out=[out])
        assert (bytes(out) if not isinstance(out, str) else out) == before

    def test_get_many_keeps_the_order_and_gives_none_where_absent(self, ns: Namespace) -> None:
        ns.put_many({"a": b"1", "b": pattern(70_000)})
        assert ns.get_many(["b", "x", "a", "b"]) == [pattern(70_000), None, b"1", pattern(70_000)]
        assert ns.get_many([]) == []

    def test_get_many_takes_more_keys_than_can_be_pinned_at_once(self, ns: Namespace) -> None:
        ns.put("key", b"1")
        assert ns.get_many(["key", "absent"] * 10_000) == [b"1", None] * 10_000

    def test_get_many_fills_one_out_per_key(self, ns: Namespace) -> None:
        ns.put_many({"a": b"1", "b": b"22"})
        outs = [bytearray(3) for _ in range(3)]
        assert ns.get_many(["a", "absent", "b"], out=outs) == [b"1", None, b"22"]
        assert outs == [b"1\0\0", b"\0\0\0", b"22\0"]
        with pytest.raises(InvalidValue):
            ns.get_many(["a", "b"], out=outs)

    def test_contains_prefix_counts_the_leading_run(self, ns: Namespace) -> None:
        ns.put_many({f"key {i}": b"" for i in range(100) if i != 60})
        keys = [f"key {i}" for i in range(110)]
        assert ns.contains_prefix(keys) == 60
        assert ns.contains_prefix(keys[61:]) == 39
        assert ns.contains_prefix(keys[:20]) == 20
        assert ns.contains_prefix(["absent", *keys]) == 0
        assert ns.contains_prefix([]) == 0

    # ---- Pin

    def test_a_pin_shows_the_value(self, ns: Namespace) -> None:
        for size in SIZES:
            ns.put("key", pattern(size))
            with ns.pin("key") as view:
                assert view == pattern(size)
                assert view.readonly
            assert ns.get("key") == pattern(size)

    def test_pin_of_an_absent_key_raises_key_error(self, ns: Namespace) -> None:
        with pytest.raises(KeyError):
            ns.pin("absent")

    def test_a_pinned_value_stays_whatever_becomes_of_its_key(self, ns: Namespace) -> None:
        for size in (100, 5000, 70_000):
            ns.put("key", pattern(size, 1))
            with ns.pin("key") as first:
                ns.put("key", pattern(size, 2))
                with ns.pin("key") as second:
                    ns.delete("key")
                    ns.put("key", pattern(size, 3))
                    with ns.pin("key") as third:
                        ns.clear()
                        for i in range(20):
                            ns.put(f"another {i}", pattern(size, 10 + i))
                        assert [first, second, third] == [pattern(size, i) for i in (1, 2, 3)]
            assert ns.get("key") is None

    def test_a_value_may_be_pinned_many_times_over(self, ns: Namespace) -> None:
        ns.put("key", b"value")
        pins = [ns.pin("key") for _ in range(1000)]
        ns.delete("key")
        assert all(bytes(pin.__enter__()) == b"value" for pin in pins)
        for pin in pins:
            pin.release()

    def test_an_array_over_a_pin_keeps_it(self, ns: Namespace) -> None:
        ns.put("key", np.arange(10_000))
        with ns.pin("key") as view:
            values = np.frombuffer(view, np.int64)
        ns.delete("key")
        for i in range(10):
            ns.put(f"another {i}", pattern(80_000))
        assert np.array_equal(values, np.arange(10_000))
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1

    def test_the_view_of_a_pin_ends_with_its_block(self, ns: Namespace) -> None:
        ns.put("key", b"value")
        with ns.pin("key") as view:
            pass
        with pytest.raises(ValueError, match="released"):
            bytes(view)

    def test_pin_many_pins_what_is_present(self, ns: Namespace) -> None:
        ns.put_many({"a": b"1", "b": pattern(70_000)})
        a, absent, b, again = ns.pin_many(["a", "absent", "b", "a"])
        assert absent is None
        assert a is not None
        assert b is not None
        assert again is not None
        assert (len(a), len(b)) == (1, 70_000)
        with a as first, b as second, again as third:
            ns.clear()
            assert [first, second, third] == [b"1", pattern(70_000), b"1"]
        assert ns.pin_many([]) == []

    # ---- Removing

    def test_delete_removes_and_says_whether_it_was_there(self, ns: Namespace) -> None:
        ns.put("key", b"1")
        assert ns.delete("key") is True
        assert ns.delete("key") is False
        assert ns.get("key") is None
        assert "key" not in ns
        ns.put("key", b"2")
        assert ns.get("key") == b"2"

    def test_delete_many_removes_and_counts_those_that_were_there(self, ns: Namespace) -> None:
        keys = [f"key {i}" + "." * (i % 3 * 20) for i in range(30)]
        ns.put_many(dict.fromkeys(keys, b"1"))
        assert ns.delete_many([*keys[::2], "absent", keys[0]]) == 15
        assert ns.get_many(keys) == [None, b"1"] * 15
        assert ns.delete_many([]) == 0

    def test_keys_lists_what_is_there(self, ns: Namespace, namespace: Namespaces) -> None:
        namespace("another").put("a/0", b"1")
        names = [f"{letter}/{i}" + "." * (i % 3 * 20) for letter in "ab" for i in range(20)]
        ns.put_many(dict.fromkeys(names, b"1"))
        ns.delete("a/3" + "." * 0)
        left = {name.encode() for name in names} - {b"a/3"}
        assert set(ns.keys()) == left
        assert sorted(ns.keys("a/1")) == sorted(key for key in left if key.startswith(b"a/1"))
        assert list(ns.keys(b"c")) == []

    @pytest.mark.parametrize("prefix", [b"user/1/", b"user/1/\xff", b"\xff\xff", b"u"])
    def test_delete_prefix_removes_all_keys_that_start_with_it(
        self, ns: Namespace, namespace: Namespaces, prefix: bytes
    ) -> None:
        starts = [b"user/1/", b"user/1", b"user/10/", b"user/1/\xff", b"user/2/", b"\xff\xff", b"\xff", b"\xfe\xff"]
        keys = [start + bytes([i]) + b"." * (i % 3 * 20) for start in starts for i in range(5)]
        another = namespace("another")
        for each in (ns, another):
            each.put_many(dict.fromkeys(keys, b"1"))
        gone = [key for key in keys if key.startswith(prefix)]
        assert ns.delete_prefix(prefix) == len(gone)
        assert ns.get_many(keys) == [None if key in gone else b"1" for key in keys]
        assert another.contains_prefix(keys) == len(keys)
        assert ns.delete_prefix(prefix) == 0
        ns.put_many(dict.fromkeys(gone, b"2"))
        assert ns.get_many(gone) == [b"2"] * len(gone)

    @pytest.mark.parametrize("prefix", ["", b"", None, 1, bytearray(b"a"), "\ud800"])
    def test_what_is_no_prefix_raises_invalid_key(self, ns: Namespace, prefix: Any) -> None:
        ns.put("key", b"1")
        with pytest.raises(InvalidKey):
            ns.delete_prefix(prefix)
        assert ns.get("key") == b"1"

    def test_delete_tag_removes_what_was_put_with_it_before(self, ns: Namespace, namespace: Namespaces) -> None:
        another = namespace("another")
        for each in (ns, another):
            each.put("first", b"1", tags=["user 1", b"document"])
            each.put("second", b"1", tags=["user 2", "document"])
            each.put_many({"third": b"1", "fourth": b"1"}, tags=["user 1"])
            with each.reserve("fifth", 1, tags=["a", "b", "c", "user 1"]) as view:
                view[:] = b"1"
            each.put("without", b"1")
        keys = ["first", "second", "third", "fourth", "fifth", "without"]
        ns.delete_tag("user 1")
        assert ns.get_many(keys) == [None, b"1", None, None, None, b"1"]
        assert ns.contains_prefix(["second", "first"]) == 1
        assert another.get_many(keys) == [b"1"] * 6
        ns.put("first", b"2", tags=["user 1"])
        ns.delete_tag("nobody has it")
        assert ns.get_many(keys) == [b"2", b"1", None, None, None, b"1"]
        ns.delete_tag(b"document")
        assert ns.get_many(keys) == [b"2", None, None, None, None, b"1"]
        ns.put("first", b"3")  # overwritten without
        ns.delete_tag("user 1")
        assert ns.get("first") == b"3"

    def test_more_tags_than_a_record_can_have_are_refused(self, ns: Namespace) -> None:
        for put in (lambda tags: ns.put("key", b"1", tags=tags), lambda tags: ns.put_many({"key": b"1"}, tags=tags)):
            with pytest.raises(InvalidValue, match="tags"):
                put(["a", "b", "c", "d", "e"])
            for no_tags in ("text", [1], [""]):
                with pytest.raises(InvalidKey):
                    put(no_tags)
        assert "key" not in ns

    def test_clear_empties_this_namespace_only(self, cache: Cache, ns: Namespace, namespace: Namespaces) -> None:
        another = namespace("another")
        for each in (ns, another):
            each.put_many({f"key {i}": b"1" for i in range(20)})
        ns.clear()
        assert ns.get_many([f"key {i}" for i in range(20)]) == [None] * 20
        assert ns.contains_prefix(["key 0"]) == 0
        assert another.contains_prefix([f"key {i}" for i in range(20)]) == 20
        ns.put("key 0", b"2")
        assert ns.get_many(["key 0", "key 1"]) == [b"2", None]

    # ---- Namespaces

    def test_namespaces_hold_their_own_keys(self, namespace: Namespaces) -> None:
        names = ["default", "a", "ä/ö ü", "x" * 128]
        for name in names:
            namespace(name).put("key", name.encode())
        assert [namespace(name).get("key") for name in names] == [name.encode() for name in names]

    def test_a_newer_version_never_sees_older_records(self, namespace: Namespaces) -> None:
        old = namespace("versioned", version=3)
        old.put("key", b"old")
        new = namespace("versioned", version=7)
        assert new.get("key") is None
        assert old.get("key") is None
        assert old.contains_prefix(["key"]) == 0
        for write in (
            lambda: old.put("key", b"late"),
            lambda: old.delete("key"),
            lambda: old.delete_many([]),
            lambda: old.delete_prefix("k"),
            lambda: old.delete_tag("tag"),
            old.clear,
        ):
            with pytest.raises(VersionConflict):
                write()
        new.put("key", b"new")
        assert (new.get("key"), old.get("key")) == (b"new", None)
        with pytest.raises(VersionConflict):
            namespace("versioned", version=6)
        assert namespace("versioned", version=7).get("key") == b"new"

    def test_a_reservation_made_before_a_newer_version_is_refused(self, namespace: Namespaces) -> None:
        old = namespace("versioned", version=1)
        with pytest.raises(VersionConflict), old.reserve("key", 10):
            new = namespace("versioned", version=2)
        assert new.get("key") is None

    def test_an_immutable_namespace_keeps_the_first_value(self, namespace: Namespaces) -> None:
        ns = namespace("immutable", immutable=True)
        ns.put("key", b"first")
        ns.put("key", b"second")
        ns.put_many({"key": b"third", "another": b"1"})
        with ns.reserve("key", 6) as view:
            view[:] = b"fourth"
        assert ns.get_many(["key", "another"]) == [b"first", b"1"]
        assert ns.delete("key")
        ns.put("key", b"fifth")
        assert ns.get("key") == b"fifth"

    def test_a_quota_bounds_the_memory_of_its_namespace(self, cache: Cache, namespace: Namespaces) -> None:
        ns = namespace("small", quota="256KiB")
        for i in range(100):
            ns.put(f"key {i}", pattern(10_000, i))
            assert cache.stats()["namespaces"]["small"]["memory_bytes"] <= 256 * 1024
        assert ns.get("key 99") == pattern(10_000, 99)
        for i in range(20):
            ns.put_many({f"small {i} {n}": bytes(3000) for n in range(i + 1)})
            assert cache.stats()["namespaces"]["small"]["memory_bytes"] <= 256 * 1024
        with pytest.raises(TierFull):
            ns.put("key", bytes(256 * 1024))

    # ---- Time to live

    def test_a_record_is_gone_when_its_time_is_over(self, ns: Namespace, namespace: Namespaces) -> None:
        ns.put("long", b"1", ttl=1000)
        ns.put("short", b"1", ttl=0.01)
        with ns.reserve("reserved", 1, ttl=0.01) as view:
            view[:] = b"1"
        another = namespace("short-lived", ttl=0.01)
        another.put("short", b"1")
        another.put("long", b"1", ttl=1000)
        while "short" in ns or "reserved" in ns or "short" in another:
            pass  # the test's own time limit ends this if they stay
        assert ns.get_many(["long", "short", "reserved"]) == [b"1", None, None]
        assert another.get_many(["long", "short"]) == [b"1", None]
        assert ns.delete("short") is False
        ns.put("short", b"2")
        assert ns.get("short") == b"2"

    def test_jitter_lets_records_expire_at_different_times(self, namespace: Namespaces) -> None:
        ns = namespace("jittered", ttl=2, ttl_jitter=1)
        keys = [f"key {i}" for i in range(100)]
        ns.put_many(dict.fromkeys(keys, b"1"))
        seen = set()
        while left := sum(value is not None for value in ns.get_many(keys)):
            seen.add(left)
        assert len(seen) > 5  # they don't all go at once

    # ---- The cache itself

    def test_every_verb_of_a_closed_cache_raises_cache_closed(self, cache: Cache, ns: Namespace) -> None:
        ns.put("key", b"1")
        cache.close()
        cache.close()
        verbs: list[Callable[[], object]] = [
            lambda: ns.put("key", b"1"),
            lambda: ns.put_many({"key": b"1"}),
            lambda: ns.reserve("key", 1).__enter__(),
            lambda: ns.get("key"),
            lambda: ns.get("key", out=bytearray(1)),
            lambda: ns.get_many(["key"]),
            lambda: ns.pin("key"),
            lambda: ns.pin_many(["key"]),
            lambda: ns.contains_prefix(["key"]),
            lambda: "key" in ns,
            lambda: ns.delete("key"),
            lambda: ns.delete_many(["key"]),
            lambda: ns.delete_prefix("key"),
            lambda: ns.delete_tag("tag"),
            lambda: list(ns.keys()),
            lambda: cache.holder("holder", limit=1000),
            ns.clear,
            lambda: cache.namespace("another"),
            cache.stats,
            cache.flush,
            cache.demote,
        ]
        for verb in verbs:
            with pytest.raises(KVStrataError) as raised:
                verb()
            assert type(raised.value).__name__ == "CacheClosed"

    def test_a_pinned_value_outlives_its_cache(self, cache: Cache, ns: Namespace) -> None:
        ns.put("key", pattern(70_000))
        with ns.pin("key") as view:
            cache.close()
            assert view == pattern(70_000)

    def test_the_statistics_tell_what_was_done(self, cache: Cache, ns: Namespace) -> None:
        before = cache.stats()["memory"]
        ns.put("key", b"1")
        ns.get("key")
        ns.get("absent")
        ns.delete("key")
        after = cache.stats()["memory"]
        for name in ("puts", "hits", "misses", "deletes"):
            assert after[name] == before[name] + 1, name
        assert cache.stats()["namespaces"][ns.name]["records"] == 0
