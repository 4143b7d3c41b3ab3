"""What the connector's two sides tell each other: the scheduler's, which knows requests, and the workers', with KV."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstrata.codecs.base import TensorInfo

__all__ = ["Load", "Progress", "Rank", "Shard", "Store", "Work"]


@dataclass
class Load:
    """Blocks of a group of layers to be loaded for a request, and where to; `with_step`, not ahead of the step."""

    request: str
    group: int
    keys: list[bytes]
    blocks: list[int]
    with_step: bool


@dataclass
class Store:
    """Blocks of a group that this step completes, from number `first` of the request on, and where they are."""

    number: int
    request: str
    group: int
    first: int
    keys: list[bytes]
    blocks: list[int]


@dataclass
class Work(KVConnectorMetadata):  # type: ignore[misc]
    """What a step brings for the workers. `fresh` blocks are written from now on, whatever they held.

    An `idle` step computes nothing.
    """

    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    fresh: set[int] = field(default_factory=set)
    layerwise: bool = False
    idle: bool = False


@dataclass
class Shard:
    """Where a worker keeps its part of each block of a group."""

    group: int
    namespace: str
    block_bytes: int
    tensor: TensorInfo | None


@dataclass
class Rank(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """The shards of a worker: one for each group of which it has layers."""

    shards: list[Shard]


@dataclass
class Progress(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """How many blocks of each store are there, from the first on, as each worker says of its own."""

    stored: dict[int, list[int]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Progress:
        """Join what two workers say."""
        for number, counts in other.stored.items():
            self.stored.setdefault(number, []).extend(counts)
        return self
