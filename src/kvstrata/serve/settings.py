"""What `kvstrata serve` was told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvstrata.errors import ConfigError

__all__ = ["ServeSettings"]


@dataclass(frozen=True)
class ServeSettings:
    """Options of the server, the same in all its workers.

    model: a directory or a GGUF file. name: what clients call it. path: the cache's directory; None is a temporary one.
    queue: how many requests may wait in a worker for the one that is computed.
    grace: seconds that requests have to finish when the server is told to stop.
    threads: of torch, in each worker; 0 is the cores divided by the workers.
    """

    model: str
    name: str = ""
    path: str = ""
    memory: str = "1GiB"
    disk: str | None = None
    dtype: str = "float32"
    block_tokens: int = 32
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int = 0
    queue: int = 16
    grace: int = 30

    def __post_init__(self) -> None:
        """Refuse what can't be served; raises ConfigError."""
        if self.workers < 1 or self.queue < 0 or self.grace < 0 or self.threads < 0:
            raise ConfigError("workers must be at least 1; queue, grace and threads at least 0")
        if not Path(self.model).exists():
            raise ConfigError(f"there is no model at {self.model}")

    @property
    def served_name(self) -> str:
        """What clients call the model: its name, or that of its file or directory."""
        place = Path(self.model)
        return self.name or (place.stem if place.suffix == ".gguf" else place.resolve().name)
