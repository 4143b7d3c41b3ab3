"""What stats() says of the memory tier's use."""

from __future__ import annotations

from conftest import OpenCache

MIB = 1 << 20


def test_utilisation_is_the_part_of_the_memory_that_records_take(open_cache: OpenCache) -> None:
    cache = open_cache(memory="8MiB")
    assert cache.stats()["memory"]["memory_utilisation"] == 0
    for i in range(3):
        cache.put(f"large {i}", bytes(MIB))
    cache.put("small", bytes(100))
    stats = cache.stats()["memory"]
    records = stats["memory_record_bytes"]
    assert 3 * MIB + 100 < records < 3 * MIB + 20_000
    assert stats["memory_utilisation"] == records / stats["memory_bytes"]
    assert records <= stats["memory_used_bytes"] == stats["memory_bytes"] - stats["memory_free_bytes"]
    for i in range(3):
        cache.delete(f"large {i}")
    cache.delete("small")
    stats = cache.stats()["memory"]
    assert (stats["memory_record_bytes"], stats["memory_utilisation"], stats["memory_used_bytes"]) == (0, 0, 0)


def test_fragmentation_is_the_part_of_the_free_memory_outside_its_largest_piece(open_cache: OpenCache) -> None:
    cache = open_cache(memory="8MiB")
    assert cache.stats()["memory"]["memory_fragmentation"] == 0
    keys = [str(i) for i in range(80)]
    cache.put_many(dict.fromkeys(keys, bytes(92 * 1024)))  # with their headers 96 KiB: 80 make 7.5 MiB
    assert cache.stats()["memory"]["memory_fragmentation"] == 0  # what is free lies at the end
    for key in keys[::2]:
        cache.delete(key)
    stats = cache.stats()["memory"]
    largest, free = stats["memory_largest_free_bytes"], stats["memory_free_bytes"]
    assert largest < 0.2 * free
    assert stats["memory_fragmentation"] == 1 - largest / free
    for key in keys[1::2]:
        cache.delete(key)
    assert cache.stats()["memory"]["memory_fragmentation"] == 0


def test_deletions_that_reached_the_disk_leave_no_debts(open_cache: OpenCache) -> None:
    cache = open_cache(memory="8MiB", disk="64MiB")
    keys = [str(i) for i in range(200)]
    cache.put_many(dict.fromkeys(keys, bytes(1000)))
    cache.flush()
    for key in keys[:100]:
        cache.delete(key)
    cache.put_many(dict.fromkeys(keys[100:], b"another"))
    stats = cache.stats()["memory"]
    assert (stats["debt_keys"], stats["debt_fill"], stats["debt_fp_rate"]) == (0, 0, 0)
