"""Embed each text once: for all processes of this host, and over restarts.

pip install .                   # in a clone of kvstrata
python examples/embeddings.py TEXT...

Run it twice, or from several processes at once.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import kvstrata

DIMENSIONS = 384


def embed(texts: Sequence[str]) -> np.ndarray:
    """Stands for your model: [texts, DIMENSIONS] in float32."""
    seeds = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) for text in texts]
    return np.stack([np.random.default_rng(seed).standard_normal(DIMENSIONS, np.float32) for seed in seeds])


def embeddings(ns: kvstrata.Namespace, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """Return the embeddings of all texts, and how many of them had to be computed."""
    keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]  # a text may be any length
    found = dict(zip(keys, ns.get_many(keys), strict=True))
    missing = {key: text for key, text in zip(keys, texts, strict=True) if found[key] is None}
    if missing:
        computed = dict(zip(missing, embed(list(missing.values())), strict=True))
        ns.put_many(computed)
        found.update((key, vector.tobytes()) for key, vector in computed.items())
    return np.stack([np.frombuffer(found[key], np.float32) for key in keys]), len(missing)


def main(*texts: str) -> None:
    with kvstrata.open(Path.home() / ".cache" / "kvstrata-embeddings", memory="64MiB") as cache:
        ns = cache.namespace("embeddings", version=1)  # raise it when the model changes
        vectors, computed = embeddings(ns, texts)
        print(f"{len(texts)} texts, {computed} computed, {vectors.shape[1]} dimensions")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
