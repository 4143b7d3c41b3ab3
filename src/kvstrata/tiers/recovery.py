"""What the segments alone can tell when the catalog is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvstrata.errors import CorruptRecord
from kvstrata.record import IMMUTABLE, TAGGED, NamespaceInfo, parse_descriptor

if TYPE_CHECKING:
    from kvstrata.tiers.catalog import Row
    from kvstrata.tiers.segments import SegmentSet

__all__ = ["recovered"]

_BATCH = 4096


def recovered(segments: SegmentSet, namespaces: dict[int, NamespaceInfo]) -> Iterator[list[Row]]:
    """Yield, in batches, rows of all immutable records that are found, and fill in `namespaces` by number.

    Mutable records don't come back: they could have been deleted or overwritten; nor do those with tags. Rows of
    older epochs and versions are among those that do; which are the newest is known at the end. A namespace that
    is in `namespaces` already keeps its name, and its epoch and version are only raised. What a newer segment
    says of a number or a name counts against an older one.
    """
    numbers = {info.name: info.id for info in namespaces.values()}
    rows: list[Row] = []
    for segment in reversed(segments.all()):
        described: dict[int, NamespaceInfo] = {}
        for offset, record, payload in segments.scan(segment.number):
            if payload is not None:
                described.pop(record.ns, None)
                with contextlib.suppress(CorruptRecord):
                    info = parse_descriptor(payload)
                    known = namespaces.get(info.id)
                    is_new = known is None and info.name not in numbers
                    if info.id == record.ns and (is_new or (known is not None and known.name == info.name)):
                        described[info.id] = info
                        namespaces[info.id] = _newest(known or info, info)
                        numbers[info.name] = info.id
                continue
            info_of_record = described.get(record.ns)
            if (
                info_of_record is not None
                and info_of_record.immutable
                and record.flags & (IMMUTABLE | TAGGED) == IMMUTABLE
            ):
                rows.append(
                    (
                        record.ns,
                        record.key,
                        record.seq,
                        segment.number,
                        offset,
                        record.length,
                        record.expires,
                        record.version,
                        record.epoch,
                        record.flags,
                        0,
                    )
                )
                if len(rows) >= _BATCH:
                    yield rows
                    rows = []
    yield rows


def _newest(known: NamespaceInfo, found: NamespaceInfo) -> NamespaceInfo:
    return NamespaceInfo(
        known.id,
        known.name,
        max(known.version, found.version),
        max(known.epoch, found.epoch),
        known.immutable,
    )
