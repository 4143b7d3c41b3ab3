"""A cache for llama-cpp-python that outlives the process and is shared by all: in the place of its LlamaRAMCache.

    llm = llama_cpp.Llama(model_path="model.gguf", n_ctx=4096)
    llm.set_cache(KVStrataCache(llm, "/var/cache/kv-llama-cpp"))

A completion then begins with the state of the longest prefix that any process has stored: exact to the token, loaded
straight from the cache's memory into the context. Trouble in the cache never fails a completion: it runs cold and is
counted.

llama.cpp gives the state of a sequence as one piece, which can be cut at its end but not put together. So a state is
stored as a whole, once there are `new_tokens` that no stored one covers, and a small record for each of its blocks
points to it: a prompt that shares its first blocks finds it, whatever follows there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blake3
import numpy as np

from kvstrata.cache import Cache
from kvstrata.errors import ConfigError, CorruptRecord, MissingExtra, UnsupportedModel
from kvstrata.integrations._blocks import EngineBlocks
from kvstrata.keys import DEFAULT_BLOCK_TOKENS, prefix_keys
from kvstrata.opening import open as open_cache
from kvstrata.tiers.base import Stats

try:
    import llama_cpp
    from llama_cpp import llama_cpp as native
    from llama_cpp.llama import Llama, LlamaState
    from llama_cpp.llama_cache import BaseLlamaCache
except ImportError as error:
    raise MissingExtra("llama-cpp", error.name or "llama-cpp-python") from error

__all__ = ["KVStrataCache"]

_HEAD = struct.Struct("<II")  # version, tokens
_VERSION = 1
_ALIGN = 64
_SEED_CONTEXT = "kvstrata 2026-11-25 llama.cpp sequence state"
_NAMES_BYTES = 256 << 20
"""At the beginning of a GGUF: vocabulary and names of tensors, which take some 20 MB, end before that."""

_TRIES = 3
"""States that are looked for, where those that records point to have been evicted."""

_PARAMETERS = (
    "type_k", "type_v", "flash_attn_type", "offload_kqv", "rope_scaling_type", "rope_freq_base",
    "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx",
    "attention_type", "swa_full", "kv_unified",
)  # fmt: skip


class KVStrataCache(BaseLlamaCache):  # type: ignore[misc]  # llama_cpp has no types
    """Sequence states of one `llm` in a kvstrata cache; give it to `llm.set_cache`.

    cache: an open Cache, or a path (opened with defaults, closed by `close`).
    salt: a secret of the tenant; under different salts nothing is shared.
    block_tokens: at which lengths a state can be found; what it then brings is exact to the token.
    new_tokens: a state is stored once it has so many tokens that no stored one covers.

    What a state depends on is part of the key: the content of the model's files and of a LoRA's, types of the KV,
    attention and rope settings, the context's length where a rope has factors for long ones, and the version of
    llama-cpp-python. Raises UnsupportedModel for models and contexts
    whose state can't be cut to a prefix, and for logits_all=True.
    """

    def __init__(
        self,
        llm: Llama,
        cache: Cache | str | os.PathLike[str],
        *,
        salt: str | bytes = b"",
        block_tokens: int = DEFAULT_BLOCK_TOKENS,
        new_tokens: int = 64,
    ) -> None:
        if llm._is_recurrent or llm._is_hybrid:
            raise UnsupportedModel("the state of a recurrent or hybrid model can't be cut to a prefix")
        if native.llama_model_n_swa(llm._model.model) and not llm.context_params.swa_full:
            raise UnsupportedModel("swa_full=False forgets what a shorter prefix would need")
        if llm._logits_all:
            raise UnsupportedModel("logits_all=True wants logits of the prompt, and a stored state has none")
        if block_tokens < 1 or new_tokens < 1:
            raise ConfigError("block_tokens and new_tokens must be at least 1")
        self._opened = open_cache(cache) if isinstance(cache, str | os.PathLike) else None
        cache = self._opened or cache
        if not isinstance(cache, Cache):
            raise ConfigError(f"cache must be a path or a Cache, not {type(cache).__name__}")
        super().__init__(cache.options.memory)
        facts = {"salt": salt.hex() if isinstance(salt, bytes) else salt.encode().hex(), **_facts(llm)}
        self._llm = llm
        self._blocks = EngineBlocks(cache, "llama_cpp", facts)
        self._seed = blake3.blake3(self._blocks.name.encode(), derive_key_context=_SEED_CONTEXT).digest()
        self._block_tokens = block_tokens
        self._new_tokens = new_tokens
        self._reused = 0

    @property
    def cache_size(self) -> int:
        """Bytes of the states that are in memory."""
        stats = self._blocks.cache.stats()["namespaces"]
        return int(stats.get(self._blocks.name, {}).get("memory_bytes", 0))

    @property
    def reused_tokens(self) -> int:
        """How many tokens the last lookup brought into the context."""
        return self._reused

    def stats(self) -> Stats:
        """Return counters of this object since it was made."""
        return self._blocks.stats()

    def close(self) -> None:
        """Close the cache if this object opened it."""
        if self._opened is not None:
            self._opened.close()

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._blocks.match(self._keys(key)) > 0

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """Bring the longest stored prefix of a prompt into the context; raises KeyError where it has as much already.

        The state that is returned says what the context now holds, so that `Llama` doesn't load it once more.
        """
        self._reused = 0
        prompt = np.asarray(key, np.intc)
        keys = self._keys(prompt)
        held = Llama.longest_token_prefix(self._llm._input_ids.tolist(), prompt.tolist())
        found = self._blocks.match(keys)
        for _ in range(_TRIES):
            if found * self._block_tokens <= held:
                break
            tokens = self._restore(keys[found - 1], prompt)
            if tokens:
                self._reused = tokens
                ids = prompt[:tokens].copy()
                return LlamaState(ids, np.empty((0, 0), np.single), tokens, b"", 0, self._llm._seed)
            found = self._blocks.match(keys[: found - 1])
        raise KeyError(tuple(key))

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Store the context's state, unless a stored one covers nearly as much of it.

        `value`, which `Llama` makes for any cache, is a copy of everything, logits included; what is stored is read
        from the context itself.
        """
        del value
        llm = self._llm
        tokens = llm._input_ids.astype("<u4")
        keys = self._keys(tokens)
        covered = self._blocks.match(keys) * self._block_tokens
        if not keys or len(tokens) - covered < self._new_tokens:
            return
        start = _state_at(len(tokens))
        size = native.llama_state_seq_get_size(llm._ctx.ctx, 0)
        name = _state_key(self._seed, keys[-1], tokens)

        def fill(_: int, memory: memoryview) -> None:
            _HEAD.pack_into(memory, 0, _VERSION, len(tokens))
            memory[_HEAD.size : _HEAD.size + tokens.nbytes] = tokens.tobytes()
            if native.llama_state_seq_get_data(llm._ctx.ctx, _pointer(memory, start), size, 0) != size:
                raise OSError("llama.cpp gave less of its state than it said")

        def point(_: int, memory: memoryview) -> None:
            memory[:] = name

        if self._blocks.store([name], start + size, fill):
            self._blocks.store(keys, len(name), point, depth=1)

    def _restore(self, pointer: bytes, prompt: Any) -> int:
        """Load the state that a block's record points to, cut to what the prompt shares; returns its tokens, or 0.

        A state that is bad is removed, and a record that points to none, so that another one may be stored; what can't
        be read, or doesn't fit this context, stays.
        """
        with self._blocks.pinned([pointer]) as (pin,):
            name = bytes(pin) if pin is not None else b""
        if not name:
            return 0
        try:
            with self._blocks.pinned([name]) as (pin,):
                if pin is not None:
                    return self._load(memoryview(pin), prompt)
        except CorruptRecord:
            self._blocks.delete([pointer, name])
            return 0
        if self._blocks.absent([name])[0] and not self._blocks.present_elsewhere([name])[0]:
            self._blocks.delete([pointer])
        return 0

    def _load(self, value: memoryview, prompt: Any) -> int:
        """Load a state, cut to what the prompt shares; returns its tokens, or 0. Raises CorruptRecord if it is bad."""
        version, count = _HEAD.unpack_from(value) if len(value) > _HEAD.size else (0, 0)
        start = _state_at(count)
        if version != _VERSION or len(value) <= start:
            raise CorruptRecord("it isn't the state of a sequence")
        stored = np.frombuffer(value, "<u4", count, _HEAD.size).astype(np.intc)
        shared: int = Llama.longest_token_prefix(stored.tolist(), prompt.tolist())
        if not shared:
            raise CorruptRecord("it is the state of other tokens")
        llm, size = self._llm, len(value) - start
        if count > llm.n_ctx():
            return 0
        done = native.llama_state_seq_set_data(llm._ctx.ctx, _pointer(value, start), size, 0) == size
        if not (done and llm._ctx.kv_cache_seq_rm(-1, shared, -1)):
            llm.reset()  # the next evaluation clears what is in the context
            if not done:
                raise CorruptRecord("llama.cpp doesn't take it")
            return 0
        llm.input_ids[:shared] = prompt[:shared]
        llm.n_tokens = shared
        llm._requires_eval = True
        return shared

    def _keys(self, tokens: Any) -> list[bytes]:
        return prefix_keys(np.asarray(tokens), self._seed, self._block_tokens)


