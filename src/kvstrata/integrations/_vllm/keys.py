"""Keys of the blocks of vLLM's requests: of their tokens, their adapter's content, their salt, their images.

vLLM's own hashes name an adapter by its name and, with some algorithms, begin with a random number in each process.
Those here depend on what the KV depends on, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blake3

from kvstrata.keys import prefix_keys

__all__ = ["Adapters", "RequestKeys", "seed_of"]

_CONTEXT = "kvstrata 2026-11-25 vllm request"


def seed_of(*, adapter: str, salt: str, generation: str) -> bytes:
    """Return the key of the digests of all requests that have these in common."""
    digest = blake3.blake3(derive_key_context=_CONTEXT)
    for part in (adapter, salt, generation):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


class RequestKeys:
    """The keys of one request's blocks, made as far as they are asked for.

    `features` are vLLM's own of its images and the like, in order: a block depends on those that it overlaps, and by
    the chain on all before. In a session vLLM adds more to them, with the tokens that they lie in.
    """

    def __init__(self, seed: bytes, block_tokens: int, features: Sequence[Any] = ()) -> None:
        self._seed = seed
        self._block_tokens = block_tokens
        self._features = features
        self._keys: list[bytes] = []

    def upto(self, tokens: Sequence[int], blocks: int) -> list[bytes]:
        """Return the keys of the first blocks; `tokens` are those of the request from its beginning."""
        have = len(self._keys)
        if blocks > have:
            size = self._block_tokens
            after = {"after": self._keys[-1]} if have else {}
            extra = self._extra(have, blocks) if self._features else None
            self._keys += prefix_keys(tokens[have * size : blocks * size], self._seed, size, extra=extra, **after)
        return self._keys[:blocks]

    def _extra(self, first: int, end: int) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        size = self._block_tokens
        for feature in self._features:
            offset, length = feature.mm_position.offset, feature.mm_position.length
            for block in range(max(first, offset // size), min(end, -(-(offset + length) // size))):
                data = feature.identifier.encode()
                place = (offset - block * size).to_bytes(8, "little", signed=True)
                found[block - first] = found.get(block - first, b"") + len(data).to_bytes(8, "little") + data + place
        return found


class Adapters:
    """LoRA adapters by the digest of their files, taken when they are first seen, as vLLM loads them then.

    `dtype` is the one that they are computed in.
    """

    def __init__(self, dtype: object = None) -> None:
        self._dtype = str(dtype)
        self._known: dict[tuple[int, str], tuple[object, str]] = {}

    def identity(self, request: Any) -> str | None:
        """Return a digest for a LoRARequest, "" for None; None where it isn't certain which weights are in use."""
        if request is None:
            return ""
        try:
            files = sorted(path for path in _directory(request.lora_path).iterdir() if path.is_file())
            state = [(path.name, status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]]
            name = (request.lora_int_id, request.lora_path)
            if name not in self._known:
                digest = blake3.blake3(self._dtype.encode() + b"\0")
                for path in files:
                    content = blake3.blake3().update_mmap(path).digest()
                    digest.update(path.name.encode() + b"\0" + content)
                self._known[name] = state, digest.hexdigest()
        except OSError:
            return None
        seen, identity = self._known[name]
        # Once the files were changed, vLLM may have loaded the old ones or the new ones.
        return identity if seen == state and files else None


def _directory(name: str) -> Path:
    """The directory of an adapter that is given by its path, or by its name on the hub and was downloaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError as error:
        raise FileNotFoundError(name) from error
