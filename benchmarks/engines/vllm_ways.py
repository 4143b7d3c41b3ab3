"""vLLM for measurements, with the different things that can be attached to it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engines.processes import Engine, started

BLOCK_TOKENS = 32
ASLEEP_S = 1.2  # after a step, a worker of vLLM looks for the next one without a pause for a second
MEMORY, DISK = "1GiB", "4GiB"
MEMORY_BYTES = 1 << 30
LIMIT_S = 240


def kvstrata(path: Path, **options: Any) -> dict[str, Any]:
    """KVStrataConnector over a cache in that directory."""
    return _attached(
        "KVStrataConnector",
        {"path": str(path), "memory": MEMORY, "disk": DISK, **options},
        kv_connector_module_path="kvstrata.integrations.vllm",
    )


def offloading(tiers: list[dict[str, Any]], connector: str = "OffloadingConnector", **named: str) -> dict[str, Any]:
    """vLLM's OffloadingConnector with as much memory, and the copying for CPUs that it lacks."""
    extra = {"spec_name": "CPUTieringSpec", "spec_module_path": "engines.vllm_offloading",
             "cpu_bytes_to_use": MEMORY_BYTES, "secondary_tiers": tiers}  # fmt: skip
    return _attached(connector, extra, **named)


def kvstrata_tier(path: Path) -> dict[str, Any]:
    """The same with kvstrata as the tier below."""
    module = "kvstrata.integrations.vllm_tier"
    tier = {"type": "KVStrataTier", "module_path": module, "path": str(path), "memory": MEMORY, "disk": DISK}
    return offloading([tier], "KVStrataOffloadingConnector", kv_connector_module_path=module)


def fs_tier(path: Path) -> dict[str, Any]:
    """The same with vLLM's own tier of files."""
    return offloading([{"type": "fs", "root_dir": str(path)}])


def example(path: Path) -> dict[str, Any]:
    """vLLM's ExampleConnector, a file for each layer."""
    return _attached("ExampleConnector", {"shared_storage_path": str(path)})


def lmcache(port: int) -> dict[str, Any]:
    """LMCache's connector to its server on this host."""
    return _attached("LMCacheMPConnector", {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port})


def _attached(name: str, extra: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra, **more}  # fmt: skip


@contextmanager
def engine(model: Path, attached: dict[str, Any] | None = None, **options: Any,
           ) -> Iterator[Engine]:  # fmt: skip
    """An engine with something attached; ready when it is warm."""
    cores = len(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(cores),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    settings = {"model": str(model), "kv_cache_memory_bytes": 512 << 20, "block_size": BLOCK_TOKENS, **options}
    if attached is not None:
        settings["kv_transfer_config"] = attached
    with started("benchmarks.engines.vllm_child", environment, **settings) as found:
        for tail in range(2):
            found.ask("first_token", prefix=-99, length=64, tail=tail)
        yield found


@contextmanager
def lmcache_server(port: int) -> Iterator[None]:
    """LMCache's server, where it is installed, sharing memory with its clients."""
    command = [
        str(Path(sys.executable).parent / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(port),
        "--http-port", str(port + 1), "--l1-size-gb", "2", "--chunk-size", "256", "--eviction-policy", "LRU",
        "--supported-transfer-mode", "engine_driven", "--shm-name", f"kvstrata-bench-{os.getpid()}",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + LIMIT_S
            while not _answers(port + 1):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("lmcache server didn't start")
                time.sleep(0.5)
            yield
        finally:
            server.terminate()


def has_lmcache() -> bool:
    """Whether LMCache is installed."""
    return importlib.util.find_spec("lmcache") is not None


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