def _facts(llm: Any) -> dict[str, object]:
    """What the state of a sequence depends on besides its tokens."""
    parameters = llm.context_params
    facts: dict[str, object] = {name: str(getattr(parameters, name, "")) for name in _PARAMETERS}
    files = _model_files(llm.model_path)
    facts["model"] = " ".join(map(_digest, files))
    if _is_longrope(llm, files):
        facts["n_ctx"] = llm.n_ctx()  # decides which factors the rope takes
    facts["lora"] = f"{_digest(llm.lora_path)} {llm.lora_scale}" if llm.lora_path else ""
    facts["overrides"] = str(llm.kv_overrides)
    facts["version"] = llama_cpp.__version__
    return facts


def _model_files(path: str) -> list[Path]:
    """All files of a model, which may be split; llama.cpp is given the first one."""
    split = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path, re.DOTALL)
    if split is None:
        return [Path(path)]
    return [Path(f"{split[1]}-{number:05}-of-{split[2]}.gguf") for number in range(1, int(split[2]) + 1)]


def _is_longrope(llm: Any, files: list[Path]) -> bool:
    """Whether a rope has factors for long contexts, and others for short ones: the model says so, or has them."""
    if any(name.endswith(".rope.scaling.type") and text == "longrope" for name, text in llm.metadata.items()):
        return True
    return any(_has_long_factors(path) for path in files)


def _has_long_factors(path: Path) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(b"rope_factors_long", 0, _NAMES_BYTES) >= 0


def _digest(path: str | Path) -> str:
    return blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(path).hexdigest()


def _state_key(seed: bytes, last: bytes, tokens: Any) -> bytes:
    return blake3.blake3(b"state" + last + tokens.tobytes(), key=seed).digest()


def _pointer(memory: memoryview, start: int) -> Any:
    """Where a part of some memory lies, for a call of llama.cpp while it stays."""
    return ctypes.cast(np.frombuffer(memory, np.uint8, offset=start).ctypes.data, ctypes.POINTER(ctypes.c_uint8))


def _state_at(tokens: int) -> int:
    return -(-(_HEAD.size + 4 * tokens) // _ALIGN) * _ALIGN
